"""The loop lowered for CUDA, on a machine without a GPU: which kernels it holds, and how often."""

from __future__ import annotations

import dataclasses
import re
import types
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import dispatch
from pallas_kernels.bf16_matmul import configs as bf16_configs
from quantspec_jax.bench.decode import random_state
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.policies import ALL, Policy, TopPages
from quantspec_jax.generate.state import Program
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.module import init_params
from quantspec_jax.weights.entries import draft_tree, quantize_params
from quantspec_jax.weights.formats import DraftConfig

MODEL = ModelConfig("llama", 512, 256, 512, 3, 4, 2, 64, 4096)


FUNCTION = r"  func\.func private @(\w+?)(?:_\d+)?\(.*?\n  \}"
H200 = types.SimpleNamespace(core_count=132, device_kind="NVIDIA H200", compute_capability="9.0")


@pytest.fixture(autouse=True)
def h200(monkeypatch):
    """A device to lower for. Its launches begin in turn: where they begin early, the first layer of
    a pass, which reads nothing ahead, has kernels of its own."""
    monkeypatch.setattr(dispatch, "device", lambda: H200)
    monkeypatch.setenv("QUANTSPEC_EARLY_LAUNCHES", "0")


def lowered(
    model: ModelConfig, gamma: int, view: str, draft: DraftConfig, policy: Policy = ALL
) -> str:
    """The loop as text."""
    cache = CacheConfig(2048, 128, view, gamma + 1, "bfloat16")  # type: ignore[arg-type]
    program = Program(model, cache, gamma, policy)
    params = jax.eval_shape(lambda: init_params(model, jax.random.key(0), jnp.bfloat16))
    own = (
        jax.eval_shape(lambda p: draft_tree(p, quantize_params(p, draft)), params) if gamma else {}
    )
    state = jax.eval_shape(lambda: random_state(program, 1, 1024, 128, 99))
    traced = jax.jit(generate_tokens, static_argnames="program").trace(
        params, own, state, jnp.int32(5), program=program
    )
    return without_copies(traced.lower(lowering_platforms=("cuda",)).as_text())


def without_copies(text: str) -> str:
    """The text without functions that have the kernels of another one and give other results: from
    JAX 0.12 on a call whose results are not all used has a function of its own. A function that is
    there twice stays."""
    results: dict[tuple[str, ...], str] = {}

    def once(function: re.Match[str]) -> str:
        form = (function[1], *kernels(function[0]))
        given = function[0].partition("\n")[0].rpartition(" -> ")[2]
        fewer = len(form) > 1 and results.setdefault(form, given) != given
        return "" if fewer else function[0]

    return re.sub(FUNCTION, once, text, flags=re.DOTALL)


def kernels(text: str) -> list[str]:
    """What identifies each kernel call's code."""
    return re.findall(r'custom_call @mosaic_gpu.*?kernel_hash = "([^"]*)"', text)


def names(text: str) -> list[str]:
    """The kernels' functions, calls of one form sharing one. (What XLA does in place of a kernel
    has the same name.)"""
    found = re.finditer(FUNCTION, text, flags=re.DOTALL)
    return sorted(each[1] for each in found if kernels(each[0]))


@pytest.fixture
def measured(monkeypatch):
    """As where the device's file has every product with bfloat16 weights."""
    monkeypatch.setattr(bf16_configs, "faster", lambda _: True)


@pytest.mark.usefixtures("measured")
@pytest.mark.parametrize(("bits", "policy"), [(4, ALL), (8, TopPages(0.25))])
def test_each_kernel_is_in_the_program_once_however_many_layers_call_it(bits, policy):
    """Whatever pages of each layer a draft reads."""
    draft = DraftConfig(bits=bits, group_size=64)
    one, three = (
        lowered(dataclasses.replace(MODEL, num_layers=layers), 4, "int8", draft, policy)
        for layers in (1, 3)
    )
    # One launch for norm, q, k, v, RoPE and buffer, one for o and the sum, for norm, gate and up,
    # for down and the sum; the target's, and both lm_heads with the last norm. The second planes of
    # 8 bits have no minima: they are launches of their own, and so is what stands around them.
    products = ["bf16_matmuls"] * 6 + ["int4_matmuls"] * (4 if bits == 4 else 8)
    sums, norms = ([], []) if bits == 4 else (["add_rms_norm"], ["rms_norm"])
    # So are RoPE and buffer, of the draft.
    attention, rope = ["kv_attention"] * 2, [] if bits == 4 else ["rope_append"]
    filters = ["kept"] * 2  # what sampling leaves of a draft's row, and of a verification's
    quantize = ["quantize_keys", "quantize_values"]
    choice = ["most_voted", "page_votes"] if policy.votes else []
    for text in (one, three):
        found = [*sums, *products, *filters, *attention, *choice, *quantize, *norms, *rope]
        assert names(text) == found
        # Attention is two kernels, the pass over the cache and the merge of its parts.
        assert len(kernels(text)) == len(names(text)) + 2
        assert len(set(kernels(text))) == len(kernels(text))
    assert len(three) < 1.5 * len(one)


@pytest.mark.usefixtures("measured")
def test_what_top_pages_adds_does_not_grow_with_the_layers():
    """Two kernels, and what counts pages: each layer adds an operand and a result of theirs. XLA
    would make launches of a sum, a sort or a slice a layer."""
    draft = DraftConfig(group_size=64)

    def operations(layers: int, policy: Policy) -> Counter[str]:
        model = dataclasses.replace(MODEL, num_layers=layers)
        text = lowered(model, 4, "int8", draft, policy)
        return Counter(re.findall(r"= (?:stablehlo\.)?(\w+)", text))

    one, three = (operations(n, TopPages(0.25)) - operations(n, ALL) for n in (1, 3))
    free = ("reshape", "constant")
    assert {x: one[x] for x in one if x not in free} == {
        x: three[x] for x in three if x not in free
    }
    assert one["custom_call"] == 2
    moving = ("sort", "reduce", "slice", "concatenate", "transpose", "dynamic_slice", "gather")
    assert not {*one} & {*moving, "scatter", "dynamic_update_slice", "while"}


def test_products_that_are_not_known_to_be_faster_are_left_to_xla():
    """Several rows times an embedding that is the lm_head; of two verifications with as many
    layers, that of a model with a lm_head of its own has one more launch of the kernel."""
    draft = DraftConfig(group_size=64, lm_head_bits=4)  # no product of one row in bfloat16
    counts = []
    for tied in (True, False):
        model = dataclasses.replace(MODEL, num_layers=2, tie_embeddings=tied)
        text = lowered(model, 4, "int8", draft)
        assert names(text).count("int4_matmuls") == 5
        assert ("dot_general" in text) == tied
        counts.append(names(text).count("bf16_matmuls"))
    assert counts == [4, 5]


@pytest.mark.usefixtures("measured")
def test_plain_decoding_has_no_kernel_of_a_draft():
    text = lowered(MODEL, 0, "full", DraftConfig())
    assert names(text) == ["bf16_matmuls"] * 5 + ["kept", "kv_attention"]
    assert len(kernels(text)) == 8


@pytest.mark.usefixtures("measured")
def test_norms_of_queries_and_keys_have_a_launch_of_their_own():
    """They take whole heads, which a block of a product does not have."""
    text = lowered(dataclasses.replace(MODEL, qk_norm=True), 0, "full", DraftConfig())
    assert names(text) == ["bf16_matmuls"] * 5 + ["kept", "kv_attention", "rope_append"]
