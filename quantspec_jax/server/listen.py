"""The application behind a socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from quantspec_jax.checks import require

HEAD_SECONDS = 10.0  # for all of a request before its body
TELLING_SECONDS = 5


def bound(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that an address that is taken is said
    before a model is loaded.

    Raises:
      ValueError: the address is taken, or none of this machine's.
    """
    require(0 <= port < 2**16, "port", port, "0 to 65535")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.ExitStack() as stack:
            found = stack.enter_context(socket.socket(family, kind))
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
            stack.pop_all()
    except OSError as error:
        raise ValueError(f"host and port are {host}:{port}: {error.strerror or error}") from error
    return found


class Server(uvicorn.Server):
    """Serves until a signal comes.

    Args:
      grace: seconds that requests have to end after that.
      end: ends those that have not; their clients have a few more seconds to hear of it.
    """

    def __init__(self, app: FastAPI, grace: int, end: Callable[[], None]):
        super().__init__(
            uvicorn.Config(
                app,
                http=Impatient,
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace + TELLING_SECONDS,
            )
        )
        self._grace, self._end = grace, end

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn has it."""
        asyncio.get_running_loop().call_later(self._grace, self._end)
        await super().shutdown(sockets)

    def serve_until_signal(self, listening: socket.socket) -> None:
        """On a socket of `bound`."""
        with contextlib.suppress(KeyboardInterrupt):  # the signal, which uvicorn raises again
            self.run(sockets=[listening])


class Impatient(H11Protocol):
    """Closes a connection where the head of a request does not come in time, which uvicorn would
    wait for."""

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        """As asyncio has it."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """As asyncio has it."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """As asyncio has it."""
        self._calm()
        super().connection_lost(exc)

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._calm()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _calm(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
