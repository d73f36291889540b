"""Memory of each device that the others write into (`pallas_kernels.collectives`).

One process, whose CUDA devices reach each other's memory: over NVLink, or over PCIe where the
machine allows that. Elsewhere devices meet in XLA's collectives alone.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pallas_kernels import devices, dispatch
from pallas_kernels.collectives import mailboxes

AXES = ("dp", "cp", "tp")
# What is written from elsewhere has to stay where it is, as long as there may be programs.
_MAILBOXES: list[jax.Array] = []


def addresses(mesh: Mesh | None) -> tuple[Mapping[str, jax.Array], ...]:
    """The last argument of `generate_tokens` where devices of the mesh reach each other, else none:
    for each axis, tp or cp, what each device is told of those that it meets over it, [dp, cp, tp,
    words] uint32, a row on each."""
    if mesh is None or mesh.shape.get("tp", 1) == mesh.shape.get("cp", 1) == 1:
        return ()
    if not reached(tuple(mesh.devices.flat)):
        return ()
    return (_addresses(mesh),)


@functools.cache
def reached(among: tuple[jax.Device, ...]) -> bool:
    """Whether all of them can write into each other's memory. NCCL_P2P_DISABLE=1, which is for
    machines that say so wrongly, holds here, too."""
    here = jax.process_count() == 1 and os.environ.get("NCCL_P2P_DISABLE", "0") == "0"
    if not here or dispatch.device() is None or any(map(_foreign, among)):
        return False
    return all(_can_access(a, b) for a, b in itertools.permutations(among, 2))


def _foreign(device: jax.Device) -> bool:
    return devices.capability(device) is None


def _can_access(device: jax.Device, peer: jax.Device) -> bool:
    """As CUDA's driver says it. XLA then has allowed the access when it began."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    found = ctypes.c_int(0)
    call = (ctypes.byref(found), device.local_hardware_id, peer.local_hardware_id)
    return driver.cuDeviceCanAccessPeer(*call) == 0 and found.value == 1


@functools.cache
def _addresses(mesh: Mesh) -> Mapping[str, jax.Array]:
    shape = tuple(mesh.shape.get(name, 1) for name in AXES)
    over = PartitionSpec(*(name if name in mesh.shape else None for name in AXES))
    where = NamedSharding(mesh, over)
    return {
        name: jax.device_put(_tables(_lie(shape, where, i), i), where)
        for i, name in enumerate(AXES)
        if name != "dp" and shape[i] > 1
    }


def _lie(shape: tuple[int, ...], where: NamedSharding, axis: int) -> np.ndarray:
    """Where a new mailbox of each device lies, for groups along one axis."""
    words = mailboxes.words(shape[axis])
    made = jax.jit(lambda: jnp.zeros((*shape, words), jnp.uint32), out_shardings=where)()
    _MAILBOXES.append(jax.block_until_ready(made))
    lie = np.zeros(shape, np.int64)
    for part in made.addressable_shards:
        device = tuple(index.start or 0 for index in part.index[:3])
        lie[device] = part.data.unsafe_buffer_pointer()
    return lie


def _tables(lie: np.ndarray, axis: int) -> np.ndarray:
    """What each device is told, from where the mailboxes lie."""
    groups = np.moveaxis(lie, axis, -1)
    rows = [
        mailboxes.addresses(device[axis], groups[device[:axis] + device[axis + 1 :]].tolist())
        for device in np.ndindex(*lie.shape)
    ]
    return np.stack(rows).reshape(*lie.shape, -1)
