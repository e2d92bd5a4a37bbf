"""Paths, and what each does.

No path of a request is opened as a file. Deliberately not here: the server's start and end (serving.py).
"""

from collections.abc import AsyncIterator, Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from ggml_diffusion.app.server import jobs
from ggml_diffusion.app.server.answers import LlamaAnswer, OpenAiAnswer, error_body, event, nothing_written
from ggml_diffusion.app.server.guard import check_host, check_key, read_json
from ggml_diffusion.app.server.requests import (
    DEFAULT_TOKENS,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    PageRequest,
    RequestError,
    check,
)
from ggml_diffusion.app.server.writer import Cancelled, Job, Writer
from ggml_diffusion.generation.diffusion_model import DiffusionModel

_CLIENT_GONE = 499  # nobody reads it
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
_PAGE_FILES = {
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
}


@dataclass(frozen=True)
class Service:
    """What the paths need.

    Attributes:
        model, name: what writes, and what it is called.
        writer: its thread.
        key: that clients must know, None = none.
        hosts: names that are answered to, None = any.

    """

    model: DiffusionModel
    name: str
    writer: Writer
    key: str | None
    hosts: Collection[str] | None


def application(service: Service) -> Starlette:
    """The ASGI application."""

    def guarded(handler: Callable[[Request], Any], *, open_to_all: bool = False) -> Callable[[Request], Any]:
        async def handle(request: Request) -> Response:
            try:
                check_host(request, service.hosts)
                if not open_to_all:
                    check_key(request, service.key)
                response: Response = await handler(request)
            except RequestError as error:
                response = _error(error)
            except Cancelled:
                response = Response(status_code=_CLIENT_GONE)
            response.headers["X-Content-Type-Options"] = "nosniff"
            return response

        return handle

    async def completions(request: Request) -> Response:
        asked = check(CompletionRequest, await read_json(request, service.writer.is_closing))
        answer = OpenAiAnswer(service.name, is_chat=False, with_usage=_with_usage(asked))
        return await _answer(
            request, lambda tell: jobs.complete(service.model, asked, tell), answer, asked.stream
        )

    async def chat(request: Request) -> Response:
        asked = check(ChatRequest, await read_json(request, service.writer.is_closing))
        answer = OpenAiAnswer(service.name, is_chat=True, with_usage=_with_usage(asked))
        if asked.n_predict == 0:
            return JSONResponse(answer.whole(nothing_written()))
        return await _answer(
            request, lambda tell: jobs.chat(service.model, asked, tell), answer, asked.stream
        )

    async def infill(request: Request) -> Response:
        asked = check(InfillRequest, await read_json(request, service.writer.is_closing))
        answer = LlamaAnswer(service.name, asked.response_fields)
        if asked.n_predict == 0:
            return JSONResponse(answer.whole(nothing_written()))
        return await _answer(
            request, lambda tell: jobs.fill_in_editor(service.model, asked, tell), answer, asked.stream
        )

    async def fill(request: Request) -> Response:
        asked = check(PageRequest, await read_json(request, service.writer.is_closing))

        def job(tell: Callable[[Any], None]) -> Any:
            return jobs.fill_page(service.model, asked, tell)

        async def stream() -> AsyncIterator[str]:
            try:
                async with aclosing(service.writer.write(job, request.is_disconnected)) as written:
                    async for kind, value in written:
                        yield event({kind: value})
            except RequestError as error:
                yield event(error_body(error))
            except Cancelled:
                return

        return _events(stream())

    async def _answer(
        request: Request, job: Job, answer: OpenAiAnswer | LlamaAnswer, streams: bool
    ) -> Response:
        written = service.writer.write(job, request.is_disconnected)
        if not streams:
            async with aclosing(written):
                async for kind, value in written:
                    if kind == "done":
                        return JSONResponse(answer.whole(value))
            raise Cancelled
        # The first word comes before the status, so that a refusal has its own.
        try:
            kind, value = await anext(written)
        except BaseException:
            await written.aclose()
            raise

        async def stream() -> AsyncIterator[str]:
            async with aclosing(written):
                try:
                    if answer.first() is not None:
                        yield answer.first() or ""
                    yield answer.last(value) if kind == "done" else answer.state(value)
                    async for kind_, value_ in written:
                        yield answer.last(value_) if kind_ == "done" else answer.state(value_)
                except RequestError as error:
                    yield event(error_body(error))
                except Cancelled:
                    return

        return _events(stream())

    async def models(_: Request) -> Response:
        card = {"id": service.name, "object": "model", "created": 0, "owned_by": "local"}
        context = {"n_ctx_train": service.model.engine.file.context_length}
        return JSONResponse({"object": "list", "data": [{**card, "meta": context}]})

    async def props(_: Request) -> Response:
        context = service.model.engine.file.context_length
        return JSONResponse(
            {
                "default_generation_settings": {
                    "n_ctx": context,
                    "params": {"n_predict": DEFAULT_TOKENS},
                },
                "total_slots": 1,
                "model_alias": service.name,
                "model_path": service.name,
                "build_info": "ggml-diffusion",
                "modalities": {"vision": False, "audio": False},
            }
        )

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    routes = [
        Route("/v1/completions", guarded(completions), methods=["POST"]),
        Route("/v1/chat/completions", guarded(chat), methods=["POST"]),
        Route("/infill", guarded(infill), methods=["POST"]),
        Route("/fill", guarded(fill), methods=["POST"]),
        Route("/v1/models", guarded(models)),
        Route("/models", guarded(models)),
        Route("/props", guarded(props)),
        Route("/health", guarded(health, open_to_all=True)),
        Route("/v1/health", guarded(health, open_to_all=True)),
        *(Route(path, guarded(_page(*page), open_to_all=True)) for path, page in _PAGE_FILES.items()),
    ]
    return Starlette(routes=routes, exception_handlers={HTTPException: _http_error})


def _page(name: str, media_type: str) -> Callable[[Request], Any]:
    content = (files("ggml_diffusion.app.server") / name).read_bytes()

    async def handle(_: Request) -> Response:
        return Response(content, media_type=media_type, headers=_PAGE_HEADERS)

    return handle


def _with_usage(asked: Any) -> bool:
    return asked.stream_options is not None and bool(asked.stream_options.include_usage)


def _events(stream: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(stream, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})


def _error(error: RequestError) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 503 else None
    return JSONResponse(error_body(error), status_code=error.status, headers=headers)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(RequestError(str(error.detail), status=error.status_code))
