"""`quantspec bench kernels`: each kernel beside its peers, on random data.

Times are those of the kernels on the device (medians, from the profiler); bytes are codes, scales
and minima, each once; inputs are rotated so that the L2 cache cannot hold them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import dispatch, timing, tuned
from pallas_kernels.bf16_matmul import api as bf16
from pallas_kernels.bf16_matmul import xla as bf16_reference
from pallas_kernels.int4_matmul import api as matmul
from pallas_kernels.int4_matmul import xla as matmul_reference
from pallas_kernels.kv_attention import api as attention
from pallas_kernels.kv_attention import xla as attention_reference
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import LayerCache, Planes, QuantizedWeight, tile, untile
from pallas_kernels.products.append import Append
from pallas_kernels.products.around import NOTHING, PLAIN, Around, apart
from pallas_kernels.quantize_pack import api as quantize
from quantspec_jax.bench import flashinfer, record
from quantspec_jax.checks import require
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.models.presets import PRESETS

KERNELS = ("attention", "matmul", "bf16", "quantize")
TUNED_ROWS = (1, 8, 16)  # a configuration serves up to so many
GROUP_SIZE = 128  # of the cache
# GB/s that were measured before: a run in which less is measured is not judged by less.
READ_CEILING = {"NVIDIA H200": 4390.0}
COPY_CEILING = {"NVIDIA H200": 4190.0}
ROTATED_BYTES = 400e6  # several times any L2 cache


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What is measured.

    attention  (view, context, kv heads, query tokens); "ragged": a batch of 16 lengths up to the
               context
    matmul     name → input channels, outputs of each weight of the pass
    group      input channels that share a scale of a weight
    tied       whether the lm_head is the embedding [N, Kin]
    qk_norm    whether queries and keys are normed: then RoPE is no part of the products' launch
    """

    heads: int
    head_dim: int
    group: int
    attention: tuple[tuple[str, int, int, int], ...]
    matmul: dict[str, tuple[int, tuple[int, ...]]]
    tied: bool = False
    qk_norm: bool = False

    @property
    def appended(self) -> int | None:
        """head_dim, where q, k and v are finished in the launch of their products."""
        return None if self.qk_norm else self.head_dim


ATTENTION = (
    ("int4", 131072, 32, 1),
    ("int4", 32768, 32, 1),
    ("int4", 131072, 8, 1),
    ("int8", 131072, 32, 5),
    ("int8", 131072, 32, 8),
    ("int8", 131072, 8, 8),
    ("int8", 131072, 32, 16),
    ("int8", 131072, 8, 16),
    ("ragged", 32768, 32, 1),
    ("full", 131072, 32, 1),
)
MATMUL = {
    "llama-2-7b q, k, v": (4096, (4096, 4096, 4096)),
    "llama-2-7b o": (4096, (4096,)),
    "llama-2-7b gate, up": (4096, (11008, 11008)),
    "llama-2-7b down": (11008, (4096,)),
    "llama-3-8b q, k, v": (4096, (4096, 1024, 1024)),
    "llama-3-8b gate, up": (4096, (14336, 14336)),
    "llama-3-8b down": (14336, (4096,)),
}
LISTED = Shapes(32, 128, 128, ATTENTION, MATMUL)


