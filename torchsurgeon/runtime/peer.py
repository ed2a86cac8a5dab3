"""One server as a module sees it: how it is asked, what is known of it, and whether it may be asked at all."""

from __future__ import annotations

import dataclasses
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchsurgeon.adapting import ServerState
from torchsurgeon.adapting.link import LinkEstimator
from torchsurgeon.adapting.sharing import Sharing
from torchsurgeon.adapting.tracker import Quantity, Tracker
from torchsurgeon.codec import Codec
from torchsurgeon.errors import (
    CodecError,
    ModelMismatchError,
    ProtocolError,
    RequestRefusedError,
    ServerUnavailableError,
)
from torchsurgeon.link import Link
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime.choice import Adaptive
from torchsurgeon.runtime.handshake import Ours, shake_hands
from torchsurgeon.runtime.inference import seconds
from torchsurgeon.transport import Answer, Transport
from torchsurgeon.transport.base import Deadline

# Stands in until two requests have shown the link; its own uncertainty is a factor of e.
_UNKNOWN_LINK = Link("not measured", 10e6, 10e6, 0.05, source="a guess until there are requests")
# These say what is wrong with one request, not with the server.
_REQUESTS_FAULT = (400, 413, 415, 422)


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a server's answer was not used. ``kind`` is one word, for counting."""

    kind: str
    text: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.text}"

    @staticmethod
    def of(error: Exception) -> Failure:
        """The failure that an error is."""
        for kinds, word in _WORDS:
            if isinstance(error, kinds):
                return Failure(word, str(error))
        return Failure("failed", f"{type(error).__name__}: {error}")


_WORDS: tuple[tuple[tuple[type[Exception], ...], str], ...] = (
    ((ModelMismatchError,), "mismatch"),
    ((RequestRefusedError,), "refused"),
    ((ServerUnavailableError, OSError), "unavailable"),
    ((ProtocolError, CodecError), "damaged"),
)


