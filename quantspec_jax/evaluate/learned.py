"""What methods learn from a text: it goes through the model once, in full precision, a layer after
the other, for all of them.

The tokens are [chunks, length]. Keys are those before RoPE, after their norm where the model has
one; what the layer below came to goes up with the text, as codes that build on it need.
"""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from pallas_kernels.rope_append.heads import rotate, unrotated
from quantspec_jax.checks import require
from quantspec_jax.evaluate.gradients import loss_gradients
from quantspec_jax.evaluate.teacher_forced import Stream, embedded
from quantspec_jax.files import whole
from quantspec_jax.loading import Model
from quantspec_jax.methods import Layer, Method
from quantspec_jax.methods.aqua import Predictors
from quantspec_jax.models.attention import Tokens, sequence_attention
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.decoder import block_params, run_block
from quantspec_jax.models.linear import precision
from quantspec_jax.models.parameters import Params, leaves
from quantspec_jax.models.projection import Projection
from quantspec_jax.models.rope import rope_frequencies, rope_tables
from quantspec_jax.notices import notice
from quantspec_jax.weights.calibrate.programs import program

Learned = list[Any]  # a pytree a layer
Chunks = Callable[[], np.ndarray]
WEIGHTED = slice(None, None, 2)  # chunks that weighted methods read: gradients take their time
AT_ONCE = 8  # methods that learn side by side: their programs take long to compile
SAMPLE = 1024  # numbers of each weight that tell a model from another


def fitted(
    model: Model,
    methods: Mapping[str, Method],
    chunks: Chunks,
    context: int,
    *,
    progress: bool = False,
) -> dict[str, Learned]:
    """What methods know of each layer: from the model, or from [chunks, length] tokens, which go
    through it in full precision once for all of them. `context`: tokens of the text to come; keys
    that are learned after RoPE are turned to positions below it."""
    found = {name: list(method.prepare(model, chunks)) for name, method in methods.items()}
    learning = {name: method for name, method in methods.items() if method.learns}
    if not learning:
        return found
    weighted = any(method.weighted for method in learning.values())
    gradients = loss_gradients(model, chunks()[WEIGHTED], progress=progress) if weighted else None
    learners = {name: method.learner() for name, method in learning.items()}
    below: dict[Method, Layer | None] = dict.fromkeys(learners.values())
    shape = chunks().shape
    anywhere = np.random.default_rng(0).integers(0, context, shape)
    turn = rope_tables(
        *rope_frequencies(model.config.rope, model.config.head_dim, context), jnp.asarray(anywhere)
    )
    layers = tqdm(
        activations(model, chunks()),
        desc="learning",
        total=model.config.num_layers,
        disable=not progress,
    )
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for i, made in enumerate(layers):
            known = _fit_all(pool, below, made, turn, None if gradients is None else gradients[i])
            for name, learner in learners.items():
                found[name][i], below[learner] = known[learner]
    return found


def _fit_all(
    pool: ThreadPoolExecutor,
    below: Mapping[Method, Layer | None],
    made: tuple[jax.Array, jax.Array],
    turn: tuple[jax.Array, jax.Array],
    gradient: Layer | None,
) -> dict[Method, tuple[Any, Layer | None]]:
    """`_fit` of a layer, by method."""
    weighed = None if gradient is None else jax.tree.map(lambda x: x[WEIGHTED], (made, turn))

    def fit(method: Method) -> tuple[Any, Layer | None]:
        if not method.weighted:
            return _fit(made, None, below[method], turn, method=method)
        assert weighed is not None
        return _fit(weighed[0], gradient, below[method], weighed[1], method=method)

    return dict(zip(below, pool.map(fit, below), strict=True))


@program("method")
def _fit(
    made: tuple[jax.Array, jax.Array],
    gradient: Layer | None,
    below: Layer | None,
    turn: tuple[jax.Array, jax.Array] | None,
    *,
    method: Method,
) -> tuple[Any, Layer | None]:
    """Learn from keys before RoPE and values [chunks, length, K, D], but the first tokens'; and,
    where the layer above needs it, what this one comes to."""

    def kept(keys: jax.Array, values: jax.Array) -> Layer:
        if not method.before_rope:
            assert turn is not None
            keys = rotate(keys, *turn)
        return Layer(*(x[:, method.sinks :].reshape(-1, *x.shape[2:]) for x in (keys, values)))

    slopes = None if gradient is None else kept(*(x.astype(jnp.float32) for x in gradient))
    learned, read = method.fit(kept(*made), below, slopes)
    return learned, read if method.stacked else None


