"""The 4-bit product whose blocks add up in shared memory: run by the emulator, and lowered."""

from __future__ import annotations

import functools

import emulator
import jax
import jax.numpy as jnp
import pytest
from kernel_cases import random_weight, relative_error

from pallas_kernels import ptx
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.int4_matmul import reference

Config = functools.partial(matmul.Config, splits=1)

# rows, inputs, outputs, group, symmetric, configuration
CASES = [
    (1, 256, (128, 64), 128, False, Config(1, 3, beside=1, cluster=1)),
    (1, 384, (256,), 128, False, Config(1, 2, beside=2, cluster=3, whole=True)),
    (9, 100, (48,), 32, True, Config(1, 2, beside=1, cluster=2)),
    (5, 320, (576, 64), 64, False, Config(2, 3, beside=4, cluster=2)),
    (16, 640, (144,), 128, True, Config(1, 2, beside=1, cluster=4, line=256)),
]
NAMES = ("rows", "inputs", "outputs", "group", "symmetric", "config")


@pytest.fixture
def emulated(monkeypatch):
    emulator.install(monkeypatch, matmul)


def operands(rows, inputs, outputs, group, symmetric):
    weights = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
    x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
    return x, weights


@pytest.mark.parametrize(NAMES, CASES)
def test_every_product_is_the_dense_one(emulated, rows, inputs, outputs, group, symmetric, config):
    x, weights = operands(rows, inputs, outputs, group, symmetric)
    for y, w in zip(matmul.int4_matmuls(x, weights, config=config), weights, strict=True):
        dense = reference.dequantize(w)[:inputs]
        assert relative_error(y, x.astype(jnp.float32) @ dense) <= 1e-5


@pytest.mark.parametrize(NAMES, CASES)
def test_a_launch_of_one_kernel(rows, inputs, outputs, group, symmetric, config):
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
        operands(rows, inputs, outputs, group, symmetric),
    )
    fn = jax.jit(functools.partial(matmul.int4_matmuls, config=config))
    text = fn.trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 1
    assert "reduce" not in text


def test_a_cluster_has_to_divide_the_blocks():
    with pytest.raises(ValueError, match="there are 3 blocks; a multiple of the cluster's 2"):
        ptx.kernel(lambda *_: None, (), name="none", blocks=3, warpgroups=1, cluster=2)
