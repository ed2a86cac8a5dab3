"""Reading request bodies: bounded in bytes and in time, into one preallocated buffer."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import torch

from torchsurgeon.errors import BodyTooLargeError, ProtocolError

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

# Set by serve.protocol: reads the rest of the body straight into a buffer.
RECEIVE_INTO = "torchsurgeon.receive_into"
MIN_UPLINK_BYTE_S = 16_384


class DisconnectedError(Exception):
    """The client went away in mid-request."""


class BodyTimeoutError(Exception):
    """The body did not arrive in time."""


def content_length(headers: Mapping[bytes, bytes]) -> int | None:
    """The declared length of the body, None when it is chunked."""
    value = headers.get(b"content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 15:
        raise ProtocolError(f"Content-Length is {value!r}, which is not a number of bytes")
    return int(value)


def check_length(size: int | None, limit_bytes: int) -> None:
    """Refuse a body by its declared length, before any of it is read."""
    if size is not None and size > limit_bytes:
        raise BodyTooLargeError(f"the body is {size} bytes; what this model can be sent is at most {limit_bytes} bytes")


async def read_body(
    scope: Mapping[str, Any], receive: Receive, size: int | None, limit_bytes: int, timeout_s: float
) -> memoryview:
    """Read the whole body: ``size`` bytes when that is known, otherwise at most ``limit_bytes``.

    The client has ``timeout_s`` and the time the body takes at 16 KiB/s, whatever way it spends them. Raises
    BodyTooLargeError, BodyTimeoutError or DisconnectedError.
    """
    timeout_s += (limit_bytes if size is None else size) / MIN_UPLINK_BYTE_S
    if size is None:
        return await _in_time(_read_chunked(receive, limit_bytes), timeout_s)
    buffer = _buffer(size)
    receive_into = scope.get("extensions", {}).get(RECEIVE_INTO)
    if receive_into is None:
        await _in_time(_read_sized(receive, buffer), timeout_s)
        return buffer
    arriving: asyncio.Future[bool] = receive_into(buffer)
    if not arriving.done():
        timer = arriving.get_loop().call_later(timeout_s, arriving.cancel, "late")
        try:
            await arriving
        except asyncio.CancelledError as error:
            if error.args == ("late",):
                raise BodyTimeoutError from None
            raise
        finally:
            timer.cancel()
    if not arriving.result():
        raise DisconnectedError
    return buffer


async def discard(receive: Receive, limit_bytes: int, timeout_s: float) -> int:
    """Read and forget the rest of a body, up to a limit; returns the bytes read.

    A client that is still writing when the connection closes would lose the answer already on its way.
    """
    count = 0
    end_s = time.monotonic() + timeout_s
    try:
        while count <= limit_bytes:
            message = await asyncio.wait_for(receive(), max(0.0, end_s - time.monotonic()))
            count += len(message.get("body", b""))
            if message["type"] == "http.disconnect" or not message.get("more_body", False):
                break
    except (TimeoutError, asyncio.TimeoutError):
        pass
    return count


def inflate(body: memoryview, encoding: bytes, limit_bytes: int) -> memoryview:
    """Decompress a gzip or deflate body, never to more than ``limit_bytes``. Raises ProtocolError."""
    if encoding not in (b"gzip", b"deflate"):
        raise ProtocolError(f"Content-Encoding {encoding.decode('latin-1')!r} is not known; use gzip or deflate")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        data = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"the compressed body is damaged: {error}") from None
    if len(data) > limit_bytes:
        raise BodyTooLargeError(f"the body inflates to more than the {limit_bytes} bytes this model can be sent")
    if not unpacker.eof or unpacker.unused_data:
        raise ProtocolError("the compressed body is cut off, or something follows it")
    buffer = _buffer(len(data))
    buffer[:] = data
    return buffer


async def _in_time(reading: Awaitable[memoryview], timeout_s: float) -> memoryview:
    try:
        return await asyncio.wait_for(reading, timeout_s)
    except (TimeoutError, asyncio.TimeoutError):
        raise BodyTimeoutError from None


async def _read_sized(receive: Receive, buffer: memoryview) -> memoryview:
    filled = 0
    more = True
    while more:
        chunk, more = await _chunk(receive)
        if filled + len(chunk) > len(buffer):
            raise ProtocolError("the body is longer than its Content-Length")
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != len(buffer):
        raise ProtocolError("the body is shorter than its Content-Length")
    return buffer


async def _read_chunked(receive: Receive, limit_bytes: int) -> memoryview:
    collected = bytearray()
    more = True
    while more:
        chunk, more = await _chunk(receive)
        check_length(len(collected) + len(chunk), limit_bytes)
        collected += chunk
    buffer = _buffer(len(collected))
    buffer[:] = collected
    return buffer


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message.get("body", b""), message.get("more_body", False)


def _buffer(size: int) -> memoryview:
    # torch aligns its memory to 64 bytes and does not clear it, so a page is touched only as data arrives.
    return torch.empty(size, dtype=torch.uint8).numpy().data
