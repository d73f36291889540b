"""Compiled programs: how many there are, and that what is forgotten is freed."""

from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from quantspec_jax.engine import programs
from quantspec_jax.engine.programs import Programs


def on_the_device() -> int:
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def scaled(x: jax.Array, *, by: int) -> jax.Array:
    return jnp.sin(x) * by


def test_programs_that_are_forgotten_are_freed() -> None:
    """By JAX, too, which keeps what it compiled for a function while the function is there."""
    kept, function = Programs(most=3), jax.jit(scaled, static_argnames="by")
    form = jax.ShapeDtypeStruct((3,), np.float32)
    before = on_the_device()
    for by in range(1, 13):
        kept.compiled(function, form, by=by)
    assert kept.statistics() == {"kept": 3, "most": 3, "made": 12, "bytes": 0}
    assert on_the_device() - before == 3


def test_the_code_of_programs_is_bounded(monkeypatch) -> None:
    """XLA's CPU backend does not say how long it is: so it is made up here. The newest is kept."""
    sizes: dict[Any, int] = {}
    monkeypatch.setattr(programs, "code_bytes", lambda x: sizes.setdefault(x, 10 * len(sizes) + 10))
    kept, function = Programs(most=9, most_bytes=60), jax.jit(scaled, static_argnames="by")
    form = jax.ShapeDtypeStruct((3,), np.float32)
    found = []
    for by in range(1, 8):  # 10, 20, ... bytes
        kept.compiled(function, form, by=by)
        found.append((len(kept), kept.statistics()["bytes"]))
    assert found == [(1, 10), (2, 30), (3, 60), (1, 40), (1, 50), (1, 60), (1, 70)]


def decoded(params: Any, drafts: Any, state: jax.Array, rounds: Any, *, program: Any) -> jax.Array:
    return jnp.sin(state) * program.number


def test_an_engine_keeps_none_that_was_forgotten(monkeypatch) -> None:
    """And those that it uses without looking them up are not the ones that are forgotten."""

    @dataclasses.dataclass(frozen=True)
    class Step:
        number: int
        gamma: int = 0
        max_length: int = 8
        mesh: Any = None

        @property
        def cache(self) -> Any:
            return self

    kept = Programs(most=2)
    monkeypatch.setattr(programs, "PROGRAMS", kept)
    monkeypatch.setattr(programs, "DECODE", jax.jit(decoded, static_argnames="program"))
    model: Any = SimpleNamespace(params={}, params_for=lambda cache: {})
    runner = programs.Runner(model, Step(0), 1)  # type: ignore[arg-type]
    jnp.int32(1)
    before = on_the_device()
    for number in (1, 2, 3, 4, 3, 5, 3):
        runner.decode(model, np.zeros(3, np.float32), (1,), Step(number))  # type: ignore[arg-type]
    assert kept.statistics() == {"kept": 2, "most": 2, "made": 5, "bytes": 0}
    assert on_the_device() - before == 2


def test_traces_that_programs_share_are_forgotten_now_and_then() -> None:
    """Each time as many programs were made as are kept."""
    kept, traced = Programs(most=2), []

    def inner(x: jax.Array) -> jax.Array:
        traced.append(x.shape)
        return 2 * x

    outer = jax.jit(lambda x, y: dispatch.shared(inner, ())(x).sum() + y)
    x = jax.ShapeDtypeStruct((3,), np.float32)
    times = []
    for n in (1, 2, 3, 4):
        kept.compiled(outer, x, jax.ShapeDtypeStruct((n,), np.float32))
        times.append(len(traced))
    assert times == [1, 1, 2, 2]


def test_the_one_that_was_used_last_is_kept() -> None:
    kept, function = Programs(most=2), jax.jit(scaled, static_argnames="by")
    form = jax.ShapeDtypeStruct((3,), np.float32)
    first, _ = kept.compiled(function, form, by=1)
    kept.compiled(function, form, by=2)
    assert kept.compiled(function, form, by=1) == (first, 0.0)
    kept.compiled(function, form, by=3)
    assert kept.compiled(function, form, by=1) == (first, 0.0)
    assert kept.compiled(function, form, by=2)[1] > 0
    np.testing.assert_allclose(first(np.ones(3, np.float32)), np.sin(1.0), rtol=1e-6)
