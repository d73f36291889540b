"""Products with bfloat16 weights, and what stands around products: the kernels' own code, run by
the emulator, and the XLA form, against formulas in float64."""

from __future__ import annotations

import functools
import types

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from kernel_cases import dense_products, random_around, random_weight, relative_error

from pallas_kernels import devices, dispatch, layout
from pallas_kernels.bf16_matmul import api, configs
from pallas_kernels.bf16_matmul import mosaic_gpu as matmul
from pallas_kernels.bf16_matmul.mosaic_gpu import Config, Plan, Shape
from pallas_kernels.int4_matmul import mosaic_gpu as int4
from pallas_kernels.int4_matmul.api import int4_matmuls
from pallas_kernels.int4_matmul.xla import dequantize
from pallas_kernels.products.around import Around, Form

tile = jax.jit(layout.tile)


@functools.partial(jax.jit, static_argnums=range(5))
def operands(rows, inputs, outputs, transposed, seed=0):
    keys = jax.random.split(jax.random.key(seed), len(outputs) + 1)
    x = (3 * jax.random.normal(keys[0], (rows, inputs))).astype(jnp.bfloat16)
    shapes = [(n, inputs) if transposed else (inputs, n) for n in outputs]
    weights = [
        (0.05 * jax.random.normal(k, shape)).astype(jnp.bfloat16)
        for k, shape in zip(keys[1:], shapes, strict=True)
    ]
    return x, weights


CASES = [
    # A weight's last tile has fewer outputs; warps without chunks; blocks with a tile after the
    # other, the weight changing on the way, and with one less than others.
    (1, 96, (64,), False, "", Config(1, 1), 8),
    (3, 320, (128, 72, 8), False, "norm", Config(1, 2), 3),
    (16, 192, (320,), True, "residual", Config(1, 3, 2), 2),
    # Two column blocks; clusters with uneven shares; two warps side by side with two units of 64
    # outputs each, of which one has less to do.
    (9, 352, (136,), True, "", Config(1, 2, 2, 3, across=2), 8),
    (5, 160, (136, 136), False, "norm gated", Config(1, 2), 2),
    (2, 320, (72, 72), True, "norm gated", Config(1, 1, 1, 2), 8),
    (4, 512, (72,), False, "norm residual", Config(2, 2, 1, 2, across=4), 8),
    (8, 288, (72, 72), False, "gated", Config(1, 3, line=256), 8),
]


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "transposed", "parts", "config", "processors"), CASES
)
def test_products_are_the_dense_ones(
    monkeypatch, rows, inputs, outputs, transposed, parts, config, processors
):
    emulator.install(monkeypatch)
    x, weights = operands(rows, inputs, outputs, transposed)
    around = random_around(parts, rows, inputs, outputs[0])
    found = matmul.bf16_matmuls(
        x, weights, around, config=config, multiprocessors=processors, transposed=transposed
    )
    dense = [w.T if transposed else w for w in weights]
    exact = dense_products(x, dense, around)
    plain = api.bf16_matmuls(x, weights, around, transposed=transposed, backend="xla")
    bound = 4e-3 if found[0].dtype == jnp.bfloat16 else 4e-4 if around.norm is not None else 1e-6
    for y, z, expected in zip(found, plain, exact, strict=True):
        assert y.dtype == z.dtype
        assert relative_error(y, expected) <= bound
        assert relative_error(z, expected) <= 2 * bound  # XLA rounds within a SiLU


@pytest.mark.parametrize(
    ("rows", "inputs", "outputs", "group", "symmetric", "parts", "config"),
    [
        (1, 320, (64, 32), 128, False, "norm", int4.Config(1, 1, 3)),
        (9, 104, (48,), 32, True, "norm residual", int4.Config(1, 1, 2, 2)),
        (5, 320, (48, 48), 32, False, "norm gated", int4.Config(1, 2, 2)),
        (3, 320, (80, 80), 64, True, "gated", int4.Config(1, 1, 2, 3)),
        (2, 256, (96,), 128, False, "residual", int4.Config(2, 1, 4)),
    ],
)
def test_what_stands_around_packed_products(
    monkeypatch, rows, inputs, outputs, group, symmetric, parts, config
):
    emulator.install(monkeypatch)
    x = operands(rows, inputs, (), False)[0]
    weights = [random_weight(inputs, n, group, symmetric, i) for i, n in enumerate(outputs)]
    around = random_around(parts, rows, inputs, outputs[0])
    found = int4.int4_matmuls(x, [tile(w) for w in weights], around, config=config)
    exact = dense_products(x, [dequantize(w)[:inputs] for w in weights], around)
    plain = int4_matmuls(x, weights, around, backend="xla")
    bound = 4e-3 if found[0].dtype == jnp.bfloat16 else 4e-4
    for y, z, expected in zip(found, plain, exact, strict=True):
        assert y.dtype == z.dtype
        assert relative_error(y, expected) <= bound
        assert relative_error(z, expected) <= 2 * bound


def test_results_are_rounded_once(monkeypatch):
    emulator.install(monkeypatch)
    x, weights = operands(2, 64, (64,), False)
    wide, narrow = (
        matmul.bf16_matmuls(x, weights, config=Config(1, 1), multiprocessors=4, out_dtype=dtype)[0]
        for dtype in (jnp.float32, jnp.bfloat16)
    )
    assert narrow.dtype == jnp.bfloat16
    np.testing.assert_array_equal(wide.astype(jnp.bfloat16), narrow)


def test_what_cannot_stand_around_products_is_named():
    x, weights = operands(1, 64, (64, 64, 32), False)
    with pytest.raises(ValueError, match=r"two weights of as many outputs; given: \(64, 32\)"):
        api.bf16_matmuls(x, weights[1:], Around(gated=True))
    with pytest.raises(ValueError, match="residual takes one product"):
        api.bf16_matmuls(x, weights, Around(residual=x))


