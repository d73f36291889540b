"""The 4-bit product: the kernel run by the emulator, its configurations, and both backends' API."""

from __future__ import annotations

import functools
import types
import warnings

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random_weight, relative_error

from pallas_kernels import devices, dispatch, layout, ptx
from pallas_kernels.int4_matmul import api, configs
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.int4_matmul import xla as reference
from pallas_kernels.int4_matmul.mosaic_gpu import Config, Plan, Shape

tile = jax.jit(layout.tile)


@functools.partial(jax.jit, static_argnums=range(5))  # op by op it takes four times as long
def operands(rows, inputs, outputs, group, symmetric):
    weights = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
    x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
    return x, weights


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group", "symmetric", "config"),
    [
        # A weight's last block has fewer strips; a ring that is filled twice; idle warps.
        (1, 640, (64, 32), 128, False, Config(1, 1, 3)),
        (5, 320, (48,), 32, False, Config(1, 2, 2)),
        (2, 100, (32,), 64, False, Config(2, 1, 2)),
        # Blocks that add up in each other's shared memory, with uneven shares; two column blocks.
        (9, 100, (48,), 32, True, Config(1, 1, 2, 2)),
        (3, 320, (80, 16), 64, True, Config(1, 1, 4, 3)),
        (16, 384, (32,), 128, False, Config(1, 1, 1, 2)),
        # As many stages as turns, and more: nothing is ordered twice. Warps with two turns and one.
        (1, 640, (32,), 128, False, Config(1, 2, 1)),
        (8, 160, (16,), 32, True, Config(1, 4, 1)),
    ],
)
def test_every_product_is_the_dense_one(
    monkeypatch, rows, inputs, outputs, group, symmetric, config
):
    emulator.install(monkeypatch)
    x, weights = operands(rows, inputs, outputs, group, symmetric)
    found = matmul.int4_matmuls(x, [tile(w) for w in weights], config=config)
    for y, w in zip(found, weights, strict=True):
        dense = reference.dequantize(w)[:inputs]
        assert relative_error(y, x.astype(jnp.float32) @ dense) <= 1e-5


def test_results_are_rounded_once(monkeypatch):
    emulator.install(monkeypatch)
    x, (weight,) = operands(2, 64, (32,), 32, False)
    run = functools.partial(matmul.int4_matmuls, x, [tile(weight)], config=Config(1, 1, 1))
    (wide,), (narrow,) = run(), run(out_dtype=jnp.bfloat16)
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


def test_copies_of_either_kind_bring_the_same(monkeypatch):
    """More groups than there are stages, and a piece that is no multiple of what a warp copies."""
    emulator.install(monkeypatch)
    x, weights = operands(3, 320, (48,), 32, True)
    tiled = [tile(w) for w in weights]
    run = functools.partial(matmul.int4_matmuls, x, tiled, config=Config(1, 2, 2))
    for a, b in zip(run(bulk=True), run(bulk=False), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_tiled_weight_is_the_same_weight():
    x, (weight,) = operands(3, 100, (48,), 32, False)
    expected = api.int4_matmul(x, weight)
    np.testing.assert_array_equal(api.int4_matmul(x, tile(weight)), expected)
    both = api.int4_matmuls(x, [tile(weight), weight], out_dtype=jnp.bfloat16)
    for y in both:
        np.testing.assert_array_equal(y, expected.astype(jnp.bfloat16))
    with pytest.raises(ValueError, match="out_dtype is float16; it can be float32 or bfloat16"):
        api.int4_matmul(x, weight, out_dtype="float16")


def test_the_kernel_takes_tiled_weights_alone(monkeypatch):
    device = types.SimpleNamespace(
        core_count=132, device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(dispatch, "device", lambda: device)
    dispatch._notice.cache_clear()
    x, (weight, other) = operands(3, 64, (48, 32), 32, False)

    def kernels(weights) -> int:
        run = jax.jit(lambda x, weights: api.int4_matmuls(x, weights))
        text = run.trace(x, weights).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @mosaic_gpu")

    reason = r"the weight is not tiled \(pallas_kernels.layout.tile\)"
    with pytest.warns(UserWarning, match=f"int4_matmul runs in XLA: {reason}"):
        assert kernels([weight]) == 0
    with pytest.raises(NotImplementedError, match=f"mosaic_gpu cannot run int4_matmul.*{reason}"):
        api.int4_matmul(x, weight, backend="mosaic_gpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels([tile(weight), tile(other)]) == 1
    assert kernels([tile(weight), other]) == 1, (
        "one that is tiled does not wait for one that is not"
    )


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(
    ("groups", "group_size", "outputs"),
    [(32, 128, (11008, 11008)), (86, 128, (4096,)), (1, 32, (16,)), (32, 128, (128256,))],
)
def test_configurations_fit_and_the_best_guess_fills_the_chip(rows, groups, group_size, outputs):
    shape = Shape(rows, groups, group_size, outputs, False)
    found = configs.candidates(shape)
    for config in (*found, *configs.diverse(shape)):
        assert Plan(shape, config).shared_bytes <= devices.DEFAULT.usable_bytes
    strips = sum(outputs) // 16
    assert Plan(shape, found[0]).blocks >= min(strips, 0.85 * devices.DEFAULT.multiprocessors)


def test_a_cluster_has_to_divide_the_blocks():
    with pytest.raises(ValueError, match="there are 3 blocks; a multiple of the cluster's 2"):
        ptx.kernel(lambda *_: None, (), name="none", blocks=3, warpgroups=1, cluster=2)
