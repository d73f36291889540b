"""Other generations of GPUs, by pretence: what runs there, and that its configuration fits."""

from __future__ import annotations

import dataclasses
import functools
import types
import warnings

import emulator
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.mosaic.gpu import core as mosaic_core
from jax.experimental.mosaic.gpu import utils as mosaic_utils
from jax.experimental.mosaic.gpu.core import artificial_shared_memory_limit
from jax.experimental.pallas import mosaic_gpu as plgpu
from kernel_cases import attention_call, random_weight, without_poison

from pallas_kernels import devices, dispatch, ptx, tuned
from pallas_kernels.int4_matmul import configs as matmul_configs
from pallas_kernels.int4_matmul import mosaic_gpu as matmul
from pallas_kernels.int4_matmul.api import int4_matmul
from pallas_kernels.kv_attention import configs, mosaic_gpu
from pallas_kernels.kv_attention.api import kv_attention
from pallas_kernels.kv_attention.read import Read
from pallas_kernels.layout import tile
from pallas_kernels.ptx.launch import begins_early
from quantspec_jax.bench import tuning

OLDER = {"8.0": "NVIDIA A100-SXM4-80GB", "8.6": "NVIDIA GeForce RTX 3090", "7.5": "Tesla T4"}
NEWER = {"9.0": "NVIDIA H100", "10.0": "NVIDIA B200", "12.0": "NVIDIA GeForce RTX 5090"}
MULTIPROCESSORS = {"8.0": 108, "8.6": 82, "7.5": 40, "9.0": 132, "10.0": 148, "12.0": 170}
KIB = {"8.0": 163, "8.6": 99, "9.0": 227, "10.0": 227, "12.0": 99}


