"""Which kernels run on the device at hand, and for a model's shapes; where one does not, why."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache, Planes, QuantizedWeight, can_tile
from pallas_kernels.rope_append.heads import Heads
from quantspec_jax.dtypes import BFLOAT16
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.parameters import parameter_shapes
from quantspec_jax.weights.formats import DraftConfig
from quantspec_jax.weights.sizes import layer_formats

GROUP_SIZE = 128  # of the cache
VERIFIED = 5  # rows of a pass that verifies: γ = 4


def kernels_here(
    model: ModelConfig | None = None,
    draft: DraftConfig | None = None,
    dtype: np.dtype = BFLOAT16,
) -> dict[str, Any]:
    """`dispatch.described`; with a model its shapes decide, too, in `dtype`, a sequence at a time,
    with this draft (the default one)."""
    found = dispatch.described()
    if model is not None and dispatch.device() is not None:
        found["kernels"] = _of_model(model, draft or DraftConfig(), dtype)
    return found


def lines(found: dict[str, Any]) -> list[str]:
    """`kernels_here` for people: the device, the kernels that run, and a line for each reason."""
    device, reasons = found["name"], found["kernels"]
    if "compute_capability" in found:
        device += (
            f" (compute capability {found['compute_capability']}), {found['multiprocessors']} "
            f"multiprocessors, {found['shared_bytes'] >> 10} KiB of shared memory a block"
        )
    running = [name for name, reason in reasons.items() if reason is None]
    said = [device]
    if running:
        said.append(
            f"kernels: {', '.join(running)}; copies {found['copies']}, configurations "
            f"{found['configurations']}"
        )
    for reason in dict.fromkeys(reason for reason in reasons.values() if reason is not None):
        names = ", ".join(name for name, why in reasons.items() if why == reason)
        said.append(f"in XLA: {names}; {reason}")
    return said


def _of_model(model: ModelConfig, draft: DraftConfig, dtype: np.dtype) -> dict[str, str | None]:
    from pallas_kernels.add_rms_norm import mosaic_gpu as norm
    from pallas_kernels.logit_filter import mosaic_gpu as logit_filter
    from pallas_kernels.page_choice import mosaic_gpu as choice
    from pallas_kernels.quantize_pack import mosaic_gpu as quantize
    from pallas_kernels.rope_append import mosaic_gpu as rope

    h, k, d = model.num_heads, model.num_kv_heads, model.head_dim
    layer = _layer(k, d, dtype)
    q, kv = (_shape(1, VERIFIED, n, d, dtype=dtype) for n in (h, k))
    heads = Heads(q, kv, kv, (None,) * 3, (None,) * 2, (None,) * 2, 0.0, dtype)  # type: ignore[arg-type]
    votes = _shape(1, model.num_layers, k, -(-model.max_context // GROUP_SIZE))
    return {
        "add_rms_norm": norm.unsupported(_shape(1, model.hidden_size, dtype=dtype)),
        "int4_matmul": _product(model, draft, dtype),
        "kv_attention": _attention(q, layer),
        "logit_filter": logit_filter.unsupported(_shape(1, VERIFIED, model.vocab_size)),
        "page_choice": choice.choice_unsupported(votes),
        "quantize_pack": quantize.unsupported(kv, GROUP_SIZE),
        "rope_append": rope.unsupported(heads, layer),
    }


def _shape(*shape: int, dtype: Any = jnp.bfloat16) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _layer(k: int, d: int, dtype: np.dtype) -> LayerCache:
    """The shapes of a layer's cache with some tiles."""
    g, tiles = GROUP_SIZE, 64

    def planes(code: tuple[int, int], number: tuple[int, ...]) -> Planes:
        codes = _shape(1, k, tiles, *code, dtype=jnp.uint8)
        numbers = _shape(1, k, tiles, *number)
        return Planes(codes, codes, numbers, numbers)

    buffer = _shape(1, k, 2 * g, d, dtype=dtype)
    values = planes((d, g // 2), (-(-d // min(g, d)), g))
    return LayerCache(planes((g, d // 2), (d,)), values, buffer, buffer)


def _product(model: ModelConfig, draft: DraftConfig, dtype: np.dtype) -> str | None:
    """Of the first weight of the draft that the kernel cannot take."""
    from pallas_kernels.int4_matmul import mosaic_gpu

    x, shapes = _shape(1, 1, dtype=dtype), parameter_shapes(model)
    if dtype != BFLOAT16:
        return mosaic_gpu.unsupported(x, [])
    for name, stored in layer_formats(model, draft).items():
        if stored.bits == 16:
            continue
        inputs, outputs = shapes[f"{name}.kernel"].shape
        groups, half = -(-inputs // stored.group_size), stored.group_size // 2
        numbers = _shape(groups, outputs)
        packed = _shape(groups, half, outputs, dtype=jnp.uint8)
        weight = QuantizedWeight(packed, numbers, numbers)
        if not can_tile(weight):
            return mosaic_gpu.unsupported(x, [weight])
    return None


def _attention(q: Any, layer: LayerCache) -> str | None:
    """Of drafts, or of verifications."""
    from pallas_kernels.kv_attention import configs, mosaic_gpu

    for view, rows in (("int4", 1), ("int8", VERIFIED)):
        queries = _shape(1, rows, *q.shape[2:], dtype=q.dtype)
        shape = mosaic_gpu.shape_of(queries, layer, read=Read(view), sm_scale=1.0, strict=False)
        reason = mosaic_gpu.unsupported(shape, (q.dtype,))
        if reason is None and configs.choose(shape) is None:
            reason = "no configuration fits the shape into shared memory"
        if reason is not None:
            return reason
    return None
