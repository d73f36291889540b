"""Compiled programs: how many there are, and that what is forgotten is freed."""

from __future__ import annotations

import gc

import jax
import jax.numpy as jnp
import numpy as np

from quantspec_jax.engine.programs import Programs


def on_the_device() -> int:
    gc.collect()
    return len(jax.devices()[0].client.live_executables())


def scaled(x: jax.Array, *, by: int) -> jax.Array:
    return jnp.sin(x) * by


def test_programs_that_are_forgotten_are_freed() -> None:
    """By JAX, too, which keeps what it compiled for a function while the function is there."""
    programs, function = Programs(most=3), jax.jit(scaled, static_argnames="by")
    form = jax.ShapeDtypeStruct((3,), np.float32)
    before = on_the_device()
    for by in range(1, 13):
        programs.compiled(function, form, by=by)
    assert programs.statistics() == {"kept": 3, "most": 3, "made": 12}
    assert on_the_device() - before == 3


def test_the_one_that_was_used_last_is_kept() -> None:
    programs, function = Programs(most=2), jax.jit(scaled, static_argnames="by")
    form = jax.ShapeDtypeStruct((3,), np.float32)
    first, _ = programs.compiled(function, form, by=1)
    programs.compiled(function, form, by=2)
    assert programs.compiled(function, form, by=1) == (first, 0.0)
    programs.compiled(function, form, by=3)
    assert programs.compiled(function, form, by=1) == (first, 0.0)
    assert programs.compiled(function, form, by=2)[1] > 0
    np.testing.assert_allclose(first(np.ones(3, np.float32)), np.sin(1.0), rtol=1e-6)
