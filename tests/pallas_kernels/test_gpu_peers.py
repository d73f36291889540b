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

from pallas_kernels.collectives import api, mosaic_gpu
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
    over = jax.shard_map(
        lambda parts, rest, table: jax.tree.map(lambda x: x[None], run(parts[0], rest, table)),
        mesh=mesh,
        in_specs=(split, whole, PartitionSpec(None, None, "tp")),
        out_specs=split,
        check_vma=False,
    )
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

    assert mosaic_gpu.unsupported(parts[0], jnp.bfloat16) is None
    found = np.asarray(on_each(over, run)(parts, stream).astype(jnp.float32))
    assert (found == found[0]).all()
    expected = stream
    for _ in range(times):
        scaled = parts * expected.astype(jnp.float32)[None]
        total = functools.reduce(jnp.add, scaled).astype(jnp.bfloat16)
        expected = (expected + total) * jnp.bfloat16(0.5)
    np.testing.assert_allclose(found[0], np.asarray(expected, np.float32), rtol=2**-6, atol=1e-2)


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

    found, whole = on_each(over, run)(both, None)
    expected, log_sum_exp = on_each(over, functools.partial(run, backend="xla"))(both, None)
    found, expected = (np.asarray(x, np.float32) for x in (found, expected))
    assert (found == found[0]).all()
    np.testing.assert_allclose(found, expected, atol=2e-3, rtol=2**-7)
    np.testing.assert_allclose(whole, log_sum_exp, atol=1e-4)
