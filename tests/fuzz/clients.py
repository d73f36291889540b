"""Clients that are wrong: bodies, bytes and manners that `quantspec serve` has to survive.

    python benchmarks/server.py --what malformed --model M --text T.txt --output FILE

Each case is answered below 500 or its connection closed; no file of the system is in any answer;
and the next good request is answered.
"""

from __future__ import annotations

import collections
import contextlib
import json
import socket
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np

GOOD = {"prompt": "a", "max_tokens": 2}
VALUES: list[Any] = [
    *(None, True, -1, 0, 2**31, 2**63, 10**400, 1e308, "", "x" * 5000, "\ud800", "1", [], {}),
    *([None], [[]], [[1e9]], {"a": {"b": []}}, [[-1]], [1.5], ["a"] * 40),
]
KEYS = [
    *("prompt", "max_tokens", "n", "temperature", "top_p", "top_k", "min_p", "stop", "stream"),
    *("seed", "logprobs", "model", "repetition_penalty", "stream_options", "messages", "zzz"),
    *("ignore_eos", "speculate", "echo", "best_of", "suffix", "presence_penalty"),
]
PATHS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/v1/models/../../etc/passwd")
ESCAPES = (
    *("/../../../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/..%2f..%2f..%2fetc/passwd"),
    *("//etc/passwd", "/v1/models/..%00/etc/passwd", "/page.html/../../../etc/passwd"),
    *("/\\..\\..\\etc\\passwd", "file:///etc/passwd", "/v1/../etc/./passwd?a=/etc/passwd"),
)
POST = b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
JSON = b"Content-Type: application/json\r\n"
RAW = (
    b"GET / HTTP/9.9\r\n\r\n",
    b"\x00\xff" * 100,
    b"GET\r\n\r\n",
    b"GET / HTTP/1.1\r\n\r\n",  # no host
    POST + b"Content-Length: abc\r\n\r\n",
    POST + b"Content-Length: -5\r\n\r\n",
    POST + b"Content-Length: " + b"9" * 400 + b"\r\n\r\n",
    POST + b"Content-Length: 2\r\nContent-Length: 90\r\n\r\n{}",
    POST + JSON + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + JSON + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    POST + JSON + b"Transfer-Encoding: chunked\r\n\r\nffffffffffffffffff\r\n",
    POST + JSON + b"Content-Length: 99\r\n\r\n{}",  # shorter than it says
    POST + JSON + b"Expect: 100-continue\r\nContent-Length: 99999999999\r\n\r\n",
    POST + b"Content-Type: text/plain\r\nContent-Length: 2\r\n\r\n{}",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: a\r\n" * 20_000 + b"\r\n",
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" * 5,  # pipelined
    b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT 127.0.0.1:22 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    *(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode() for path in ESCAPES),
)


def body(rng: np.random.Generator) -> bytes:
    """A request's body that is wrong, or strange."""
    good: dict[str, Any] = dict(GOOD)
    match rng.integers(7):
        case 0:
            return b"[" * int(rng.integers(1, 30_000))
        case 1:
            return rng.bytes(int(rng.integers(0, 300)))
        case 2:
            return json.dumps(good).encode()[: int(rng.integers(0, 30))]
        case 3:
            return b'{"prompt": "a", "max_tokens": ' + b"9" * int(rng.integers(5, 6000)) + b"}"
        case 4:
            return b'{"a":' * int(rng.integers(1, 9000)) + b"1"
        case 5:
            text = json.dumps(good | {"prompt": "é\U0001f600"}, ensure_ascii=False).encode()
            place = int(rng.integers(len(text)))
            return text[:place] + rng.bytes(2) + text[place + 1 :]  # UTF-8 that is cut
        case _:
            for _ in range(int(rng.integers(1, 3))):
                good[KEYS[rng.integers(len(KEYS))]] = VALUES[rng.integers(len(VALUES))]
            return json.dumps(good).encode()


class Failed(AssertionError):
    """A server that did what it must not."""


def require(condition: bool, *words: Any) -> None:
    if not condition:
        raise Failed(*words)


