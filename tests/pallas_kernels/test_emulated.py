"""The kernels' own code, run by the emulator, against the XLA references."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    HEADS,
    append_call,
    append_errors,
    attention_call,
    dense_products,
    heads_call,
    random_weight,
    relative_error,
    without_poison,
)

from pallas_kernels import ptx
from pallas_kernels.add_rms_norm import mosaic_gpu as norm
from pallas_kernels.add_rms_norm import xla as norm_reference
from pallas_kernels.bf16_matmul import mosaic_gpu as bf16
from pallas_kernels.collectives import mailboxes
from pallas_kernels.collectives import mosaic_gpu as collectives
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.int4_matmul import xla as int4_reference
from pallas_kernels.kv_attention import mosaic_gpu as attention
from pallas_kernels.kv_attention import xla as attention_reference
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import tile
from pallas_kernels.products.around import Around, apart
from pallas_kernels.quantize_pack import mosaic_gpu as quantize
from pallas_kernels.quantize_pack import xla as quantize_reference
from pallas_kernels.rope_append import api as rope_reference
from pallas_kernels.rope_append import mosaic_gpu as rope


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    emulator.install(monkeypatch)


def rows_in_a_bank(monkeypatch) -> list[int]:
    """Of each 8×8 matrix that is loaded from shared memory, how many rows lie in the same of the
    eight banks of 16 bytes; added to while the kernels run."""
    found: list[int] = []

    def noted(where):
        found.extend(np.bincount(row).max() for row in where.array.reshape(4, 8) // 16 % 8)
        return emulator.load_matrices_transposed(where)

    emulator.replace(monkeypatch, "load_matrices_transposed", noted)
    return found


@pytest.mark.parametrize(
    ("view", "head_dim", "group_size", "group", "tokens", "config", "strict"),
    [
        ("int4", 64, 64, 1, 1, attention.Config(1, 2, 1, 2), False),
        ("int4", 128, 128, 1, 2, attention.Config(1, 4, 1, 2), True),
        ("int8", 64, 32, 3, 5, attention.Config(1, 1, 2, 2), False),
        ("int8", 96, 64, 2, 8, attention.Config(1, 2, 1, 3), False),
        ("int8", 64, 64, 3, 5, attention.Config(1, 1, 2, 2, True), False),
        ("int8", 64, 128, 3, 5, attention.Config(1, 2, 2, 2, True, True), False),
        ("int8", 128, 128, 3, 3, attention.Config(1, 4, 2, 2, True, True), False),
        ("int8", 64, 256, 3, 3, attention.Config(1, 4, 2, 2, True, True), False),
        ("int4", 64, 128, 3, 4, attention.Config(2, 4, 1, 2, True, True), True),
        ("int4", 64, 64, 4, 5, attention.Config(1, 2, 2, 2, True, True), True),
        ("full", 64, 64, 1, 2, attention.Config(1, 1, 1, 3), False),
    ],
)
def test_attention(monkeypatch, view, head_dim, group_size, group, tokens, config, strict):
    g, conflicts = group_size, rows_in_a_bank(monkeypatch)
    call = attention_call(
        view,
        kv_heads=1,
        group=group,
        tokens=tokens,
        head_dim=head_dim,
        group_size=g,
        tiles=3,
        positions=[0, 1, 2 * g, 4 * g - tokens],
    )
    options = {"read": Read(view), "sm_scale": 0.11, "strict": strict}
    found = attention.kv_attention(*call, **options, config=config, blocks=2)
    reference = jax.jit(functools.partial(attention_reference.kv_attention, **options))
    expected = reference(*without_poison(call))
    assert relative_error(found[0], expected[0]) <= 2e-3
    np.testing.assert_allclose(found[1], expected[1], atol=5e-3)
    assert max(conflicts) == 1


@pytest.mark.parametrize(
    ("view", "config"),
    [
        ("int8", (1, 2, 1, 2)),
        ("int8", (1, 2, 1, 4)),
        ("int8", (1, 4, 2, 2, True, True)),
        ("full", (1, 1, 1, 2)),
    ],
)
def test_attention_reads_tiles_before_it_waits(view, config):
    """And neither queries nor the buffer, where all, some and none of the first units are tiles."""
    call = attention_call(
        view, kv_heads=1, group=2, tokens=2, head_dim=64, group_size=128, tiles=4,
        positions=[1, 128 * 2 + 9, 128 * 5 - 3],
    )  # fmt: skip
    options = {"read": Read(view), "sm_scale": 0.11, "strict": False}
    config = attention.Config(*config)
    run = functools.partial(attention.kv_attention, *call, **options, config=config, blocks=2)
    for a, b in zip(run(ahead=True)[:2], run(ahead=False)[:2], strict=True):
        np.testing.assert_array_equal(a, b)


def test_attention_of_warps_is_that_of_warpgroups(monkeypatch):
    """The same products, added in the same order: the same bits."""
    call = attention_call(
        "int8", kv_heads=1, group=3, tokens=3, head_dim=64, group_size=128, tiles=3,
        positions=[1, 4 * 128 - 3],
    )  # fmt: skip
    options = {"read": Read("int8"), "sm_scale": 0.11, "strict": False}
    config = attention.Config(1, 4, 2, 2, True, True)
    run = functools.partial(attention.kv_attention, *call, **options, config=config, blocks=2)
    by_warps, ordered = run(wgmma=False), []

    def noted(*args):
        ordered.append(args)
        return emulator.wgmma(*args)

    emulator.replace(monkeypatch, "wgmma", noted)
    by_warpgroups = run(wgmma=True)
    assert ordered
    for a, b in zip(by_warpgroups[:2], by_warps[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("y_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 64), (3, 1032), (2, 4160)])
def test_add_rms_norm(rows, channels, y_dtype):
    """Fewer channels than threads, a few more, and two chunks of some threads."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = (3 * jax.random.normal(keys[0], (1, rows, channels))).astype(jnp.bfloat16)
    y = jax.random.normal(keys[1], x.shape).astype(y_dtype)
    weight = jax.random.normal(keys[2], (channels,)).astype(jnp.bfloat16)
    found = norm.add_rms_norm(x, y, weight, eps=1e-5)
    expected = norm_reference.add_rms_norm(x, y, weight, 1e-5)
    np.testing.assert_array_equal(found[0], expected[0])
    wide = expected[1].astype(jnp.float32)  # a sum in another order may round otherwise
    np.testing.assert_allclose(found[1].astype(jnp.float32), wide, rtol=2**-7, atol=1e-6)
    # The norm alone is the same numbers.
    np.testing.assert_array_equal(norm.rms_norm(found[0], weight, eps=1e-5), found[1])