@pytest.fixture
def h200(monkeypatch):
    """A device to lower for."""
    device = types.SimpleNamespace(
        core_count=132, device_kind="NVIDIA H200", compute_capability="9.0"
    )
    monkeypatch.setattr(dispatch, "device", lambda: device)


def test_few_rows_are_the_kernels_and_more_are_left_to_xla(h200, monkeypatch):
    def kernels(rows, inputs=64, outputs=(64, 24), dtype=jnp.bfloat16, backend="auto") -> int:
        x, weights = operands(rows, inputs, outputs, False)
        run = jax.jit(lambda x, w: api.bf16_matmuls(x, w, backend=backend))
        arguments = (x.astype(dtype), [w.astype(dtype) for w in weights])
        text = run.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        return text.count("custom_call @mosaic_gpu")

    assert kernels(16) == 0, "it was not measured to be faster"
    monkeypatch.setattr(configs, "faster", lambda _: True)
    assert kernels(16) == 1
    assert kernels(1, backend="xla") == 0
    # Nothing is said of what XLA does as well.
    assert kernels(17) == kernels(1, dtype=jnp.float32) == kernels(1, inputs=80) == 0
    assert kernels(1, outputs=(20,)) == 0
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu cannot run bf16_matmul.*17 rows"):
        kernels(17, backend="mosaic_gpu")


def test_a_measured_configuration_is_taken_where_it_is_possible(h200, monkeypatch):
    shape = Shape(1, 1536, (1536,), False)
    for config, possible in (
        (Config(1, 4, cluster=4, across=2, line=256), True),
        (Config(1, 4, cluster=8, across=4), True),
        (Config(1, 64), False),  # more than fits
        (Config(1, 2, resident=1, across=8), False),  # more side by side than there are warps
    ):
        monkeypatch.setattr(configs.tuned, "find", lambda *_, c=config: vars(c))
        assert (configs.choose(shape) == config) == possible


def operands_of(shape):
    """Shapes alone, of a call."""
    sizes = [(n, shape.inputs) if shape.transposed else (shape.inputs, n) for n in shape.outputs]
    weights = [jax.ShapeDtypeStruct(size, jnp.bfloat16) for size in sizes]
    x = jax.ShapeDtypeStruct((shape.rows, shape.inputs), jnp.bfloat16)
    norm = jnp.zeros(shape.inputs, jnp.bfloat16) if shape.form.norm else None
    return x, weights, Around(norm), shape.transposed


SHAPES = [  # inputs, outputs, [N, Kin]
    (1536, (1536, 256, 256), False, Form(norm=True)),
    (1536, (8960, 8960), False, Form(norm=True, gated=True)),
    (8960, (1536,), False, Form(residual=True)),
    (1536, (151936,), True, Form(norm=True)),
    (4096, (4096, 1024, 1024), False, Form(norm=True)),
    (4096, (14336, 14336), False, Form(norm=True, gated=True)),
    (14336, (4096,), False, Form(residual=True)),
    (4096, (128256,), False, Form(norm=True)),
    (576, (576,), False, Form(residual=True)),
    (64, (8,), False, Form()),
]


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize(("inputs", "outputs", "transposed", "form"), SHAPES)
def test_configurations_fit_and_the_best_guess_fills_the_chip(
    rows, inputs, outputs, transposed, form
):
    shape = Shape(rows, inputs, outputs, transposed, form)
    if matmul.unsupported(*operands_of(shape)):
        assert rows == 16  # of many channels, normed: the norm is then a launch of its own
        assert form.norm
        return
    found = configs.candidates(shape)
    processors = devices.DEFAULT.multiprocessors
    for config in (*found, *configs.diverse(shape)):
        assert Plan(shape, config, processors).shared_bytes <= devices.DEFAULT.usable_bytes
    best = Plan(shape, configs.choose(shape), processors)
    if sum(outputs) * inputs > 6e6:  # less is read in the time of a launch
        assert best.blocks >= 0.7 * processors


@pytest.mark.parametrize(
    ("rows", "outputs", "parts", "transposed"),
    [
        (1, (512, 64, 64), "norm", False),
        (16, (576, 576), "norm gated", False),
        (5, (576,), "residual", True),
    ],
)
def test_lowering(h200, rows, outputs, parts, transposed):
    """One launch, whatever stands around the products."""
    x, weights = operands(rows, 576, outputs, transposed)
    around = random_around(parts, rows, 576, outputs[0])
    run = jax.jit(
        lambda *call: api.bf16_matmuls(*call, transposed=transposed, backend="mosaic_gpu")
    )
    text = run.trace(x, weights, around).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call") == text.count("custom_call @mosaic_gpu") == 1
    assert not [name for name in ("reduce", "dot_general", "transpose", "pad") if name in text]


def test_where_no_measurement_says_it_the_kernel_is_known_to_be_faster():
    """Up to 8 rows; but for an embedding that is the lm_head, unless XLA writes the weight times
    the row, and for the widest weights at several rows."""
    for rows, inputs, outputs, transposed, wanted in [
        (1, 1000, (128,), False, True),
        (1, 4096, (150000,), False, True),
        (8, 5000, (14000, 14000), False, True),
        (8, 4096, (150000,), False, False),
        (9, 1000, (128,), False, False),
        (1, 1000, (128,), True, True),
        (1, 4096, (20000,), True, False),
        (2, 1000, (128,), True, False),
    ]:
        assert configs.faster(Shape(rows, inputs, outputs, transposed=transposed)) is wanted
