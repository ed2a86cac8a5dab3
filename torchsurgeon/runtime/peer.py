"""One server as a module sees it: how it is asked, what is known of it, and whether it may be asked at all."""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from torchsurgeon._interrupts import by_signal_handler
from torchsurgeon.adapting import Allowance, ServerState
from torchsurgeon.adapting.link import LinkEstimator
from torchsurgeon.adapting.load import LoadEstimator, TrialPolicy
from torchsurgeon.adapting.mean import Mean, Quantity
from torchsurgeon.adapting.sharing import Sharing
from torchsurgeon.backends.eager import Eager
from torchsurgeon.codec import Codec, CodecTable, RatedCodec, find_codec
from torchsurgeon.codec.names import FITTED
from torchsurgeon.errors import (
    ModelMismatchError,
    RequestRefusedError,
    ServerUnavailableError,
)
from torchsurgeon.link import Link
from torchsurgeon.models.arithmetic import Arithmetic, Difference
from torchsurgeon.runtime import bits
from torchsurgeon.runtime.choice import Adaptive
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel, shake_hands
from torchsurgeon.runtime.inference import seconds
from torchsurgeon.runtime.server_profiles import ServerProfiles
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport import Answer, Transport
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, complete

# What a link is taken for until two requests have been timed. An estimate that starts from it is stated to be uncertain
# by a factor of e.
_UNKNOWN_LINK = Link("not measured", 10e6, 10e6, 0.05, source="a guess until there are requests")
# Durations at a fixed cut are averaged over about this time.
_DURATIONS_MEMORY_S = 1.0
# Of answers that follow each other within this time, one is observed.
_ALIKE_S = 2e-3
# How many kinds of requests are remembered that a server refused.
_MOST_REFUSED = 64


