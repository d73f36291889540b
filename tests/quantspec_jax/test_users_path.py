"""What users run, with a pretended GPU: `load` with a string for a dtype, and `generate`.

Every quantized weight of the draft is tiled, however the draft was made; and the loop that
`generate` itself hands to XLA writes nothing as large as a weight or a plane in its rounds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from programs import leaves_where, rewritten

import convert
import quantspec_jax as qs
from pallas_kernels import dispatch
from pallas_kernels.bf16_matmul import configs as bf16_configs
from pallas_kernels.layout import Planes, QuantizedWeight, TiledWeight
from quantspec_jax.engine import programs
from quantspec_jax.engine.engine import SEEN
from quantspec_jax.models import attention
from quantspec_jax.weights.formats import DraftConfig, WeightFormat

TEXT = "The draft reads the upper plane, the target both of them. " * 320


@pytest.fixture
def h200(monkeypatch):
    """A device to lower for."""
    device = types.SimpleNamespace(
        core_count=132, device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(dispatch, "device", lambda: device)


def imported_tools():
    """The packers of tests/convert/test_imported.py and the writers of its conftest.py."""
    found = []
    for name in ("test_imported", "conftest"):
        path = Path(__file__).parents[1] / "convert" / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"_convert_{name}", path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found


def rounded(**options) -> Callable:
    return lambda source, out: (str(source), DraftConfig(**options))


def stored(**options) -> Callable:
    def make(source: Path, out: Path):
        draft = DraftConfig(**options)
        text = TEXT if draft.method == "gptq" else None
        return str(convert.convert(source, out, draft=draft, draft_text=text, progress=False)), None

    return make


def quantized(method: str, **options) -> Callable:
    def make(source: Path, out: Path):
        packers, _ = imported_tools()
        return str(source), str(
            packers.quantize_directory(source, out, method, **options).directory
        )

    return make


def gguf(kind: str) -> Callable:
    def make(source: Path, out: Path):
        _, tools = imported_tools()
        out.mkdir()
        path = tools.write_gguf(tools.make_model("llama"), out / "m.gguf", kind)
        return str(path), str(path)

    return make


MIXED = (("layers.0.q", WeightFormat(8, 64)), ("layers.1.down", WeightFormat(4, 128, True)))
DRAFTS = {
    **{
        f"rounded, groups of {g}{', symmetric' if s else ''}": rounded(group_size=g, symmetric=s)
        for g in (32, 64, 128)
        for s in (False, True)
    },
    "eight bits": rounded(bits=8, group_size=64),
    "eight bits, symmetric": rounded(bits=8, group_size=32, symmetric=True),
    "lm_head": rounded(lm_head_bits=4, lm_head_first=64),
    "lm_head alone": rounded(bits=None, lm_head_bits=4),
    "MLP": rounded(layers="mlp"),
    "several formats": rounded(formats=MIXED),
    "stored": stored(group_size=32),
    "calibrated": stored(method="gptq"),
    "calibrated, mixed": stored(method="gptq", average_bits=5.5),
    "calibrated, eight bits": stored(method="gptq", bits=8),
    "GPTQ": quantized("gptq"),
    "GPTQ, symmetric": quantized("gptq", symmetric=True),
    "GPTQ, activation order": quantized("gptq", act_order=True),
    "GPTQ, some layers left": quantized("gptq", leave=("down", "o")),
    "AWQ": quantized("awq", scaled=("norms", "up")),
    "GGUF Q4_0": gguf("Q4_0"),
    "GGUF Q4_K": gguf("Q4_K"),
}


@pytest.fixture(scope="module")
def source(make_tiny_llama, tmp_path_factory) -> Path:
    """A head_dim that all kernels take, and a context that calibration soon fills."""
    return make_tiny_llama(
        tmp_path_factory.mktemp("llama"), head_dim=64, max_position_embeddings=512
    )


@pytest.fixture(params=DRAFTS)
def loaded(request, h200, source, tmp_path) -> qs.Model:
    source, draft = DRAFTS[request.param](source, tmp_path / "made")
    return qs.load(source, dtype="bfloat16", draft=draft)


def weights(tree) -> list:
    packed = (QuantizedWeight, TiledWeight)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, packed))
    return [x for x in leaves if isinstance(x, packed)]


class Executable:
    """Stands in for a compiled program."""

    def __init__(self, run):
        self.run = run

    def __call__(self, *args):
        return self.run(*args)

    def memory_analysis(self):
        return None


@pytest.fixture
def lowered(monkeypatch) -> list:
    """Filled with what `generate` compiles: (function, arguments, static arguments). Nothing runs
    but the look at a state: results are zeros, and the loop has finished after a call."""
    found: list = []

    def compile_(function, *args, **static):
        found.append((function, args, static))
        if function is SEEN:
            return function.lower(*args, **static).compile(), 0.0
        shapes = jax.eval_shape(functools.partial(function, **static), *args)

        def run(*_):
            out = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
            if function is programs.DECODE:
                out = dataclasses.replace(out, finished=~out.finished)
            return out

        return Executable(run), 0.0

    monkeypatch.setattr(programs.PROGRAMS, "compiled", compile_)
    monkeypatch.setattr(attention, "uses_cudnn", lambda *_: False)
    return found


def decode_loop(lowered: list):
    """The loop that was lowered last, traced, with its arguments and static arguments."""
    function, args, static = next(x for x in reversed(lowered) if x[0] is programs.DECODE)
    return function.trace(*args, **static), args


def test_every_weight_is_tiled_and_read_where_it_lies(loaded, lowered, monkeypatch):
    monkeypatch.setattr(bf16_configs, "faster", lambda _: True)
    own = weights(loaded.draft_params)
    assert own
    assert all(isinstance(weight, TiledWeight) for weight in own)

    qs.generate(loaded, [list(range(5, 300))], qs.GenerateConfig(max_new_tokens=8, gamma=3))
    traced, args = decode_loop(lowered)
    packed = leaves_where(
        args,
        lambda node: isinstance(node, TiledWeight | QuantizedWeight),
        lambda x: isinstance(x, TiledWeight | QuantizedWeight),
    )
    assert sum(packed) == len(own)
    assert rewritten(traced.jaxpr, packed) == []
    # No product of few rows is left to XLA, of either weights.
    assert "dot_general" not in str(traced.jaxpr)


@pytest.mark.parametrize(("gamma", "policy"), [(3, "all"), ("auto", "top-pages")])
def test_no_plane_and_no_weight_of_the_target_is_rewritten(gamma, policy, h200, source, lowered):
    model = qs.load(str(source), dtype="bfloat16")
    config = qs.GenerateConfig(max_new_tokens=8, gamma=gamma, draft_policy=policy)
    qs.generate(model, [list(range(5, 300))], config)
    traced, args = decode_loop(lowered)
    planes = leaves_where(
        args, lambda node: isinstance(node, Planes), lambda x: isinstance(x, Planes)
    )
    assert sum(planes) == 2 * 2 * 4
    # A flush writes a tile in place.
    assert {line.split(":")[0] for line in rewritten(traced.jaxpr, planes)} <= {
        "dynamic_update_slice"
    }
    matrices = [x.ndim == 2 and x.dtype == jnp.bfloat16 for x in jax.tree.leaves(args)]
    embedding = model.params["embedding"].shape
    # The embedding gives rows.
    assert not [
        line
        for line in rewritten(traced.jaxpr, matrices)
        if f"[{embedding[0]},{embedding[1]}] →" not in line
    ]


def test_the_check_finds_what_it_looks_for():
    """A weight that is transposed, converted or gathered in a loop, however deep it stands."""
    weight = jnp.zeros((64, 32), jnp.uint8)

    changes = {
        "transpose": lambda w: w.T,
        "convert_element_type": lambda w: w.astype(jnp.float32),
        "concatenate": lambda w: jnp.concatenate([w, w], 1),
        "gather": lambda w: w[jnp.arange(64)[::-1]],
    }
    for name, change in changes.items():

        def program(weight, x, change=change):
            def body(_, x):
                y = jax.lax.cond(x[0, 0] > 0, lambda: change(weight), lambda: change(weight + 1))
                return x + y.astype(jnp.float32).sum()

            return jax.lax.fori_loop(0, 3, body, x)

        found = rewritten(jax.make_jaxpr(program)(weight, jnp.zeros((2, 2))), [True, False])
        assert any(line.startswith(name) for line in found), name


def test_words_for_a_dtype_become_one_type(tiny_llama_dir):
    """The defect of its kind: a string equals no dtype."""
    for given in ("bfloat16", jnp.bfloat16, np.dtype(jnp.bfloat16)):
        model = qs.load(str(tiny_llama_dir), dtype=given)
        assert isinstance(model.dtype, np.dtype)
        assert model.dtype == jnp.bfloat16
        cache = qs.CacheConfig(256, dtype=given)
        assert isinstance(cache.dtype, np.dtype)
        assert cache == qs.CacheConfig(256, dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype is 'int8'; allowed: float32, bfloat16"):
        qs.load(str(tiny_llama_dir), dtype="int8")
