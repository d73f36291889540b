"""Linear layers that read the same input: one call for the packed ones, whatever the formats."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from quantspec_jax.models import linear as module
from quantspec_jax.models.linear import linear, linears
from quantspec_jax.weights.formats import WeightFormat
from quantspec_jax.weights.rounding import quantize_linear

KIN = 96
FORMATS = {
    "q": WeightFormat(4, 32),
    "k": WeightFormat(8, 32),
    "v": WeightFormat(16),
    "gate": WeightFormat(4, 64, symmetric=True),
    "up": WeightFormat(8, 48, symmetric=True),
}


@pytest.fixture
def layers():
    made = {}
    for i, (name, stored) in enumerate(FORMATS.items()):
        kernel = jax.random.normal(jax.random.key(i), (KIN, 16 * (i + 1)))
        made[name] = {"kernel": kernel} if stored.bits == 16 else quantize_linear(kernel, stored)
    made["k"]["bias"] = jnp.arange(32.0)
    return made


@pytest.fixture
def calls(monkeypatch):
    """How many weights each call of the 4-bit product gets."""
    found = []

    def counted(x, weights, **options):
        found.append(len(weights))
        return original(x, weights, **options)

    original = module.int4_matmuls
    monkeypatch.setattr(module, "int4_matmuls", counted)
    return found


@pytest.fixture
def x():
    return jax.random.normal(jax.random.key(9), (2, 3, KIN))


def test_together_is_each_alone_bit_for_bit(layers, x, calls):
    together = linears(x, list(layers.values()), "auto")
    assert calls == [6], "all planes of all packed layers in one call"
    for y, weights in zip(together, layers.values(), strict=True):
        np.testing.assert_array_equal(y, linear(x, weights, "auto"))


def test_a_second_plane_brings_the_product_closer(layers, x):
    dense = jax.random.normal(jax.random.key(1), (KIN, 32))
    near, far = (
        linear(x, quantize_linear(dense, WeightFormat(bits, 32)), "auto") for bits in (8, 4)
    )
    exact = jnp.matmul(x, dense, precision="highest")
    assert jnp.abs(near - exact).max() < 0.15 * jnp.abs(far - exact).max()


def test_an_order_permutes_the_input(layers, x, calls):
    order = jnp.asarray(np.random.default_rng(0).permutation(KIN), jnp.int32)
    plain, residual = layers["q"], layers["k"]
    ordered = [plain | {"order": order}, residual | {"order": order}, layers["gate"]]
    found = linears(x, ordered, "auto")
    assert calls == [3, 1], "the same order: one call"
    del calls[:]
    np.testing.assert_array_equal(found[0], linear(x[..., order], plain, "auto"))
    np.testing.assert_array_equal(found[1], linear(x[..., order], residual, "auto"))
    np.testing.assert_array_equal(found[2], linear(x, layers["gate"], "auto"))
    del calls[:]
    other = [plain | {"order": order}, plain | {"order": order[::-1]}]
    linears(x, other, "auto")
    assert calls == [1, 1], "different orders: a call each"