def calibrated(
    config: ModelConfig,
    params: Mapping[str, Any],
    method: Method,
    chunks: np.ndarray,
    *,
    resume: Path | None = None,
    progress: bool = False,
) -> Learned:
    """What one method that reads keys before RoPE learns, to be stored. `params` may be made in
    turn (`InTurn`), a block at a time. `resume`: a directory that holds, between layers, all that
    the next one needs: the same call goes on from there.

    Raises:
      ValueError: `resume` holds another calibration, or the text led to numbers that are none.
    """
    signature = _signature(config, params, method, chunks)
    dtype = params["final_norm"].dtype
    state = None if resume is None else _load(resume, signature, dtype)
    if state is None:
        state = ([], embedded(params, jnp.asarray(chunks), config), None)
    learned, stream, below = state
    layers = range(len(learned), config.num_layers)
    bar = tqdm(layers, desc="calibrating the cache", unit=" layers", disable=not progress)
    for i in bar:
        stream, made = _plain_block(*block_params(params, i), stream, config=config)
        found, below = _fit(made, None, below, None, method=method)
        finite = all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves((found, below)))
        require(finite, f"layer {i}", "NaN or infinite", "a model and a text that give numbers")
        learned.append(found)
        if resume is not None:
            _save(resume, signature, learned, stream, below)
    return learned


def _signature(
    config: ModelConfig, params: Mapping[str, Any], method: Method, chunks: np.ndarray
) -> str:
    """Of all that decides what is learned."""
    digest = hashlib.sha256(repr((config, method, chunks.shape)).encode())
    digest.update(np.ascontiguousarray(chunks).tobytes())
    for name, x in leaves(params):
        sample = x.reshape(-1)[:: max(1, x.size // SAMPLE)].astype(jnp.float32)
        digest.update(name.encode() + np.asarray(sample).tobytes())
    return digest.hexdigest()


def _save(
    directory: Path, signature: str, learned: Learned, stream: Stream, below: Layer | None
) -> None:
    """One file, whole or not at all: leaves of what was learned, the stream, what the last layer
    came to."""
    directory.mkdir(parents=True, exist_ok=True)
    arrays = {f"learned.{i}.{n}": x for i, one in enumerate(learned)
              for n, x in enumerate(jax.tree.leaves(one))}  # fmt: skip
    arrays |= {f"stream.{n}": x.astype(jnp.float32) for n, x in enumerate(stream)}
    arrays |= {f"below.{n}": x for n, x in enumerate(below or ())}
    held = {name: np.asarray(x) for name, x in arrays.items()}
    with whole(directory / "layers.npz") as partial_file, partial_file.open("wb") as stream_file:
        held |= {"signature": np.array(signature), "layers": np.array(len(learned))}
        np.savez(stream_file, allow_pickle=False, **held)


def _load(
    directory: Path, signature: str, dtype: np.dtype
) -> tuple[Learned, Stream, Layer | None] | None:
    """What `_save` was given; None where there is nothing, or what is there is damaged."""
    path = directory / "layers.npz"
    if not path.exists():
        return None
    try:
        with path.open("rb") as file, np.load(file) as kept:
            found = {name: kept[name] for name in kept.files}
        layers, held = int(found["layers"]), str(found["signature"])
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile):
        notice(f"{path} is damaged: the cache is calibrated from the first layer")
        return None
    require(held == signature, str(path), "another calibration", "one of this model, text and bits")
    leaves = [[found[n] for n in sorted(found) if n.startswith(f"learned.{i}.")]
              for i in range(layers)]  # fmt: skip
    learned = [Predictors(*map(jnp.asarray, one)) if one else () for one in leaves]
    stream = Stream(*(jnp.asarray(found[f"stream.{n}"], dtype) for n in range(2)))
    below = [jnp.asarray(found[name]) for name in sorted(found) if name.startswith("below.")]
    return learned, stream, Layer(*below) if below else None


def activations(model: Model, chunks: np.ndarray) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Of one layer after the other: keys before RoPE and values [chunks, length, K, D] float32."""
    stream = embedded(model.params, jnp.asarray(chunks), model.config)
    for i in range(model.config.num_layers):
        block, norm = block_params(model.params, i)
        stream, made = _plain_block(block, norm, stream, config=model.config)
        yield made


@program("config")
def _plain_block(
    block: Params, norm: jax.Array, stream: Stream, *, config: ModelConfig
) -> tuple[Stream, tuple[jax.Array, jax.Array]]:
    def attend(_: None, heads: Projection) -> tuple[jax.Array, Any]:
        q, k, v = heads.finished()
        own, exact = Tokens(k, v), precision(q.dtype)
        out = sequence_attention(q, own, own, sm_scale=config.head_dim**-0.5, exact=exact)
        keys, values = (x.astype(jnp.float32) for x in own)
        return out, (unrotated(keys, *heads.rope), values)

    rope = whole_tables(config, stream.x.shape[1])
    x, h, made = run_block(block, norm, config, *stream, rope, None, attend, backend="xla")
    return Stream(x, h), made


def whole_tables(config: ModelConfig, length: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of the positions below `length`."""
    frequencies = rope_frequencies(config.rope, config.head_dim, length)
    return rope_tables(*frequencies, jnp.arange(length)[None])
