"""Takes the default device for another one: of another compute capability, or with less shared
memory than it has.

PRETEND_DEVICE=8.0     python -m pytest -m gpu tests/pallas_kernels
PRETEND_DEVICE=8.0:99  python tests/pallas_kernels/pretend.py bench kernels    (99 KiB a block)
PRETEND_DEVICE=7.5     python tests/pallas_kernels/pretend.py bench decode     (XLA alone)

The instructions of an older generation run on a later one, so that a card at hand shows whether
kernels for the other one are right, and how fast its way of copying is.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types

import jax
from jax.experimental.mosaic.gpu import core, utils

from pallas_kernels import devices, dispatch

_HELD = contextlib.ExitStack()


def pretend(
    capability: str, shared_kib: int | None = None, like: devices.Device | None = None
) -> devices.Device:
    """Take the default device for one of `capability`, for the rest of this process.

    Configurations of attention that were measured on the device at hand are not taken; those that
    were measured on `like` are, if that is given.
    """
    gpu = jax.devices()[0] if jax.default_backend() == "gpu" else None
    named = types.SimpleNamespace(
        device_kind=" taken for ".join(
            [*([gpu.device_kind] if gpu else []), f"sm {capability} {shared_kib or ''}".strip()]
        ),
        compute_capability=capability,
        core_count=getattr(gpu, "core_count", 100),
        shared_memory_per_block_optin=(shared_kib or 0) << 10,
    )
    if like is not None:
        named.device_kind, named.core_count = like.name, like.multiprocessors
    device = devices.of(named)
    (module,) = [m for m in (core, utils) if hasattr(m, "_infer_arch")]
    module._infer_arch = lambda: device.capability
    dispatch.cuda_device = lambda: named
    _HELD.enter_context(core.artificial_shared_memory_limit(device.shared_bytes))
    return device


def by_environment() -> None:
    """As the environment's variable says, if there is one."""
    if wanted := os.environ.get("PRETEND_DEVICE"):
        capability, _, kib = wanted.partition(":")
        pretend(capability, int(kib) if kib else None)


if __name__ == "__main__":
    from quantspec_jax import cli

    by_environment()
    sys.exit(cli.main())