class Clients:
    """Wrong clients of one server.

    Args:
      url: where it listens.
      key: that it wants.
    """

    def __init__(self, url: str, key: str = "none", seed: int = 0):
        self.rng = np.random.default_rng(seed)
        where = urlsplit(url)
        self.address = (where.hostname, where.port)
        self.key = key
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        self.http = httpx.Client(base_url=url, headers=headers, timeout=120)
        self.seen: collections.Counter[str] = collections.Counter()
        self.longest = 0.0  # seconds of a good request
        self.failures: list[str] = []

    def run(self, cases: int) -> None:
        """Cases of all kinds, a good request after every tenth."""
        kinds = (self.wrong_body, self.wrong_body, self.wrong_body, self.wrong_bytes, self.slow)
        with self.http:
            for i in range(cases):
                kind = kinds[i % len(kinds)]
                self.seen[f"{kind.__name__} {self.tried(kind)}"] += 1
                if i % 10 == 9:
                    self.tried(self.good)
            self.tried(self.good)

    def tried(self, case: Callable[[], str]) -> str:
        """What a case got; a failure is written down."""
        try:
            return case()
        except (Failed, httpx.HTTPError) as error:
            self.failures.append(f"{case.__name__}: {type(error).__name__} {error}"[:500])
            return "failed"

    def good(self) -> str:
        """Is answered."""
        started = time.perf_counter()
        answer = self.http.post("/v1/completions", json=GOOD | {"max_tokens": 1})
        self.longest = max(self.longest, time.perf_counter() - started)
        require(answer.status_code == 200, "a good request", answer.status_code, answer.text)
        return "200"

    def wrong_body(self) -> str:
        """JSON that is none, or of wrong types."""
        content = body(self.rng)
        answer = self.http.post(PATHS[self.rng.integers(len(PATHS))], content=content)
        status = answer.status_code
        require(status == 200 or 400 <= status < 500, status, answer.text, content[:300])
        require(b"root:" not in answer.content, content)
        if status != 200:
            require(bool(answer.json()["error"]["message"]), answer.text)
        return str(status)

    def wrong_bytes(self) -> str:
        """What is no HTTP, sometimes changed, from clients that may hang up halfway."""
        raw = RAW[self.rng.integers(len(RAW))]
        if self.rng.integers(3) == 0:
            place = int(self.rng.integers(len(raw)))
            raw = raw[:place] + self.rng.bytes(3) + raw[place + 1 :]
        if self.rng.integers(3) == 0:
            raw = raw[: int(self.rng.integers(1, len(raw)))]
        return self.sent([raw], half_closed=bool(self.rng.integers(2)))

    def slow(self) -> str:
        """A good request, a few bytes at a time, that is given up."""
        content = json.dumps(GOOD).encode()
        head = POST + JSON + f"Authorization: Bearer {self.key}\r\n".encode()
        whole = head + f"Content-Length: {len(content)}\r\n\r\n".encode() + content
        most = int(self.rng.integers(1, len(whole) - 1))
        parts = [whole[:most][i : i + 60] for i in range(0, most, 60)]
        return self.sent(parts, half_closed=bool(self.rng.integers(2)), pause=0.01)

    def sent(self, parts: list[bytes], *, half_closed: bool, pause: float = 0.0) -> str:
        """Bytes as they are; the status of the first answer, "closed", or "given up" where the
        server waits for more."""
        with socket.create_connection(self.address, timeout=0.2) as connection:
            answer, nothing = b"", "closed"
            with contextlib.suppress(OSError):  # refused while it is sent
                for part in parts:
                    connection.sendall(part)
                    time.sleep(pause)
                if half_closed:
                    connection.shutdown(socket.SHUT_WR)
            try:
                while len(answer) < 1 << 20 and (part := connection.recv(1 << 16)):
                    answer += part
            except TimeoutError:
                nothing = "given up"
            except OSError:
                pass
        require(b"root:" not in answer, parts[0][:300])
        if not answer:
            return nothing
        status = answer.split()[1].decode()
        require(status < "500", answer[:300], parts[0][:300])
        return status
