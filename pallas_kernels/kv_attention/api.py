"""Attention of a pass of a few tokens over the hierarchical cache."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.kv_attention import xla
from pallas_kernels.kv_attention.read import Attended, Pages, Read, side_by_side
from pallas_kernels.layout import LayerCache
from pallas_kernels.shapes import Each, Queries, shaped


@shaped
def kv_attention(
    q: Queries,
    cache: LayerCache,
    quantized_length: Each,
    start: Each,
    *,
    read: Read,
    sm_scale: float,
    pages: Pages | None = None,
    page_log_sums: bool = False,
    strict: bool = False,
    ahead: bool = False,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> Attended:
    """Attend from S consecutive tokens to the planes and the full-precision buffer.

    The pass's own keys and values are in the buffer already, which is a ring: position p lies in
    slot p mod R, so slot j holds position q + ((j − q) mod R), q = quantized_length (the
    full-precision view has q = 0 and R beyond the last position: slot j holds position j). Row i of
    the pass has position start + i and sees positions up to its own (`strict`: up to the one
    before); slots whose position is beyond that hold anything.

    Args:
      q: [B, S, H, D] queries after RoPE.
      cache: the layer's, whole; without planes all tokens are in its buffer (the full-precision
        view).
      quantized_length: [B] int32, tokens read from the planes; a multiple of G.
      start: [B] int32, position of the pass's first token.
      read: what to read of the cache (`pallas_kernels.kv_attention.read.Read`).
      sm_scale: factor on the scores, 1/√D as a rule.
      pages: the tiles of the planes that are read; None: all that are coded. Page log-sums are
        given in a kernel where no list says which.
      page_log_sums: give those, too.
      strict: leave out the row's own position.
      ahead: the planes, the lengths and what `pages` says were so when the attention of another
        layer, which has been launched before this, began: the kernel may read them while what was
        launched since ends.
      out_dtype: of the output; with bf16 queries the kernel writes float32 or bfloat16.
      backend: `auto`, `mosaic_gpu` or `xla`. A pass of more rows than the kernel takes (256 query
        rows a key-value head, 128 of head_dim 256) is several launches.

    Returns:
      Output, log-sum-exp of the scores (−∞ and output 0 where a row sees nothing), and, where
      asked for, that of each page.
    """
    _check_pages(pages, cache)
    operands = (q, cache, quantized_length, start)
    options: dict[str, Any] = {"read": read, "sm_scale": sm_scale, "strict": strict}
    options |= {"pages": pages, "page_log_sums": page_log_sums}
    most = _most_tokens(q, cache, options, backend)
    if most < q.shape[1]:
        given = options | {"ahead": ahead, "out_dtype": out_dtype, "backend": backend}
        return in_parts(functools.partial(kv_attention, **given), *operands, most)
    if _mosaic_gpu(q, cache, options, backend):
        from pallas_kernels import ptx
        from pallas_kernels.kv_attention import configs, mosaic_gpu

        device, shape = dispatch.target(), mosaic_gpu.shape_of(q, cache, **options)
        config = configs.choose(shape)
        assert config is not None
        kernel = dispatch.shared(
            mosaic_gpu.kv_attention,
            (
                *("read", "sm_scale", "strict", "page_log_sums", "config", "out_dtype", "blocks"),
                *("bulk", "wgmma", "ahead"),
            ),
        )
        return kernel(
            *operands,
            **options,
            config=config,
            out_dtype=jnp.dtype(out_dtype),
            blocks=device.multiprocessors,
            bulk=device.generation.bulk_copies,
            wgmma=device.generation.wgmma,
            ahead=ahead and ptx.begins_early(),
        )
    found = dispatch.shared(xla.kv_attention, ("read", "sm_scale", "strict", "page_log_sums"))(
        *operands, **options
    )
    return found._replace(out=found.out.astype(out_dtype))


def in_parts(
    attend: Callable[..., Attended],
    q: jax.Array,
    cache: LayerCache,
    quantized_length: jax.Array,
    start: jax.Array,
    most: int,
) -> Attended:
    """`attend` to parts of the pass, of up to `most` tokens each, as even as they can be."""
    parts = -(-q.shape[1] // most)
    each = -(-q.shape[1] // parts)
    found = [
        attend(q[:, i : i + each], cache, quantized_length, start + i)
        for i in range(0, q.shape[1], each)
    ]
    out, log_sum_exp = (jnp.concatenate(x, 1) for x in zip(*(x[:2] for x in found), strict=True))
    sums = [x.page_log_sums for x in found if x.page_log_sums is not None]
    return Attended(out, log_sum_exp, side_by_side(sums) if sums else None)


def _most_tokens(q: jax.Array, cache: LayerCache, options: dict[str, Any], backend: str) -> int:
    """How many tokens of the pass a launch takes: all where the kernel does not run anyway."""
    if backend == "xla" or dispatch.device() is None:
        return q.shape[1]
    from pallas_kernels.kv_attention import mosaic_gpu

    b, s, h, d = q.shape
    most = max(1, mosaic_gpu.most_rows(d) // (h // cache.key_buffer.shape[1]))
    part = jax.ShapeDtypeStruct((b, min(s, most), h, d), q.dtype)
    possible = _reason(part, cache, options) is None
    return most if possible else s


def _check_pages(pages: Pages | None, cache: LayerCache) -> None:
    """A list for each sequence and key-value head, of tiles that the cache has, and a count."""
    if pages is None:
        return
    b, k = cache.key_buffer.shape[:2]
    if cache.keys is None:
        raise ValueError("pages is a list; allowed: None, since the cache has no tiles")
    listed = (b, k, 1) if pages.tiles is None else pages.tiles.shape
    if listed[:2] != (b, k) or len(listed) != 3 or not listed[2] or pages.count.shape != (b,):
        shapes = (listed, pages.count.shape)
        raise ValueError(f"pages are of shapes {shapes}; allowed: [{b}, {k}, P ≥ 1] and [{b}]")


def _mosaic_gpu(q: jax.Array, cache: LayerCache, options: dict[str, Any], backend: str) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "kv_attention", None)
    return dispatch.use_mosaic_gpu(backend, "kv_attention", _reason(q, cache, options))


def _reason(q: Any, cache: LayerCache, options: dict[str, Any]) -> str | None:
    """Why the kernel cannot do a call, or None."""
    from pallas_kernels.kv_attention import configs, mosaic_gpu

    shape = mosaic_gpu.shape_of(q, cache, **options)
    reason = mosaic_gpu.unsupported(shape, (q.dtype, cache.key_buffer.dtype))
    if reason is None and configs.choose(shape) is None:
        return "no configuration fits the shape into shared memory"
    return reason
