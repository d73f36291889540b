"""The HTTP side: OpenAI's paths, its objects and its errors.

Nothing of a request is logged. Requests have to be `application/json`, so that a page of another
origin cannot send one from somebody's browser.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Receive, Scope, Send

from quantspec_jax.engine.scheduler import Event, statistics
from quantspec_jax.server import answers
from quantspec_jax.server.requests import (
    ChatRequest,
    CompletionRequest,
    RefusedError,
    TokenizeRequest,
    read,
)
from quantspec_jax.server.service import Answers, Service
from quantspec_jax.text.chat import conversation_ids

PAGE = Path(__file__).with_name("page.html")
OPEN_PATHS = ("/", "/health")  # without a key
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class KeyRequired:
    """Lets pass what has the API key."""

    def __init__(self, app: ASGIApp, key: str):
        self.app, self._wanted = app, f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        headers = dict(scope.get("headers", ()))
        given = headers.get(b"authorization", b"")
        is_open = scope["type"] == "lifespan" or scope["path"] in OPEN_PATHS
        if is_open or secrets.compare_digest(given, self._wanted):
            await self.app(scope, receive, send)
            return
        error = RefusedError(401, "the API key is wrong or missing", code="invalid_api_key")
        answer = JSONResponse(error.body(), 401, {"WWW-Authenticate": "Bearer"})
        await answer(scope, receive, send)


def make_app(service: Service, hosts: Sequence[str] | None = None) -> FastAPI:
    """The application; its lifespan starts and stops the service.

    Args:
      hosts: names that requests may give for the server; None: any.
    """

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await asyncio.to_thread(service.start)
        try:
            yield
        finally:
            await asyncio.to_thread(service.stop)

    # FastAPI's own pages of documentation load scripts from elsewhere.
    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())
    name = service.config.name
    watched: set[asyncio.Task[None]] = set()

    @app.exception_handler(RefusedError)
    async def refused(_: Request, error: RefusedError) -> JSONResponse:
        return JSONResponse(error.body(), error.status, error.headers)

    @app.exception_handler(HTTPException)
    async def no_path(_: Request, error: HTTPException) -> JSONResponse:
        headers = dict(error.headers or {})
        refusal = RefusedError(error.status_code, str(error.detail), headers=headers)
        return await refused(_, refusal)

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> JSONResponse:
        return await refused(_, RefusedError(500, f"{type(error).__name__} in the server"))

    if service.config.api_key is not None:
        app.add_middleware(KeyRequired, key=service.config.api_key)
    if hosts is not None:  # a page whose name leads here is no client
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))

    async def parsed(request: Request, kind: Any) -> Any:
        wanted = read(kind, await _body(request, service))
        if wanted.model not in (None, name):
            words = f"there is no model {wanted.model[:100]!r} here; allowed: {name!r}"
            raise RefusedError(404, words, "model", "model_not_found")
        return wanted

    async def answered(request: Request, wanted: CompletionRequest | ChatRequest) -> Response:
        try:
            made = await service.jobs(wanted)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        form = answers.Form(wanted, name, service.model.tokenizer)
        watching = asyncio.create_task(made.close_when_gone(request.receive))
        watched.add(watching)
        watching.add_done_callback(watched.discard)
        if wanted.stream:
            return StreamingResponse(_stream(made, form), media_type="text/event-stream")
        return await _whole(made, form)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answered(request, await parsed(request, CompletionRequest))

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answered(request, await parsed(request, ChatRequest))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> dict[str, Any]:
        wanted = await parsed(request, TokenizeRequest)
        if (wanted.prompt is None) == (wanted.messages is None):
            raise RefusedError(400, "a prompt or messages; allowed: one of them", "prompt")
        try:
            if wanted.prompt is None:
                messages = [message.plain() for message in wanted.messages]
                ids = await asyncio.to_thread(conversation_ids, messages, service.model.tokenizer)
            else:
                special = wanted.add_special_tokens
                ids = await asyncio.to_thread(service.tokenize, wanted.prompt, special)
        except ValueError as error:
            raise RefusedError(400, str(error)) from error
        return {"tokens": ids, "count": len(ids), "max_model_len": service.length}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [model()]}

    @app.get("/v1/models/{wanted:path}")
    async def one_model(wanted: str) -> dict[str, Any]:
        if wanted != name:
            raise RefusedError(404, "there is no such model here", "model", "model_not_found")
        return model()

    def model() -> dict[str, Any]:
        about = {"id": name, "object": "model", "created": created, "owned_by": "quantspec-jax"}
        return {**about, "max_model_len": service.length}

    @app.get("/health")
    async def health() -> JSONResponse:
        if service.broken:
            return JSONResponse({"status": "broken"}, 503)
        return JSONResponse({"status": "ok"})

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/")
    async def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE.read_text(encoding="utf-8"), headers=headers)

    return app


async def _body(request: Request, service: Service) -> bytes:
    """A body of JSON, not too long and not too late."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RefusedError(415, "content-type; allowed: application/json")
    most = service.config.body_bytes
    too_long = RefusedError(413, f"the body is longer than {most} bytes")
    length = request.headers.get("content-length", "0")
    if not length.isascii() or not length.isdigit():
        raise RefusedError(400, "content-length is no number")
    if len(length) > 18 or int(length) > most:
        raise too_long
    body = bytearray()
    try:
        async with asyncio.timeout(service.config.body_seconds):
            async for part in request.stream():
                body += part
                if len(body) > most:
                    raise too_long
    except ClientDisconnect:
        raise RefusedError(400, "the client has gone") from None
    except TimeoutError:
        raise RefusedError(408, "the body did not come in time") from None
    return bytes(body)


async def _whole(made: Answers, form: answers.Form) -> Response:
    """The answer as one object."""
    spans: list[list[Event]] = [[] for _ in made.jobs]
    try:
        async for number, event in made.events():
            spans[number].append(event)
    finally:
        made.close()
    return JSONResponse(form.whole(made.jobs, spans))


async def _stream(made: Answers, form: answers.Form) -> AsyncIterator[str]:
    """The answer in events; an error that comes late is the last one."""

    def line(value: Any) -> str:
        return f"data: {json.dumps(value)}\n\n"

    try:
        for number in range(len(made.jobs)):
            if (first := form.first(number)) is not None:
                yield line(first)
        async for number, event in made.events():
            yield line(form.chunk(number, event, statistics(made.jobs[number])))
        if form.usage_wanted:
            yield line(form.last(made.jobs))
        yield "data: [DONE]\n\n"
    except RefusedError as error:
        yield line(error.body())
    finally:
        made.close()
