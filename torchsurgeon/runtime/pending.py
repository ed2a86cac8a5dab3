"""One inference in three stages: the head has run when this is made, then the request is sent, then it is finished.

Whoever overlaps inferences calls the stages from different threads; each is called once, in this order.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from torchsurgeon.adapting import SURE, rescue
from torchsurgeon.codec import Codec
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.runtime import inference, telemetry
from torchsurgeon.runtime.answers import check_answer
from torchsurgeon.runtime.choice import Expected, Way
from torchsurgeon.runtime.inference import Moments
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.peer import Failure, Peer, is_requests_fault
from torchsurgeon.runtime.pool import Call
from torchsurgeon.runtime.work import Work
from torchsurgeon.transport import Answer
from torchsurgeon.transport.base import Deadline

if TYPE_CHECKING:
    from torchsurgeon.adapting import Decision
    from torchsurgeon.planning import Row
    from torchsurgeon.runtime.engine import Engine

# An answer is late when 99 in 100 would have come, but never before a round trip more than was predicted, and at the
# latest after three times that and four round trips: one lost segment that is sent again after a timeout, and a
# connection that is opened anew, both stay below that.
_LATE_FACTOR, _LATE_ROUND_TRIPS = 3.0, 4.0
# Of the logarithm of what an answer takes: far above the limit, far below what overflows.
_MOST_SPREAD = 5.0
# A scheduler, a garbage collector or a radio that wakes up may cost as much at any time.
_LEAST_PATIENCE_S = 0.05
# Before anything is known of how long an answer takes.
_FIRST_PATIENCE_S = 1.0
# A local tail that is there first says nothing against the server before this.
_SLOW_FACTOR = 2.0
# Longer than it takes to hand the request over: then the weights are looked at while it is on its way.
_BRIEF_S = 5e-4
# A request that waits for its turn may end so much after its own limit.
_QUEUED_S = 1.0


class Done:
    """An inference that was run here as a whole; it has the stages of a :class:`Pending`, and nothing left to do."""

    def __init__(self, value: Any) -> None:
        self._value = value

    def send(self, *, here: bool = False) -> None:
        """Nothing is sent."""

    def cancel(self) -> None:
        """Nothing is under way."""

    def result(self) -> Any:
        """Return the model's result."""
        return self._value


