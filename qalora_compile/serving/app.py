"""The HTTP server: routes of the OpenAI API over one model."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from qalora_compile.optional import require
from qalora_compile.serving.api_errors import ApiError, gone, of_exception
from qalora_compile.serving.embedder import Embedder, embedding_answer, embedding_request
from qalora_compile.serving.engine import Engine
from qalora_compile.serving.generation_answer import AnswerForm, ChatForm, TextForm
from qalora_compile.serving.generation_request import (
    GenerationRequest,
    chat_request,
    text_request,
)
from qalora_compile.serving.guard import check_host, check_key, read_body
from qalora_compile.serving.job import Piece
from qalora_compile.serving.limits import Limits
from qalora_compile.serving.text_model import TextModel
from qalora_compile.serving.worker import Worker

_log = logging.getLogger(__name__)
_CHECK_SECONDS = 0.2
"""How often a request that waits looks whether its client is still there."""
_PURPOSE = "serve a model"
Json = dict[str, Any]
Pieces = AsyncGenerator[tuple[int, Piece], None]


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a server serves.

    Attributes:
        name: The model's name for clients.
        model: The model.
        limits: What is accepted.
        key: The key that clients must send, or None.
        local: Whether clients must name the server by a local name.
    """

    name: str
    model: TextModel | Embedder
    limits: Limits
    key: str | None = None
    local: bool = True


def create_app(served: Served) -> Any:
    """The `fastapi.FastAPI` application; it starts and stops the thread of the model.

    Raises:
        UnsupportedError: FastAPI is not installed.
    """
    fastapi = require("fastapi", extra="serve", purpose=_PURPOSE)
    server = _Server(served)
    app = fastapi.FastAPI(
        openapi_url=None, docs_url=None, redoc_url=None, lifespan=lambda _: server.running()
    )
    for method, path, handle in server.routes():
        app.add_route(path, partial(server.guarded, handle, free=path == "/health"), [method])
    for status in (404, 405):
        app.add_exception_handler(status, _no_route)
    return app


async def _no_route(request: Any, error: Any) -> Any:
    known = "see /v1/models, /v1/chat/completions, /v1/completions, /v1/embeddings and /health"
    return _json(ApiError(error.status_code, f"no such route: {known}").body(), error.status_code)


def _json(body: Mapping[str, Any], status: int = 200) -> Any:
    responses = require("starlette.responses", extra="serve", purpose=_PURPOSE)
    return responses.JSONResponse(body, status_code=status)


