"""Every kernel lowers for CUDA on a machine without a GPU: layouts, types and shared memory fit."""

from __future__ import annotations

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import pytest
from kernel_cases import (
    APPENDS,
    HEADS,
    append_call,
    attention_call,
    heads_call,
    random_pages,
    random_weight,
)

from pallas_kernels import dispatch
from pallas_kernels.add_rms_norm import mosaic_gpu as norm
from pallas_kernels.bf16_matmul import configs as bf16_configs
from pallas_kernels.bf16_matmul import mosaic_gpu as bf16
from pallas_kernels.int4_matmul import configs as matmul_configs
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.kv_attention import api, configs, mosaic_gpu
from pallas_kernels.kv_attention.read import Pages, Read
from pallas_kernels.layout import tile
from pallas_kernels.products.around import Around, Form, check
from pallas_kernels.quantize_pack import mosaic_gpu as quantize
from pallas_kernels.rope_append import mosaic_gpu as rope


def shapes_of(make, *args, **options):
    """Of what `make` returns: to lower for takes no numbers."""
    return jax.eval_shape(lambda: make(*args, **options))


def lower(fn, *args) -> str:
    """The program for CUDA, as text."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("view", ["int4", "int8", "full"])
@pytest.mark.parametrize(
    ("head_dim", "group_size", "group", "tokens"),
    [
        (128, 128, 1, 1),
        (128, 128, 4, 8),
        (64, 128, 3, 5),
        (256, 128, 1, 1),
        (96, 64, 2, 3),
        (64, 32, 1, 16),
        (128, 128, 8, 16),
    ],
)
def test_attention(view, head_dim, group_size, group, tokens):
    call = shapes_of(
        attention_call,
        view,
        kv_heads=2,
        group=group,
        tokens=tokens,
        head_dim=head_dim,
        group_size=group_size,
        tiles=3,
        positions=[3 * group_size, 5],
    )
    options = {"read": Read(view), "sm_scale": 0.1, "strict": False}
    shape = mosaic_gpu.shape_of(*call[:2], **options)
    assert mosaic_gpu.unsupported(shape, (call[0].dtype, call[1].key_buffer.dtype)) is None
    config = configs.choose(shape)
    assert config is not None
    text = lower(functools.partial(mosaic_gpu.kv_attention, **options, config=config), *call)
    # The pass over the cache, and the merge of its parts.
    assert text.count("custom_call @mosaic_gpu") == 2


@pytest.mark.parametrize(
    ("read", "group", "tokens", "asked"),
    [
        (Read("int4", 1), 4, 1, "pages"),
        (Read("int8"), 6, 16, "pages"),
        (Read("int8"), 4, 8, "page_log_sums"),
        (Read("int8"), 4, 8, "page_log_sums of a count"),
    ],
)
def test_attention_to_pages(read, group, tokens, asked):
    """In two launches, too; page log-sums and lists at once are refused."""
    call = shapes_of(
        attention_call, read.view,
        kv_heads=2, group=group, tokens=tokens, head_dim=128, group_size=128, tiles=3,
        positions=[384],
    )  # fmt: skip
    pages = random_pages([2], 2, [1], 2) if asked == "pages" else None
    pages = Pages(None, jnp.array([1])) if asked.endswith("count") else pages
    options = {
        "read": read, "sm_scale": 0.1, "strict": False, "page_log_sums": asked != "pages",
    }  # fmt: skip
    shape = mosaic_gpu.shape_of(*call[:2], **options, pages=pages)
    assert mosaic_gpu.unsupported(shape, (call[0].dtype,)) is None
    run = functools.partial(mosaic_gpu.kv_attention, **options, config=configs.choose(shape))
    text = lower(lambda pages, *call: run(*call, pages=pages), pages, *call)
    assert text.count("custom_call @mosaic_gpu") == 2
    both = dataclasses.replace(shape, places=2, page_log_sums=True)
    assert "page log-sums only" in (mosaic_gpu.unsupported(both, (call[0].dtype,)) or "")


@pytest.mark.parametrize(("tokens", "exchange"), [(5, False), (8, True)])
def test_attention_with_rounded_output(tokens, exchange):
    """And with three and four blocks of query rows, and probabilities in shared memory."""
    call = shapes_of(
        attention_call, "int8",
        kv_heads=2, group=4, tokens=tokens, head_dim=128, group_size=128, tiles=3,
        positions=[384],
    )  # fmt: skip
    options = {"read": Read("int8"), "sm_scale": 0.1, "strict": False}
    config = mosaic_gpu.Config(2, 4, -(-tokens // 2), 2, shared=True, exchange=exchange)
    run = functools.partial(
        mosaic_gpu.kv_attention, **options, config=config, out_dtype=jnp.bfloat16
    )
    assert lower(run, *call).count("custom_call @mosaic_gpu") == 2


def test_a_tile_of_a_prompt_is_several_launches(monkeypatch):
    """Of 128 tokens × 6 query heads a head a launch takes 42 tokens; none is left to XLA."""
    h200 = types.SimpleNamespace(
        core_count=132, device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(dispatch, "device", lambda: h200)
    call = shapes_of(
        attention_call, "int8", kv_heads=2, group=6, tokens=128, head_dim=128, group_size=128,
        tiles=3, positions=[256],
    )  # fmt: skip
    run = functools.partial(api.kv_attention, read=Read("int8"), sm_scale=0.1)
    text = lower(run, *call)
    assert text.count("call @kv_attention") == 4
    assert "dot_general" not in text


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("rows", "outputs", "cluster"), [(1, (512, 512), 1), (16, (576,), 1), (3, (256, 64, 64), 2)]
)
def test_int4_matmul(rows, outputs, cluster, group, symmetric):
    weights = [
        shapes_of(lambda n=n: tile(random_weight(576, n, group, symmetric))) for n in outputs
    ]
    x = jnp.zeros((rows, 576), jnp.bfloat16)
    assert matmul.unsupported(x, weights) is None
    found = matmul_configs.candidates(matmul.shape_of(x, weights))
    config = next(c for c in found if c.cluster == cluster)
    run = functools.partial(matmul.int4_matmuls, config=config, out_dtype=jnp.bfloat16)
    text = lower(run, x, weights)
    assert text.count("custom_call") == text.count("custom_call @mosaic_gpu") == 1
    assert "reduce" not in text


@pytest.mark.parametrize("kind", ["int4", "bf16"])
@pytest.mark.parametrize("case", APPENDS)
def test_products_that_finish_heads(case, kind):
    """One launch, that writes the buffers where they lie."""
    x, outputs, append = append_call(case, True, (5, 97), True, inputs=576)
    around = Around(x[0, 0], 1e-5, append=append)
    if kind == "int4":
        weights = [shapes_of(lambda n=n: tile(random_weight(576, n, 64, False))) for n in outputs]
        assert matmul.unsupported(x, weights, around) is None
        config = matmul_configs.candidates(matmul.shape_of(x, weights, around))[0]
        run = functools.partial(matmul.int4_matmuls, config=config)
    else:
        weights = [jnp.zeros((576, n), jnp.bfloat16) for n in outputs]
        assert bf16.unsupported(x, weights, around) is None
        config = bf16_configs.candidates(bf16.shape_of(x, weights, around))[0]
        run = functools.partial(bf16.bf16_matmuls, config=config, multiprocessors=132)
    text = lower(run, x, weights, around)
    assert text.count("custom_call") == text.count("custom_call @mosaic_gpu") == 1
    assert text.count("stablehlo.output_operand_alias<") == 2


@pytest.mark.parametrize(("head_dim", "group_size"), [(64, 32), (128, 128), (256, 64)])
@pytest.mark.parametrize("kernel", [quantize.quantize_keys, quantize.quantize_values])
def test_quantize(kernel, head_dim, group_size):
    x = jnp.zeros((1, 2, 2 * group_size, head_dim), jnp.bfloat16)
    assert quantize.unsupported(x, group_size) is None
    text = lower(functools.partial(kernel, group_size=group_size), x)
    assert text.count("custom_call @mosaic_gpu") == 1


def test_what_the_kernels_cannot_do_is_named():
    call = shapes_of(
        attention_call, "int8", kv_heads=1, group=1, tokens=1, head_dim=80, group_size=128, tiles=1,
        positions=[5],
    )  # fmt: skip
    options = {"read": Read("int8"), "sm_scale": 0.1, "strict": False}
    shape = mosaic_gpu.shape_of(*call[:2], **options)
    assert "head_dim is 80" in (mosaic_gpu.unsupported(shape, (jnp.bfloat16,)) or "")
    assert "bfloat16" in (mosaic_gpu.unsupported(shape, (jnp.float32,)) or "")
    weight = random_weight(64, 24, 32, False)
    assert "24 outputs" in (matmul.unsupported(jnp.zeros((1, 64), jnp.bfloat16), [weight]) or "")
    assert "17 rows" in (matmul.unsupported(jnp.zeros((17, 64), jnp.bfloat16), [weight]) or "")


def test_heads_that_products_cannot_finish_are_named():
    _, outputs, append = append_call("one", True, (5,), True)
    buffer = append.cache.key_buffer
    narrow = dataclasses.replace(append.cache, key_buffer=buffer[..., :88])
    wide = dataclasses.replace(append.cache, key_buffer=buffer.astype(jnp.float32))
    x = jnp.zeros((1, 1, 64), jnp.bfloat16)
    packed = [tile(random_weight(64, n, 64, False)) for n in outputs]
    dense = [jnp.zeros((64, n), jnp.bfloat16) for n in outputs]
    for module, weights, multiple in ((matmul, packed, 32), (bf16, dense, 16)):
        for cache, reason in (
            (narrow, f"head_dim is 88; it takes multiples of {multiple}"),
            (wide, "bfloat16"),
        ):
            around = Around(append=dataclasses.replace(append, cache=cache))
            found = module.unsupported(x, weights, around) or ""
            assert reason in found
    with pytest.raises(ValueError, match="three weights, of q, k and v; given: 2"):
        check(Around(append=append), outputs[:2])
    with pytest.raises(ValueError, match="append takes neither gated"):
        check(Around(append=append, gated=True), outputs)


def test_a_named_backend_never_becomes_another_one():
    if dispatch.device() is not None:
        pytest.skip("there is a CUDA device")
    assert not dispatch.use_mosaic_gpu("auto", "kernel", None)
    assert not dispatch.use_mosaic_gpu("xla", "kernel", None)
    with pytest.raises(NotImplementedError, match="CUDA device"):
        dispatch.use_mosaic_gpu("mosaic_gpu", "kernel", None)
    with pytest.raises(ValueError, match="backend is 'triton'; allowed: auto, mosaic_gpu, xla"):
        dispatch.use_mosaic_gpu("triton", "kernel", None)


def test_auto_says_once_what_it_leaves_to_xla(monkeypatch):
    monkeypatch.setattr(dispatch, "device", object)
    dispatch._notice.cache_clear()
    with pytest.warns(UserWarning, match="kv_attention runs in XLA: head_dim is 80"):
        assert not dispatch.use_mosaic_gpu("auto", "kv_attention", "head_dim is 80")
    assert not dispatch.use_mosaic_gpu("auto", "kv_attention", "head_dim is 80")
    with pytest.raises(NotImplementedError, match="head_dim is 80"):
        dispatch.use_mosaic_gpu("mosaic_gpu", "kv_attention", "head_dim is 80")


@pytest.mark.parametrize("y_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("channels", [576, 4096, 16384])
def test_add_rms_norm(channels, y_dtype):
    x = jnp.zeros((2, 5, channels), jnp.bfloat16)
    assert norm.unsupported(x) is None
    text = lower(functools.partial(norm.add_rms_norm, eps=1e-6), x, x.astype(y_dtype), x[0, 0])
    assert text.count("custom_call @mosaic_gpu") == 1
    text = lower(functools.partial(norm.rms_norm, eps=1e-6), x, x[0, 0])
    assert text.count("custom_call @mosaic_gpu") == 1


@pytest.mark.parametrize("case", HEADS)
def test_rope_append(case):
    """One launch, that writes the buffers where they lie."""
    call = shapes_of(heads_call, case, True, (5, 97))
    assert rope.unsupported(*call[:2]) is None
    text = lower(rope.rope_append, *call)
    assert text.count("custom_call @mosaic_gpu") == 1
    assert text.count("stablehlo.output_operand_alias<") == 2


def test_rope_append_says_what_it_cannot_do():
    heads, layer, _ = heads_call("plain", True, (5,))
    wide = dataclasses.replace(heads, dtype=jnp.dtype(jnp.float32))
    assert "bfloat16" in rope.unsupported(wide, layer)
    assert "bfloat16" in rope.unsupported(
        heads, dataclasses.replace(layer, key_buffer=layer.key_buffer.astype(jnp.float32))
    )
    assert "multiples of 4" in rope.unsupported(
        dataclasses.replace(heads, q=heads.q[..., :126]), layer
    )


def test_add_rms_norm_says_what_it_cannot_do():
    assert "multiples of 8" in norm.unsupported(jnp.zeros((1, 60), jnp.bfloat16))
    assert "16384" in norm.unsupported(jnp.zeros((1, 16392), jnp.bfloat16))
    assert "bfloat16" in norm.unsupported(jnp.zeros((1, 64)))


@pytest.mark.parametrize("rows", [1, 5, 16])
@pytest.mark.parametrize("inputs", [1024, 7168])
def test_blocks_that_wait_for_other_devices_run_at_once(rows, inputs):
    """Of a layer's products over devices; alone the same shapes have configurations of more blocks
    than run at once, or than mailboxes have slots for."""

    def shapes(devices: int):
        form = Form(residual=True, devices=devices)
        yield matmul_configs, matmul.Shape(rows, inputs // 64, 64, (8192,), False, form)
        yield bf16_configs, bf16.Shape(rows, inputs, (8192,), False, form)

    def meets(module, shape, config) -> bool:
        if module is matmul_configs:
            plan, resident = matmul.Plan(shape, config), module._resident(shape, config)
        else:
            plan = bf16.Plan(shape, config, dispatch.target().multiprocessors)
            resident = module._resident(plan)
        at_once = resident * dispatch.target().multiprocessors
        return plan.blocks <= at_once and plan.blocks <= 512 and plan.sums.share <= 256

    for module, shape in shapes(4):
        found = module.candidates(shape)
        assert found or rows == 16  # their sums may take more slots than there are
        assert all(meets(module, shape, config) for config in found)
        assert not found or meets(module, shape, module.choose(shape))
    for module, shape in shapes(1):
        assert not all(meets(module, shape, config) for config in module.candidates(shape))
