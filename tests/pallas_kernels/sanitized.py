"""Every kernel once on small shapes, for NVIDIA's checkers. Not a test of its own:

compute-sanitizer --tool memcheck python tests/pallas_kernels/sanitized.py
compute-sanitizer --tool racecheck python tests/pallas_kernels/sanitized.py
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from kernel_cases import (
    HEADS,
    attention_call,
    heads_call,
    random_around,
    random_pages,
    random_weight,
)

from pallas_kernels.add_rms_norm.api import add_rms_norm, rms_norm
from pallas_kernels.bf16_matmul.api import bf16_matmuls
from pallas_kernels.int4_matmul.api import int4_matmuls
from pallas_kernels.kv_attention.api import kv_attention
from pallas_kernels.kv_attention.read import ByPage, PageLogSums, Read
from pallas_kernels.layout import tile
from pallas_kernels.logit_filter.api import kept
from pallas_kernels.page_choice.api import most_voted, page_votes
from pallas_kernels.quantize_pack.api import quantize_keys, quantize_values
from pallas_kernels.rope_append.api import rope_append


def calls():
    """(kernel, its arguments); made on the host, so that the device runs little else."""
    for view, head_dim, group, tokens in (
        ("int4", 128, 1, 1),
        ("int4", 64, 3, 1),
        ("int8", 128, 4, 5),
        ("int8", 96, 2, 8),
        ("full", 128, 4, 1),
    ):
        call = attention_call(
            view, kv_heads=2, group=group, tokens=tokens, head_dim=head_dim, group_size=128,
            tiles=4, positions=[0, 127, 128, 700],
        )  # fmt: skip
        yield functools.partial(kv_attention, read=Read(view), sm_scale=0.1), call
        if view == "full":
            continue
        exact = functools.partial(kv_attention, read=Read(view, int(view == "int4")), sm_scale=0.1)
        yield functools.partial(exact, page_log_sums=True), call
        pages = random_pages([0, 0, 0, 4], 2, [0, 0, 0, 2], 3)
        yield functools.partial(_listed, exact), (pages, *call)
    for rows, inputs, outputs, transposed, parts in (
        (1, 1024, (256, 72), False, "norm"),
        (8, 320, (208, 208), False, "norm gated"),
        (16, 2048, (136,), True, "residual"),
    ):
        shapes = [(n, inputs) if transposed else (inputs, n) for n in outputs]
        weights = [jax.random.normal(jax.random.key(4), s).astype(jnp.bfloat16) for s in shapes]
        x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
        run = functools.partial(bf16_matmuls, transposed=transposed)
        yield run, (x, weights, random_around(parts, rows, inputs, outputs[0]))
    for rows, inputs, outputs, group, symmetric, parts in (
        (1, 1024, (256, 128), 128, False, "norm"),
        (8, 300, (208,), 64, True, "residual"),
        (16, 160, (64, 64), 32, False, "norm gated"),
    ):
        plain = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
        weights = [tile(weight) for weight in plain]
        x = jax.random.normal(jax.random.key(1), (rows, inputs)).astype(jnp.bfloat16)
        yield int4_matmuls, (x, weights, random_around(parts, rows, inputs, outputs[0]))
    for kernel in (quantize_keys, quantize_values):
        x = jax.random.normal(jax.random.key(2), (2, 3, 256, 128)).astype(jnp.bfloat16)
        yield functools.partial(kernel, group_size=128), (x,)
    x = jax.random.normal(jax.random.key(3), (5, 1032)).astype(jnp.bfloat16)
    yield functools.partial(add_rms_norm, eps=1e-6), (x, x, x[0])
    yield functools.partial(rms_norm, eps=1e-6), (x, x[0])
    lse = jnp.zeros((2, 3, 4))
    sums = PageLogSums(jnp.zeros((2, 2, 130, 2, 6)), jnp.array([130, 7]), 3)
    yield page_votes, ([ByPage(sums, lse)] * 3, jnp.array([2, 0]))
    yield (
        functools.partial(most_voted, places=80, ends=(1, 1)),
        (
            jax.random.uniform(jax.random.key(5), (2, 3, 2, 300)),
            jnp.array([299, 9]),
            jnp.array([80, 3]),
        ),
    )
    scores = jnp.round(3 * jax.random.normal(jax.random.key(6), (2, 3, 5003)))
    heat, top_p, min_p = (jnp.array(x) for x in ([0.7, 0.0], [0.9, 1.0], [0.0, 0.1]))
    yield kept, (scores, heat, jnp.array([40, 0]), top_p, min_p)
    for case in HEADS:
        yield rope_append, heads_call(case, True, (31, 62))


def _listed(attend, pages, *call, backend):
    return attend(*call, pages=pages, backend=backend)


def main() -> None:
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        made = list(calls())
    for kernel, arguments in made:
        call = jax.jit(functools.partial(kernel, backend="mosaic_gpu"))
        jax.block_until_ready(call(*jax.device_put(arguments, device)))
        print(kernel, flush=True)


if __name__ == "__main__":
    main()
