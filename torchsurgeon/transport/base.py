"""The base class of what carries bytes to a server and back; without a tensor library."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.errors import BodyTooLargeError, EncodingError, RequestRefusedError, short
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps
from torchsurgeon.wire.body import Encoded
from torchsurgeon.wire.header import MAX_HEADER_BYTES, Buffer, header_length

if TYPE_CHECKING:
    from typing_extensions import Self

CONTROL_LIMIT_BYTES = 64 << 20
ERROR_LIMIT_BYTES = 64 << 10
_REASON_CHARACTERS = 1000


class Timing(NamedTuple):
    """When one exchange happened, and how many bytes it moved.

    Attributes:
        sent_bytes: length of the request's body.
        received_bytes: length of the answer's body.
        send_start_s: when sending began, in seconds of ``time.perf_counter``, like all times that follow.
        send_end_s: when the request had been handed to the operating system.
        first_byte_s: when the answer's first byte arrived.
        end_s: when the answer was complete.
        encode_s: seconds that encoding the request took; 0 where that is not known.
        encoded_s: when the request had been encoded; None where that is not known. Between this and the beginning of
            sending, a connection may have been opened.
    """

    sent_bytes: int
    received_bytes: int
    send_start_s: float
    send_end_s: float
    first_byte_s: float
    end_s: float
    encode_s: float = 0.0
    encoded_s: float | None = None

    @property
    def ready_s(self) -> float:
        """When the request had been encoded, or, where that is not known, when sending began."""
        return self.send_start_s if self.encoded_s is None else self.encoded_s


class RawAnswer(NamedTuple):
    """One HTTP answer.

    Attributes:
        status: the HTTP status.
        header_bytes: the value of ``Inference-Header-Content-Length``; None where the answer has none.
        body: the body, in writable memory of exactly its size.
        timing: when it happened.
    """

    status: int
    header_bytes: str | None
    body: memoryview
    timing: Timing


class ByteTransport(ABC):
    """The way of bytes to one tail server. Thread-safe; a context manager that closes it. Closing twice is harmless.

    Args:
        timeout_s: seconds that each call as a whole may take, unless the call says otherwise.
    """

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s

    @abstractmethod
    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """Return the JSON value at a path of the server.

        Args:
            path: the path, such as ``/v2/models/NAME``.
            timeout_s: seconds that the call may take; the transport's by default.

        Raises:
            ServerUnavailableError: no complete answer came in time.
            RequestRefusedError: the server answered with an error.
            ProtocolError: the answer is no JSON.
        """

    @abstractmethod
    def _post(
        self, path: str, header_bytes: int | None, buffers: list[Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        """Post buffers as one binary body. An answer of more than ``limit_bytes`` is refused before it is read."""

    def _posting(
        self, path: str, header_bytes: int | None, buffers: list[Buffer], limit_bytes: int, deadline: Deadline
    ) -> Steps[RawAnswer]:
        """Do what ``_post()`` does, in steps; here in one that waits by itself."""
        yield None
        return self._post(path, header_bytes, buffers, limit_bytes, deadline)

    @abstractmethod
    def close(self) -> None:
        """Close every connection. Calls after that raise ServerUnavailableError."""

    def _asking(
        self,
        model: str,
        version: str | None,
        named: Iterable[str],
        encode: Callable[[], Encoded],
        max_answer_bytes: int,
        deadline: Deadline,
    ) -> Steps[tuple[memoryview, int | None, Timing]]:
        """Send an inference request in steps; return the answer's body, the length of its header, and when it came.

        Args:
            model: the model's name at the server.
            version: the model's version; the server's default without one.
            named: the names of the tensors that are sent, for the message of an error.
            encode: makes the request.
            max_answer_bytes: the most bytes that the output tensors have together. A longer answer is not read.
            deadline: when the call has to be over.

        Raises:
            EncodingError: the request could not be made; nothing was sent.
            ServerUnavailableError: no complete answer came in time.
            RequestRefusedError: the server answered with an error.
        """
        begun_s = time.perf_counter()
        try:
            message = encode()
        except EncodingError:
            raise
        except Exception as error:
            if by_signal_handler(error):
                raise
            # Whatever it is (no memory, a codec's missing package), it happened here: nothing has been sent.
            tensors = short(", ".join(named), 200, quote=False)
            raise EncodingError(
                f"the tensors {tensors} could not be encoded on this side: {type(error).__name__}: {short(error)}"
            ) from error
        encoded_s, path = time.perf_counter(), _infer_path(model, version)
        limit_bytes = max_answer_bytes + MAX_HEADER_BYTES
        raw = yield from self._posting(path, message.header_bytes, message.buffers, limit_bytes, deadline)
        check_status(raw.status, raw.body, path)
        header_bytes = None if raw.header_bytes is None else header_length(raw.header_bytes, len(raw.body))
        timing = raw.timing._replace(encode_s=encoded_s - begun_s, encoded_s=encoded_s)
        return raw.body, header_bytes, timing

    def probe(
        self, up_bytes: int, down_bytes: int, *, timeout_s: float | None = None, deadline: Deadline | None = None
    ) -> Timing:
        """Send bytes and receive bytes, to measure the link. The server limits both.

        Args:
            up_bytes: bytes to send.
            down_bytes: bytes to receive.
            timeout_s: seconds that the call may take; the transport's by default.
            deadline: in place of ``timeout_s``: a deadline that another thread can cancel.

        Raises:
            ServerUnavailableError: no complete answer came in time.
            RequestRefusedError: the server answered with an error, such as to a probe above its limit.
        """
        deadline = deadline or Deadline(self.timeout_s if timeout_s is None else timeout_s)
        path = f"/v2/probe?down={down_bytes}"
        raw = self._post(path, None, [os.urandom(up_bytes)], down_bytes + ERROR_LIMIT_BYTES, deadline)
        check_status(raw.status, raw.body, path)
        return raw.timing

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@lru_cache(maxsize=256)
def _infer_path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}/infer" if version else f"{path}/infer"


def check_size(size: int, limit_bytes: int, who: str) -> None:
    """Check the size of an answer.

    Args:
        size: the answer's bytes.
        limit_bytes: the most bytes that are accepted.
        who: who answers, for the message of an error.

    Raises:
        BodyTooLargeError: the answer is larger.
    """
    if size > limit_bytes:
        raise BodyTooLargeError(f"an answer may have at most {limit_bytes} bytes; {who} answers with {size}")


def check_status(status: int, body: memoryview, path: str) -> None:
    """Check that the status of an answer is one of success.

    Args:
        status: the HTTP status.
        body: the answer's body, which says what was wrong.
        path: the path that was asked for.

    Raises:
        RequestRefusedError: the status is an error; the message repeats the server's, at most 1,000 characters of it.
    """
    if 200 <= status < 300:
        return
    text = bytes(body[:2000]).decode("utf-8", "replace").strip()
    try:
        parsed = json.loads(text)
        text = str(parsed["error"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        if by_signal_handler(error):
            raise
    reason = text[:_REASON_CHARACTERS] or "no reason given"
    raise RequestRefusedError(f"the server answered {status} to {path[:300]}: {reason}", status)