# In the middle of a half of the ring, at its end where rows have to be dropped, and around; the
# full view does not wrap.
@pytest.mark.parametrize(
    ("planes", "start"), [(True, (5, 97)), (True, (31, 62)), (True, (63, 0)), (False, (31, 62))]
)
@pytest.mark.parametrize("case", HEADS)
def test_rope_append(case, planes, start):
    call = heads_call(case, planes, start)
    found, layer = rope.rope_append(*call, ahead=planes)
    expected, reference = rope_reference.rope_append(*call, backend="xla")
    for a, b in (
        (found, expected),
        (layer.key_buffer, reference.key_buffer),
        (layer.value_buffer, reference.value_buffer),
    ):  # products may round otherwise before they are added, a last place of bfloat16 at most
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
        np.testing.assert_allclose(a, b, rtol=2**-7, atol=2**-7)
    np.testing.assert_array_equal(layer.value_buffer, reference.value_buffer)


@pytest.mark.parametrize("case", ["bias", "all, odd"])
def test_rope_append_finds_a_passs_rows_in_tables_of_more(case):
    """As with tables of the pass alone, however far into the others it begins."""
    heads, layer, start = heads_call(case, True, (31, 62))
    before = jnp.array([0, 2], jnp.int32)[: len(start)]  # rows before a sequence's own
    tokens = heads.q.shape[1]
    rows = jnp.arange(tokens)[None] + before[:, None]
    tables = tuple(
        jnp.full((len(start), tokens + 3, *x.shape[2:]), jnp.nan)
        .at[jnp.arange(len(start))[:, None], rows]
        .set(x)
        for x in heads.rope
    )
    within = dataclasses.replace(heads, rope=tables)
    for run in (rope.rope_append, functools.partial(rope_reference.rope_append, backend="xla")):
        expected, found = run(heads, layer, start), run(within, layer, start, start - before)
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


