"""Several processes, one a host, that run one program over the devices of all (`jax.distributed`).

Each runs the same command; the first one prints and writes. Whatever decides what runs next, and is
not known to be the same everywhere, is `agreed` on.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from quantspec_jax.checks import require
from quantspec_jax.notices import notice

SECONDS = 45  # for the others to come, and without a sign of life of one


def join(coordinator: str, number: int | None, index: int | None, seconds: int = SECONDS) -> None:
    """Meet the other processes, before anything else is asked of JAX.

    Args:
      coordinator: HOST:PORT, where process 0 listens; "auto": JAX finds it and the numbers out,
        from Slurm, Open MPI, Kubernetes or a TPU's environment.
      number: of processes; index: this one's, from 0 on.
      seconds: how long to wait for the others. A process of which nothing is heard for so long
        later on ends them all.

    Where not all come, this process ends, with a line that says so and exit status 1.
    """
    where: dict[str, Any] = {}
    if coordinator != "auto":
        host, _, port = coordinator.rpartition(":")
        possible = bool(host) and port.isdecimal() and 0 < int(port) < 1 << 16
        require(possible, "--coordinator", coordinator, "HOST:PORT of process 0, or auto")
        require(number is not None and number >= 1, "--num-processes", number, "an integer ≥ 1")
        assert number is not None
        inside = index is not None and 0 <= index < number
        require(inside, "--process-id", index, f"0 to {number - 1}")
        where = {"coordinator_address": coordinator, "num_processes": number, "process_id": index}
    require(seconds >= 1, "--process-timeout", seconds, "an integer ≥ 1")
    jax.config.update("jax_enable_preemption_service", False)  # SIGTERM ends a process

    def give_up() -> None:  # JAX would abort, without a line that names what is missing
        notice(f"error: not all processes met at {coordinator} in {seconds} seconds")
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **where,
            cluster_detection_method=None if coordinator == "auto" else "deactivate",
            initialization_timeout=2 * seconds,
            heartbeat_timeout_seconds=seconds,
            shutdown_timeout_seconds=seconds,
        )
    except (ValueError, TypeError) as error:  # no number was found out
        raise ValueError(f"--coordinator {coordinator}: {error}") from error
    finally:
        timer.cancel()
    _print_from_first()


def several() -> bool:
    """Whether there is more than this process."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def is_first() -> bool:
    """Whether this process prints and writes."""
    return not several() or jax.process_index() == 0


def leave(status: int) -> None:
    """End at once where there are others: to say goodbye would be to wait for them."""
    if several():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def agreed(value: float | None) -> float | None:
    """The first process's, in all of them."""
    if not several():
        return value
    from jax.experimental.multihost_utils import broadcast_one_to_all

    found = float(broadcast_one_to_all(np.float32(np.nan if value is None else value)))
    return None if np.isnan(found) else found


def everywhere(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every process can read whole, from arrays that are split over the mesh."""
    return _whole(mesh)(tree) if several() else tree


@functools.cache
def _whole(mesh: Mesh) -> Any:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))


def _print_from_first() -> None:
    """Results to the first one's standard output. Libraries that print there, such as Gloo, print
    to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    to: Any = kept if is_first() else os.devnull
    sys.stdout = open(to, "w", encoding=encoding, errors=errors)  # noqa: SIM115
