"""What is checked of a request before its body means anything: host, key, type, size and time."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Mapping
from typing import Any

from qalora_compile.errors import UserInputError
from qalora_compile.optional import require
from qalora_compile.serving.api_errors import ApiError, gone, refused
from qalora_compile.serving.limits import Limits
from qalora_compile.untrusted import parse_json

_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_local(host: str) -> bool:
    """Whether only programs of this machine can reach a server on an address."""
    return host in _LOCAL


def check_host(headers: Mapping[str, str]) -> None:
    """Check that a request to a local server names it by a local name.

    Otherwise a page of any site could reach it, by a name that it resolves to this machine.

    Raises:
        ApiError: it names another host.
    """
    host = headers.get("host", "")
    name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
    if name.strip("[]") not in _LOCAL:
        raise ApiError(403, "this server answers to localhost only", code="wrong_host")


def check_key(headers: Mapping[str, str], key: str | None) -> None:
    """Check the key of a request, in a time that does not depend on it.

    Raises:
        ApiError: it is missing or wrong.
    """
    if key is None:
        return
    scheme, _, given = headers.get("authorization", "").partition(" ")
    sent = given.strip().encode("latin-1", "replace")  # as headers were decoded
    same = hmac.compare_digest(sent, key.encode())
    if scheme.lower() != "bearer" or not same:
        raise ApiError(
            401,
            "the key is missing or wrong: send it as Authorization: Bearer KEY",
            code="invalid_api_key",
        )


async def read_body(request: Any, limits: Limits) -> dict[str, Any]:
    """The JSON object in the body of a request.

    Args:
        request: A request of Starlette.
        limits: The largest size, and the longest time.

    Raises:
        ApiError: it is too large or too slow, or no JSON object.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other sites cannot send this without asking
        raise ApiError(415, "send the request as application/json")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > limits.max_body:
        raise _too_large(limits)
    try:
        content = await asyncio.wait_for(_read(request, limits), limits.body_seconds)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"the request took over {limits.body_seconds} s to arrive") from error
    try:
        value = parse_json(content, "", what="the body", finite=True)
    except UserInputError as error:
        raise refused(error.what) from error
    if not isinstance(value, dict):
        raise refused("the body must be a JSON object")
    return value


async def _read(request: Any, limits: Limits) -> bytes:
    lost = require("starlette.requests", extra="serve", purpose="serve a model").ClientDisconnect
    content = bytearray()
    try:
        async for part in request.stream():
            content += part
            if len(content) > limits.max_body:
                raise _too_large(limits)
    except lost as error:
        raise gone() from error
    return bytes(content)


def _too_large(limits: Limits) -> ApiError:
    return ApiError(
        413, f"the request is larger than {limits.max_body} bytes", code="request_too_large"
    )
