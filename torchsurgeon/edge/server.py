"""The one server of a device without PyTorch: how it is asked, what is known of it, and whether it may be asked."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import numpy as np

from torchsurgeon._interrupts import start_thread
from torchsurgeon.adapting import LinkEstimator, ServerState
from torchsurgeon.edge.bundle import Bundle
from torchsurgeon.edge.codec import ArrayCodec
from torchsurgeon.edge.inference import seconds
from torchsurgeon.edge.message import ArrayAnswer, ArrayTransport
from torchsurgeon.errors import (
    EncodingError,
    ModelMismatchError,
    ProtocolError,
    RequestRefusedError,
    ServerError,
    ServerUnavailableError,
)
from torchsurgeon.link import Link
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.fingerprint import fetch
from torchsurgeon.transport.link_probe import measure_link

T = TypeVar("T")

# What a link is taken for until it has been measured.
_UNKNOWN_LINK = Link("not measured", 10e6, 10e6, 0.05, source="a guess until there are requests")
# How long the handshake and a probe may take.
_HANDSHAKE_S, _PROBE_S = 5.0, 2.0


class Task(Generic[T]):
    """A function that runs in a thread of its own, for which the caller can wait as long as it wants."""

    def __init__(self, function: Callable[[], T]) -> None:
        self.error: BaseException | None = None
        self._function = function
        self._value: list[T] = []
        self._ended = threading.Event()
        start_thread(self._run, "torchsurgeon-edge")

    def _run(self) -> None:
        try:
            self._value.append(self._function())
        except BaseException as error:
            self.error = error
        finally:
            self._ended.set()

    @property
    def ended(self) -> bool:
        """Whether it has ended."""
        return self._ended.is_set()

    def wait(self, timeout_s: float) -> bool:
        """Wait for its end, at most ``timeout_s``, and return whether it has ended."""
        return self._ended.wait(max(timeout_s, 0.0))

    def result(self) -> T:
        """Return what the function returned, or raise what it raised."""
        if self.error is not None:
            raise self.error
        return self._value[0]


class EdgeServer:
    """One server. Thread-safe.

    Args:
        transport: the way to it.
        name: the model's name there.
        bundle: what the device has of the model.
        link: the link to it; None to measure it at the handshake.
        max_bytes: the most bytes that an answer's arrays have together.

    Attributes:
        url: its URL.
        name: the model's name there.
        state: estimates of link and load, and whether to ask it.
        ready: whether the last handshake succeeded.
        measures: whether a link that was not given is measured; requests show it too, only later.
        failure: why its last answer could not be used, in words; None after an answer that could.
    """

    def __init__(self, transport: ArrayTransport, name: str, bundle: Bundle, link: Link | None, max_bytes: int) -> None:
        self.url, self.name = transport.url, name
        self.ready, self.measures = False, True
        self.failure: str | None = None
        self._transport, self._bundle, self._max_bytes = transport, bundle, max_bytes
        self._known_link = link
        self.state: ServerState[ArrayTransport] = ServerState.new(
            transport, link or _UNKNOWN_LINK, now_s=time.monotonic
        )
        self._identity: str | None = None
        self._fitted: Mapping[str, Any] = {}
        self._shaking = threading.Lock()
        self._errand: Task[None] | None = None

    def connect(self, timeout_s: float = _HANDSHAKE_S) -> None:
        """Check that its model is this one, and measure the link if that is unknown.

        Args:
            timeout_s: the longest wait for its fingerprint.

        Raises:
            ModelMismatchError: the server holds another model.
            ServerError: it does not answer, or refuses.
            ProtocolError: it answers something else than the protocol says.
        """
        with self._shaking:
            self._shake(timeout_s)
            if self._known_link is None and self.measures:
                self._known_link = link = measure_link(self._transport)
                self.state = replace(self.state, link=LinkEstimator(link, now_s=time.monotonic))
            self.ready = True

    def _shake(self, timeout_s: float) -> None:
        self.ready = False
        ours = self._bundle
        theirs = fetch(self._transport, self.name, ours.weights, ours.graph, ours.fingerprint, timeout_s)
        fitted = theirs.get("fitted_codecs")
        self._identity, self._fitted = theirs.get("identity"), fitted if isinstance(fitted, dict) else {}

    def has(self, codec: ArrayCodec) -> bool:
        """Return whether it decodes what a codec encodes: a fitted codec only if it has the same file."""
        return codec.fitted is None or bool(self._fitted.get(codec.fitted.name) == codec.fitted.digest)

    def ask(self, arrays: Mapping[str, np.ndarray[Any, Any]], codec: ArrayCodec, deadline: Deadline) -> ArrayAnswer:
        """Return the answer to named arrays. A server that was restarted is checked again before that is used.

        Args:
            arrays: the arrays by name.
            codec: how to encode them.
            deadline: when to give up.

        Raises:
            ModelMismatchError: the server holds another model now.
            ServerError: it did not answer in time, or refused.
            ProtocolError: its answer is not one of this protocol.
        """

        def infer() -> ArrayAnswer:
            return self._transport.infer(self.name, arrays, codec, max_answer_bytes=self._max_bytes, deadline=deadline)

        known = self._identity
        answer = infer()
        if answer.parameters.get("identity") == known:
            return answer
        with self._shaking:
            if self._identity == known:
                self._shake(self._left_s(deadline))
                self.ready = True
            known = self._identity
        answer = infer()
        if answer.parameters.get("identity") != known:
            raise ModelMismatchError(
                f"model {self.name!r} answers with other weights than the server has just given the fingerprint of; "
                "are there several servers behind one address? Serve the same weights on all of them"
            )
        return answer

    def _left_s(self, deadline: Deadline) -> float:
        try:
            return deadline.left_s()
        except TimeoutError:
            raise ServerUnavailableError(f"{self.url} gave no answer within {deadline.timeout_s:g} s") from None

    def observe(self, answer: ArrayAnswer, predicted_s: float) -> None:
        """Update the estimates of link and load from an answer.

        Args:
            answer: the answer.
            predicted_s: predicted seconds of its tail on an idle server.
        """
        timing, told = answer.timing, answer.parameters
        queue_s, compute_s = seconds(told.get("queue_s")), seconds(told.get("compute_s"))
        total_s = timing.end_s - timing.send_start_s
        # A server may lie: no request waits in a queue for longer than it took as a whole.
        self.state.load.observe(queue_s=min(queue_s, total_s), compute_s=compute_s, predicted_s=predicted_s)
        self.state.link.observe(
            up_bytes=timing.sent_bytes,
            up_s=None if told.get("receive_s") is None else seconds(told["receive_s"]),
            down_bytes=timing.received_bytes,
            down_s=timing.end_s - timing.first_byte_s,
            total_s=total_s,
            server_s=queue_s + compute_s + seconds(told.get("decode_s")),
        )

    def answered(self) -> None:
        """Record an answer that could be used."""
        self.failure = None
        self.state.breaker.succeeded()

    def failed(self, error: BaseException | str) -> None:
        """Record a failure; the server is not asked for a while, and at once if it holds another model."""
        self.failure = in_words(error)
        if isinstance(error, EncodingError):
            return
        breaker = self.state.breaker
        breaker.failed()
        if isinstance(error, ModelMismatchError):
            self.ready = False
            while breaker.state == "closed":
                breaker.failed()

    @property
    def usable(self) -> bool:
        """Whether calls may ask it now."""
        return self.ready and self.state.breaker.state == "closed"

    def attend(self) -> None:
        """Try a server that failed again, or probe a link that no request has shown lately, in the background."""
        if self._errand is not None and not self._errand.ended:
            return
        if not self.usable:
            # A breaker that is closed has not opened yet, but the handshake is missing.
            if self.state.breaker.allow():
                self._errand = Task(self._try)
            return
        rate = self.state.link.estimate().uplink
        size = self.state.probes.due_bytes(rate.age_s, rate.value)
        if size is not None:
            self._errand = Task(lambda: self._probe(size))

    def _try(self) -> None:
        try:
            self.connect()
        except (ServerError, ProtocolError) as error:
            self.failed(error)
        else:
            self.answered()

    def _probe(self, size: int) -> None:
        begun_s = time.perf_counter()
        try:
            timing = self._transport.probe(size, 0, timeout_s=_PROBE_S)
        except ServerError as error:
            self.failed(error)
            return
        finally:
            self.state.probes.spent(size, min(time.perf_counter() - begun_s, _PROBE_S))
        self.state.link.observe(
            up_bytes=timing.sent_bytes,
            up_s=None,
            down_bytes=timing.received_bytes,
            down_s=timing.end_s - timing.first_byte_s,
            total_s=timing.end_s - timing.send_start_s,
        )

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()


_WORDS: tuple[tuple[type[Exception], str], ...] = (
    (EncodingError, "encoding"),
    (ModelMismatchError, "mismatch"),
    (RequestRefusedError, "refused"),
    (ServerUnavailableError, "unavailable"),
    (ProtocolError, "damaged"),
)


def in_words(error: BaseException | str) -> str:
    """Return why an answer could not be used: one word for the kind of failure, and what happened."""
    if isinstance(error, str):
        return error
    word = next((word for kind, word in _WORDS if isinstance(error, kind)), "failed")
    return f"{word}: {error}"
