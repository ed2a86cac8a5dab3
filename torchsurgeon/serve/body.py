"""Reading request bodies: bounded in bytes and in time, into one preallocated buffer."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torchsurgeon.errors import BodyTooLargeError, ProtocolError
from torchsurgeon.serve.failure import BodyTimeoutError
from torchsurgeon.wire.buffers import aligned_buffer

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

MIN_UPLINK_BYTE_S = 16_384
# Up to here buffers are joined rather than written one by one.
JOIN_BYTES = 64 << 10


class Incoming:
    """An ASGI ``receive`` that remembers whether the whole body has come."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.complete = False

    async def __call__(self) -> Mapping[str, Any]:
        message = await self._receive()
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


class DisconnectedError(Exception):
    """The client went away in mid-request."""


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


def timeout_for(timeout_s: float, size: int) -> float:
    """How long a body of ``size`` bytes may take: ``timeout_s``, and the time it needs at 16 KiB/s."""
    return timeout_s + size / MIN_UPLINK_BYTE_S


async def read_body(receive: Receive, size: int | None, limit_bytes: int, timeout_s: float) -> memoryview:
    """Read the whole body: ``size`` bytes when that is known, otherwise at most ``limit_bytes``.

    The client may take :func:`timeout_for` long, whatever way it spends that. Raises BodyTooLargeError, ProtocolError,
    BodyTimeoutError or DisconnectedError.
    """
    reading = _read_chunked(receive, limit_bytes) if size is None else _read_sized(receive, aligned_buffer(size))
    try:
        return await asyncio.wait_for(reading, timeout_for(timeout_s, limit_bytes if size is None else size))
    except (TimeoutError, asyncio.TimeoutError):
        raise BodyTimeoutError("the body did not arrive in time") from None


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
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    return buffer


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
    buffer = aligned_buffer(len(collected))
    buffer[:] = collected
    return buffer


async def _chunk(receive: Receive) -> tuple[bytes, bool]:
    message = await receive()
    if message["type"] == "http.disconnect":
        raise DisconnectedError
    return message.get("body", b""), message.get("more_body", False)