def pretended(capability: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(
        device_kind={**OLDER, **NEWER}[capability],
        compute_capability=capability,
        core_count=MULTIPROCESSORS[capability],
    )


@pytest.fixture
def on(monkeypatch):
    """Takes the default device for one of a compute capability."""

    def pretend(capability: str) -> devices.Device:
        device = pretended(capability)
        monkeypatch.setattr(dispatch, "cuda_device", lambda: device)
        for notice in (dispatch._notice, dispatch._notice_of_device):
            notice.cache_clear()
        return devices.of(device)

    return pretend


def test_a_capability_is_two_numbers_and_not_one():
    """As a float, 10.0 comes after 9.0 and 8.10 before 8.9."""
    assert devices.generation((8, 10)).capability == (8, 9)
    assert devices.generation((10, 3)).capability == (10, 0)
    assert devices.generation((12, 1)).capability == (12, 0)
    assert [g.capability for g in devices.GENERATIONS] == sorted(
        g.capability for g in devices.GENERATIONS
    )


def test_a_device_is_asked_first_and_its_generation_second():
    device = pretended("12.0")
    assert devices.of(device).shared_bytes == 99 * 1024
    device.shared_memory_per_block_optin = 65536
    assert devices.of(device).shared_bytes == 65536
    for other in (types.SimpleNamespace(compute_capability="gfx90a"), object()):
        assert devices.capability(other) is None
        with pytest.raises(ValueError, match="allowed: CUDA devices"):
            devices.of(other)


@pytest.mark.parametrize("capability", NEWER)
def test_kernels_run_from_hopper_on(on, capability):
    device = on(capability)
    assert dispatch.use_mosaic_gpu("auto", "kernel", None)
    assert dispatch.target() == device
    assert device.multiprocessors == MULTIPROCESSORS[capability]


@pytest.mark.parametrize("capability", ["8.0", "8.6"])
def test_ampere_takes_a_jax_that_compiles_for_it(on, monkeypatch, capability):
    device = on(capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    monkeypatch.setattr(jax, "__version__", "0.10.2")
    with pytest.warns(UserWarning, match="it takes JAX 0.11 or later .* and this is 0.10.2"):
        assert not dispatch.use_mosaic_gpu("auto", "kernel", None)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    assert dispatch.use_mosaic_gpu("auto", "kernel", None)
    assert dispatch.target() == device


@pytest.mark.parametrize("capability", OLDER)
def test_an_older_device_says_once_that_it_runs_none(on, monkeypatch, capability):
    on(capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 10, 2))
    call = without_poison(
        attention_call(
            "int4", kv_heads=1, group=1, tokens=1, head_dim=32, group_size=32, tiles=1,
            positions=[40],
        )
    )  # fmt: skip
    attend = functools.partial(kv_attention, *call, read=Read("int4"), sm_scale=0.1)
    with pytest.warns(UserWarning, match="no kernel runs on") as seen:
        found = attend()
    (notice,) = [str(w.message) for w in seen]
    assert f"{OLDER[capability]} (compute capability {capability})" in notice
    assert all(name in notice for name in dispatch.KERNELS)
    why = "compute capability 8.0 or later" if capability == "7.5" else "it takes JAX 0.11 or later"
    assert why in notice
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = attend()
        int4_matmul(jnp.ones((1, 64), jnp.bfloat16), random_weight(64, 16, 32, False))
    expected = attend(backend="xla")
    for a, b, c in zip(found, again, expected, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, c)
    with pytest.raises(NotImplementedError, match=f"compute capability {capability}"):
        attend(backend="mosaic_gpu")


ATTENTION = [
    (view, kv_heads, group, tokens, head_dim, group_size)
    for view in ("int4", "int8", "full")
    for kv_heads, group, tokens, head_dim, group_size in (
        (32, 1, 1, 128, 128),
        (32, 1, 8, 128, 128),
        (8, 4, 1, 128, 128),
        (8, 4, 5, 128, 128),
        (8, 4, 8, 128, 128),
        (3, 3, 5, 64, 128),
        (2, 8, 16, 128, 128),
        (8, 2, 4, 96, 64),
        (4, 2, 8, 256, 64),
        (4, 2, 8, 256, 128),
    )
]


@pytest.mark.parametrize("capability", KIB)
def test_attentions_configurations_fit(monkeypatch, capability):
    """On devices of 8.x, too, where a kernel may run some day."""
    device = devices.of(pretended(capability))
    assert device.shared_bytes == KIB[capability] << 10
    monkeypatch.setattr(dispatch, "target", lambda: device)
    for view, kv_heads, group, tokens, head_dim, group_size in ATTENTION:
        tiles, slots = (0, 4096) if view == "full" else (9, 2 * group_size)
        shape = mosaic_gpu.Shape(
            4, kv_heads, group, tokens, head_dim, group_size, tiles, slots, view, False, 0.1
        )
        found = configs.choose(shape)
        # Two tiles of both planes with heads of 256, 68 KB each, and no more.
        assert (found is None) == (
            (view, head_dim, group_size) == ("int8", 256, 128) and KIB[capability] == 99
        )
        for config in (found, *configs.candidates(shape)):
            if config is not None:
                plan = mosaic_gpu.Plan(shape, config, device.multiprocessors)
                assert plan.shared_bytes <= device.usable_bytes
                assert config.stages >= 2


@pytest.mark.parametrize("capability", KIB)
@pytest.mark.parametrize("rows", [1, 8, 16])
def test_the_products_configurations_fit(monkeypatch, capability, rows):
    device = devices.of(pretended(capability))
    monkeypatch.setattr(dispatch, "target", lambda: device)
    for groups, size, outputs in (
        (32, 128, (11008, 11008)),
        (86, 128, (4096,)),
        (18, 32, (576,)),
        (32, 128, (128256,)),
    ):
        shape = matmul.Shape(rows, groups, size, outputs, False)
        found = matmul_configs.candidates(shape)
        for config in (matmul_configs.choose(shape), *found):
            assert matmul.Plan(shape, config).shared_bytes <= device.usable_bytes
            assert config.cluster == 1 or device.generation.clusters
        assert matmul.Plan(shape, found[0]).blocks >= min(
            sum(outputs) // 16, 0.7 * device.multiprocessors
        )


def test_what_was_measured_on_short_texts_serves_no_long_ones(monkeypatch):
    """But the other way round, where there is nothing better."""
    monkeypatch.setattr(dispatch, "target", lambda: devices.DEFAULT)
    one, other = mosaic_gpu.Config(2, 2, 1, 2), mosaic_gpu.Config(1, 2, 1, 2)

    def shape(tiles):
        return mosaic_gpu.Shape(1, 2, 6, 5, 128, 128, tiles, 256, "int8", False, 0.1)

    short, long = configs.key(shape(511)), configs.key(shape(512))
    rule = next(configs.candidates(shape(512)))
    assert rule not in (one, other)
    for known, chosen in (
        ({short: one}, (one, rule)),
        ({long: other}, (other, other)),
        ({short: one, long: other}, (one, other)),
    ):
        found = {key: vars(config) for key, config in known.items()}
        monkeypatch.setattr(tuned, "find", lambda device, kernel, key, found=found: found.get(key))
        assert (configs.choose(shape(511)), configs.choose(shape(512))) == chosen


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_a_product_takes_what_was_measured_on_an_h200(monkeypatch, capability):
    shape = matmul.Shape(1, 32, 128, (11008, 11008), False)
    measured = tuned.find("NVIDIA H200", matmul_configs.KERNEL, matmul_configs.key(shape))
    monkeypatch.setattr(dispatch, "target", lambda: devices.of(pretended(capability)))
    assert matmul_configs.choose(shape) == matmul.Config(**measured)
    assert matmul_configs.choose(shape) != matmul_configs.candidates(shape)[0], "the rule's"


def test_what_a_step_takes_least_with_is_found_one_kernel_after_the_other():
    """Of a step of two products, each of which takes the longer the further its configuration is
    from another one; some cannot be compiled. Nothing is taken from the step when all is done."""
    wanted = {(1, 3): matmul.Config(2, 3, 4, 2), (2, 1): matmul.Config(4, 2, 2)}
    shapes = [matmul.Shape(1, 32, 128, (4096 * n,), False) for n in (3, 1)]
    before = [matmul_configs.choose(shape) for shape in shapes]

    def far(config: matmul.Config, other: matmul.Config) -> int:
        return sum(
            abs(a - b) for a, b in zip(vars(config).values(), vars(other).values(), strict=True)
        )

    class Lowered:
        def __init__(self):
            self.chosen = [matmul_configs.choose(shape) for shape in shapes]

        def compile(self):
            if any(config.cluster > 1 for config in self.chosen):
                raise RuntimeError("too many registers")
            return self

    def timed(step: Lowered):
        steps = 50 + sum(map(far, step.chosen, wanted.values()))
        return lambda rounds: 1e-3 + 1e-4 * rounds * steps

    found = tuning.tune(tuning.Step(Lowered, timed))
    assert [matmul_configs.choose(shape) for shape in shapes] == before
    assert {name[0] for name in found} == {matmul_configs.KERNEL}
    configs = dict(zip(map(matmul_configs.key, shapes), before, strict=True))
    configs |= {key: matmul.Config(**config) for (_, key), config in found.items()}
    for first, last, best in zip(before, configs.values(), wanted.values(), strict=True):
        assert far(last, best) < far(first, best) or first == last
        assert far(last, best) <= 2


def test_a_step_may_take_less_with_fewer_tiles_of_attention_ahead(monkeypatch):
    """Than there is room for."""
    monkeypatch.setattr(dispatch, "target", lambda: devices.DEFAULT)
    shape = mosaic_gpu.Shape(1, 32, 1, 1, 128, 128, 32, 256, "int4", False, 0.1)
    deepest = next(configs.candidates(shape))
    assert deepest.stages > 2

    class Lowered:
        def __init__(self):
            self.chosen = configs.choose(shape)

        def compile(self):
            return self

    def timed(step: Lowered):
        other = dataclasses.replace(step.chosen, stages=deepest.stages) != deepest
        return lambda rounds: 1e-4 * rounds * (50 + 9 * other + step.chosen.stages)

    found = tuning.tune(tuning.Step(Lowered, timed))
    assert found == {(configs.KERNEL, configs.key(shape)): vars(deepest) | {"stages": 2}}


def lowered(fn, *args) -> str:
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
    return jax.jit(fn).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize(("head_dim", "kernels"), [(128, 2), (256, 0)])
def test_a_device_with_little_shared_memory(on, head_dim, kernels):
    """Lowered with its limit: a configuration that fits, or a notice and XLA."""
    device = on("12.0")
    call = attention_call(
        "int8", kv_heads=2, group=4, tokens=8, head_dim=head_dim, group_size=128, tiles=3,
        positions=[384],
    )  # fmt: skip
    attend = functools.partial(kv_attention, read=Read("int8"), sm_scale=0.1)
    with artificial_shared_memory_limit(device.shared_bytes):
        if kernels:
            text = lowered(attend, *call)
        else:
            with pytest.warns(UserWarning, match="no configuration fits"):
                text = lowered(attend, *call)
        assert text.count("custom_call @mosaic_gpu") == kernels
        weight = tile(random_weight(576, 576, 64, False))
        x = jnp.zeros((4, 576), jnp.bfloat16)
        assert lowered(int4_matmul, x, weight).count("custom_call @mosaic_gpu") == 1


# What ptxas refuses for 8.x.
HOPPERS = (
    "cp.async.bulk",
    "mbarrier.try_wait",
    "mbarrier.arrive.expect_tx",
    "fence.mbarrier_init",
    "mul.rn.bf16x2",
    "barrier.cluster",
    "mapa.shared::cluster",
    "st.shared::cluster",
    "griddepcontrol",
    "wgmma",
    "stmatrix",
)


def emitted_for(monkeypatch, device: devices.Device) -> set[str]:
    """Instructions of what is lowered from here on, for the device."""
    (module,) = [m for m in (mosaic_core, mosaic_utils) if hasattr(m, "_infer_arch")]
    monkeypatch.setattr(module, "_infer_arch", lambda: device.capability)
    emitted, asm = set(), ptx.asm

    def noted(template, *args, **options):
        emitted.add(template)
        return asm(template, *args, **options)

    emulator.replace(monkeypatch, "asm", noted)
    return emitted


@pytest.mark.parametrize("capability", ["8.6", "12.0"])
def test_instructions_are_those_of_the_device(on, monkeypatch, capability):
    """Lowered for it, with its shared memory; bulk copies where they are, else unit by unit; early
    launches where they are."""
    device = on(capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 12, 0))
    monkeypatch.delenv("QUANTSPEC_EARLY_LAUNCHES", raising=False)
    early: list[str] = []  # what tells JAX to launch a kernel early; JAX 0.10 has no such thing
    monkeypatch.setattr(plgpu, "griddepcontrol_wait", lambda: early.append("wait"), raising=False)
    emitted = emitted_for(monkeypatch, device)
    call = attention_call(
        "int8", kv_heads=1, group=1, tokens=1, head_dim=32, group_size=32, tiles=3,
        positions=[96],
    )  # fmt: skip
    x, weight = jnp.zeros((4, 576), jnp.bfloat16), tile(random_weight(576, 576, 64, False))
    calls = [(int4_matmul, (x, weight))]
    if not (bulk := device.generation.bulk_copies):  # else other tests have lowered it
        calls.append((functools.partial(kv_attention, read=Read("int8"), sm_scale=0.1), call))
    jax.clear_caches()
    with artificial_shared_memory_limit(device.shared_bytes):
        for kernel, args in calls:
            assert "custom_call @mosaic_gpu" in lowered(kernel, *args)
    text = "\n".join(emitted)
    if bulk:
        assert "cp.async.bulk" in text
        assert "cp.async.cg" not in text
        assert "griddepcontrol.wait" in text
        assert "griddepcontrol.launch_dependents" in text
        assert early == ["wait"]
    else:
        assert not [name for name in HOPPERS if name in text]
        assert "cp.async.cg" in text
        assert not early


