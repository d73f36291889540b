"""FlashInfer's decode attention (Ye et al., arXiv 2501.01005) as a peer, where it is installed.

It comes with PyTorch, which nothing else here uses; neither is installed with this package.
"""

from __future__ import annotations

import importlib
import importlib.util
import statistics
from typing import Any

CALLS, REPEATS = 20, 7  # of a graph; graphs that are timed


def milliseconds(context: int, heads: int, kv_heads: int, head_dim: int) -> dict[str, float]:
    """One query token over a cache of `context` tokens, in bfloat16 and in 8-bit floats: by name,
    without the launches (a CUDA graph's), the faster of its two kernels. {}: it is not there."""
    if importlib.util.find_spec("flashinfer") is None:
        return {}
    torch = importlib.import_module("torch")
    flashinfer = importlib.import_module("flashinfer")
    found = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp8", torch.float8_e4m3fn)):
        options = {"device": "cuda", "dtype": torch.bfloat16}
        q = torch.randn(heads, head_dim, **options)
        # Two caches in turn: L2 holds neither.
        caches = [
            [torch.randn(kv_heads, context, head_dim, **options).to(dtype) for _ in range(2)]
            for _ in range(2)
        ]

        def run(tensor_cores: bool, q: Any = q, caches: Any = caches) -> None:
            for i in range(CALLS):
                flashinfer.single_decode_with_kv_cache(
                    q, *caches[i % 2], kv_layout="HND", use_tensor_cores=tensor_cores
                )

        found[f"flashinfer {name}, 1 query"] = min(
            _graph_milliseconds(torch, lambda cores=cores, run=run: run(cores)) / CALLS
            for cores in (False, True)
        )
    return found


def _graph_milliseconds(torch: Any, run: Any) -> float:
    """Median time of what `run` launches, replayed."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    times = []
    for _ in range(REPEATS + 1):  # the first one is a warm-up
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[1:])
