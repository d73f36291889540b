"""The attention kernel's own code, run by the emulator, in the ways that it can be configured."""

from __future__ import annotations

import dataclasses
import functools

import emulator
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import (
    attention_call,
    plain_attention,
    random_pages,
    relative_error,
    with_poison_but_in,
    without_poison,
)

from pallas_kernels.kv_attention import mosaic_gpu as attention
from pallas_kernels.kv_attention.read import Pages, Read


@pytest.fixture(autouse=True)
def _emulated(monkeypatch):
    """With adders that cut off so early that 300 tokens are to them what 100,000 are to a GPU's:
    sums that drift show."""
    emulator.install(monkeypatch)
    emulator.replace(monkeypatch, "mma", emulator.cutting_mma(16))


def check(
    call,
    read: Read,
    config: attention.Config,
    strict: bool = False,
    blocks: int = 2,
    pages=None,
    page_log_sums: bool = False,
):
    """Against plain attention; tiles that are not listed are poisoned."""
    options = {"read": read, "sm_scale": 0.11, "strict": strict, "page_log_sums": page_log_sums}
    expected = plain_attention(without_poison(call), read, 0.11, strict, pages)
    if pages is not None:
        call = with_poison_but_in(call, pages)
    found = attention.kv_attention(*call, **options, pages=pages, config=config, blocks=blocks)
    assert found.out.dtype == jnp.float32
    assert relative_error(found.out, expected.out) <= 2e-3
    np.testing.assert_allclose(found.log_sum_exp, expected.log_sum_exp, atol=5e-3)
    if page_log_sums:
        np.testing.assert_allclose(found.page_log_sums.by_row, expected.page_log_sums, atol=5e-3)


@pytest.mark.parametrize("blocks", [1, 3, 40])
def test_partial_results_are_merged(blocks):
    """With more units than teams, about as many, and fewer."""
    call = attention_call(
        "int4", kv_heads=2, group=1, tokens=1, head_dim=64, group_size=32, tiles=9,
        positions=[20, 32 * 9, 130],
    )  # fmt: skip
    check(call, Read("int4"), attention.Config(1, 1, 1, 2), blocks=blocks)


@pytest.mark.parametrize(
    ("view", "tokens", "config", "strict"),
    [
        # One block of rows a warp; more blocks than warps; two warps with blocks of their own.
        ("int8", 4, attention.Config(1, 2, 2, 2, True), False),
        ("int8", 5, attention.Config(1, 2, 3, 2, True), True),
        ("int4", 8, attention.Config(1, 1, 2, 2, True), False),
        # Probabilities, too: a warp has half of the channels; one team, then two.
        ("int8", 4, attention.Config(1, 2, 2, 2, True, True), False),
        ("int4", 5, attention.Config(1, 2, 3, 2, True, True), True),
    ],
)
def test_queries_in_shared_memory(view, tokens, config, strict):
    call = attention_call(
        view, kv_heads=2, group=4, tokens=tokens, head_dim=32, group_size=64, tiles=4,
        positions=[260],
    )  # fmt: skip
    check(call, Read(view), config, strict)


def ragged_call(view: str, positions: list[int], **sizes):
    """Arguments of one size but for the queries: making them takes longer than what is tested."""
    return attention_call(
        view, kv_heads=2, head_dim=32, group_size=64, tiles=6, positions=positions, **sizes
    )


@pytest.mark.parametrize(
    ("view", "exact_tiles", "group", "config"),
    [
        ("int4", 0, 1, attention.Config(1, 2, 1, 2)),
        ("int4", 1, 2, attention.Config(1, 1, 1, 2)),
        ("int8", 0, 4, attention.Config(1, 2, 2, 2, True, True)),
    ],
)
def test_pages_of_a_list(view, exact_tiles, group, config):
    """Other ones for each head, with tile 0 and without; none, some, all, and places to spare."""
    call = ragged_call(view, [30, 64 * 7 + 5, 64 * 3], group=group, tokens=4)
    coded = np.asarray(call[2]) // 64
    assert coded.tolist() == [0, 6, 2]
    pages = random_pages(coded, 2, [0, 3, 2], 5)
    assert 0 not in np.asarray(pages.tiles)[1, 0, :3]
    check(call, Read(view, exact_tiles), config, blocks=3, pages=pages)