class Pending:
    """An inference whose head has run, on ``boundary``; ``peer`` is the server to ask.

    ``deadline_s`` is when the answer is due, by ``time.perf_counter``.
    """

    def __init__(
        self,
        engine: Engine,
        work: Work,
        way: Way,
        peer: Peer,
        boundary: tuple[Tensor, ...],
        moments: Moments,
        *,
        expected: Callable[[], Expected] | None,
        decision: Decision[Row] | None,
        deadline_s: float | None,
    ) -> None:
        self._engine, self._work, self._way, self._peer, self._boundary = engine, work, way, peer, boundary
        self._moments, self._expected, self._decision, self._deadline_s = moments, expected, decision, deadline_s
        self._specs = work.crossing(way.point)
        example = sum(spec.size_bytes for spec in self._specs)
        self.scale = sum(tensor.nbytes for tensor in boundary) / example if example else 1.0
        self._tried = [peer]
        self._call: Call[Answer] | None = None
        self._sent_s = 0.0
        self._why: Failure | None = None
        self._share, self._unwanted = 1, False

    # --- sending ---

    def send(self, *, here: bool = False) -> None:
        """Send the boundary tensors to the server; ``here`` waits for the answer in this thread."""
        engine = self._engine
        self._sent_s = time.perf_counter()
        limit_s = self._peer.transport.timeout_s
        if self._deadline_s is not None and not engine.always:
            limit_s = max(min(limit_s, self._deadline_s - self._sent_s), 1e-6)
        deadline = Deadline(limit_s)
        tensors = dict(zip((spec.name for spec in self._specs), self._boundary, strict=True))
        self._codec = self._codec_now()
        ask = functools.partial(self._peer.ask, tensors, dict.fromkeys(tensors, self._codec), deadline)
        if self._boundary[0].is_cuda:
            # The stream that computes them is another thread's.
            ask = functools.partial(_on_stream, torch.cuda.current_stream(self._boundary[0].device), ask)
        self._peer.asked_s = time.monotonic()
        if here:
            self._call = Call(ask, None)
            self._call.run()
        else:
            self._call = engine.pool.submit(ask, deadline.cancel)

    def cancel(self) -> None:
        """Nobody wants the answer any more."""
        self._unwanted = True
        if self._call is not None:
            self._call.give_up()

    def _codec_now(self) -> Codec:
        codec = self._way.codec or self._engine.codec
        if isinstance(codec, Lossless):
            size_bytes = sum(tensor.nbytes for tensor in self._boundary)
            return codec.choose(self._way.point.index, size_bytes, self._peer.state.link.estimate().uplink.value)
        return codec

    # --- finishing ---

    def result(self) -> Any:
        """Return the model's result, from the server or, if the engine always answers, from here.

        Otherwise raises what the servers' failures were.
        """
        try:
            return self._result()
        except KeyboardInterrupt:
            self.cancel()
            raise
        except Exception as error:
            if not self._unwanted:
                telemetry.record_error(self._engine.name, time.perf_counter() - self._moments.begun_s, error)
            raise

    def _result(self) -> Any:
        while True:
            call = self._call
            assert call is not None
            if not self._engine.always:
                timeout_s = self._peer.transport.timeout_s
                if not call.wait(timeout_s + _QUEUED_S):
                    call.give_up()
                    raise ServerUnavailableError(f"no thread could ask {self._peer.label} within {timeout_s:g} s")
                try:
                    return self._accepted(call)
                except Exception as error:
                    if self._unwanted or not (self._failed(error) and self._next_peer()):
                        raise
                self.send(here=True)
                continue
            in_time = call.wait(_BRIEF_S)
            # From here on the request is on its way, and what is done meanwhile costs no time.
            if self._engine.ours.changed():
                return self._anew(call)
            if not in_time:
                patience_s, late = self._patience()
                if not call.wait(patience_s - _BRIEF_S):
                    if self._deadline_s is None and self._crowded():
                        continue
                    self._why = late
                    return self._finished_here(call)
            try:
                return self._accepted(call)
            except Exception as error:
                if self._unwanted:
                    raise
                if not (self._failed(error) and self._next_peer()):
                    return self._finished_here(call)
            self.send()

    def _patience(self) -> tuple[float, Failure]:
        """For how many seconds to do nothing but wait, and why not for longer."""
        expected, scale = self._expected_now(), max(self.scale, 1.0)
        if expected is None:
            patience_s, why = _FIRST_PATIENCE_S, "the first answer is usually sooner"
        else:
            remote_s = expected.remote_s * scale
            likely_s = remote_s * math.exp(min(SURE * expected.spread, _MOST_SPREAD))
            patience_s = max(likely_s, remote_s + expected.round_trip_s + _LEAST_PATIENCE_S)
            if not self._engine.parts.stoppable:
                # A tail that runs to its end is begun when as much has been waited in vain as it costs.
                tail_s = self._engine.here.known_tail_s(self._way)
                patience_s = math.inf if tail_s is None else max(patience_s, remote_s + tail_s * self.scale)
            most_s = max(_LATE_FACTOR * remote_s + _LATE_ROUND_TRIPS * expected.round_trip_s, _LEAST_PATIENCE_S)
            patience_s = min(patience_s, most_s)
            why = f"expected after {remote_s * 1e3:.3g} ms"
        late = Failure("late", f"{self._peer.label} gave no answer within {patience_s * 1e3:.3g} ms, {why}")
        if self._deadline_s is None:
            return patience_s, late
        left_s = self._deadline_s - time.perf_counter()
        here = self._engine.here
        plan = rescue(
            left_s,
            # Nothing is known yet: as likely as not to take half of what is left, give or take a factor of two.
            remote_s=left_s / 2 if expected is None else expected.remote_s * scale,
            remote_spread=0.7 if expected is None else expected.spread,
            tail_s=here.takes_s(self._way)[1] * self.scale,
            tail_spread=here.slowdown().spread,
        )
        if plan.start_s >= patience_s:
            return patience_s, late
        why = "will probably be late" if plan.hedged else f"was not there {plan.start_s * 1e3:.3g} ms after the head"
        return plan.start_s, Failure("deadline", f"the answer of {self._peer.label} {why}")

    def _expected_now(self) -> Expected | None:
        if self._expected is not None and self._peer is self._tried[0]:
            foreseen = self._expected()
            return foreseen._replace(remote_s=foreseen.remote_s * self._share)
        taken = self._peer.takes(self._way.point.index)
        if taken is None:
            return None
        round_trip_s = min(self._peer.state.link.estimate().round_trip.value, taken.value)
        return Expected(taken.value * self._share, taken.spread, round_trip_s)

    def _crowded(self) -> bool:
        """Whether more requests share the link and the server than patience has been reckoned for."""
        share, self._share = self._share, max(self._share, self._peer.under_way)
        return self._share > share

    def _accepted(self, call: Call[Answer]) -> Any:
        """Return the result that the answer is. Raises what is wrong with it."""
        answer, peer, engine = call.result(), self._peer, self._engine
        check_answer(engine.graph, self._specs, self._boundary, answer.tensors)
        device = self._boundary[0].device
        result = self._work.result({name: tensor.to(device) for name, tensor in answer.tensors.items()})
        end_s = time.perf_counter()
        peer.answered()
        row = self._way.row
        peer.observe(answer, 0.0 if row is None else row.tail_s * self.scale)
        if row is None:
            taken_s = min(max(answer.timing.end_s - self._sent_s, 1e-6), peer.transport.timeout_s)
            peer.took(self._way.point.index, taken_s / (max(self.scale, 1.0) * self._share))
        if isinstance(engine.codec, Lossless) and self._codec.zstd and self._way.codec is None:
            size_bytes = sum(tensor.nbytes for tensor in self._boundary)
            spent_s = answer.timing.send_start_s - self._sent_s + inference.seconds(answer.parameters.get("decode_s"))
            engine.codec.observe(self._way.point.index, size_bytes, answer.timing.sent_bytes, spent_s)
        engine.ended(
            self._way,
            inference.of_answer(
                self._way.point,
                answer,
                self._moments,
                end_s,
                engine.round_trip_s if self._decision is None else self._decision.estimates.link.round_trip.value,
                degraded=None if self._why is None else str(self._why),
                server=peer.label,
                decision=self._decision,
            ),
            self._why,
        )
        return result

    def _failed(self, error: Exception) -> bool:
        """Note that the server failed; whether another may do better."""
        self._why = failure = Failure.of(error)
        if is_requests_fault(error) and self._unusual():
            return False
        self._peer.failed(failure)
        self._engine.keeper.wake()
        self._engine.warn(failure)
        return True

    def _unusual(self) -> bool:
        """Whether the request was unlike the example, so that a refusal may be right."""
        pairs = zip(self._specs, self._boundary, strict=True)
        return any(tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape for spec, tensor in pairs)

    def _next_peer(self) -> bool:
        peer = self._engine.another(self._tried)
        if peer is None:
            return False
        self._peer = peer
        self._tried.append(peer)
        return True

    # --- finishing here ---

    def _finished_here(self, call: Call[Answer]) -> Any:
        """Return the result of the tail run here, or the answer if that comes first."""
        begin_s = time.perf_counter()
        try:
            tail = self._work.tail(tuple(spec.name for spec in self._specs))
            # A call that has failed already would stop nothing.
            result = tail(self._boundary) if call.ended else tail.until(call.answered, self._boundary)
            if result is None:
                try:
                    return self._accepted(call)
                except Exception as error:
                    self._failed(error)
                    result = tail(self._boundary)
        finally:
            if not call.ended:
                call.give_up()
        end_s = time.perf_counter()
        self._engine.here.tail_took(self._way, self.scale, end_s - begin_s)
        self._judge(call, end_s)
        moments = self._moments
        self._engine.ended(
            self._way,
            inference.Inference(
                partition=self._way.point,
                total_s=end_s - moments.begun_s,
                head_s=moments.headed_s - moments.decided_s,
                decide_s=moments.decided_s - moments.begun_s,
                wait_s=begin_s - moments.headed_s,
                local_s=end_s - begin_s,
                degraded=None if self._why is None else str(self._why),
                decision=self._decision,
            ),
            self._why,
        )
        return result

    def _judge(self, call: Call[Answer], end_s: float) -> None:
        """Note what it says of the server that the tail here was finished first."""
        why = self._why
        if why is None or why.kind not in ("late", "deadline"):
            return
        if call.ended:
            if call.error is not None and not (is_requests_fault(call.error) and self._unusual()):
                self._failed(call.error)
            return
        expected, taken_s = self._expected_now(), end_s - self._sent_s
        remote_s = _FIRST_PATIENCE_S if expected is None else expected.remote_s * max(self.scale, 1.0)
        if (row := self._way.row) is not None and taken_s > remote_s:
            self._peer.missed(row.size_bytes * self.scale, taken_s - row.tail_s * self.scale)
        if taken_s > max(_SLOW_FACTOR * remote_s, _LEAST_PATIENCE_S):
            self._peer.failed(why)
        self._engine.keeper.wake()

    def _anew(self, call: Call[Answer]) -> Any:
        """The weights have changed since hands were shaken, perhaps while the head ran: run it all here, as it is."""
        call.give_up()
        self._engine.renew()
        why = Failure("weights", "this model's weights have changed since hands were shaken with the server")
        return self._engine.run_here(self._work, self._moments.begun_s, why, self._decision)


def _on_stream(stream: torch.cuda.Stream, ask: Callable[[], Answer]) -> Answer:
    with torch.cuda.stream(stream):
        return ask()
