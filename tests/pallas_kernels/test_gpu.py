"""The Pallas kernels on a CUDA device, against the XLA references. `pytest -m gpu`, and as on an
older device: `pretend`."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    APPENDS,
    HEADS,
    append_call,
    append_errors,
    attention_call,
    dense_products,
    heads_call,
    random_around,
    random_pages,
    random_weight,
    relative_error,
    with_other_lower_planes,
    with_poison_but_in,
    without_poison,
)

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm import api as norm
from pallas_kernels.bf16_matmul import api as bf16
from pallas_kernels.bf16_matmul import configs as bf16_configs
from pallas_kernels.bf16_matmul import mosaic_gpu as bf16_kernel
from pallas_kernels.int4_matmul import api as matmul
from pallas_kernels.int4_matmul import configs as matmul_configs
from pallas_kernels.int4_matmul import mosaic_gpu as matmul_kernel
from pallas_kernels.int4_matmul import xla as matmul_reference
from pallas_kernels.kv_attention import api as attention
from pallas_kernels.kv_attention import configs, mosaic_gpu
from pallas_kernels.kv_attention.read import ByPage, PageLogSums, Pages, Read
from pallas_kernels.layout import tile
from pallas_kernels.logit_filter.api import kept
from pallas_kernels.page_choice.api import most_voted, page_votes
from pallas_kernels.products.around import Around
from pallas_kernels.quantize_pack import api as quantize
from pallas_kernels.rope_append import api as rope

DRAFT, TARGET = Read("int4"), Read("int8")

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _cuda_and_exact_references():
    if dispatch.device() is None:
        pytest.skip("no CUDA device that the kernels run on")
    with jax.default_matmul_precision("highest"):
        yield


def copies_in_bulk() -> bool:
    return dispatch.target().generation.bulk_copies


def of_the_device() -> dict[str, bool]:
    return {"bulk": copies_in_bulk(), "wgmma": dispatch.target().generation.wgmma}


def reference(call, read: Read, strict: bool = False, pages=None, page_log_sums: bool = False):
    options = {"read": read, "sm_scale": 0.11, "strict": strict, "page_log_sums": page_log_sums}
    run = functools.partial(attention.kv_attention, **options, backend="xla")
    return jax.jit(run)(*without_poison(call), pages=pages)


def read_of(found) -> list:
    """What is read of a result: what was not written may be anything."""
    sums = [] if found.page_log_sums is None else [found.page_log_sums.by_row]
    return [found.out, found.log_sum_exp, *sums]


def check_attention(
    call, read: Read, expected, strict: bool = False, config=None, pages=None
) -> None:
    """Page log-sums are asked for where they are expected."""
    asked = expected.page_log_sums is not None
    options = {"read": read, "sm_scale": 0.11, "strict": strict, "page_log_sums": asked}
    if config is None:
        run = functools.partial(attention.kv_attention, **options, backend="mosaic_gpu")
    else:
        run = functools.partial(
            mosaic_gpu.kv_attention, **options, config=config, **of_the_device()
        )
    run = jax.jit(run)
    if pages is not None:
        call = with_poison_but_in(call, pages)
    found, again = run(*call, pages=pages), run(*call, pages=pages)
    for a, b in zip(read_of(found), read_of(again), strict=True):
        np.testing.assert_array_equal(a, b)
    assert relative_error(found.out, expected.out) <= 2e-3
    assert relative_error(found.out.astype(jnp.bfloat16), expected.out) <= 3e-3
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, atol=5e-3)
    if asked:
        np.testing.assert_allclose(
            found.page_log_sums.by_row, expected.page_log_sums.by_row, atol=1e-2
        )


@pytest.mark.parametrize(("group", "tokens", "blocks"), [(4, 8, 4), (7, 5, 5), (6, 2, 2)])
def test_warpgroups_multiply_as_warps_do(group, tokens, blocks):
    """The same products, added in the same order: the same bits."""
    if not dispatch.target().generation.wgmma:
        pytest.skip("the device has no products of a warpgroup")
    call = attention_call(
        "int8", kv_heads=2, group=group, tokens=tokens, head_dim=128, group_size=128, tiles=40,
        positions=[128 * 39 + 7],
    )  # fmt: skip
    options = {"read": Read("int8"), "sm_scale": 0.11, "strict": False}
    config = mosaic_gpu.Config(2, 4, blocks, 2, True, True)
    run = functools.partial(mosaic_gpu.kv_attention, **options, config=config)
    found, expected = (jax.jit(functools.partial(run, wgmma=x))(*call) for x in (True, False))
    for a, b in zip(read_of(found), read_of(expected), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("view", ["int4", "int8", "full"])
@pytest.mark.parametrize(
    ("head_dim", "group_size", "group", "tokens"),
    [(128, 128, 1, 1), (128, 128, 4, 8), (64, 128, 3, 5), (256, 128, 1, 1), (96, 64, 2, 3)],
)
def test_attention_over_ragged_lengths(view, head_dim, group_size, group, tokens):
    """Lengths at the edges of a group, and far below the allocation."""
    g = group_size
    positions = [0, 1, g - 1, g, g + 1, 2 * g, 3 * g - tokens, 5 * g + 7]
    call = attention_call(
        view,
        kv_heads=2,
        group=group,
        tokens=tokens,
        head_dim=head_dim,
        group_size=g,
        tiles=9,
        positions=positions,
    )
    check_attention(call, Read(view), reference(call, Read(view)))


@pytest.mark.parametrize(("view", "tokens"), [("int4", 4), ("int8", 4), ("int8", 5), ("int8", 8)])
def test_attention_in_every_configuration(view, tokens):
    call = attention_call(
        view, kv_heads=2, group=4, tokens=tokens, head_dim=128, group_size=128, tiles=20,
        positions=[2400, 300],
    )  # fmt: skip
    options = {"read": Read(view), "sm_scale": 0.11, "strict": False}
    shape = mosaic_gpu.shape_of(*call[:2], **options)
    expected = reference(call, Read(view))
    pages = random_pages(np.asarray(call[2]) // 128, 2, [6, 1], 8)
    exact = Read(view, int(view == "int4"))
    # One of these in turn.
    more = [{"pages": pages}, {"page_log_sums": True}]
    wanted = [reference(call, exact, **asked) for asked in more]
    for i, config in enumerate(configs.candidates(shape)):
        check_attention(call, Read(view), expected, config=config)
        which = more[i % 2].get("pages")
        check_attention(call, exact, wanted[i % 2], config=config, pages=which)


@pytest.mark.parametrize(("read", "tokens"), [(Read("int4", 1), 4), (Read("int8"), 5)])
def test_attention_to_as_many_tiles_as_are_counted(read, tokens):
    """With page log-sums."""
    call = attention_call(
        read.view, kv_heads=2, group=4, tokens=tokens, head_dim=128, group_size=128, tiles=20,
        positions=[2400, 300],
    )  # fmt: skip
    pages = Pages(None, jnp.array([6, 1]))
    expected = reference(call, read, pages=pages, page_log_sums=True)
    check_attention(call, read, expected, pages=pages)


def test_stages_are_read_before_they_are_filled_anew():
    """Launches differed where a copy overtook reads that were under way when the stage was handed
    back: of full-precision values, by eight warps, at that time from the same banks."""
    call = attention_call(
        "int8", kv_heads=2, group=6, tokens=5, head_dim=128, group_size=128, tiles=236,
        positions=[29990],
    )  # fmt: skip
    options = {"read": Read("int8"), "sm_scale": 0.11, "strict": False}
    for config in (
        mosaic_gpu.Config(2, 2, 1, 2),
        mosaic_gpu.Config(4, 4, 1, 2),
        mosaic_gpu.Config(2, 4, 4, 2, True, True),
    ):
        run = functools.partial(
            mosaic_gpu.kv_attention, **options, config=config, **of_the_device()
        )
        run = jax.jit(run)
        first = run(*call)
        for _ in range(100):
            for a, b in zip(jax.tree.leaves(run(*call)), jax.tree.leaves(first), strict=True):
                np.testing.assert_array_equal(a, b)
        assert relative_error(first.out, reference(call, Read("int8")).out) <= 2e-3


@pytest.mark.parametrize("kv_heads", [8, 32])
@pytest.mark.parametrize(
    ("read", "tokens"), [(DRAFT, 1), (Read("int4", 1), 1), (TARGET, 5), (Read("int4", 1), 16)]
)
def test_scattered_pages_of_a_long_context(read, tokens, kv_heads):
    """A quarter of 131,072 tokens, other ones for each of the heads."""
    call = attention_call(
        read.view, kv_heads=kv_heads, group=32 // kv_heads, tokens=tokens, head_dim=128,
        group_size=128, tiles=1024, positions=[131072 + 200],
    )  # fmt: skip
    coded = np.asarray(call[2]) // 128
    pages = random_pages(coded, kv_heads, [256], 256)
    check_attention(call, read, reference(call, read, pages=pages), pages=pages)


@pytest.mark.parametrize(("read", "tokens"), [(DRAFT, 1), (TARGET, 5), (TARGET, 16)])
def test_all_pages_of_a_long_context(read, tokens):
    """Sums of up to 16,000 products that one adder makes: where they drift, it shows here."""
    call = attention_call(
        read.view, kv_heads=32, group=1, tokens=tokens, head_dim=128, group_size=128, tiles=1024,
        positions=[131072 + 200],
    )  # fmt: skip
    check_attention(call, read, reference(call, read))


@pytest.mark.parametrize(
    ("read", "group", "tokens", "head_dim"),
    [
        (TARGET, 1, 16, 128),
        (TARGET, 6, 16, 128),
        (TARGET, 7, 16, 128),
        (TARGET, 16, 16, 64),
        (TARGET, 8, 16, 256),
        (Read("int4", 1), 6, 16, 128),
        (Read("int4", 2), 4, 1, 256),
    ],
)
def test_passes_of_many_rows(read, group, tokens, head_dim):
    """Up to the most that the kernel takes, with page log-sums, ragged."""
    call = attention_call(
        read.view, kv_heads=2, group=group, tokens=tokens, head_dim=head_dim, group_size=128,
        tiles=9, positions=[1100, 5, 300],
    )  # fmt: skip
    check_attention(call, read, reference(call, read, page_log_sums=True))


def test_attention_rounded_to_bfloat16():
    call = attention_call(
        "int4", kv_heads=2, group=2, tokens=1, head_dim=128, group_size=128, tiles=4,
        positions=[600],
    )  # fmt: skip
    run = functools.partial(attention.kv_attention, read=DRAFT, sm_scale=0.1, backend="mosaic_gpu")
    exact, rounded = (
        jax.jit(run)(*call),
        jax.jit(functools.partial(run, out_dtype=jnp.bfloat16))(*call),
    )
    np.testing.assert_array_equal(exact[0].astype(jnp.bfloat16), rounded[0])


def test_strict_attention_and_rows_that_see_nothing():
    call = attention_call(
        "int8", kv_heads=2, group=2, tokens=3, head_dim=128, group_size=128, tiles=3,
        positions=[0, 128, 300],
    )  # fmt: skip
    check_attention_of_nothing = jax.jit(
        functools.partial(
            attention.kv_attention,
            read=TARGET,
            sm_scale=0.1,
            strict=True,
            backend="mosaic_gpu",
        )
    )
    out, lse, _ = check_attention_of_nothing(*call)
    assert not np.any(out[0, 0])
    assert np.all(np.isneginf(lse[0, 0]))
    assert np.all(np.isfinite(lse[1:]))


def test_the_draft_never_reads_the_lower_plane():
    q, cache, *lengths = attention_call(
        "int4", kv_heads=2, group=1, tokens=1, head_dim=128, group_size=128, tiles=4,
        positions=[600],
    )  # fmt: skip
    run = jax.jit(
        functools.partial(attention.kv_attention, read=DRAFT, sm_scale=0.1, backend="mosaic_gpu")
    )
    before, other = run(q, cache, *lengths), with_other_lower_planes(cache)
    for a, b in zip(before[:2], run(q, other, *lengths)[:2], strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "symmetric"),
    [
        (1024, (1024,), 128, False),
        (1000, (512, 256, 256), 128, True),
        (576, (1536, 1536), 64, False),
        (576, (576,), 32, False),
        (4096, (4096, 1040), 128, False),
    ],
)
def test_int4_matmul(rows, inputs, outputs, group, symmetric):
    weights = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
    x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
    run = jax.jit(functools.partial(matmul.int4_matmuls, backend="mosaic_gpu"))
    tiled = [tile(w) for w in weights]
    found = run(x, tiled)
    for y, again, w in zip(found, run(x, tiled), weights, strict=True):
        np.testing.assert_array_equal(y, again)
        dense = matmul_reference.dequantize(w)[:inputs]
        assert relative_error(y, x.astype(jnp.float32) @ dense) <= 1e-4
    for y, rounded in zip(
        found, matmul.int4_matmuls(x, tiled, out_dtype=jnp.bfloat16), strict=True
    ):
        np.testing.assert_array_equal(y.astype(jnp.bfloat16), rounded)


@pytest.mark.parametrize("rows", [3, 16])
def test_int4_matmul_in_every_configuration(rows):
    weight = random_weight(1024, 1040, 128, False)
    x = jax.random.normal(jax.random.key(1), (rows, 1024)).astype(jnp.bfloat16)
    expected = x.astype(jnp.float32) @ matmul_reference.dequantize(weight)
    tiled = [tile(weight)]
    for config in matmul_configs.diverse(matmul_kernel.shape_of(x, tiled)):
        run = functools.partial(matmul_kernel.int4_matmuls, config=config, bulk=copies_in_bulk())
        run = jax.jit(run)
        (y,), (again,) = run(x, tiled), run(x, tiled)
        np.testing.assert_array_equal(y, again)
        assert relative_error(y, expected) <= 1e-4


def bf16_operands(rows, inputs, outputs, transposed):
    keys = jax.random.split(jax.random.key(2), len(outputs) + 1)
    x = (3 * jax.random.normal(keys[0], (rows, inputs))).astype(jnp.bfloat16)
    shapes = [(n, inputs) if transposed else (inputs, n) for n in outputs]
    weights = [
        (0.05 * jax.random.normal(k, shape)).astype(jnp.bfloat16)
        for k, shape in zip(keys[1:], shapes, strict=True)
    ]
    return x, weights, [w.T if transposed else w for w in weights]


def check_products(run, call, dense, around, bound: float) -> None:
    """Against the formulas, and the same bits again."""
    found, again = run(*call), run(*call)
    exact = dense_products(call[0], dense, around)
    for y, z, expected in zip(found, again, exact, strict=True):
        np.testing.assert_array_equal(y, z)
        assert relative_error(y, expected) <= (4e-3 if y.dtype == jnp.bfloat16 else bound)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("inputs", "outputs", "parts"),
    [
        (1536, (1536, 256, 256), ""),
        (1536, (1536, 256, 256), "norm"),
        (1536, (1536,), "residual"),
        (1536, (4480, 4480), "norm gated"),
        (4480, (1536,), "residual"),
        (576, (192, 72, 8), "norm"),
        (4096, (20008,), "norm"),
    ],
)
def test_bf16_matmul(rows, inputs, outputs, parts, transposed):
    x, weights, dense = bf16_operands(rows, inputs, outputs, transposed)
    around = random_around(parts, rows, inputs, outputs[0])
    run = jax.jit(functools.partial(bf16.bf16_matmuls, transposed=transposed, backend="mosaic_gpu"))
    device = dispatch.target()
    # A block has all rows, and all channels where they are normed: else a cluster shares those.
    blocks = 8 if device.generation.clusters and "norm" not in parts else 1
    if 2 * rows * inputs > blocks * device.usable_bytes * 3 // 8:
        with pytest.raises(NotImplementedError, match="do not fit beside the weights"):
            run(x, weights, around)
        return
    # One bfloat16 of the norm that is rounded otherwise is 2⁻⁸ of itself.
    check_products(run, (x, weights, around), dense, around, 4e-4 if "norm" in parts else 1e-5)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(("outputs", "parts"), [((1040,), "residual"), ((520, 520), "norm gated")])
def test_bf16_matmul_in_every_configuration(rows, outputs, parts):
    x, weights, dense = bf16_operands(rows, 1024, outputs, False)
    around = random_around(parts, rows, 1024, outputs[0])
    for config in bf16_configs.diverse(bf16_kernel.shape_of(x, weights, around)):
        run = jax.jit(functools.partial(bf16_kernel.bf16_matmuls, config=config, multiprocessors=4))
        check_products(run, (x, weights, around), dense, around, 1e-5)


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize(
    ("inputs", "outputs", "group", "symmetric", "parts"),
    [
        (1536, (1536, 256, 256), 64, False, "norm"),
        (1000, (512,), 128, True, "residual"),
        (1536, (4480, 4480), 64, False, "norm gated"),
        (4480, (1536,), 64, False, "residual"),
        (576, (1536, 1536), 32, True, "norm gated"),
    ],
)
def test_what_stands_around_int4_matmul(rows, inputs, outputs, group, symmetric, parts):
    weights = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
    x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
    around = random_around(parts, rows, inputs, outputs[0])
    dense = [matmul_reference.dequantize(w)[:inputs] for w in weights]
    run = jax.jit(functools.partial(matmul.int4_matmuls, backend="mosaic_gpu"))
    check_products(run, (x, [tile(w) for w in weights], around), dense, around, 4e-4)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("case", APPENDS)
@pytest.mark.parametrize("kind", ["int4", "bf16"])
def test_products_that_finish_heads(kind, case, ahead):
    """In every configuration."""
    x, outputs, append = append_call(case, True, (31, 62), ahead, 2, 1024)
    norm_weight = jax.random.normal(jax.random.key(3), x.shape[-1:]).astype(jnp.bfloat16)
    around = Around(norm_weight, 1e-5, append=append)
    if kind == "int4":
        packed = [random_weight(1024, n, 64, False, n) for n in outputs]
        weights, dense = list(map(tile, packed)), list(map(matmul_reference.dequantize, packed))
        shape, kernel = matmul_kernel.shape_of(x, weights, around), matmul_kernel.int4_matmuls
        runs = [functools.partial(kernel, config=c) for c in matmul_configs.diverse(shape)]
    else:
        _, weights, dense = bf16_operands(1, 1024, outputs, False)
        shape, kernel = bf16_kernel.shape_of(x, weights, around), bf16_kernel.bf16_matmuls
        runs = [
            functools.partial(kernel, config=c, multiprocessors=4)
            for c in bf16_configs.diverse(shape)
        ]
    for run in runs:
        found, again = (jax.jit(run)(x, weights, around) for _ in range(2))
        for y, z in zip(found, again, strict=True):
            np.testing.assert_array_equal(np.asarray(y), np.asarray(z))
        assert max(append_errors(found, dense_products(x, dense, around), append)) <= 4e-3


@pytest.mark.parametrize("which", ["quantize_keys", "quantize_values"])
@pytest.mark.parametrize(("head_dim", "group_size"), [(128, 128), (64, 128), (256, 128), (64, 32)])
def test_quantized_bit_for_bit(which, head_dim, group_size):
    """The same codes as the reference computes on the CPU, where quotients are rounded right."""
    spread = jnp.exp(2 * jax.random.normal(jax.random.key(1), (head_dim,)))
    x = jax.random.normal(jax.random.key(0), (2, 3, 4 * group_size, head_dim))
    x = x * spread[None, None, None]
    x = x.at[:, 0, :group_size].set(0.5)
    x = x.at[:, :, -3:, ::5].multiply(jnp.array([1e6, -1e30, 1e-7])[:, None]).astype(jnp.bfloat16)
    run = getattr(quantize, which)
    found = jax.jit(functools.partial(run, group_size=group_size, backend="mosaic_gpu"))(x)
    cpu = jax.devices("cpu")[0]
    expected = jax.jit(functools.partial(run, group_size=group_size, backend="xla"))(
        jax.device_put(x, cpu)
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("start", [(5, 97), (31, 62), (63, 0)])
@pytest.mark.parametrize("case", HEADS)
def test_rope_append(case, start):
    call = heads_call(case, True, start)
    run = jax.jit(rope.rope_append, static_argnames="backend")
    found, again, expected = (run(*call, backend=x) for x in ("mosaic_gpu", "mosaic_gpu", "xla"))
    for a, b, c in zip(*map(jax.tree.leaves, (found, again, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        a, c = (np.asarray(x.astype(jnp.float32)) for x in (a, c))
        # Inside one program XLA keeps more of what is due to be rounded before the rotation: of two
        # numbers up to 4 in size half a last place each, and one of their result.
        np.testing.assert_allclose(a, c, rtol=2**-7, atol=2**-6)
        assert np.linalg.norm(a - c) <= 4e-3 * np.linalg.norm(c)


def test_rope_append_finds_a_passs_rows_in_tables_of_more():
    heads, layer, start = heads_call("bias", True, (31, 62))
    own = jnp.full((1, 2, *heads.rope[0].shape[2:]), jnp.nan)
    tables = tuple(jnp.concatenate([own, x, own], 1) for x in heads.rope)
    run = jax.jit(functools.partial(rope.rope_append, backend="mosaic_gpu"))
    expected = run(heads, layer, start)
    found = run(dataclasses.replace(heads, rope=tables), layer, start, start - 2)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("y_dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(("rows", "channels"), [(1, 576), (5, 4096), (16, 3584), (300, 16384)])
def test_add_rms_norm(rows, channels, y_dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    x = (3 * jax.random.normal(keys[0], (1, rows, channels))).astype(jnp.bfloat16)
    y = jax.random.normal(keys[1], x.shape).astype(y_dtype)
    weight = jax.random.normal(keys[2], (channels,)).astype(jnp.bfloat16)
    run = jax.jit(norm.add_rms_norm, static_argnames=("eps", "backend"))
    found = run(x, y, weight, eps=1e-5, backend="mosaic_gpu")
    again = run(x, y, weight, eps=1e-5, backend="mosaic_gpu")
    expected = run(x, y, weight, eps=1e-5, backend="xla")
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found[0], expected[0])
    assert relative_error(found[1], expected[1].astype(jnp.float32)) <= 1e-3
    alone = jax.jit(functools.partial(norm.rms_norm, eps=1e-5, backend="mosaic_gpu"))
    np.testing.assert_array_equal(alone(found[0], weight), found[1])


@pytest.mark.parametrize(
    ("n", "tokens", "kind"),
    [(151936, 5, "peaked"), (128256, 1, "ties"), (262144, 1, "flat"), (49152, 16, "ties")],
)
def test_what_is_left_of_a_row_of_logits(n, tokens, kind):
    """As XLA's way finds it, but for tokens at the very end of the budget; the same bits again."""
    scores = {"peaked": 4.0, "ties": 3.0, "flat": 0.2}[kind] * jax.random.normal(
        jax.random.key(n), (6, tokens, n)
    )
    scores = jnp.round(scores) if kind == "ties" else scores
    wants = (
        jnp.array([0.7, 1.0, 0.8, 0.0, 1.0, 1.2]),
        jnp.array([0, 50, 0, 0, n // 2, 0]),
        jnp.array([0.9, 1.0, 0.95, 1.0, 0.5, 1e-9]),
        jnp.array([0.0, 0.0, 0.1, 0.0, 0.0, 0.0]),
    )
    if not dispatch.target().generation.clusters:
        pytest.skip("it takes clusters")
    run, reference = (
        jax.jit(functools.partial(kept, wanted=(True, True), backend=backend))
        for backend in ("mosaic_gpu", "xla")
    )
    found, again, expected = run(scores, *wants), run(scores, *wants), reference(scores, *wants)
    for a, b in zip(found, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(found.most, expected.most)
    np.testing.assert_allclose(found.mass, expected.mass, rtol=2e-5)
    ours, theirs = found.of(scores), expected.of(scores)
    number = np.maximum(np.asarray(theirs.sum(-1)), 1)
    assert (np.asarray((ours != theirs).sum(-1)) <= 1 + 1e-4 * number).all()
    np.testing.assert_array_equal(ours[3].sum(-1), 1)  # temperature 0


@pytest.mark.parametrize(
    ("layers", "kv_heads", "group", "tokens", "tiles", "shares"),
    [(32, 32, 1, 5, 1032, 4), (28, 2, 6, 5, 243, 2), (2, 8, 4, 16, 8200, 1), (130, 1, 1, 1, 3, 1)],
)
def test_votes_and_the_most_voted_pages(layers, kv_heads, group, tokens, tiles, shares):
    """Of the largest models, with tiles that were not written; the same bits again."""
    keys = iter(jax.random.split(jax.random.key(tiles), 2 * layers))
    written, last = jnp.array([tiles - 1]), jnp.array([tokens // 2])
    shape = (1, kv_heads, tiles, shares, group * tokens)
    seen = []
    for _ in range(layers):
        parts = (4 * jax.random.normal(next(keys), shape)).at[:, :, tiles - 1].set(jnp.nan)
        lse = 14 + jax.random.normal(next(keys), (1, tokens, kv_heads * group))
        seen.append(ByPage(PageLogSums(parts, written, tokens), lse))
    vote = jax.jit(functools.partial(page_votes, backend="mosaic_gpu"))
    votes = vote(seen, last)
    np.testing.assert_array_equal(votes, vote(seen, last))
    coded = votes[..., : tiles - 1]
    expected = jax.jit(functools.partial(page_votes, backend="xla"))(seen, last)
    np.testing.assert_allclose(coded, expected[..., : tiles - 1], rtol=1e-4)

    count = jnp.array([-(-tiles // 4)])
    options = {"places": -(-tiles // 4), "ends": (1, 1)}
    tied = jnp.floor(8 * votes) if tiles < 1000 else votes
    kernel, reference = (
        jax.jit(functools.partial(most_voted, **options, backend=backend))
        for backend in ("mosaic_gpu", "xla")
    )
    for a, b in zip(kernel(tied, written, count), reference(tied, written, count), strict=True):
        np.testing.assert_array_equal(a, b)