class _Server:
    """Handles requests."""

    def __init__(self, served: Served) -> None:
        self._served, model, limits = served, served.model, served.limits
        self._started = int(time.time())
        engine = None
        self._ends: frozenset[int] = frozenset()
        if isinstance(model, TextModel):
            engine = Engine(model.model, rows=limits.max_rows)
            self._ends = model.turn_ends()
        self._batches = engine is not None and engine.joins
        self._vocabulary = len(model.tokenizer)
        self._worker = Worker(limits.max_queue, engine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the thread of the model in the block."""
        self._worker.start()
        try:
            yield
        finally:
            await asyncio.to_thread(self._worker.stop)

    def routes(self) -> list[tuple[str, str, Callable[[Any], Awaitable[Any]]]]:
        """Method, path and handler of every route."""
        return [
            ("GET", "/health", self._health),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{name:path}", self._one_model),
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/v1/embeddings", self._embed),
        ]

    async def guarded(
        self, handle: Callable[[Any], Awaitable[Any]], request: Any, *, free: bool
    ) -> Any:
        """The answer of a handler; every error has OpenAI's form, and none a traceback."""
        try:
            if self._served.local:
                check_host(request.headers)
            if not free:
                check_key(request.headers, self._served.key)
            return await handle(request)
        except Exception as error:
            found = of_exception(error)
            if found.status == 500:
                _log.exception("a request failed")
            return _json(found.body(), found.status)

    async def _health(self, request: Any) -> Any:
        return _json({"status": "ok", "texts": self._worker.open, "batches": self._batches})

    def _card(self) -> Json:
        return {
            "id": self._served.name,
            "object": "model",
            "created": self._started,
            "owned_by": "qalora-compile",
        }

    async def _models(self, request: Any) -> Any:
        return _json({"object": "list", "data": [self._card()]})

    async def _one_model(self, request: Any) -> Any:
        self._check_name(request.path_params["name"])
        return _json(self._card())

    def _check_name(self, name: object) -> None:
        if name not in (None, self._served.name):
            raise ApiError(
                404,
                f"the model of this server is {self._served.name}",
                code="model_not_found",
                param="model",
            )

    async def _body(self, request: Any) -> Json:
        body = await read_body(request, self._served.limits)
        self._check_name(body.get("model"))
        return body

    def _text_model(self) -> TextModel:
        model = self._served.model
        if isinstance(model, TextModel):
            return model
        raise ApiError(400, "the model is a sentence encoder: use /v1/embeddings")

    async def _chat(self, request: Any) -> Any:
        body, model = await self._body(request), self._text_model()
        found = await asyncio.to_thread(chat_request, body, model, self._ends, self._served.limits)
        return await self._generate(request, found, ChatForm(model.tokenizer, self._served.name))

    async def _complete(self, request: Any) -> Any:
        body, model = await self._body(request), self._text_model()
        found = await asyncio.to_thread(
            text_request, body, model, self._vocabulary, self._served.limits
        )
        return await self._generate(request, found, TextForm(model.tokenizer, self._served.name))

    async def _embed(self, request: Any) -> Any:
        body, model = await self._body(request), self._served.model
        if isinstance(model, TextModel):
            raise ApiError(400, "the model generates text: /v1/embeddings needs a sentence encoder")
        found = await asyncio.to_thread(
            embedding_request, body, model, self._vocabulary, self._served.limits
        )
        vectors = await self._worker.call(lambda: model.embed(found.rows), texts=len(found.rows))
        return _json(embedding_answer(found, vectors, self._served.name))

    async def _generate(self, request: Any, found: GenerationRequest, form: AnswerForm) -> Any:
        pieces = self._worker.generate(self._text_model(), found.orders)
        if found.stream:
            return await _streamed(request, pieces, found, form)
        choices: list[list[Piece]] = [[] for _ in found.orders]
        async with aclosing(pieces), _watched(request):
            async for index, piece in pieces:
                if piece.error is not None:
                    raise piece.error
                choices[index].append(piece)
        return _json(form.complete(choices, found.prompt_tokens))


@asynccontextmanager
async def _watched(request: Any) -> AsyncIterator[None]:
    """End the block when the client goes away.

    Raises:
        ApiError: it has gone; nobody reads the error.
    """
    task, lost = asyncio.current_task(), False
    assert task is not None, "a handler runs in a task"

    async def watch() -> None:
        nonlocal lost
        while not await request.is_disconnected():
            await asyncio.sleep(_CHECK_SECONDS)
        lost = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError as error:
        if not lost:
            raise
        raise gone() from error
    finally:
        watcher.cancel()


async def _streamed(
    request: Any, pieces: Pieces, found: GenerationRequest, form: AnswerForm
) -> Any:
    """The answer as server-sent events.

    They begin with the first piece: an error before it has its own status.
    """
    responses = require("starlette.responses", extra="serve", purpose=_PURPOSE)
    try:
        async with _watched(request):
            first = await anext(pieces)
        if first[1].error is not None:
            raise first[1].error
    except BaseException:
        await pieces.aclose()
        raise
    events = _events(first, pieces, found, form)
    return responses.StreamingResponse(events, media_type="text/event-stream")


async def _events(
    first: tuple[int, Piece], pieces: Pieces, found: GenerationRequest, form: AnswerForm
) -> AsyncIterator[str]:
    """The events of an answer; closing them, as a lost client does, ends the generation."""
    count = 0
    async with aclosing(pieces):
        for index in range(len(found.orders)):
            begin = form.begin(index)
            if begin is not None:
                yield _event(begin)
        async for index, piece in _chain(first, pieces):
            if piece.error is not None:
                yield _event(of_exception(piece.error).body())
                return
            count += piece.tokens
            if piece.text or piece.finish or piece.logprob:
                yield _event(form.part(index, piece))
        if found.usage:
            yield _event(form.end(found.prompt_tokens, count))
        yield "data: [DONE]\n\n"


async def _chain(first: tuple[int, Piece], rest: Pieces) -> AsyncIterator[tuple[int, Piece]]:
    yield first
    async for each in rest:
        yield each


def _event(body: Json) -> str:
    return f"data: {json.dumps(body)}\n\n"
