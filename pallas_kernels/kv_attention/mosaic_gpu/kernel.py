"""The call: which shape it specializes the kernel to, whether it can, and the two launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import devices, ptx
from pallas_kernels.kv_attention.mosaic_gpu.body import attention_body
from pallas_kernels.kv_attention.mosaic_gpu.merge import (
    WARP_BYTES,
    merge_blocks,
    merge_body,
    merge_warpgroups,
)
from pallas_kernels.kv_attention.mosaic_gpu.pages import shape_of_sums
from pallas_kernels.kv_attention.mosaic_gpu.plan import Config, Plan, Shape
from pallas_kernels.kv_attention.read import Attended, PageLogSums, Pages, Read
from pallas_kernels.layout import LayerCache


def shape_of(
    q: Any,
    cache: LayerCache,
    *,
    read: Read,
    sm_scale: float,
    strict: bool,
    pages: Pages | None = None,
    page_log_sums: bool = False,
) -> Shape:
    """The shape that a call specializes the kernel to."""
    b, tokens, h, d = q.shape
    kv_heads, buffer_length = cache.key_buffer.shape[1:3]
    tiles, group_size = (0, 128) if cache.keys is None else cache.keys.upper.shape[2:4]
    return Shape(
        batch=b,
        kv_heads=kv_heads,
        group=h // kv_heads,
        tokens=tokens,
        head_dim=d,
        group_size=group_size,
        tiles=tiles,
        buffer_length=buffer_length,
        view="full" if cache.keys is None else read.view,
        strict=strict,
        sm_scale=float(sm_scale),
        exact_tiles=0 if cache.keys is None else read.exact_tiles,
        places=None if pages is None or pages.tiles is None else pages.tiles.shape[2],
        counted=pages is not None,
        page_log_sums=page_log_sums and cache.keys is not None,
    )


def most_rows(head_dim: int) -> int:
    """Query rows of a key-value head that a launch takes."""
    return 256 if head_dim <= 128 else 128


def unsupported(shape: Shape, dtypes: Sequence[Any]) -> str | None:
    """Why the kernel cannot do a call, or None."""
    if any(d != jnp.bfloat16 for d in dtypes):
        return "queries and buffer have to be bfloat16"
    if shape.head_dim % 32 or shape.head_dim > 256:
        return f"head_dim is {shape.head_dim}; it takes multiples of 32 up to 256"
    if shape.planes and (shape.group_size % 32 or shape.buffer_length % 64):
        return f"group_size is {shape.group_size}; it takes multiples of 32"
    most = most_rows(shape.head_dim)
    if shape.rows > most:
        return f"a key-value head has {shape.rows} query rows; it takes up to {most}"
    if shape.listed and shape.page_log_sums:
        return "it gives page log-sums only where no list says which pages it reads"
    return None


def kv_attention(
    q: jax.Array,
    cache: LayerCache,
    quantized_length: jax.Array,
    start: jax.Array,
    *,
    read: Read,
    sm_scale: float,
    strict: bool,
    pages: Pages | None = None,
    page_log_sums: bool = False,
    config: Config,
    out_dtype: Any = jnp.float32,
    blocks: int = devices.DEFAULT.multiprocessors,
    bulk: bool = True,
    wgmma: bool = True,
    ahead: bool = False,
) -> Attended:
    """See `pallas_kernels.kv_attention.api.kv_attention`; bf16 queries and buffer."""
    asked: dict[str, Any] = {"pages": pages, "page_log_sums": page_log_sums}
    shape = shape_of(q, cache, read=read, sm_scale=sm_scale, strict=strict, **asked)
    plan = Plan(shape, config, blocks, bulk, wgmma, ahead)
    operands = [quantized_length, start, q, cache.key_buffer, cache.value_buffer]
    planes = [part for part in (cache.keys, cache.values) if part is not None]
    for part in planes:
        operands += [part.upper, part.lower][: shape.planes]
        operands += [part.scale, part.minimum]
    operands += [part.lower for part in planes] if shape.exact_tiles else []
    counts = [] if pages is None else [pages.count]
    operands += [] if pages is None or pages.tiles is None else [pages.tiles]
    operands += counts
    results: list[tuple[int, ...]]
    results = [(plan.partials, shape.rows, shape.head_dim), (plan.partials, shape.rows, 2)]
    results += [shape_of_sums(plan)] if shape.page_log_sums else []
    partial, statistics, *sums = ptx.kernel(
        attention_body(plan),
        [jax.ShapeDtypeStruct(x, jnp.float32) for x in results],
        name=f"kv_attention_{shape.view}",
        blocks=blocks,
        warpgroups=config.warpgroups,
        shared_bytes=plan.shared_bytes,
        ahead=(0, 1, *range(5, len(operands))) if ahead else (),  # all but queries and buffer
    )(*operands)
    merge = ptx.kernel(
        merge_body(plan, out_dtype),
        [
            jax.ShapeDtypeStruct(q.shape, out_dtype),
            jax.ShapeDtypeStruct(q.shape[:3], jnp.float32),
        ],
        name="kv_attention_merge",
        blocks=merge_blocks(plan),
        warpgroups=merge_warpgroups(plan),
        shared_bytes=4 * merge_warpgroups(plan) * WARP_BYTES,
        ahead=range(2 + len(counts)),  # attention lets it begin when it has them
    )
    output, log_sum_exp = merge(quantized_length, start, *counts, partial, statistics)
    found = None
    if page_log_sums:  # there may be no tiles
        parts = sums[0] if sums else jnp.zeros((shape.batch, shape.kv_heads, 0, 1, shape.rows))
        written = quantized_length // shape.group_size if pages is None else pages.count
        found = PageLogSums(parts, written, shape.tokens)
    return Attended(output, log_sum_exp, found)