@pytest.mark.parametrize(
    ("capability", "head_dim", "group_size", "warpgroups"),
    [
        ("9.0", 128, 128, True),
        ("9.0", 64, 64, False),
        ("8.6", 128, 128, False),
        ("12.0", 128, 128, False),
    ],
)
def test_grouped_heads_are_multiplied_by_warpgroups_on_hopper(
    on, monkeypatch, capability, head_dim, group_size, warpgroups
):
    """Five blocks of rows meet what is converted then, else as many as registers hold for warps."""
    device = on(capability)
    monkeypatch.setattr(jax, "__version_info__", (0, 11, 0))
    emitted = emitted_for(monkeypatch, device)
    call = attention_call(
        "int8", kv_heads=1, group=7, tokens=5, head_dim=head_dim, group_size=group_size, tiles=3,
        positions=[3 * group_size],
    )  # fmt: skip
    found = configs.choose(
        mosaic_gpu.shape_of(*call[:2], read=Read("int8"), sm_scale=0.1, strict=False)
    )
    assert found is not None
    assert found.exchange
    assert found.column_blocks == (5 if warpgroups else 3)
    jax.clear_caches()
    with artificial_shared_memory_limit(device.shared_bytes):
        lowered(functools.partial(kv_attention, read=Read("int8"), sm_scale=0.1), *call)
    text = "\n".join(emitted)
    assert ("wgmma.mma_async" in text, "stmatrix" in text) == (warpgroups, warpgroups)


@pytest.mark.parametrize(
    ("capability", "version", "told", "expected"),
    [
        ("9.0", (0, 12, 0), None, True),
        ("9.0", (0, 12, 0), "0", False),
        ("9.0", (0, 11, 2), None, False),
        ("8.0", (0, 12, 0), None, False),
    ],
)
def test_launches_begin_early_where_they_can(on, monkeypatch, capability, version, told, expected):
    on(capability)
    monkeypatch.setattr(jax, "__version_info__", version)
    monkeypatch.delenv("QUANTSPEC_EARLY_LAUNCHES", raising=False)
    if told is not None:
        monkeypatch.setenv("QUANTSPEC_EARLY_LAUNCHES", told)
    assert begins_early() == expected