# In the middle of a half of the ring, at the ends of both, and of the whole.
@pytest.mark.parametrize(
    ("kind", "case", "config", "planes", "start", "ahead", "more"),
    [
        ("int4", "one", (1, 2, 4), True, (5,), True, 0),
        ("int4", "one", (1, 1, 3, 2), True, (31,), False, 2),  # strips that do not divide a half
        ("int4", "several", (1, 2, 1), True, (31,), True, 2),
        ("int4", "several", (1, 2, 1), False, (62,), False, 0),
        ("int4", "batch", (2, 1, 2), True, (62, 31), True, 1),
        ("int4", "wide", (1, 1, 2), False, (31,), True, 0),
        ("bf16", "one", (1, 2), True, (31,), True, 1),
        ("bf16", "several", (1, 2, 1, 2), True, (62,), False, 2),
        ("bf16", "several", (1, 2), False, (31,), True, 0),
        ("bf16", "batch", (1, 1, 2), True, (31, 97), True, 2),
        ("bf16", "wide", (1, 1, 1, 1, 1, 2), True, (5,), False, 0),
    ],
)
def test_products_that_finish_heads(kind, case, config, planes, start, ahead, more):
    """Bias, RoPE and the write into the buffer: what `rope_append` makes of the products."""
    x, outputs, append = append_call(case, planes, start, ahead, more)
    norm_weight = jax.random.normal(jax.random.key(3), x.shape[-1:]).astype(jnp.bfloat16)
    around = Around(norm_weight, 1e-5, append=append)
    if kind == "int4":
        packed = [random_weight(x.shape[-1], n, 64, False, n) for n in outputs]
        dense = list(map(int4_reference.dequantize, packed))
        found = matmul.int4_matmuls(
            x, list(map(tile, packed)), around, config=matmul.Config(*config)
        )
    else:
        keys = jax.random.split(jax.random.key(2), 3)
        dense = [
            jax.random.normal(key, (x.shape[-1], n), jnp.bfloat16)
            for key, n in zip(keys, outputs, strict=True)
        ]
        options = {"config": bf16.Config(*config), "multiprocessors": 2}
        found = bf16.bf16_matmuls(x, dense, around, **options)

    def multiply(h: jax.Array) -> list[jax.Array]:
        return [jnp.dot(h.astype(jnp.float32), w.astype(jnp.float32)) for w in dense]

    exact = dense_products(x, dense, around)
    for way in (found, apart(x, around, multiply)):
        assert max(append_errors(way, exact, append)) <= 4e-3


