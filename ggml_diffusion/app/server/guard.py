"""Who may ask, and how much: host names, origins, the key, sizes and times.

A page of another site can send requests to a server on this machine, by its address or by a name of its own
that leads here (DNS rebinding): so the Host must be one of ours, and an Origin the same. Deliberately not
here: what is asked (requests.py).
"""

import asyncio
import hmac
import json
from collections.abc import Callable, Collection
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect, Request

from ggml_diffusion.app.server.requests import RequestError

MAX_BODY_BYTES = 4 << 20
BODY_LIMIT_S = 30.0
_LOOK_S = 0.1  # how often it is looked whether the server ends
LOOPBACK = ("localhost", "127.0.0.1", "::1")


def check_host(request: Request, hosts: Collection[str] | None) -> None:
    """Refuse names that are not ours; None = any.

    Raises:
        RequestError: 403.

    """
    host = request.headers.get("host", "")
    if hosts is not None and _name(f"//{host}") not in hosts:
        raise RequestError("this server does not answer to that host name", status=403)
    origin = request.headers.get("origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise RequestError("requests from other sites are not answered", status=403)


def check_key(request: Request, key: str | None) -> None:
    """Refuse those without the key, if there is one.

    Raises:
        RequestError: 401.

    """
    if key is None:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.strip().encode(), key.encode()):
        raise RequestError("the API key is missing or wrong", status=401, code="invalid_api_key")


async def read_json(request: Request, is_closing: Callable[[], bool]) -> Any:
    """The body.

    Raises:
        RequestError: too long, too slow, or no JSON; or the server ends before all is there.

    """
    reading = asyncio.ensure_future(_read(request))
    n_looks = 0
    while not reading.done():
        await asyncio.wait([reading], timeout=_LOOK_S)
        n_looks += 1
        if not reading.done() and (is_closing() or n_looks * _LOOK_S > BODY_LIMIT_S):
            reading.cancel()
            raise RequestError("the body came too slowly", status=408)
    try:
        body = reading.result()
    except ClientDisconnect:
        raise RequestError("the client has gone") from None
    try:
        return json.loads(body, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON: {error}" if str(error) else "the body is no JSON") from None


async def _read(request: Request) -> bytes:
    too_long = RequestError(f"the body is longer than {MAX_BODY_BYTES >> 20} MiB", status=413)
    announced = request.headers.get("content-length", "0")
    if announced.isdecimal() and int(announced) > MAX_BODY_BYTES:
        raise too_long
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY_BYTES:
            raise too_long
    return bytes(body)


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _name(address: str) -> str | None:
    try:
        return urlsplit(address).hostname
    except ValueError:
        return None