class Peer:
    """One server. Thread-safe.

    ``ready_in`` is the epoch of our weights in which hands were shaken and all else that asking it takes was found out.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        ours: Ours,
        *,
        link: Link | None,
        profile: LayerProfile | None,
        output_codec: Codec,
        max_bytes: int,
    ) -> None:
        self.transport = transport
        self.label: str = getattr(transport, "url", type(transport).__name__)
        self.link = link
        """The link as it was given or measured before the first request; None before either."""
        self.profile = profile
        """Its layer times as they were given, or as it has told them; None before either."""
        self.failure: Failure | None = None
        self.sent_bytes = self.received_bytes = self.answers = 0
        self._name, self._ours = name, ours
        self._output_codec, self._max_bytes = output_codec, max_bytes
        self.start_anew()

    def start_anew(self) -> None:
        """Forget what may not outlive a fork: locks, and hands shaken over connections that were the parent's."""
        self.state: ServerState[Transport] = ServerState.new(
            self.transport, self.link or _UNKNOWN_LINK, now_s=time.monotonic
        )
        self.plan: Adaptive | None = None
        self.stream_plan: Adaptive | None = None
        self.ready_in = -1
        self.asked_s = -math.inf
        self.doubted = False
        self._identity: str | None = None
        self._lock = threading.Lock()
        self._seen: dict[int, Tracker] = {}
        self._counting = threading.Lock()
        self.under_way = 0
        self._sharing = Sharing()

    # --- asking ---

    def shake(self, timeout_s: float | None = None) -> int:
        """Make sure that the server's model is ours; return the epoch of our weights. Raises ModelMismatchError."""
        with self._lock:
            return self._shake(timeout_s)

    def _shake(self, timeout_s: float | None) -> int:
        self.ready_in = -1
        epoch, digests = self._ours.digests()
        self._identity = shake_hands(self.transport, self._name, self._ours.graph, digests, timeout_s)
        return epoch

    def ask(self, tensors: Mapping[str, Tensor], codecs: Mapping[str, Codec], deadline: Deadline) -> Answer:
        """Return the answer of the model that hands were shaken with, or of an equal one in its place.

        Raises what the transport raises, and ModelMismatchError.
        """

        def infer() -> Answer:
            return self.transport.infer(
                self._name,
                tensors,
                max_answer_bytes=self._max_bytes,
                codecs=codecs,
                output_codec=self._output_codec,
                deadline=deadline,
                crc32=True,
            )

        with self._counting:
            self.under_way += 1
        try:
            return self._checked(infer, deadline)
        finally:
            with self._counting:
                self.under_way -= 1

    def _checked(self, infer: Callable[[], Answer], deadline: Deadline) -> Answer:
        known = self._identity
        answer = infer()
        if answer.parameters.get("identity") == known:
            return answer
        with self._lock:
            if self._identity == known:
                self.ready_in = self._shake(deadline.left_s())
            known = self._identity
        answer = infer()
        if answer.parameters.get("identity") != known:
            raise ModelMismatchError(
                f"model {self._name!r} answers with other weights than the server has just given the fingerprint of; "
                "are there several servers behind one address? Serve the same weights on all of them"
            )
        return answer

    # --- what is known ---

    def usable(self, epoch: int) -> bool:
        """Whether to ask it now."""
        return self.ready_in == epoch and self.state.breaker.state == "closed"

    def adopt(self, link: Link) -> None:
        """Start from a link that was measured."""
        self.link = link
        self.state = dataclasses.replace(self.state, link=LinkEstimator(link, now_s=time.monotonic))

    def observe(self, answer: Answer, predicted_s: float) -> None:
        """Take in what an answer tells of link and load. ``predicted_s`` is its tail's prediction, 0 for none."""
        timing, told = answer.timing, answer.parameters
        queue_s, compute_s = seconds(told.get("queue_s")), seconds(told.get("compute_s"))
        server_s = queue_s + compute_s + seconds(told.get("decode_s"))
        total_s, up_bytes = timing.end_s - timing.send_start_s, timing.sent_bytes
        state = self.state
        # Nobody waits for longer than the whole request took.
        state.load.observe(queue_s=min(queue_s, total_s), compute_s=compute_s, predicted_s=predicted_s)
        up_s = None if told.get("receive_s") is None else seconds(told["receive_s"])
        if up_s is not None:
            arrived_s = timing.first_byte_s - server_s
            with self._counting:
                alone = self._sharing.alone(up_bytes, arrived_s - up_s, arrived_s, self.under_way)
            if alone is not None:
                total_s += alone[1] - up_s
                up_bytes, up_s = alone
        if up_s is None or alone is not None:
            state.link.observe(
                up_bytes=up_bytes,
                up_s=up_s,
                down_bytes=timing.received_bytes,
                down_s=timing.end_s - timing.first_byte_s,
                total_s=total_s,
                server_s=server_s,
            )
        self.answers += 1
        self.sent_bytes += timing.sent_bytes
        self.received_bytes += timing.received_bytes

    def missed(self, up_bytes: float, waited_s: float) -> None:
        """Take in that there was no answer after so long, beside what the server needs: it looks as if the link were as
        slow. It may have been the server, which trials find out."""
        self.doubted = True
        self.state.link.missed(up_bytes=int(up_bytes), waited_s=waited_s)

    def took(self, cut: int, seconds_: float) -> None:
        """Take in how long the server's part of a cut took as a whole, from head to answer."""
        with self._counting:
            tracker = self._seen.get(cut)
            if tracker is None:
                tracker = self._seen[cut] = Tracker(seconds_, now_s=time.monotonic)
            tracker.observe(seconds_)

    def takes(self, cut: int) -> Quantity | None:
        """How long the server's part of a cut takes as a whole; None until it has been seen."""
        with self._counting:
            tracker = self._seen.get(cut)
            return None if tracker is None else tracker.quantity()

    def told(self, epoch: int) -> dict[str, Any]:
        """What is known of it, as plain data."""
        state = self.state
        link, load = state.link.estimate(), state.load.estimate()
        return {
            "server": self.label,
            "usable": self.usable(epoch),
            "breaker": state.breaker.state,
            "opened": state.breaker.opened,
            "failure": None if self.failure is None else str(self.failure),
            "uplink_bit_s": link.uplink.value,
            "downlink_bit_s": link.downlink.value,
            "round_trip_s": link.round_trip.value,
            "load": load.compute.value,
            "queue_s": load.queue_s,
            "answers": self.answers,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "probes": state.probes.count,
            "probe_bytes": state.probes.spent_bytes,
        }

    def answered(self) -> None:
        """It has answered well."""
        self.failure = None
        self.state.breaker.succeeded()

    def failed(self, failure: Failure) -> None:
        """It has not."""
        self.failure = failure
        breaker = self.state.breaker
        breaker.failed()
        if failure.kind == "mismatch":
            # Another model there will not become ours by being asked again.
            self.ready_in = -1
            while breaker.state == "closed":
                breaker.failed()


def is_requests_fault(error: Exception) -> bool:
    """Whether a server refused a request for what is in it."""
    return isinstance(error, RequestRefusedError) and error.status in _REQUESTS_FAULT
