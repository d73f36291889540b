"""The attention kernel's own code, run by the emulator, in the ways that it can be configured."""

from __future__ import annotations

import functools

import emulator
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import attention_call, relative_error, without_poison

from pallas_kernels.kv_attention import mosaic_gpu as attention
from pallas_kernels.kv_attention import xla as attention_reference
from pallas_kernels.kv_attention.read import Read


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulator.install(monkeypatch)


def check(call, view: str, config: attention.Config, strict: bool = False, blocks: int = 2):
    options = {"read": Read(view), "sm_scale": 0.11, "strict": strict}
    found = attention.kv_attention(*call, **options, config=config, blocks=blocks)
    assert found[0].dtype == jnp.float32
    expected = attention_reference.kv_attention(*without_poison(call), **options)
    assert relative_error(found[0], expected[0]) <= 2e-3
    np.testing.assert_allclose(found[1], expected[1], atol=5e-3)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_partial_results_are_merged(blocks):
    """With more units than teams, about as many, and fewer."""
    call = attention_call(
        "int4", kv_heads=2, group=1, tokens=1, head_dim=64, group_size=32, tiles=9,
        positions=[20, 32 * 9, 130],
    )  # fmt: skip
    check(call, "int4", attention.Config(1, 1, 1, 2), blocks=blocks)


@pytest.mark.parametrize(
    ("view", "tokens", "config", "strict"),
    [
        # One block of rows a warp; more blocks than warps; two warps with blocks of their own.
        ("int8", 4, attention.Config(1, 2, 2, 2, True), False),
        ("int8", 5, attention.Config(1, 2, 3, 2, True), True),
        ("int4", 8, attention.Config(1, 1, 2, 2, True), False),
        # Probabilities, too: a warp has half of the channels; one team, then two.
        ("int8", 4, attention.Config(1, 2, 2, 2, True, True), False),
        ("int4", 5, attention.Config(1, 2, 3, 2, True, True), True),
    ],
)
def test_queries_in_shared_memory(view, tokens, config, strict):
    call = attention_call(
        view, kv_heads=2, group=4, tokens=tokens, head_dim=32, group_size=64, tiles=4,
        positions=[260],
    )  # fmt: skip
    check(call, view, config, strict)


@pytest.mark.parametrize(
    ("view", "tokens", "config"),
    [
        ("int4", 1, attention.Config(1, 2, 1, 2)),
        ("int8", 4, attention.Config(1, 2, 2, 3, True, True)),
        ("full", 2, attention.Config(1, 1, 1, 2)),
    ],
)
def test_copies_of_either_kind_bring_the_same(view, tokens, config):
    """Teams of two warps and of one; a buffer whose last rows are fewer than a unit."""
    call = attention_call(
        view, kv_heads=1, group=4, tokens=tokens, head_dim=32, group_size=64, tiles=3,
        positions=[200],
    )  # fmt: skip
    run = functools.partial(
        attention.kv_attention, *call, read=Read(view), sm_scale=0.1, strict=False,
        config=config, blocks=1,
    )  # fmt: skip
    for a, b in zip(run(bulk=True), run(bulk=False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_output_rounded_by_the_merge(head_dim):
    call = attention_call(
        "int4", kv_heads=1, group=1, tokens=1, head_dim=head_dim, group_size=32, tiles=1,
        positions=[20],
    )  # fmt: skip
    run = functools.partial(
        attention.kv_attention,
        *call,
        read=Read("int4"),
        sm_scale=0.1,
        strict=False,
        config=attention.Config(1, 1, 1, 2),
        blocks=1,
    )
    exact, rounded = run(), run(out_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(exact[0].astype(jnp.bfloat16), rounded[0])
    np.testing.assert_array_equal(exact[1], rounded[1])
