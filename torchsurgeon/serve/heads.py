"""What a request's head may be. The HTTP parser itself collects lines, and what a line holds, without a limit."""

from __future__ import annotations

from collections.abc import Iterable

from torchsurgeon.errors import ProtocolError, short
from torchsurgeon.serve.failure import HeadTooLargeError, TransferCodingError, VersionError

MAX_HEAD_BYTES = 64 << 10
MAX_HEAD_LINES = 100


class HeadMeter:
    """Counts the lines and bytes of one request's head, and of the trailer of a chunked body, while they arrive.

    The parser tells of a line only once the line is complete. So two counts are kept, neither of which is ever more
    than has arrived: of the complete lines, and of the pieces of data that hold nothing but a part of the head.
    """

    def __init__(self) -> None:
        self.begin()

    def begin(self) -> None:
        """Start to count for another request."""
        self._lines = self._line_bytes = self._piece_bytes = 0

    def target(self, count: int) -> None:
        """Count bytes of the request's target.

        Raises:
            HeadTooLargeError: the head is too large.
        """
        self._line_bytes += count
        self._check()

    def line(self, name: bytes, value: bytes) -> None:
        """Count a complete line.

        Raises:
            HeadTooLargeError: the head is too large.
        """
        self._lines += 1
        self._line_bytes += len(name) + len(value) + len(b": \r\n")
        self._check()

    def piece(self, count: int) -> None:
        """Count a piece of data that holds nothing but a part of the head.

        Raises:
            HeadTooLargeError: the head is too large.
        """
        self._piece_bytes += count
        self._check()

    def body(self) -> None:
        """Take notice that a piece holds a part of the body, so that the head was complete before it."""
        self._piece_bytes = 0

    def _check(self) -> None:
        if self._lines > MAX_HEAD_LINES:
            raise HeadTooLargeError(
                f"the head of a request may have at most {MAX_HEAD_LINES} header lines; this one has more"
            )
        if max(self._line_bytes, self._piece_bytes) > MAX_HEAD_BYTES:
            raise HeadTooLargeError(
                f"the head of a request may have at most {MAX_HEAD_BYTES >> 10} KiB; this one has more"
            )


def check_head(version: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
    """Check what a proxy and this server could otherwise read differently (RFC 9112, sections 2.3, 3.2 and 6.1).

    Args:
        version: the version of HTTP.
        headers: the headers, with names in lower case.

    Raises:
        VersionError: the version is another one.
        TransferCodingError: the body is sent in another way than in chunks.
        ProtocolError: there is not one Host.
    """
    if version not in ("1.0", "1.1"):
        raise VersionError(f"the version must be HTTP/1.1 or HTTP/1.0; got HTTP/{version}")
    codings = [value for name, value in headers if name == b"transfer-encoding"]
    if codings and (len(codings) > 1 or codings[0].strip().lower() != b"chunked"):
        raise TransferCodingError(
            f"Transfer-Encoding must be chunked; got {short(b', '.join(codings).decode('latin-1'))}"
        )
    hosts = sum(name == b"host" for name, _ in headers)
    if hosts > 1 or (hosts == 0 and version == "1.1"):
        raise ProtocolError(f"a request must have the header Host once; this one has it {hosts} times")
