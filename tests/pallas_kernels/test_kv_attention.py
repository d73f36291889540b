"""The attention kernels' own code, run by the emulator, in the ways that they can be configured."""

from __future__ import annotations

import functools

import emulator
import jax
import numpy as np
import pytest
from kernel_cases import attention_call, relative_error, without_poison

from pallas_kernels.kv_attention import mosaic_gpu as attention
from pallas_kernels.kv_attention import reference as attention_reference
from pallas_kernels.kv_attention import wide


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulator.install(monkeypatch, attention, wide)


def check(call, view: str, config: attention.Config, strict: bool = False, blocks: int = 2):
    options = {"view": view, "sm_scale": 0.11, "strict": strict}
    found = attention.kv_attention(*call, **options, config=config, blocks=blocks)
    expected = attention_reference.kv_attention(*without_poison(call), **options)
    assert relative_error(found[0], expected[0]) <= 2e-3
    np.testing.assert_allclose(found[1], expected[1], atol=5e-3)


@pytest.mark.parametrize(
    ("head_dim", "group_size", "group", "tokens", "config", "strict"),
    [
        (64, 64, 3, 5, attention.Config(1, 1, 1, 2, groups=1), False),
        (128, 128, 2, 8, attention.Config(2, 1, 1, 2, groups=2), True),
        (64, 128, 4, 8, attention.Config(2, 1, 1, 3, groups=1, even=True, online=True), False),
    ],
)
def test_products_of_warpgroups(head_dim, group_size, group, tokens, config, strict):
    g = group_size
    call = attention_call(
        "int8",
        kv_heads=1,
        group=group,
        tokens=tokens,
        head_dim=head_dim,
        group_size=g,
        tiles=3,
        positions=[1, 3 * g - tokens],
    )
    check(call, "int8", config, strict)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_work_is_dealt_evenly_and_merged_in_one_pass(blocks):
    """With more units than teams, about as many, and fewer."""
    call = attention_call(
        "int4", kv_heads=2, group=1, tokens=1, head_dim=64, group_size=32, tiles=9,
        positions=[20, 32 * 9, 130],
    )  # fmt: skip
    check(call, "int4", attention.Config(1, 1, 1, 2, even=True, online=True), blocks=blocks)


@pytest.mark.parametrize(("head_dim", "group", "tokens"), [(128, 4, 8), (64, 4, 5), (128, 8, 8)])
def test_products_of_warpgroups_lower(head_dim, group, tokens, monkeypatch):
    """Every configuration that is offered fits, and lowers for CUDA without a GPU."""
    monkeypatch.undo()
    call = attention_call(
        "int8", kv_heads=2, group=group, tokens=tokens, head_dim=head_dim, group_size=128, tiles=3,
        positions=[384, 5],
    )  # fmt: skip
    options = {"view": "int8", "sm_scale": 0.1, "strict": False}
    shape = attention.shape_of(call[0], call[1], call[3], **options)
    found = list(wide.candidates(shape))
    assert found
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), call)
    for config in found:
        run = jax.jit(functools.partial(attention.kv_attention, **options, config=config))
        text = run.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("custom_call @mosaic_gpu") == 2