class Peer:
    """One server. Thread-safe.

    Attributes:
        label: its URL, or its transport's class.
        link: the link as given, or as measured before the first request; None before either.
        profiles: its backends, and their layer times as given or as it has sent them.
        allowance: how many bytes may be sent to all servers together.
        sent_bytes: what has been sent to it in requests, whether it answered or not.
        failure: why its last answer could not be used; None after an answer that could.
        ready_in: the epoch of the local weights with which the handshake succeeded; -1 where the server has to be made
            ready again. The epoch changes when the local weights do.
        plan: the choice among the cuts with this server; None until it has been measured.
        planned_for: the only cut that ``plan`` is among; None where it is among all.
        trials: when to try how fast it computes.
        doubted: whether an answer is overdue, and it is open whether the link is slow or the server is down.
        pinged: whether what was last sent to it in the background was a ping.
        told: what it said at the last handshake that it computes with; None where it did not say.
    """

    def __init__(
        self,
        transport: Transport,
        name: str,
        local: LocalModel,
        *,
        link: Link | None,
        profiles: ServerProfiles,
        output_codec: Codec,
        max_bytes: int,
        exact: bool,
        allowance: Allowance,
    ) -> None:
        self.transport = transport
        self.label: str = getattr(transport, "url", type(transport).__name__)
        self.link, self.profiles = link, profiles
        self.allowance = allowance
        self.failure: Failure | None = None
        self.sent_bytes = self.received_bytes = self.answers = 0
        self._name, self._local = name, local
        self._output_codec, self._max_bytes, self._exact = output_codec, max_bytes, exact
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Begin anew: locks may be held by the parent's threads, and connections are the parent's."""
        self.state: ServerState[Transport] = ServerState.new(
            self.transport, self.link or _UNKNOWN_LINK, now_s=time.monotonic
        )
        self.plan: Adaptive | None = None
        self.planned_for: PartitionPoint | None = None
        self.ready_in = -1
        self.asked_s = self._observed_s = -math.inf
        self.doubted = self.pinged = False
        self.trials = TrialPolicy()
        self._identity: str | None = None
        self._fitted: Mapping[str, str] = {}
        self._weights: str | None = None
        self.told: Arithmetic | None = None
        self._compared: set[str] = set()
        self._lock = threading.Lock()
        self._seen: dict[object, Mean] = {}
        self._counting = threading.Lock()
        self._asking: dict[object, float] = {}
        self._sharing = Sharing()
        self._refused: dict[object, tuple[str, int]] = {}

    # --- asking ---

    def shake(self, timeout_s: float | None = None) -> int:
        """Check that the server's model is the local one, and return the epoch of the local weights.

        Raises:
            ModelMismatchError: the server holds another model; or the same, but exact answers are asked for, and it
                cannot give the same bits.
        """
        with self._lock:
            return self._shake(timeout_s)

    def _shake(self, timeout_s: float | None) -> int:
        self.ready_in = -1
        self._refused.clear()
        epoch, digests = self._local.digests()
        agreed = shake_hands(self.transport, self._name, self._local.graph, digests, timeout_s)
        self._identity, told, self._fitted, backends = agreed
        self.profiles.agree(backends, self.label)
        if told is not None and self.profiles.to_name(None) == Eager.name:
            # It has told what its own choice computes with, and is asked for eager PyTorch.
            told = told.in_eager()
        self._weights = digests.combined
        if told is None or self.told is None or told.digest != self.told.digest:
            self._compared.clear()
        self.told = told
        ours = self._ours()
        self._compared.add(ours.digest)
        if self._exact and (differences := ours.compare(told)):
            raise bits.refusal(self._name, differences)
        return epoch

    def _ours(self) -> Arithmetic:
        """Return what the latest call was computed with here. This may be a background thread, which computes none."""
        return self._local.arithmetic.last or self._local.arithmetic.now()

    def differences(self, ours: Arithmetic) -> tuple[Difference, ...]:
        """Return what differs between what this device and the server compute with, as far as the server has told."""
        return ours.compare(self.told)

    def compared(self, ours: Arithmetic) -> bool:
        """Return whether the server has told what it computes with since this device began to compute with ``ours``.

        A server in the same process follows ``torch.set_num_threads()`` when it is asked again.
        """
        return ours.digest in self._compared

    def ask(
        self,
        tensors: Mapping[str, Tensor],
        codecs: Mapping[str, Codec],
        deadline: Deadline,
        exact: Arithmetic | None = None,
        backend: str | None = None,
    ) -> Answer:
        """Return the server's answer to named tensors; see ``asking()``."""
        return complete(self.asking(tensors, codecs, deadline, exact, backend), deadline)

    def asking(
        self,
        tensors: Mapping[str, Tensor],
        codecs: Mapping[str, Codec],
        deadline: Deadline,
        exact: Arithmetic | None = None,
        backend: str | None = None,
        *,
        reserved: object = None,
        record_sent: Callable[[int], object] | None = None,
    ) -> Steps[Answer]:
        """Return the server's answer to named tensors, in steps.

        If the server has been restarted since the handshake, it is checked again before its answer is used.

        Args:
            tensors: the tensors by name.
            codecs: how to encode each.
            deadline: when to give up.
            exact: what the server has to compute with; None for anything.
            backend: by which backend; None for the server's own.
            reserved: for which request bytes were reserved of those that may be sent in this hour.
            record_sent: called with the bytes that were sent, whether the answer came or not.

        Raises:
            ModelMismatchError: the server holds another model now, or computes with something else than ``exact``.
            ServerError: it did not answer in time, or refused; whatever else the transport raises.
        """

        options: dict[str, Any] = {
            "max_answer_bytes": self._max_bytes,
            "parameters": None if backend is None else {"backend": backend},
            "codecs": codecs,
            "output_codec": self._output_codec,
            "deadline": deadline,
        }
        request, known = object(), self._identity
        reserved = request if reserved is None else reserved
        deadline.most_bytes = self.allowance.left_bytes(reserved)
        try:
            self._asking[request] = time.perf_counter()
            answer = yield from self.transport.inferring(self._name, tensors, **options)
            if answer.parameters.get("identity") != known:
                again = functools.partial(self.transport.inferring, self._name, tensors, **options)
                answer = yield from self._once_more(again, answer, known, deadline, reserved)
            if not deadline.sent_bytes:
                # A transport of the program's own, which counts its answers only.
                deadline.sent_bytes = answer.timing.sent_bytes
            if exact is not None and answer.parameters.get("arithmetic") != exact.digest:
                yield None
                self.shake(self._left_s(deadline))
                raise bits.refusal(self._name, self.differences(exact) or (Difference("arithmetic", "told", None),))
            return answer
        finally:
            self._asking.pop(request, None)
            with self._counting:
                self.sent_bytes += deadline.sent_bytes
            self.allowance.settle(reserved, deadline.sent_bytes)
            if record_sent is not None:
                record_sent(deadline.sent_bytes)

    def _once_more(
        self,
        infer: Callable[[], Steps[Answer]],
        answer: Answer,
        known: str | None,
        deadline: Deadline,
        reserved: object,
    ) -> Steps[Answer]:
        """Check the server again after an answer that carries another identity than ``known``, and ask it once more."""
        # A transport of the program's own counts its answers only, and each of the two is one.
        uncounted = not deadline.sent_bytes
        deadline.sent_bytes = deadline.sent_bytes or answer.timing.sent_bytes
        yield None  # a handshake waits by itself
        with self._lock:
            if self._identity == known:
                self.ready_in = self._shake(self._left_s(deadline))
            known = self._identity
        if not self.allowance.reserve(reserved, deadline.sent_bytes + answer.timing.sent_bytes):
            raise ServerUnavailableError(
                f"{self.label} has changed, and sending the request again would be above hourly_bytes in this hour"
            )
        answer = yield from infer()
        if uncounted:
            deadline.sent_bytes += answer.timing.sent_bytes
        if answer.parameters.get("identity") != known:
            raise ModelMismatchError(
                f"model {self._name!r} answers with other weights than the server has just given the fingerprint of; "
                "are there several servers behind one address? Serve the same weights on all of them"
            )
        return answer

    def _left_s(self, deadline: Deadline) -> float:
        """Return the seconds until a deadline.

        Raises:
            ServerUnavailableError: it is over.
        """
        try:
            return deadline.left_s()
        except TimeoutError as error:
            if by_signal_handler(error):
                raise
            raise ServerUnavailableError(
                f"{self.label} has changed, and there was no time left to compare its model with this one"
            ) from error

    # --- what is known ---

    def has(self, codec: Codec) -> bool:
        """Return whether it decodes what a codec encodes: a fitted codec only if it has the same file.

        A codec that was fitted to other weights than both sides have now counts as one that it does not have.
        """
        if not isinstance(codec, RatedCodec):
            return True
        return self._fitted.get(codec.fitted.name) == codec.fitted.digest and not self.outdated(codec)

    def outdated(self, codec: Codec) -> bool:
        """Return whether a codec was fitted to other weights than the model had at the last handshake."""
        return isinstance(codec, RatedCodec) and self._weights not in (None, codec.fitted.weights)

    def decodable(self, table: CodecTable | None) -> CodecTable | None:
        """Return a table of measured codecs without the rows of fitted codecs that it does not have."""
        if table is None:
            return None
        rows = [
            row for row in table.rows if not row.cost.codec.startswith(FITTED) or self.has(find_codec(row.cost.codec))
        ]
        return dataclasses.replace(table, rows=tuple(rows))

    def plans(self, point: PartitionPoint | None) -> bool:
        """Return whether it has a plan for a fixed cut, or with None for choosing the cut."""
        return self.plan is not None and self.planned_for == point

    @property
    def under_way(self) -> int:
        """How many requests are under way."""
        return len(self._asking)

    def usable(self, epoch: int) -> bool:
        """Return whether it is ready in this epoch and its breaker is closed."""
        return self.ready_in == epoch and self.state.breaker.state == "closed"

    def adopt(self, link: Link) -> None:
        """Begin the estimates anew from a measured link."""
        self.link = link
        self.state = dataclasses.replace(self.state, link=LinkEstimator(link, now_s=time.monotonic))

    def forget_load(self) -> None:
        """Forget by what factor it is slower than predicted, since it is predicted otherwise from now on."""
        self.state = dataclasses.replace(self.state, load=LoadEstimator(now_s=time.monotonic))
        self.trials = TrialPolicy()

    def observe(self, answer: Answer, predicted_s: float, *, ping: bool = False) -> None:
        """Update the estimates of link and load from an answer.

        Args:
            answer: the answer, with its timing and what the server measured.
            predicted_s: predicted seconds of its tail on an idle server; 0 for none.
            ping: whether it answers a ping, whose tail is short.
        """
        if not ping:
            self.trials.timed()
        elif not self.trials.pings_count():
            predicted_s = 0.0
        self.count(answer)
        timing, measured = answer.timing, answer.parameters
        queue_s, compute_s = seconds(measured.get("queue_s")), seconds(measured.get("compute_s"))
        server_s = queue_s + compute_s + seconds(measured.get("decode_s"))
        total_s, up_bytes = timing.end_s - timing.send_start_s, timing.sent_bytes
        state = self.state
        # A server may lie: no request waits in a queue for longer than it took as a whole.
        state.load.observe(queue_s=min(queue_s, total_s), compute_s=compute_s, predicted_s=predicted_s)
        up_s = None if measured.get("receive_s") is None else seconds(measured["receive_s"])
        if up_s is not None:
            # Requests that overlap share the uplink: what this one would have taken alone is worked out first.
            arrived_s = timing.first_byte_s - server_s
            others = sum(begun_s < arrived_s for begun_s in list(self._asking.values()))
            with self._counting:
                alone = self._sharing.alone(up_bytes, arrived_s - up_s, arrived_s, others)
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

    def missed(self, up_bytes: float, waited_s: float) -> None:
        """Record that no answer came within ``waited_s`` beyond what the server needs, so the link may be that slow.

        It may as well have been the server; the keeper's trials find out which.
        """
        self.doubted = True
        self.state.link.missed(up_bytes=int(up_bytes), waited_s=waited_s)

    def record_duration(self, cut: PartitionPoint, seconds_: float) -> None:
        """Record how long the server's part of a cut took, from the end of the head to the answer."""
        with self._counting:
            known = self._seen.get(cut.place)
            if known is None:
                known = self._seen[cut.place] = Mean(seconds_, now_s=time.monotonic, memory_s=_DURATIONS_MEMORY_S)
            known.observe(seconds_)

    def refuse(self, request: object, error: RequestRefusedError) -> None:
        """Record that it refuses requests like this one, so that none is sent again before the next handshake."""
        if len(self._refused) < _MOST_REFUSED:
            # Not the error itself, whose traceback would keep the tensors of each call that it is raised in.
            self._refused[request] = str(error), error.status

    @property
    def refuses(self) -> bool:
        """Whether it has refused any request since the last handshake."""
        return bool(self._refused)

    def refusal(self, request: object) -> RequestRefusedError | None:
        """Return a new error that says how it refused a request like this one; None where it did not."""
        known = self._refused.get(request)
        return None if known is None else RequestRefusedError(*known)

    def waited(self, cut: PartitionPoint, seconds_: float) -> None:
        """Record that the server's part of a cut took longer than ``seconds_``, after which nobody waited any more.

        The next call waits longer, so that an answer that is slow, but comes, is waited for in the end.
        """
        with self._counting:
            known = self._seen.get(cut.place)
            if known is None:
                known = self._seen[cut.place] = Mean(seconds_, now_s=time.monotonic, memory_s=_DURATIONS_MEMORY_S)
            known.suppose(min(max(seconds_, known.value()), self.transport.timeout_s))

    def expected_duration(self, cut: PartitionPoint) -> Quantity | None:
        """Return how long the server's part of a cut takes, from the end of the head; None until one was recorded."""
        with self._counting:
            known = self._seen.get(cut.place)
            return None if known is None else known.quantity()

    def snapshot(self, epoch: int) -> dict[str, Any]:
        """Return what is known of it, as plain data."""
        state = self.state
        link, load = state.link.estimate(), state.load.estimate()
        rates = {"uplink_bit_s": link.uplink, "downlink_bit_s": link.downlink, "round_trip_s": link.round_trip}
        # Before the first handshake, nothing has been compared.
        differences = list(map(str, self.differences(self._ours()))) if self._compared else None
        return {
            "server": self.label,
            "usable": self.usable(epoch),
            "breaker": state.breaker.state,
            "opened": state.breaker.opened,
            "failure": None if self.failure is None else str(self.failure),
            "bits": None if differences is None else bits.verdict(differences)[0],
            "inexact_because": differences or [],
            **{name: None if self._is_guess(one) else one.value for name, one in rates.items()},
            "load": load.compute.value,
            "queue_s": load.queue_s,
            "answers": self.answers,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "probes": state.probes.count,
            "probe_bytes": state.probes.spent_bytes,
        }

    def _is_guess(self, rate: Quantity) -> bool:
        """Return whether a rate or the round trip has neither been given nor measured."""
        return self.link is None and math.isinf(rate.age_s)

    def tells_more(self, now_s: float) -> bool:
        """Return whether the answer that has come now is to be observed, and not only counted.

        The estimates are averages over a hundred times ``_ALIKE_S``, so of answers that follow each other more closely
        one is enough. An answer that comes while other requests are under way is always observed, since what each would
        take alone follows from all of them.

        Args:
            now_s: when it came (``time.perf_counter``).
        """
        if not self._asking and 0 <= now_s - self._observed_s < _ALIKE_S:
            return False
        self._observed_s = now_s
        return True

    def count(self, answer: Answer) -> None:
        """Count an answer, without which the estimates are as good."""
        self.answers += 1
        self.received_bytes += answer.timing.received_bytes

    def answered(self) -> None:
        """Record an answer: the breaker closes."""
        self.failure = None
        self.trials.answered()
        self.state.breaker.succeeded()

    def failed(self, failure: Failure) -> None:
        """Record a failure; the breaker may open, and does so at once if the server holds another model.

        A request that could not be encoded, or that no thread could send, says nothing against the server.
        """
        if failure.kind == "encoding":
            return
        self.failure = failure
        if failure.kind == "threads":
            return
        breaker = self.state.breaker
        breaker.failed()
        if failure.kind == "mismatch":
            # Asking again will not turn another model into this one, so the breaker opens at once.
            self.ready_in = -1
            while breaker.state == "closed":
                breaker.failed()