@pytest.mark.parametrize(
    ("view", "exact_tiles", "config"),
    [
        ("int8", 0, attention.Config(1, 2, 1, 2)),
        ("int4", 1, attention.Config(1, 2, 2, 2, True, True)),
    ],
)
def test_the_first_tiles_as_many_as_are_counted(view, exact_tiles, config):
    """With page log-sums; the buffer begins where the coded tokens end, not the counted ones."""
    call = ragged_call(view, [30, 64 * 7 + 5, 64 * 3], group=2, tokens=4)
    pages = Pages(None, jnp.array([0, 3, 1]))
    check(call, Read(view, exact_tiles), config, blocks=3, pages=pages, page_log_sums=True)


@pytest.mark.parametrize(
    ("exact_tiles", "group", "config", "blocks"),
    [
        (1, 1, attention.Config(1, 1, 1, 2), 2),
        (1, 3, attention.Config(1, 2, 1, 3), 5),
        (2, 4, attention.Config(1, 2, 2, 2, True), 1),
        (1, 4, attention.Config(1, 2, 2, 4, True, True), 2),
    ],
)
def test_first_tiles_read_with_both_planes(exact_tiles, group, config, blocks):
    """Of sequences that have none, as many, and more; a team may end or begin with one."""
    call = ragged_call("int4", [0, 64 * 2 + 3, 64 * 6], group=group, tokens=4)
    check(call, Read("int4", exact_tiles), config, strict=True, blocks=blocks)


@pytest.mark.parametrize(
    ("read", "tokens", "config"),
    [
        (Read("int8"), 2, attention.Config(1, 2, 1, 2)),
        (Read("int8"), 5, attention.Config(1, 2, 3, 2, True)),
        (Read("int8"), 8, attention.Config(1, 2, 4, 2, True, True)),
        (Read("int8"), 12, attention.Config(1, 2, 6, 2, True, True)),
        (Read("int8"), 19, attention.Config(1, 2, 5, 2, True, True)),
        (Read("int8"), 12, attention.Config(1, 2, 3, 2, True, True)),
        (Read("int4", 1), 3, attention.Config(1, 1, 2, 2)),
    ],
)
def test_page_log_sums(read, tokens, config):
    """From one to six blocks of rows a warp, and twice five and three, side by side; a reference
    that moves between tiles."""
    call = ragged_call(read.view, [260, 10, 64 * 4], group=4, tokens=tokens)
    q, cache, *lengths = call
    keys = cache.keys._replace(scale=cache.keys.scale.at[:, :, 1].multiply(3))
    call = (q, dataclasses.replace(cache, keys=keys), *lengths)
    check(call, read, config, page_log_sums=True)


@pytest.mark.parametrize(
    ("view", "tokens", "config"),
    [
        ("int8", 4, attention.Config(1, 2, 2, 3, True, True)),
        ("full", 2, attention.Config(1, 1, 1, 2)),
    ],
)
def test_copies_of_either_kind_bring_the_same(view, tokens, config):
    """Teams of two warps and of one; a buffer whose last rows are fewer than a unit."""
    call = attention_call(
        view, kv_heads=1, group=4, tokens=tokens, head_dim=32, group_size=64, tiles=3,
        positions=[200],
    )  # fmt: skip
    run = functools.partial(
        attention.kv_attention, *call, read=Read(view), sm_scale=0.1, strict=False,
        config=config, blocks=1,
    )  # fmt: skip
    for a, b in zip(run(bulk=True), run(bulk=False), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("head_dim", [32, 64])
def test_output_rounded_by_the_merge(head_dim):
    call = attention_call(
        "int4", kv_heads=1, group=1, tokens=1, head_dim=head_dim, group_size=32, tiles=1,
        positions=[20],
    )  # fmt: skip
    run = functools.partial(
        attention.kv_attention,
        *call,
        read=Read("int4"),
        sm_scale=0.1,
        strict=False,
        config=attention.Config(1, 1, 1, 2),
        blocks=1,
    )
    exact, rounded = run(), run(out_dtype=jnp.bfloat16)
    np.testing.assert_array_equal(exact[0].astype(jnp.bfloat16), rounded[0])
    np.testing.assert_array_equal(exact[1], rounded[1])
