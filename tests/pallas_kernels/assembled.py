"""Compiles every kernel to machine code for a compute capability, on a machine without a GPU:

python tests/pallas_kernels/assembled.py 8.0

By JAX's own pipeline, LLVM and ptxas. It takes JAX's CUDA plugin (`pip install .[assemble]`).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import sys
from collections.abc import Iterator
from typing import Any

# What the plugin would look for beyond ptxas is for running.
os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
if importlib.util.find_spec("nvidia") and (nvcc := importlib.util.find_spec("nvidia.cuda_nvcc")):
    for folder in nvcc.submodule_search_locations or ():
        os.environ["PATH"] = f"{folder}/bin:{os.environ['PATH']}"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from kernel_cases import (
    APPENDS,
    HEADS,
    append_call,
    attention_call,
    heads_call,
    random_around,
    random_pages,
    random_weight,
)
from pretend import pretend

from pallas_kernels import devices, ptx
from pallas_kernels.add_rms_norm import mosaic_gpu as norm
from pallas_kernels.bf16_matmul import configs as bf16_configs
from pallas_kernels.bf16_matmul import mosaic_gpu as bf16
from pallas_kernels.collectives import mailboxes
from pallas_kernels.collectives import mosaic_gpu as collectives
from pallas_kernels.int4_matmul import configs as matmul_configs
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.kv_attention import configs, mosaic_gpu
from pallas_kernels.kv_attention.read import ByPage, PageLogSums, Read
from pallas_kernels.layout import tile
from pallas_kernels.logit_filter import mosaic_gpu as logit_filter
from pallas_kernels.page_choice import mosaic_gpu as choice
from pallas_kernels.products.around import Around
from pallas_kernels.quantize_pack import mosaic_gpu as quantize
from pallas_kernels.rope_append import mosaic_gpu as rope

# XLA compiles for a device that is described; what is not said of it here does not matter.
TARGET = """
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {shared_bytes}
  shared_memory_per_block_optin: {shared_bytes}
  threads_per_core_limit: {threads}
  core_count: {multiprocessors}
  fpus_per_core: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  memory_bandwidth: 1000000000000
  l2_cache_size: 33554432
  clock_rate_ghz: 1.5
  device_memory_size: 34359738368
  registers_per_core_limit: {registers}
  registers_per_block_limit: {registers}
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {extension} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 1 patch: 0 }}
device_description_str: "{name}"
"""


def target(device: devices.Device) -> str:
    major, minor = device.capability
    return TARGET.format(
        name=device.name,
        shared_bytes=device.shared_bytes,
        threads=device.generation.threads,
        multiprocessors=device.multiprocessors,
        registers=devices.REGISTERS,
        major=major,
        minor=minor,
        extension="ACCELERATED_FEATURES" if major >= 9 else "NONE",
    )


def attention(device: devices.Device) -> Iterator[tuple[str, Any, Any]]:
    """Every way to lay out queries and probabilities, of each shape."""
    for view, group, tokens, head_dim, group_size in (
        ("int4", 1, 1, 128, 128),
        ("int8", 4, 8, 128, 128),
        ("int8", 3, 5, 64, 64),
        ("int4", 2, 3, 96, 64),
        ("int4", 2, 1, 256, 64),
        ("full", 4, 2, 128, 128),
    ):
        call = attention_call(
            view, kv_heads=2, group=group, tokens=tokens, head_dim=head_dim,
            group_size=group_size, tiles=3, positions=[3 * group_size, 5],
        )  # fmt: skip
        options: dict[str, Any] = {"read": Read(view), "sm_scale": 0.1, "strict": False}
        shape = mosaic_gpu.shape_of(*call[:2], **options)
        ways = {}
        for config in configs.candidates(shape):
            ways.setdefault((config.column_blocks, config.shared, config.exchange), config)
        assert ways, shape
        for config in ways.values():
            run = functools.partial(
                mosaic_gpu.kv_attention,
                **options,
                config=config,
                blocks=device.multiprocessors,
                bulk=device.generation.bulk_copies,
                wgmma=device.generation.wgmma,
            )
            yield f"kv_attention {view} {head_dim} {config}", run, call


def attention_to_pages(device: devices.Device) -> Iterator[tuple[str, Any, Any]]:
    """Lists, tiles that are read exactly, and page log-sums."""
    for read, group, tokens, listed in (
        (Read("int4", 1), 4, 1, True),
        (Read("int4", 1), 1, 16, False),
        (Read("int8"), 4, 8, True),
        (Read("int8"), 4, 8, False),
    ):
        call = attention_call(
            read.view, kv_heads=2, group=group, tokens=tokens, head_dim=128, group_size=128,
            tiles=3, positions=[384, 5],
        )  # fmt: skip
        pages = random_pages([2, 0], 2, [1, 0], 2) if listed else None
        options: dict[str, Any] = {"read": read, "sm_scale": 0.1, "strict": False}
        options["page_log_sums"] = not listed
        config = configs.choose(mosaic_gpu.shape_of(*call[:2], **options, pages=pages))
        assert config is not None
        run = functools.partial(
            mosaic_gpu.kv_attention,
            **options,
            config=config,
            blocks=device.multiprocessors,
            bulk=device.generation.bulk_copies,
            wgmma=device.generation.wgmma,
        )
        name = f"kv_attention {read} {'of a list' if listed else 'and page log-sums'}"
        yield name, lambda pages, *call, run=run: run(*call, pages=pages), (pages, *call)


def products(device: devices.Device) -> Iterator[tuple[str, Any, Any]]:
    for rows, inputs, outputs, group, symmetric in (
        (1, 4096, (4096, 1024), 128, False),
        (8, 4096, (4096,), 128, True),
        (16, 576, (1536,), 64, False),
        (4, 320, (96,), 32, False),
    ):
        x = jnp.zeros((rows, inputs), jnp.bfloat16)
        weights = [tile(random_weight(inputs, n, group, symmetric)) for n in outputs]
        bulk = device.generation.bulk_copies
        for config in matmul_configs.diverse(matmul.shape_of(x, weights))[:4]:
            run = functools.partial(matmul.int4_matmuls, config=config, bulk=bulk)
            yield f"int4_matmul {rows} {inputs} {config}", run, (x, weights)
    for rows, outputs, parts in (
        (1, (576,), "norm"),
        (5, (576,), "residual"),
        (1, (576,), "residual peers"),
        (8, (576,) * 2, "norm gated"),
    ):
        x, around = jnp.zeros((rows, 576), jnp.bfloat16), random_around(parts, rows, 576, 576)
        if "peers" in parts:
            table = jnp.asarray(mailboxes.addresses(0, range(4)))
            around = dataclasses.replace(around, peers=table)
        weights = [tile(random_weight(576, n, 64, False)) for n in outputs]
        (config, *_) = matmul_configs.candidates(matmul.shape_of(x, weights, around))
        run = functools.partial(matmul.int4_matmuls, config=config, bulk=bulk)
        yield f"int4_matmul {parts}", run, (x, weights, around)
        for transposed in (False, True):
            dense = [jnp.zeros((576, 576), jnp.bfloat16)] * len(outputs)
            shape = bf16.shape_of(x, dense, around, transposed)
            for config in bf16_configs.diverse(shape)[:3]:
                run = functools.partial(
                    bf16.bf16_matmuls,
                    config=config,
                    multiprocessors=device.multiprocessors,
                    transposed=transposed,
                )
                yield f"bf16_matmul {parts} {config}", run, (x, dense, around)


def products_that_finish_heads(device: devices.Device) -> Iterator[tuple[str, Any, Any]]:
    for case in APPENDS:
        x, outputs, append = append_call(case, True, (5, 97), True, inputs=576)
        around = Around(x[0, 0], 1e-6, append=append)
        tiled = [tile(random_weight(576, n, 64, False)) for n in outputs]
        for config in matmul_configs.diverse(matmul.shape_of(x, tiled, around))[:3]:
            run = functools.partial(
                matmul.int4_matmuls, config=config, bulk=device.generation.bulk_copies
            )
            yield f"int4_matmul {case} {config}", run, (x, tiled, around)
        dense = [jnp.zeros((576, n), jnp.bfloat16) for n in outputs]
        for config in bf16_configs.diverse(bf16.shape_of(x, dense, around))[:3]:
            run = functools.partial(
                bf16.bf16_matmuls, config=config, multiprocessors=device.multiprocessors
            )
            yield f"bf16_matmul {case} {config}", run, (x, dense, around)


def others() -> Iterator[tuple[str, Any, Any]]:
    for head_dim, group_size in ((128, 128), (64, 32)):
        x = jnp.zeros((1, 2, 2 * group_size, head_dim), jnp.bfloat16)
        for kernel in (quantize.quantize_keys, quantize.quantize_values):
            run = functools.partial(kernel, group_size=group_size)
            yield f"{kernel.__name__} {head_dim}", run, (x,)
    x = jnp.zeros((2, 4096), jnp.bfloat16)
    yield "add_rms_norm", functools.partial(norm.add_rms_norm, eps=1e-6), (x, x, x[0])
    yield "rms_norm", functools.partial(norm.rms_norm, eps=1e-6), (x, x[0])
    sums = PageLogSums(jnp.zeros((1, 2, 130, 2, 6)), jnp.array([130]), 3)
    seen = [ByPage(sums, jnp.zeros((1, 3, 4)))] * 80
    yield "page_votes of 80 layers", choice.page_votes, (seen, jnp.array([2]))
    run = functools.partial(choice.most_voted, places=258, ends=(1, 1))
    yield "most_voted", run, (jnp.zeros((1, 80, 2, 1032)), jnp.array([1000]), jnp.array([250]))
    wants = (jnp.zeros(1), jnp.zeros(1, jnp.int32), jnp.zeros(1), jnp.zeros(1))
    for vocabulary in (151936, 32003):
        scores = jnp.zeros((1, 5, vocabulary))
        if logit_filter.unsupported(scores) is None:
            yield f"logit_filter {vocabulary}", logit_filter.kept, (scores, *wants)
    for count in (2, 8):
        table = jnp.asarray(mailboxes.addresses(0, range(count)))
        parts, stream = jnp.zeros((5, 4096)), jnp.zeros((5, 4096), jnp.bfloat16)
        yield f"all_reduce of {count}", collectives.all_reduce, (parts, table, stream)
        yield f"all_gather of {count}", collectives.all_gather, (parts, table)
        heads = parts.reshape(5, 32, 128)
        yield f"merge of {count}", collectives.merge, (heads, heads[..., 0], table)
    for case in HEADS:
        yield f"rope_append {case}", rope.rope_append, heads_call(case, True, (5, 97))


def slices_in_place(x: jax.Array) -> jax.Array:
    """Each half of x is updated in place by a launch of its own."""

    def body(addresses: Any, shared: Any) -> None:
        (before,) = ptx.load(addresses[0], 1, "f32")
        ptx.store(addresses[0], [before + 1.0])

    add = ptx.kernel(body, [], name="in_place", blocks=1, warpgroups=1, updated=1)
    half = len(x) // 2
    return jnp.concatenate([add(x[:half])[0], add(x[half:])[0]])


def main() -> None:
    device = pretend(sys.argv[1])
    described = topologies.get_topology_desc(
        platform="cuda", topology="1x1x1", target_config=target(device)
    )
    sharding = jax.sharding.SingleDeviceSharding(described.devices[0])
    for name, kernel, args in (
        *attention(device),
        *attention_to_pages(device),
        *products(device),
        *products_that_finish_heads(device),
        *others(),
        ("in_place", slices_in_place, (jnp.zeros((4, 64)),)),
    ):
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), args
        )
        compiled = jax.jit(kernel).trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
        if name == "in_place":  # a fusion would lose the update
            assert "slice_fusion" not in compiled.as_text()
        print("assembled", name, flush=True)


if __name__ == "__main__":
    main()
