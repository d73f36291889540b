"""The attention kernel's own code, run by the emulator, in the ways that it can be configured."""

from __future__ import annotations

import emulator
import numpy as np
import pytest
from kernel_cases import attention_call, relative_error, without_poison

from pallas_kernels.kv_attention import mosaic_gpu as attention
from pallas_kernels.kv_attention import reference as attention_reference


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulator.install(monkeypatch, attention)


def check(call, view: str, config: attention.Config, strict: bool = False, blocks: int = 2):
    options = {"view": view, "sm_scale": 0.11, "strict": strict}
    found = attention.kv_attention(*call, **options, config=config, blocks=blocks)
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
