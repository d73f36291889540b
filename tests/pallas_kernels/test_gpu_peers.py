"""Meetings of devices on real GPUs of one machine, against XLA's collectives and NumPy.

`pytest -m gpu`, where there are two or more that reach each other's memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from kernel_cases import random_weight, relative_error

from pallas_kernels.bf16_matmul import api as bf16
from pallas_kernels.collectives import api, mosaic_gpu
from pallas_kernels.int4_matmul import api as int4
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.layout import TiledWeight, tile
from pallas_kernels.products.around import Around
from quantspec_jax import peers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        jax.default_backend() != "gpu" or jax.device_count() < 2, reason="one GPU at most"
    ),
]


@pytest.fixture(scope="module", name="over")
def _over():
    mesh = Mesh(np.array(jax.devices()), ("tp",))
    if not peers.reached(tuple(jax.devices())):
        pytest.skip("they do not reach each other's memory")
    return mesh


def on_each(mesh: Mesh, run):
    """run(parts [devices, ...], rest, peers) on each device with its part; results of all."""
    (table,) = peers.addresses(mesh)
    split, whole = PartitionSpec("tp"), PartitionSpec()

    def one(parts, rest, table):
        own = jax.tree.map(lambda x: x[0], parts)
        return jax.tree.map(lambda x: x[None], run(own, rest, table))

    specs = (split, whole, PartitionSpec(None, None, "tp"))
    over = jax.shard_map(one, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return lambda parts, rest: jax.jit(over)(parts, rest, table["tp"])


@pytest.mark.parametrize(("rows", "channels"), [(1, 576), (5, 4096), (16, 8192)])
@pytest.mark.parametrize("times", [1, 40])
def test_all_reduce(over, rows, channels, times):
    """Sums one after the other; of many, in graphs."""
    count = jax.device_count()
    parts = jax.random.normal(jax.random.key(0), (count, rows, channels))
    stream = jax.random.normal(jax.random.key(1), (rows, channels), jnp.bfloat16)

    def run(part, stream, table):
        def step(_, stream):
            scaled = part * stream.astype(jnp.float32)
            total = api.all_reduce(scaled, "tp", stream, peers=table, out_dtype=jnp.bfloat16)
            return total * jnp.bfloat16(0.5)

        return jax.lax.fori_loop(0, times, step, stream)

    assert mosaic_gpu.unsupported(parts[0]) is None
    found = np.asarray(on_each(over, run)(parts, stream).astype(jnp.float32))
    assert (found == found[0]).all()
    expected = stream
    for _ in range(times):
        scaled = parts * expected.astype(jnp.float32)[None]
        total = functools.reduce(jnp.add, scaled).astype(jnp.bfloat16)
        expected = (expected + total) * jnp.bfloat16(0.5)
    np.testing.assert_allclose(found[0], np.asarray(expected, np.float32), rtol=2**-6, atol=1e-2)


@pytest.mark.parametrize(("rows", "channels"), [(1, 576), (1, 64128), (5, 4096)])
def test_all_gather(over, rows, channels):
    parts = jax.random.normal(jax.random.key(0), (jax.device_count(), rows, channels))
    found = on_each(over, lambda x, _, table: api.all_gather(x, "tp", peers=table))(parts, None)
    expected = np.asarray(parts).swapaxes(0, 1).reshape(rows, -1)
    for each in found:
        np.testing.assert_array_equal(np.asarray(each), expected)


@pytest.mark.parametrize(("rows", "heads", "head_dim"), [(1, 9, 64), (5, 32, 128)])
def test_merged_parts_of_attention(over, rows, heads, head_dim):
    count = jax.device_count()
    outs = jax.random.normal(jax.random.key(0), (count, rows, heads, head_dim))
    sums = 10 * jax.random.normal(jax.random.key(1), (count, rows, heads))
    sums = sums.at[1:, :, 1].set(-jnp.inf).at[:, :, 2].set(-jnp.inf)
    both = jnp.concatenate([outs, sums[..., None]], -1)

    def run(part, _, table, **options):
        options = {"out_dtype": jnp.bfloat16, **options}
        return api.merge(part[..., :-1], part[..., -1], "tp", peers=table, **options)

    found, whole = (np.asarray(x, np.float32) for x in on_each(over, run)(both, None))
    assert (found == found[0]).all()
    sums, outs = np.asarray(sums), np.asarray(outs)
    expected = np.logaddexp.reduce(sums, 0)
    weights = np.exp(sums - np.where(np.isfinite(expected), expected, 0))
    merged = (weights[..., None] * outs).sum(0)
    np.testing.assert_allclose(found[0], merged, atol=2e-3, rtol=2**-7)
    np.testing.assert_allclose(whole[-1], expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["int4", "bf16"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1024, 4096), (5, 3584, 1536)])
def test_products_of_parts(over, kind, rows, inputs, outputs):
    """A chain of them, each added to the stream that the one before has left."""
    count, times = jax.device_count(), 20
    xs = jax.random.normal(jax.random.key(0), (count, rows, inputs), jnp.bfloat16)
    stream = jax.random.normal(jax.random.key(1), (rows, outputs), jnp.bfloat16)
    if kind == "int4":
        parts = [random_weight(inputs, outputs, 128, False, seed) for seed in range(count)]
        whole = np.stack([np.asarray(dequantize(weight)) for weight in parts])
        weights = jnp.stack([tile(weight).strips for weight in parts])
    else:
        weights = jax.random.normal(jax.random.key(2), (count, inputs, outputs), jnp.bfloat16)
        whole = np.asarray(weights, np.float32)
    multiply = int4.int4_matmuls if kind == "int4" else bf16.bf16_matmuls

    def run(part, stream, table):
        x, weight = part
        weight = TiledWeight(weight) if kind == "int4" else weight
        for _ in range(times):
            around = Around(residual=stream, peers=table)
            (found,) = multiply(x, [weight], around, backend="mosaic_gpu")
            stream = found * jnp.bfloat16(0.5)
        return found

    found = np.asarray(on_each(over, run)((xs, weights), stream).astype(jnp.float32))
    assert (found == found[0]).all()
    total = np.einsum("dri,dio->ro", np.asarray(xs, np.float32), whole)
    expected, after = None, np.asarray(stream, np.float32)
    for _ in range(times):
        expected = after + total
        after = expected / 2
    assert relative_error(found[0], expected) <= 2e-2  # the stream is rounded in each of them