def shapes_of(name: str, model: ModelConfig, context: int, group: int) -> Shapes:
    """Those of a model: drafts, verifications of γ = 4 and plain decoding at `context`."""
    e, f, d = model.hidden_size, model.intermediate_size, model.head_dim
    queries, keys = model.num_heads * d, model.num_kv_heads * d
    passes = (("int4", 1), ("int8", 5), ("full", 1))
    return Shapes(
        model.num_heads,
        d,
        group,
        tuple((view, context, model.num_kv_heads, tokens) for view, tokens in passes),
        {
            f"{name} q, k, v": (e, (queries, keys, keys)),
            f"{name} o": (queries, (e,)),
            f"{name} gate, up": (e, (f, f)),
            f"{name} down": (f, (e,)),
            f"{name} lm_head": (e, (model.vocab_size,)),
        },
        model.tie_embeddings,
        model.qk_norm,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `quantspec bench kernels`."""
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), help="shapes of this model (a list of shapes)"
    )
    parser.add_argument(
        "--context", type=int, default=32768, metavar="N", help="of the preset's rows (32768)"
    )
    parser.add_argument(
        "--group", type=int, default=64, metavar="N", help="of the preset's draft weights (64)"
    )
    parser.add_argument("--kernel", choices=KERNELS, nargs="+", default=list(KERNELS))
    parser.add_argument(
        "--view",
        choices=("int4", "int8", "full", "ragged"),
        nargs="+",
        default=["int4", "int8", "full", "ragged"],
        help="rows of attention that read these views (ragged: int4, a batch of 16 lengths)",
    )
    parser.add_argument(
        "--share",
        type=float,
        nargs="+",
        default=[1.0],
        metavar="X",
        help="parts of the pages that attention reads, each head other ones, scattered (1: all)",
    )
    parser.add_argument(
        "--exact-tiles",
        type=int,
        default=0,
        metavar="N",
        help="tiles that a draft reads with both planes (0)",
    )
    parser.add_argument(
        "--page-log-sums",
        action="store_true",
        help="let attention that reads all pages give their log-sums, too",
    )
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[1, 8], metavar="N", help="of products (1 8)"
    )
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help='products whose name holds it, such as "gate, up"'
    )
    parser.add_argument(
        "--around",
        action="store_true",
        help="products with the norm, SiLU and sum that stand around them in a layer",
    )
    parser.add_argument("--no-peers", action="store_true", help="leave out the other kernels")
    parser.add_argument(
        "--tune",
        choices=("attention", "matmul", "bf16"),
        nargs="+",
        default=[],
        help="measure configurations of these first, and keep the best in the device's file",
    )
    parser.add_argument("--output", metavar="FILE", help="write the run as JSON, row by row")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure, and return the rows of the recorded run."""
    for share in args.share:
        require(0 < share <= 1, "--share", share, "numbers in (0, 1]")
    require(args.exact_tiles >= 0, "--exact-tiles", args.exact_tiles, "an integer ≥ 0")
    if dispatch.device() is None:
        raise NotImplementedError(
            "bench kernels measures CUDA kernels: it needs a CUDA device of compute capability 8.0"
        )
    shapes = LISTED
    if args.preset:
        shapes = shapes_of(args.preset, PRESETS[args.preset], args.context, args.group)
    if args.only:
        named = [name for text in args.only for name in shapes.matmul if text in name]
        require(bool(named), "only", args.only, f"parts of {', '.join(shapes.matmul)}")
        products = {name: shapes.matmul[name] for name in named}
        shapes = dataclasses.replace(shapes, matmul=products)
    ceilings = measured_ceilings()
    rows: list[dict[str, Any]] = []
    measures = {"attention": _attention, "matmul": _matmul, "bf16": _bf16}
    measures["quantize"] = _quantize
    rates = {f"{name}_ceiling_gb_per_second": rate for name, rate in ceilings.items()}
    command = record.command("quantspec bench kernels", args)
    for name in args.kernel:
        for row in measures[name](shapes, ceilings, args):
            print(_line(row), file=sys.stderr, flush=True)
            rows.append(row)
            if args.output:
                record.write(Path(args.output), command, rows, **rates)
    device = {"device": record.device_name(), "versions": record.versions()}
    return {**device, **rates, "rows": rows}


def _line(row: dict[str, Any]) -> str:
    peers = ", ".join(f"{k} {v:.4f}" for k, v in row["peers"].items())
    return (
        f"{row['kernel']} {row['context']} kv {row['kv_heads']} q {row['query_tokens']}"
        f"{_asked(row)}: "
        f"{row['milliseconds']:.4f} ms {row['percent_of_ceiling']:.1f}% "
        f"error {row['error']:.1e} ({peers})"
    )


def _asked(row: dict[str, Any]) -> str:
    """What attention was asked for beside the usual."""
    share, exact = row.get("share", 1), row.get("exact_tiles", 0)
    words = [f"{share:g} of the pages"] * (share != 1) + [f"{exact} exact"] * bool(exact)
    words += ["page log-sums"] * bool(row.get("page_log_sums"))
    return "".join(f", {x}" for x in words)


def _row(
    kernel: str, seconds: float, num_bytes: float, ceiling: float, **more: Any
) -> dict[str, Any]:
    rate = num_bytes / seconds / 1e9
    return {
        "kernel": kernel,
        "context": None,
        "kv_heads": None,
        "query_tokens": None,
        "milliseconds": seconds * 1e3,
        "bytes": int(num_bytes),
        "gb_per_second": rate,
        "percent_of_ceiling": 100 * rate / ceiling,
        **more,
    }


def measured_ceilings() -> dict[str, float]:
    """GB/s of reading and of copying, measured in this run."""
    x = jax.random.bits(jax.random.key(0), (1 << 29,), jnp.uint32)
    name = dispatch.target().name
    read = x.nbytes / timing.device_seconds(jax.jit(lambda x: jnp.max(x)), [(x,)], 5) / 1e9
    copied = 2 * x.nbytes / timing.device_seconds(jax.jit(lambda x: x ^ 1), [(x,)], 5) / 1e9
    return {
        "read": max(read, READ_CEILING.get(name, 0.0)),
        "copy": max(copied, COPY_CEILING.get(name, 0.0)),
    }


def _error(found: Any, expected: Any) -> float:
    """‖found − expected‖ / ‖expected‖ over all arrays."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    off = sum(float(jnp.sum((a.astype(jnp.float32) - b) ** 2)) for a, b in pairs)
    return math.sqrt(off / sum(float(jnp.sum(b.astype(jnp.float32) ** 2)) for _, b in pairs))


def _sets(num_bytes: float) -> int:
    return max(2, math.ceil(ROTATED_BYTES / num_bytes))


def random_planes(
    key: jax.Array, batch: int, kv_heads: int, tokens: int, head_dim: int, values: bool
) -> Planes:
    """Planes of random codes, with the scales and minima of numbers of unit variance."""
    d, g = head_dim, GROUP_SIZE
    lead = (batch, kv_heads, tokens // g)
    code = (*lead, d, g // 2) if values else (*lead, g, d // 2)
    number = (*lead, -(-d // min(g, d)), g) if values else (*lead, d)
    keys = jax.random.split(key, 4)
    return Planes(
        jax.random.bits(keys[0], code, jnp.uint8),
        jax.random.bits(keys[1], code, jnp.uint8),
        (0.3 + 0.1 * jax.random.uniform(keys[2], number)).astype(jnp.float16),
        (-2.3 - 0.7 * jax.random.uniform(keys[3], number)).astype(jnp.float16),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _attention(shapes: Shapes, ceilings: dict[str, float], args: argparse.Namespace) -> Any:
    peers: dict[tuple[int, int], dict[str, float]] = {}
    for view, context, kv_heads, tokens in shapes.attention:
        if view not in args.view:
            continue
        lengths = [context]
        name = {"int4": "draft attention", "int8": "verify attention"}.get(view, "bf16 attention")
        if view == "ragged":
            lengths = [int(x) // 128 * 128 for x in np.linspace(1024, context, 16)]
            name, view = "draft attention, 16 ragged sequences", "int4"
        here = peers.get((context, kv_heads), {}) if len(lengths) == 1 else {}
        if not args.no_peers and not here and len(lengths) == 1:
            here = peers[context, kv_heads] = _attention_peers(shapes, context, kv_heads)
        sizes = (shapes.heads, shapes.head_dim, kv_heads, tokens)
        for share in args.share:
            if share == 1 or view != "full":
                yield _attention_row(
                    name, view, context, sizes, lengths, share, ceilings, here, args
                )


def _attention_row(
    name: str,
    view: str,
    context: int,
    sizes: tuple[int, int, int, int],
    lengths: Sequence[int],
    share: float,
    ceilings: dict[str, float],
    peers: dict[str, float],
    args: argparse.Namespace,
) -> dict[str, Any]:
    heads, head_dim, kv_heads, tokens = sizes
    batch, full = len(lengths), view == "full"
    read = Read(view, args.exact_tiles if view == "int4" else 0)
    log_sums = args.page_log_sums and share == 1 and not full
    counts = [math.ceil(share * n / GROUP_SIZE) for n in lengths]
    if full:
        num_bytes = 4.0 * sum(lengths) * kv_heads * head_dim
    else:
        num_bytes = attention_reference.ideal_bytes(
            view, GROUP_SIZE * sum(counts), kv_heads, head_dim, GROUP_SIZE
        )
        exact = sum(min(read.exact_tiles, n) for n in counts)
        num_bytes += exact * GROUP_SIZE * head_dim * kv_heads  # half a byte of key and of value
    quantized = jnp.array([0] * batch if full else lengths, jnp.int32)
    start = jnp.array(lengths if full else [n + GROUP_SIZE + 9 for n in lengths], jnp.int32)
    slots = context + 16 if full else 2 * GROUP_SIZE
    make = jax.jit(random_planes, static_argnums=(1, 2, 3, 4, 5))
    calls = []
    for i in range(_sets(num_bytes)):
        keys = jax.random.split(jax.random.key(i), 5)
        planes: list[Any] = [
            None if full else make(keys[j], batch, kv_heads, context, head_dim, bool(j))
            for j in range(2)
        ]
        buffers = [_normal(keys[2 + j], (batch, kv_heads, slots, head_dim)) for j in range(2)]
        q = _normal(keys[4], (batch, tokens, heads, head_dim))
        pages = None if share == 1 else scattered_pages(i, lengths, kv_heads, counts)
        calls.append((q, LayerCache(*planes, *buffers), quantized, start, pages))

    tunes = "attention" in args.tune
    times = _tune_attention([call[:4] for call in calls], view) if tunes else {}

    def attend(*call: Any, backend: str = "mosaic_gpu") -> attention.Attended:
        *operands, pages = call
        options: dict[str, Any] = {"sm_scale": head_dim**-0.5, "page_log_sums": log_sums}
        return attention.kv_attention(*operands, pages=pages, read=read, **options, backend=backend)

    seconds = timing.device_seconds(jax.jit(attend), calls)
    with jax.default_matmul_precision("highest"):
        expected = jax.jit(functools.partial(attend, backend="xla"))(*calls[0])[0]
    return _row(
        name,
        seconds,
        num_bytes,
        ceilings["read"],
        context=context,
        kv_heads=kv_heads,
        query_tokens=tokens,
        share=share,
        exact_tiles=read.exact_tiles,
        page_log_sums=log_sums,
        **times,
        peers=peers,
        error=_error(jax.jit(attend)(*calls[0])[0], expected),
    )


def scattered_pages(
    seed: int, lengths: Sequence[int], kv_heads: int, counts: Sequence[int]
) -> attention.Pages:
    """The first page and others at random, `counts` of each sequence, other ones for each head."""
    rng = np.random.default_rng(seed)
    tiles = np.zeros((len(lengths), kv_heads, max(counts)), np.int32)
    for b, k in np.ndindex(tiles.shape[:2]):
        others = 1 + rng.permutation(lengths[b] // GROUP_SIZE - 1)[: counts[b] - 1]
        tiles[b, k, 1 : counts[b]] = np.sort(others)
    return attention.Pages(jnp.asarray(tiles), jnp.asarray(counts, jnp.int32))


def _attention_peers(shapes: Shapes, context: int, kv_heads: int) -> dict[str, float]:
    """Milliseconds of one query token: JAX's own attention over a bf16 cache, and FlashInfer's."""
    calls = []
    for i in range(2):
        keys = jax.random.split(jax.random.key(i), 3)
        cache = (1, context, kv_heads, shapes.head_dim)
        q = _normal(keys[0], (1, 1, shapes.heads, shapes.head_dim))
        calls.append((q, _normal(keys[1], cache), _normal(keys[2], cache)))
    found = {}
    for implementation in ("cudnn", "xla"):
        fn = jax.jit(functools.partial(jax.nn.dot_product_attention, implementation=implementation))
        found[f"{implementation} bf16, 1 query"] = 1e3 * timing.device_seconds(fn, calls)
    del calls
    return found | flashinfer.milliseconds(context, shapes.heads, kv_heads, shapes.head_dim)


def _tune(
    kernel: str,
    key: str,
    candidates: Sequence[Any],
    measure: Callable[[Any], float],
    others: float = math.inf,
) -> dict[str, float]:
    """Measure configurations (frozen dataclasses, the rule's first) and write the fastest to the
    file of the device, unless what else there is takes `others` seconds, and no longer.

    Returns what a row says of it: milliseconds of the rule's choice and of the fastest.
    """
    found = {}
    for config in candidates:
        found[config] = measure(config)
        print(f"  {config} {found[config] * 1e6:.2f} µs", file=sys.stderr, flush=True)
    best = min(found, key=found.__getitem__)
    if found[best] < others:
        tuned.save(dispatch.target().name, kernel, {key: vars(best)})
    else:
        print(f"  not recorded: XLA takes {others * 1e6:.2f} µs", file=sys.stderr, flush=True)
    times = {"rule_milliseconds": found[candidates[0]], "tuned_milliseconds": found[best]}
    if others < math.inf:
        times["xla_milliseconds"] = others
    return {name: 1e3 * seconds for name, seconds in times.items()}


def _tune_attention(calls: Sequence[Any], view: str) -> dict[str, float]:
    from pallas_kernels.kv_attention import configs, mosaic_gpu

    options: dict[str, Any] = {
        "read": Read(view),
        "sm_scale": calls[0][0].shape[-1] ** -0.5,
        "strict": False,
    }
    shape = mosaic_gpu.shape_of(*calls[0][:2], **options)

    def measure(config: mosaic_gpu.Config) -> float:
        device = dispatch.target()
        fn = jax.jit(
            lambda *call: mosaic_gpu.kv_attention(
                *call,
                **options,
                config=config,
                blocks=device.multiprocessors,
                bulk=device.generation.bulk_copies,
                wgmma=device.generation.wgmma,
            )
        )
        return timing.device_seconds(fn, calls)

    return _tune(configs.KERNEL, configs.key(shape), configs.diverse(shape), measure)


def random_weight(key: jax.Array, inputs: int, outputs: int, group: int) -> QuantizedWeight:
    """An asymmetric weight of random codes."""
    groups = -(-inputs // group)
    keys = jax.random.split(key, 3)
    return QuantizedWeight(
        jax.random.bits(keys[0], (groups, group // 2, outputs), jnp.uint8),
        (0.01 + 0.01 * jax.random.uniform(keys[1], (groups, outputs))).astype(jnp.bfloat16),
        (-0.1 - 0.05 * jax.random.uniform(keys[2], (groups, outputs))).astype(jnp.bfloat16),
    )


def _around(
    name: str, inputs: int, outputs: Sequence[int], rows: int, head_dim: int | None
) -> Around:
    """What stands around a product of this name in a layer."""
    shapes = (inputs,), (1, rows, outputs[0])
    norm, residual = (_normal(jax.random.key(3), x) for x in shapes)
    if name.endswith((" o", " down")):
        return Around(residual=residual)
    around = Around(norm=norm, eps=1e-6, gated=name.endswith("gate, up"))
    if head_dim is None or not name.endswith("q, k, v"):
        return around
    return dataclasses.replace(around, append=_append(outputs, rows, head_dim))


def _append(outputs: Sequence[int], rows: int, head_dim: int) -> Append:
    """What finishes q, k and v of a sequence, with biases."""
    slots = 4 * TUNED_ROWS[-1]
    buffer = jnp.zeros((1, outputs[1] // head_dim, slots, head_dim), jnp.bfloat16)
    biases = [_normal(jax.random.key(5 + i), (n,)) for i, n in enumerate(outputs)]
    angles = jax.random.normal(jax.random.key(8), (1, rows, 1, head_dim // 2))
    angles = jnp.concatenate([angles, angles], -1)
    cache = LayerCache(None, None, buffer, buffer)
    tables, start = (jnp.cos(angles), jnp.sin(angles)), jnp.array([3], jnp.int32)
    return Append((biases[0], biases[1], biases[2]), tables, cache, start, start, ahead=True)


def _matmul(shapes: Shapes, ceilings: dict[str, float], args: argparse.Namespace) -> Any:
    """Products with 4-bit weights."""
    from pallas_kernels.int4_matmul import configs, mosaic_gpu

    make = jax.jit(lambda *of: tile(random_weight(*of)), static_argnums=(1, 2, 3))
    for name, (inputs, outputs) in shapes.matmul.items():
        num_bytes = sum(outputs) * inputs * (0.5 + 4 / shapes.group)
        weights = [
            [
                make(jax.random.key(10 * i + j), inputs, n, shapes.group)
                for j, n in enumerate(outputs)
            ]
            for i in range(_sets(num_bytes))
        ]

        def dense(h: jax.Array, weights: Sequence[Any]) -> list[jax.Array]:
            whole = (matmul_reference.dequantize(untile(w)) for w in weights)
            return [jnp.matmul(h.astype(jnp.float32), w[: h.shape[-1]]) for w in whole]

        def tune(calls: Sequence[Any]) -> dict[str, float]:
            shape = mosaic_gpu.shape_of(*calls[0])
            bulk = dispatch.target().generation.bulk_copies
            run = functools.partial(mosaic_gpu.int4_matmuls, bulk=bulk)
            return _tune_products(configs, shape, run, calls)

        run = functools.partial(matmul.int4_matmuls, backend="mosaic_gpu")
        for rows in args.rows:
            sizes = (num_bytes, rows, shapes.appended)
            products = _Products(
                f"int4 matmul, {name}", configs.KERNEL, weights, *sizes, run, dense
            )
            peer = None if args.no_peers else functools.partial(_bf16_peer, transposed=False)
            yield products.row(
                name, inputs, outputs, ceilings, args, tune if "matmul" in args.tune else None, peer
            )


def _bf16(shapes: Shapes, ceilings: dict[str, float], args: argparse.Namespace) -> Any:
    """Products with bfloat16 weights, beside XLA's own (cuBLAS)."""
    from pallas_kernels.bf16_matmul import configs, mosaic_gpu

    for name, (inputs, outputs) in shapes.matmul.items():
        tied = name.endswith("lm_head") and shapes.tied
        num_bytes = 2.0 * sum(outputs) * inputs
        weights = [
            [
                _normal(jax.random.key(10 * i + j), (n, inputs) if tied else (inputs, n))
                for j, n in enumerate(outputs)
            ]
            for i in range(_sets(num_bytes))
        ]

        def dense(h: jax.Array, weights: Sequence[Any], tied: bool = tied) -> list[jax.Array]:
            wide = h.astype(jnp.float32)
            return [bf16_reference.matmul(wide, w, tied, jnp.float32) for w in weights]

        def tune(calls: Sequence[Any], tied: bool = tied) -> dict[str, float]:
            x, first, around = calls[0]
            shape = mosaic_gpu.shape_of(x, first, around, tied)
            run = functools.partial(
                mosaic_gpu.bf16_matmuls,
                transposed=tied,
                multiprocessors=dispatch.target().multiprocessors,
            )
            alone = functools.partial(bf16.bf16_matmuls, transposed=tied, backend="xla")
            others = timing.device_seconds(jax.jit(alone), calls)
            return _tune_products(configs, shape, run, calls, others)

        run = functools.partial(bf16.bf16_matmuls, transposed=tied, backend="mosaic_gpu")
        for rows in args.rows:
            sizes = (num_bytes, rows, shapes.appended)
            products = _Products(
                f"bf16 matmul, {name}", configs.KERNEL, weights, *sizes, run, dense
            )
            peer = None if args.no_peers else functools.partial(_bf16_peer, transposed=tied)
            yield products.row(
                name, inputs, outputs, ceilings, args, tune if "bf16" in args.tune else None, peer
            )


@dataclasses.dataclass(frozen=True)
class _Products:
    """A row of products: run(x, weights, around) is measured, dense(h, weights) is exact."""

    kernel: str
    named: str  # the kernel itself: buffers are copied before it, since the caller keeps them
    weights: Sequence[Any]
    num_bytes: float
    rows: int
    head_dim: int | None  # `Shapes.appended`
    run: Callable[..., list[jax.Array]]
    dense: Callable[..., list[jax.Array]]

    def row(
        self,
        name: str,
        inputs: int,
        outputs: Sequence[int],
        ceilings: dict[str, float],
        args: argparse.Namespace,
        tune: Callable[[Sequence[Any]], dict[str, float]] | None,
        peer: Callable[[Sequence[Any]], float] | None,
    ) -> dict[str, Any]:
        around = NOTHING
        if args.around:
            around = _around(name, inputs, outputs, self.rows, self.head_dim)
        calls = [
            (_normal(jax.random.key(i), (1, self.rows, inputs)), w, around)
            for i, w in enumerate(self.weights)
        ]
        times = tune(calls) if tune is not None and self.rows in TUNED_ROWS else {}
        multiply = jax.jit(self.run)
        x, first, _ = calls[0]
        with jax.default_matmul_precision("highest"):
            expected = apart(x, around, functools.partial(self.dense, weights=first))
        form = around.form._asdict()
        parts = [part for part, here in form.items() if here != getattr(PLAIN, part)]
        return _row(
            self.kernel,
            timing.device_seconds(multiply, calls, named=self.named),
            self.num_bytes,
            ceilings["read"],
            query_tokens=self.rows,
            shape=[inputs, *outputs],
            around=parts,
            **times,
            peers={} if peer is None else {f"bf16 product, {self.rows} rows": peer(calls)},
            error=_error(multiply(*calls[0]), expected),
        )


def _bf16_peer(calls: Sequence[Any], transposed: bool) -> float:
    """Milliseconds of the same products alone with bf16 weights, by XLA (cuBLAS)."""
    dense = []
    for i, (x, weights, _) in enumerate(calls[:4]):
        if not isinstance(weights[0], jax.Array):
            shapes = [(x.shape[-1], w.outputs) for w in weights]
            weights = [_normal(jax.random.key(i), shape) for shape in shapes]
        dense.append((x, weights))
    product = jax.jit(lambda x, ws: [bf16_reference.matmul(x, w, transposed, x.dtype) for w in ws])
    return 1e3 * timing.device_seconds(product, dense)


def _tune_products(
    configs: Any,
    shape: Any,
    run: Callable[..., Any],
    calls: Sequence[Any],
    others: float = math.inf,
) -> dict[str, float]:
    """Measure a few configurations of a kernel's `configs` on a shape."""

    def measure(config: Any) -> float:
        tried = jax.jit(functools.partial(run, config=config))
        return timing.device_seconds(tried, calls, named=configs.KERNEL)

    return _tune(configs.KERNEL, configs.key(shape), configs.diverse(shape), measure, others)


def _quantize(shapes: Shapes, ceilings: dict[str, float], args: argparse.Namespace) -> Any:
    context = 32768
    shape = (1, shapes.heads, context, shapes.head_dim)
    calls = [(_normal(jax.random.key(i), shape),) for i in range(2)]
    count = math.prod(shape)
    for name in ("quantize_keys", "quantize_values"):
        fn = functools.partial(getattr(quantize, name), group_size=GROUP_SIZE)
        pallas = jax.jit(functools.partial(fn, backend="mosaic_gpu"))
        dequantize = getattr(attention_reference, name.replace("quantize", "dequantize"))
        planes = pallas(*calls[0])
        back = jax.jit(lambda p, f=dequantize: f(p, "int8"))(planes)
        peers = {}
        if not args.no_peers:
            xla = jax.jit(functools.partial(fn, backend="xla"))
            peers["xla"] = 1e3 * timing.device_seconds(xla, calls)
        yield _row(
            name,
            timing.device_seconds(pallas, calls),
            3 * count + 4 * count / GROUP_SIZE,
            ceilings["copy"],
            context=context,
            kv_heads=shapes.heads,
            peers=peers,
            error=_error(back, calls[0][0].astype(jnp.float32)),
        )
