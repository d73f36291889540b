"""Attention of a pass of a few tokens over the hierarchical cache."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels import dispatch
from pallas_kernels.kv_attention import xla
from pallas_kernels.layout import Planes


def kv_attention(
    q: jax.Array,
    keys: Planes | None,
    values: Planes | None,
    key_buffer: jax.Array,
    value_buffer: jax.Array,
    quantized_length: jax.Array,
    start: jax.Array,
    *,
    view: str,
    sm_scale: float,
    strict: bool = False,
    out_dtype: Any = jnp.float32,
    backend: str = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attend from S consecutive tokens to the planes and the full-precision buffer.

    The pass's own keys and values are in the buffer already, which is a ring: position p lies in
    slot p mod R, so slot j holds position q + ((j − q) mod R), q = quantized_length (the
    full-precision view has q = 0 and R beyond the last position: slot j holds position j). Row i of
    the pass has position start + i and sees positions up to its own (`strict`: up to the one
    before); slots whose position is beyond that hold anything.

    Args:
      q: [B, S, H, D] queries after RoPE.
      keys, values: planes of T/G tiles (`pallas_kernels.layout.Planes`); None: no planes, all
        tokens are in the buffer (the full-precision view).
      key_buffer, value_buffer: [B, K, R, D] full-precision tokens; R = 2G where there are planes.
      quantized_length: [B] int32, tokens read from the planes; a multiple of G.
      start: [B] int32, position of the pass's first token.
      view: `int8` reads both planes, `int4` the upper one alone; `full` goes with no planes.
      sm_scale: factor on the scores, 1/√D as a rule.
      strict: leave out the row's own position.
      out_dtype: of the output; with bf16 queries the kernel writes float32 or bfloat16.
      backend: `auto`, `mosaic_gpu` or `xla`.

    Returns:
      [B, S, H, D] output and [B, S, H] float32 log-sum-exp of the scores (−∞ and output 0
      where a row sees nothing).
    """
    operands = (q, keys, values, key_buffer, value_buffer, quantized_length, start)
    options: dict[str, Any] = {"view": view, "sm_scale": sm_scale, "strict": strict}
    if _mosaic_gpu(q, keys, key_buffer, view, sm_scale, strict, backend):
        from pallas_kernels.kv_attention import configs, mosaic_gpu

        shape = mosaic_gpu.shape_of(q, keys, key_buffer, **options)
        config = configs.choose(shape)
        assert config is not None
        kernel = dispatch.shared(
            mosaic_gpu.kv_attention,
            ("view", "sm_scale", "strict", "config", "out_dtype", "blocks"),
        )
        return kernel(
            *operands,
            **options,
            config=config,
            out_dtype=jnp.dtype(out_dtype),
            blocks=dispatch.multiprocessors(),
        )
    out, log_sum_exp = xla.kv_attention(*operands, **options)
    return out.astype(out_dtype), log_sum_exp


def _mosaic_gpu(
    q: jax.Array,
    keys: Planes | None,
    key_buffer: jax.Array,
    view: str,
    sm_scale: float,
    strict: bool,
    backend: str,
) -> bool:
    """Whether the Pallas kernel takes the call. CUDA code is imported only where it can."""
    if backend == "xla" or dispatch.device() is None:
        return dispatch.use_mosaic_gpu(backend, "kv_attention", None)
    from pallas_kernels.kv_attention import configs, mosaic_gpu

    shape = mosaic_gpu.shape_of(q, keys, key_buffer, view=view, sm_scale=sm_scale, strict=strict)
    reason = mosaic_gpu.unsupported(shape, (q.dtype, key_buffer.dtype))
    if reason is None and configs.choose(shape) is None:
        reason = "no configuration fits the shape into shared memory"
    return dispatch.use_mosaic_gpu(backend, "kv_attention", reason)
