"""What every transport is and gives back."""

from __future__ import annotations

import json
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from types import TracebackType
from typing import Any, NamedTuple
from urllib.parse import quote

from torch import Tensor

from torchsurgeon import wire
from torchsurgeon.codec import Codec
from torchsurgeon.errors import BodyTooLargeError, RequestRefusedError

CONTROL_LIMIT_BYTES = 64 << 20
ERROR_LIMIT_BYTES = 64 << 10
# Sockets and locks take no timeout that is much longer, and not an infinite one.
_MOST_WAIT_S = 1e6


class Timing(NamedTuple):
    """When one exchange happened (seconds of ``time.perf_counter``) and how many body bytes it moved."""

    sent_bytes: int
    received_bytes: int
    send_start_s: float
    send_end_s: float
    first_byte_s: float
    end_s: float


class Answer(NamedTuple):
    """The outputs of one inference by name, the server's parameters (``queue_s``, ``compute_s``, …), and the timing."""

    tensors: dict[str, Tensor]
    parameters: Mapping[str, Any]
    timing: Timing


class RawAnswer(NamedTuple):
    """One HTTP answer. ``body`` is writable memory of just its size; ``header_bytes`` is the v2 extension's header."""

    status: int
    header_bytes: str | None
    body: memoryview
    timing: Timing


class Transport(ABC):
    """What a device needs of a tail server. Thread-safe; closing twice is harmless; also a context manager."""

    def __init__(self, timeout_s: float = 30.0) -> None:
        self.timeout_s = timeout_s

    @abstractmethod
    def get_json(self, path: str, *, timeout_s: float | None = None) -> Any:
        """The JSON at ``path``. Raises ServerUnavailableError, RequestRefusedError or ProtocolError."""

    @abstractmethod
    def _post(
        self, path: str, header_bytes: int | None, buffers: list[wire.Buffer], limit_bytes: int, deadline: Deadline
    ) -> RawAnswer:
        """Post buffers as one binary body; an answer above ``limit_bytes`` is not read."""

    @abstractmethod
    def close(self) -> None:
        """Close every connection. Calls after this raise ServerUnavailableError."""

    def infer(
        self,
        model: str,
        tensors: Mapping[str, Tensor],
        *,
        max_answer_bytes: int,
        version: str | None = None,
        outputs: Collection[str] = (),
        request_id: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        codecs: Mapping[str, Codec] | None = None,
        output_codec: Codec | None = None,
        timeout_s: float | None = None,
        deadline: Deadline | None = None,
        crc32: bool = False,
    ) -> Answer:
        """Send named tensors and return the outputs (all of them unless ``outputs`` names some).

        ``max_answer_bytes`` is what the outputs' tensors can have together; a longer answer is refused unread.
        ``codecs`` has the codec of each tensor that is not sent as it is, ``output_codec`` is asked for in the answer.
        ``deadline``, in place of ``timeout_s``, can be cancelled from another thread. ``crc32`` has both messages carry
        a checksum, which torchsurgeon's servers understand.
        Raises ServerUnavailableError when nothing complete came within ``timeout_s``, RequestRefusedError when the
        server answered with an error, ProtocolError when the answer is not one of this protocol.
        """
        deadline = deadline or Deadline(self.timeout_s if timeout_s is None else timeout_s)
        message = wire.encode_request(
            tensors,
            outputs=outputs,
            request_id=request_id,
            parameters=parameters,
            codecs=codecs,
            output_codec=output_codec,
            crc32=crc32,
        )
        path = _infer_path(model, version)
        raw = self._post(
            path, message.header_bytes, message.buffers, max_answer_bytes + wire.MAX_HEADER_BYTES, deadline
        )
        check_status(raw.status, raw.body, path)
        length = None if raw.header_bytes is None else wire.header_length(raw.header_bytes, len(raw.body))
        response = wire.decode_response(raw.body, length, max_decoded_bytes=max_answer_bytes)
        return Answer(response.tensors, response.parameters, raw.timing)

    def probe(
        self, up_bytes: int, down_bytes: int, *, timeout_s: float | None = None, deadline: Deadline | None = None
    ) -> Timing:
        """Move that many bytes each way and time it, to measure the link. The server bounds both."""
        deadline = deadline or Deadline(self.timeout_s if timeout_s is None else timeout_s)
        path = f"/v2/probe?down={down_bytes}"
        raw = self._post(path, None, [os.urandom(up_bytes)], down_bytes + ERROR_LIMIT_BYTES, deadline)
        check_status(raw.status, raw.body, path)
        return raw.timing

    def __enter__(self) -> Transport:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@lru_cache(maxsize=256)
def _infer_path(model: str, version: str | None) -> str:
    path = f"/v2/models/{quote(model, safe='')}"
    return f"{path}/versions/{quote(version, safe='')}/infer" if version else f"{path}/infer"


class Deadline:
    """When one call as a whole has to be over. Any thread may :meth:`cancel` it, and then it is over."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.cancelled = False
        self._end_s = time.monotonic() + timeout_s
        self._lock = threading.Lock()
        self._interrupt: Callable[[], object] | None = None

    def left_s(self) -> float:
        """Seconds left; raises TimeoutError when there are none, since a socket timeout of 0 means non-blocking."""
        # No more than there was to begin with, should the clock have stepped back.
        left = min(self._end_s - time.monotonic(), self.timeout_s, _MOST_WAIT_S)
        # Not one of nan seconds either.
        if not left > 0 or self.cancelled:
            raise TimeoutError
        return left

    def cancel(self) -> None:
        """End the call now: what it waits for is interrupted, and no other wait begins."""
        with self._lock:
            self.cancelled = True
            if self._interrupt is not None:
                self._interrupt()

    def interrupted_by(self, interrupt: Callable[[], object] | None) -> None:
        """Say what ends the wait that follows; None when there is none any more. It must not raise."""
        with self._lock:
            self._interrupt = interrupt
            if self.cancelled and interrupt is not None:
                interrupt()


def check_size(size: int, limit_bytes: int, who: str) -> None:
    """Raise BodyTooLargeError for an answer longer than the outputs can be."""
    if size > limit_bytes:
        raise BodyTooLargeError(f"{who} answers with {size} bytes, but the outputs can have at most {limit_bytes}")


def check_status(status: int, body: memoryview, path: str) -> None:
    """Raise RequestRefusedError, in the server's words, for a status other than success."""
    if 200 <= status < 300:
        return
    text = bytes(body[:2000]).decode("utf-8", "replace").strip()
    try:
        parsed = json.loads(text)
        text = str(parsed["error"])
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    raise RequestRefusedError(f"the server answered {status} to {path}: {text or 'no reason given'}", status)
