"""Arrays that are made when their turn comes to be written, and let go of before the next.

Orbax asks a handler to write all arrays of a tree at once. This one makes and writes them in
batches, each with Orbax's own handler for arrays, so that what lies on the disk is the same:

    make a, b ── write a, b ── make c (large) ── write c ── …       at most a batch is held
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

BATCH_BYTES = 64 << 20  # arrays that are held together; a larger one is alone


@dataclasses.dataclass(frozen=True)
class Deferred:
    """An array that `make` gives when it is asked."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], jax.Array]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Of the array."""
        return self.size * self.dtype.itemsize


class SourceError(Exception):
    """What was raised while an array was made is the cause."""


def batches(values: Iterable[tuple[Deferred, Any, Any]]) -> Iterator[list[tuple[Any, ...]]]:
    """Neighbours of `BATCH_BYTES` together at most."""
    batch: list[tuple[Any, ...]] = []
    held = 0
    for value in values:
        if batch and held + value[0].nbytes > BATCH_BYTES:
            yield batch
            batch, held = [], 0
        batch.append(value)
        held += value[0].nbytes
    if batch:
        yield batch


def registry(stop: threading.Event) -> Any:
    """Orbax's handlers of arrays, deferred ones too. Once `stop` is set no more are made."""
    import orbax.checkpoint as ocp

    arrays = ocp.type_handlers.get_type_handler(jax.Array)

    class InTurn(ocp.type_handlers.TypeHandler):
        """Writes what `arrays` would write."""

        def typestr(self) -> str:
            return arrays.typestr()

        async def metadata(self, infos: Any) -> Any:
            return await arrays.metadata(infos)

        async def deserialize(self, infos: Any, args: Any = None) -> Any:
            return await arrays.deserialize(infos, args)

        async def serialize(self, values: Any, infos: Any, args: Any = None) -> Sequence[Any]:
            for batch in batches(zip(values, infos, args, strict=True)):
                deferred, *rest = map(list, zip(*batch, strict=True))
                for written in await arrays.serialize(_made(deferred, stop), *rest):
                    written.result()
            return []

    return ocp.type_handlers.create_type_handler_registry((jax.Array, arrays), (Deferred, InTurn()))


def _made(batch: Sequence[Deferred], stop: threading.Event) -> list[jax.Array]:
    if stop.is_set():
        raise SourceError("stopped")
    try:
        return [deferred.make() for deferred in batch]
    except Exception as error:
        raise SourceError from error
