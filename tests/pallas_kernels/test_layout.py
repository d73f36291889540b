"""The packed layout: nothing is lost, two codes a byte, tiles are independent."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import random_weight

from pallas_kernels import layout

PACKINGS = [
    (layout.pack, layout.unpack),
    (layout.pack_keys, layout.unpack_keys),
    (layout.pack_values, layout.unpack_values),
]


@pytest.mark.parametrize(("pack", "unpack"), PACKINGS)
@pytest.mark.parametrize("shape", [(128, 128), (128, 64), (8, 6), (24, 80), (96, 96)])
def test_packing_is_invertible_and_halves_the_bytes(pack, unpack, shape):
    codes = jax.random.randint(jax.random.key(0), (2, 3, *shape), -8, 8, jnp.int8)
    packed = pack(codes)
    assert packed.dtype == jnp.uint8
    assert packed.size == codes.size // 2
    np.testing.assert_array_equal(unpack(packed), codes)


@pytest.mark.parametrize(("pack", "unpack"), PACKINGS)
def test_a_tile_is_packed_alone(pack, unpack):
    """A flush writes whole tiles: what a tile becomes must not depend on its neighbours."""
    codes = jax.random.randint(jax.random.key(0), (5, 32, 16), -8, 8, jnp.int8)
    np.testing.assert_array_equal(pack(codes)[3], pack(codes[3]))


def test_a_word_of_keys_and_of_values_holds_what_its_product_sums_over():
    """Keys: eight channels of a token. Values: eight tokens of a channel."""
    g, d = 64, 32
    token = jnp.broadcast_to(jnp.arange(g)[:, None], (g, d))
    channel = jnp.broadcast_to(jnp.arange(d), (g, d))

    def words(pack, numbers):
        """[words, 8] numbers below 256, packed a nibble at a time."""
        nibbles = [(numbers // 16**i % 16 - 8).astype(jnp.int8) for i in range(2)]
        low, high = (np.asarray(pack(x)).reshape(-1, 4) for x in nibbles)
        both = [(low >> s & 15) + 16 * (high >> s & 15).astype(int) for s in (0, 4)]
        return np.concatenate(both, axis=1)

    assert (np.ptp(words(layout.pack_keys, token), axis=1) == 0).all()
    assert (np.ptp(words(layout.pack_values, channel), axis=1) == 0).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_tiling_is_invertible_and_adds_no_byte(group, symmetric):
    weight = random_weight(3 * group - 5, 48, group, symmetric)
    tiled = jax.jit(layout.tile)(weight)
    assert tiled.strips.nbytes == sum(x.nbytes for x in jax.tree.leaves(weight))
    for name in ("groups", "group_size", "outputs", "symmetric"):
        assert getattr(tiled, name) == getattr(weight, name)
    for a, b in zip(jax.jit(layout.untile)(tiled), weight, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_a_strip_is_sixteen_outputs_of_a_group():
    """Whatever else changes, the strip stays as it is."""
    weight, other = (random_weight(256, 48, 128, False, seed) for seed in (0, 1))
    mixed = jax.tree.map(lambda a, b: b.at[1, ..., 16:32].set(a[1, ..., 16:32]), weight, other)
    tiled, changed = layout.tile(weight), layout.tile(mixed)
    np.testing.assert_array_equal(tiled.strips[1, 1], changed.strips[1, 1])
    assert (tiled.strips != changed.strips).any(-1).sum() == 5


def test_what_cannot_be_tiled():
    with pytest.raises(ValueError, match="24 outputs and groups of 32"):
        layout.tile(random_weight(64, 24, 32, False))
