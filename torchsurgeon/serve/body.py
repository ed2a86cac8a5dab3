"""Reading request bodies into one buffer, with a limit on their bytes and on their time."""

from __future__ import annotations

import asyncio
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from torchsurgeon.errors import BodyTooLargeError, ProtocolError, short
from torchsurgeon.serve.failure import LateError
from torchsurgeon.wire.buffers import aligned_buffer

Receive = Callable[[], Awaitable[Mapping[str, Any]]]

MIN_UPLINK_BYTE_S = 16_384
# An answer of at most this size is joined to one buffer before it is written.
JOIN_BYTES = 64 << 10
# After an error, so many bytes are read and dropped, for so long, from a client that still sends.
LINGER_BYTES = 16 << 20
LINGER_S = 2.0


class Incoming:
    """An ASGI ``receive`` that remembers whether the whole body has arrived.

    Args:
        receive: the ASGI server's ``receive``.
        headers: the request's headers; None where they do not matter.

    Attributes:
        complete: whether the whole body has arrived, or there is none, or the client has left.
    """

    def __init__(self, receive: Receive, headers: Mapping[bytes, bytes] | None = None) -> None:
        self._receive = receive
        self.complete = headers is not None and not _announces_body(headers)

    async def __call__(self) -> Mapping[str, Any]:
        """Return the next message of the ASGI server."""
        message = await self._receive()
        self.complete = message["type"] == "http.disconnect" or not message.get("more_body", False)
        return message


class DisconnectedError(Exception):
    """The client left before its request was complete."""


def _announces_body(headers: Mapping[bytes, bytes]) -> bool:
    return b"transfer-encoding" in headers or headers.get(b"content-length", b"0") != b"0"


def content_length(headers: Mapping[bytes, bytes]) -> int | None:
    """Return the length of the body that the headers declare; None for a chunked body.

    Raises:
        ProtocolError: the length is not a number.
    """
    value = headers.get(b"content-length")
    if value is None:
        return None
    if not value.isdigit() or len(value) > 15:
        raise ProtocolError(f"Content-Length must be a number of bytes; got {short(value)}")
    return int(value)


def check_length(size: int | None, limit_bytes: int) -> None:
    """Check the declared length of a body, before any of it is read.

    Args:
        size: the declared length; None where it is not known.
        limit_bytes: the most bytes that are accepted.

    Raises:
        BodyTooLargeError: the body is larger.
    """
    if size is not None and size > limit_bytes:
        raise BodyTooLargeError(f"the body may have at most {limit_bytes} bytes; this one has {size}")


def timeout_for(timeout_s: float, size: int) -> float:
    """Return the seconds that ``size`` bytes of a body may take: ``timeout_s``, and their time at 16 KiB/s."""
    return timeout_s + size / MIN_UPLINK_BYTE_S


async def read_body(receive: Receive, size: int | None, limit_bytes: int, timeout_s: float) -> memoryview:
    """Return the whole body of a request.

    Args:
        receive: the ASGI ``receive``.
        size: the declared length; None where it is not known.
        limit_bytes: the most bytes that are accepted.
        timeout_s: seconds that the client may take, in addition to the time at 16 KiB/s of what has arrived.

    Raises:
        BodyTooLargeError: the body is larger than ``limit_bytes``.
        ProtocolError: the body is longer or shorter than declared.
        LateError: the body did not arrive in time.
        DisconnectedError: the client left.
    """
    arriving = _Arriving(receive)
    reading = asyncio.ensure_future(
        _read_chunked(arriving, limit_bytes) if size is None else _read_sized(arriving, aligned_buffer(size))
    )
    clock = asyncio.get_running_loop().time
    begun_s = clock()
    try:
        while not reading.done():
            # By what has arrived, and not by what was announced: who announces much could else send nothing for hours.
            left_s = begun_s + timeout_for(timeout_s, arriving.count) - clock()
            if left_s <= 0:
                raise late(timeout_s)
            await asyncio.wait({reading}, timeout=left_s)
        return reading.result()
    finally:
        reading.cancel()


def late(timeout_s: float) -> LateError:
    """Return the error for a body that takes longer than ``timeout_s`` and the time of what has come at 16 KiB/s."""
    rate = f"{MIN_UPLINK_BYTE_S >> 10} KiB/s"
    return LateError(f"a body must arrive within {timeout_s:g} s and the time of what has come at {rate}; it did not")


class _Arriving:
    """An ASGI ``receive`` that returns the next piece of a body, and whether more follows.

    Args:
        receive: the ASGI ``receive``.

    Attributes:
        count: how many bytes have arrived.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.count = 0

    async def __call__(self) -> tuple[bytes, bool]:
        """Return the next piece of the body.

        Raises:
            DisconnectedError: the client left.
        """
        message = await self._receive()
        if message["type"] == "http.disconnect":
            raise DisconnectedError
        piece: bytes = message.get("body", b"")
        self.count += len(piece)
        return piece, message.get("more_body", False)


async def discard(receive: Receive, limit_bytes: int, timeout_s: float) -> int:
    """Read the rest of a body and throw it away.

    A client that still writes when the server closes the connection would lose the answer that is on its way.

    Args:
        receive: the ASGI ``receive``.
        limit_bytes: the most bytes to read.
        timeout_s: the most seconds to read.

    Returns:
        The bytes that were read.
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
    """Return a gzip or deflate body decompressed.

    Args:
        body: the compressed body.
        encoding: the value of ``Content-Encoding``.
        limit_bytes: the most bytes to decompress.

    Raises:
        ProtocolError: the encoding is unknown, or the body is damaged.
        BodyTooLargeError: the body would be larger than ``limit_bytes``.
    """
    if encoding not in (b"gzip", b"deflate"):
        raise ProtocolError(f"Content-Encoding must be gzip or deflate; got {short(encoding.decode('latin-1'))}")
    unpacker = zlib.decompressobj(zlib.MAX_WBITS | 32)
    try:
        data = unpacker.decompress(body, limit_bytes + 1)
    except zlib.error as error:
        raise ProtocolError(f"the compressed body is damaged: {short(error)}") from None
    if len(data) > limit_bytes:
        raise BodyTooLargeError(
            f"the body may have at most {limit_bytes} bytes once it is decompressed; this one has more"
        )
    if not unpacker.eof or unpacker.unused_data:
        raise ProtocolError("the compressed body must end where its data ends; it is cut short, or more follows it")
    buffer = aligned_buffer(len(data))
    buffer[:] = data
    return buffer


async def _read_sized(arriving: _Arriving, buffer: memoryview) -> memoryview:
    filled = 0
    more = True
    while more:
        chunk, more = await arriving()
        if filled + len(chunk) > len(buffer):
            raise ProtocolError("the body is longer than its Content-Length")
        buffer[filled : filled + len(chunk)] = chunk
        filled += len(chunk)
    if filled != len(buffer):
        raise ProtocolError("the body is shorter than its Content-Length")
    return buffer


async def _read_chunked(arriving: _Arriving, limit_bytes: int) -> memoryview:
    collected = bytearray()
    more = True
    while more:
        chunk, more = await arriving()
        check_length(len(collected) + len(chunk), limit_bytes)
        collected += chunk
    buffer = aligned_buffer(len(collected))
    buffer[:] = collected
    return buffer