@pytest.mark.parametrize("which", ["quantize_keys", "quantize_values"])
@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 64), (64, 32)])
def test_quantized_bit_for_bit(which, head_dim, group_size):
    spread = jnp.exp(2 * jax.random.normal(jax.random.key(1), (head_dim,)))
    x = jax.random.normal(jax.random.key(0), (1, 1, 2 * group_size, head_dim))
    x = x * spread[None, None, None]
    x = x.at[:, :, :group_size, : head_dim // 2].set(0.5)
    x = x.at[:, :, -3:, ::5].multiply(jnp.array([1e6, -1e30, 1e-7])[:, None]).astype(jnp.bfloat16)
    found = getattr(quantize, which)(x, group_size)
    expected = jax.jit(getattr(quantize_reference, which), static_argnums=1)(x, group_size)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("operand", [0, 1])
def test_only_what_is_declared_is_read_before_the_wait(operand):
    """A body that reads the other one before it waits for the launches that write it is found."""

    def body(addresses, shared):
        del shared
        early = ptx.load(addresses[operand])
        ptx.wait_for_launches()
        ptx.store(addresses[2], early)

    out = [jax.ShapeDtypeStruct((32,), jnp.int32)]
    run = ptx.kernel(body, out, name="reads", blocks=1, warpgroups=1, ahead=[1])
    x = jnp.arange(32, dtype=jnp.int32)
    if operand == 1:
        assert run(x, x + 7)[0][0] == 7
    else:
        with pytest.raises(AssertionError, match="too late"):
            run(x, x + 7)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("same", [False, True])
def test_warps_that_write_different_things_to_one_place_are_found(half, same):
    """In words, or in halves of them."""

    def body(addresses, shared):
        del shared
        thread = ptx.special("tid.x")
        at = addresses[1] + ((thread & 31) * 4).to_i64()
        value = ptx.i32(7) if same else thread >> 5
        ptx.store_half(at, value) if half else ptx.store(at, [value])

    out = [jax.ShapeDtypeStruct((32,), jnp.int32)]
    run = ptx.kernel(body, out, name="races", blocks=1, warpgroups=1)
    if same:
        assert set(np.asarray(run(jnp.zeros(1))[0]) & 0xFFFF) == {7}
    else:
        with pytest.raises(AssertionError, match="two warps write different things"):
            run(jnp.zeros(1))


def over_devices(monkeypatch, devices: int, run: Callable[[int, jax.Array], Any]) -> list[Any]:
    """run(rank, addresses of peers) of each device, which is a thread."""
    memory = [np.zeros(4 * mailboxes.words(devices), np.uint8) for _ in range(devices)]
    monkeypatch.setattr(emulator, "OTHERS", memory)
    where = [(i + 1) * emulator.ELSEWHERE for i in range(devices)]
    tables = [jnp.asarray(mailboxes.addresses(rank, where)) for rank in range(devices)]
    with ThreadPoolExecutor(devices) as pool:
        return list(pool.map(run, range(devices), tables))


@pytest.mark.parametrize("devices", [2, 3])
def test_all_reduce(monkeypatch, devices):
    """Sums of several shapes, one after the other."""
    rng = np.random.default_rng(0)
    sums = []
    for shape, added in (((1, 576), True), ((2, 700), True), ((1, 1, 4), False), ((2, 576), True)):
        parts = jnp.asarray(rng.standard_normal((devices, *shape)), jnp.float32)
        sums.append((parts, jnp.asarray(parts[0], jnp.bfloat16) if added else None))

    def run(rank: int, peers: jax.Array) -> list[jax.Array]:
        return [collectives.all_reduce(parts[rank], peers, stream) for parts, stream in sums]

    for device in over_devices(monkeypatch, devices, run):
        for found, (parts, stream) in zip(device, sums, strict=True):
            expected = functools.reduce(jnp.add, parts).astype(jnp.bfloat16)
            expected = expected if stream is None else stream + expected
            assert found.dtype == jnp.bfloat16
            np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("shape", [(1, 1, 700), (3, 576)])
def test_all_gather(monkeypatch, shape):
    parts = jax.random.normal(jax.random.key(0), (3, *shape))
    expected = jnp.concatenate(list(parts), -1)

    def run(rank: int, peers: jax.Array) -> jax.Array:
        return collectives.all_gather(parts[rank], peers)

    for found in over_devices(monkeypatch, 3, run):
        np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


@pytest.mark.parametrize("devices", [2, 4])
def test_merged_parts_of_attention(monkeypatch, devices):
    """Of heads that all, one and none of the devices have keys for, twice."""
    rng = np.random.default_rng(0)
    outs = jnp.asarray(rng.standard_normal((devices, 2, 3, 6, 64)), jnp.float32)
    sums = 20 * rng.standard_normal((devices, 2, 3, 6)).astype(np.float32)
    sums[1:, :, :, 1], sums[:, :, :, 2] = -np.inf, -np.inf
    outs = jnp.where(jnp.isfinite(sums)[..., None], outs, 0)

    def run(rank: int, peers: jax.Array) -> list[Any]:
        return [collectives.merge(outs[rank], jnp.asarray(sums[rank]), peers) for _ in range(2)]

    whole = np.logaddexp.reduce(sums, 0)
    weights = np.exp(sums - np.where(np.isfinite(whole), whole, 0))
    expected = (weights[..., None] * np.asarray(outs)).sum(0)
    first, *others = over_devices(monkeypatch, devices, run)
    for merged, log_sum_exp in first:
        np.testing.assert_allclose(merged.astype(jnp.float32), expected, atol=2e-3, rtol=2**-8)
        np.testing.assert_allclose(log_sum_exp, whole, atol=1e-5)
    for a, b in zip(jax.tree.leaves([first] * len(others)), jax.tree.leaves(others), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize(
    ("kind", "rows", "config"),
    [
        ("int4", 1, matmul.Config(1, 2, 1)),
        ("int4", 5, matmul.Config(1, 1, 2, cluster=2)),
        ("int4", 1, matmul.Config(3, 1, 6, cluster=2)),
        ("bf16", 2, bf16.Config(1, 2)),
        ("bf16", 9, bf16.Config(1, 2, cluster=2)),
    ],
)
def test_products_of_parts(monkeypatch, kind, rows, config):
    """Each device's product with its input channels, added over the devices and to a stream; twice,
    and in bfloat16 several tiles of a block."""
    devices, inputs, outputs = 2, 256, 320
    xs = jax.random.normal(jax.random.key(0), (devices, rows, inputs), jnp.bfloat16)
    stream = jax.random.normal(jax.random.key(1), (rows, outputs), jnp.bfloat16)
    if kind == "int4":
        weights = [random_weight(inputs, outputs, 64, False, seed) for seed in range(devices)]
        products = [int4_reference.int4_matmul(x, w) for x, w in zip(xs, weights, strict=True)]
    else:
        dense = jax.random.normal(jax.random.key(2), (devices, inputs, outputs), jnp.bfloat16)
        products = list(xs.astype(jnp.float32) @ dense.astype(jnp.float32))

    def run(rank: int, peers: jax.Array) -> list[jax.Array]:
        around, found = Around(residual=stream, peers=peers), []
        for _ in range(2):
            if kind == "int4":
                call = (xs[rank], [tile(weights[rank])], around)
                found += matmul.int4_matmuls(*call, config=config)
            else:
                call = (xs[rank], [dense[rank]], around)
                found += bf16.bf16_matmuls(*call, config=config, multiprocessors=2)
        return found

    total = functools.reduce(jnp.add, products).astype(jnp.bfloat16)
    expected = np.asarray(stream + total, np.float32)
    first, second = over_devices(monkeypatch, devices, run)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert relative_error(a.astype(jnp.float32), expected) <= 4e-3


def test_addresses_of_peers():
    """The rank, then 8 bytes for each mailbox, its own first."""
    table = mailboxes.addresses(1, [0x400000000, 0x7FFF00000010])
    assert table.tolist() == [1, 0, 0x10, 0x7FFF, 0, 4]
