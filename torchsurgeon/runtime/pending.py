"""A call from the end of its head to its result.

The engine runs the head and makes a ``Pending``. ``send()`` then sends the boundary tensors, and ``result()`` waits for
the answer, or finishes the call on the device. Each of the three is done once, in this order. A stream does them in
different threads.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchsurgeon._interrupts import NoThreadError, by_signal_handler
from torchsurgeon.adapting import Decision
from torchsurgeon.codec import Codec, RatedCodec
from torchsurgeon.errors import (
    EncodingError,
    RequestRefusedError,
    ServerError,
    ServerUnavailableError,
)
from torchsurgeon.models.arithmetic import Arithmetic
from torchsurgeon.models.watching import WatchedWeights
from torchsurgeon.planning import Row
from torchsurgeon.planning.costs import Expected
from torchsurgeon.runtime import bits, inference
from torchsurgeon.runtime.answers import check_answer
from torchsurgeon.runtime.choice import Way
from torchsurgeon.runtime.connector import Connector
from torchsurgeon.runtime.device import DeviceRunner, DeviceTimes, settle
from torchsurgeon.runtime.driven import Driven
from torchsurgeon.runtime.failure import Failure, MeteredError, is_requests_fault
from torchsurgeon.runtime.handshake import LocalModel, changed_midway
from torchsurgeon.runtime.inference import Moments
from torchsurgeon.runtime.keeper import Keeper
from torchsurgeon.runtime.ledger import Ledger
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.peer import Peer
from torchsurgeon.runtime.pool import Ended, Pool, Task
from torchsurgeon.runtime.servers import Servers
from torchsurgeon.runtime.telemetry import below_current
from torchsurgeon.runtime.waiting import FIRST_PATIENCE_S, Waiting
from torchsurgeon.runtime.work import Work
from torchsurgeon.tracing.specs import TensorSpec
from torchsurgeon.transport import Answer
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.steps import Steps, complete

# A tail on the device may be finished before the answer comes. The server then counts as failed only if the answer has
# already taken this many times what was expected of it.
_SLOW_FACTOR = 2.0
# The server does not count as failed before this time either: a scheduler, a garbage collector or a radio that wakes up
# may take as long at any time.
_LEAST_SLOW_S = 0.05
# Handing the request to the network takes less than this. Only after it does this thread compare the weights, so that
# the comparison does not delay the request.
_BRIEF_S = 5e-4
# Bytes of which a checksum is made, or which are copied, within about a millisecond by a small device.
_LIGHT_BYTES = 1 << 20
# A request may have to wait this long for a thread of the pool before its own time limit begins.
_QUEUED_S = 1.0


@dataclass(frozen=True, eq=False)
class Shared:
    """What all calls of one SplitModule share.

    Attributes:
        options: what the user asked for.
        local: the model on this side, with its weights' digests.
        parts: the heads and tails of the model.
        times: how long the parts take on this device.
        device: runs whole calls on this device.
        servers: the servers, and the choice among them.
        connector: makes servers ready to be asked.
        keeper: the background thread that looks after servers between calls.
        pool: the threads that wait for answers.
        ledger: what has happened so far.
    """

    options: Options
    local: LocalModel
    parts: Parts
    times: DeviceTimes
    device: DeviceRunner
    servers: Servers
    connector: Connector
    keeper: Keeper
    pool: Pool
    ledger: Ledger


class Done:
    """A call that has already run on the device as a whole. It has the methods of a ``Pending``, which do nothing."""

    recorded = False

    def __init__(self, value: Any) -> None:
        self._value = value

    def send(self, *, in_caller: bool = False) -> None:
        """Do nothing: there is no request."""

    def cancel(self) -> None:
        """Do nothing: nothing is under way."""

    def result(self) -> Any:
        """Return the model's result."""
        return self._value


class Pending:
    """A call whose head has run and whose tail is still to be run, by a server or by the device.

    Args:
        shared: what the calls of its module share.
        work: the call.
        way: where it is cut.
        peer: the server to ask.
        boundary: the tensors that the head has computed.
        specs: what these tensors are, as ``work.crossing(way.point)`` says.
        moments: when its stages ended.
        codec: how to encode the boundary, unless ``way`` has a codec of its own.
        expected: predicts the server's part; None where nothing has been measured.
        decision: what the choice of the cut was made on; None where the cut is fixed.
        deadline_s: when the answer is due (``time.perf_counter``).
        arithmetic: what this device computes with.
        weights: the weights when the head began.
        rounded_because: why a server's answer has not the model's own bits, whatever the server computes with.
    """

    def __init__(
        self,
        shared: Shared,
        work: Work,
        way: Way,
        peer: Peer,
        boundary: tuple[Tensor, ...],
        specs: tuple[TensorSpec, ...],
        moments: Moments,
        *,
        codec: Codec | Lossless,
        expected: Callable[[float], Expected] | None,
        decision: Decision[Row] | None,
        deadline_s: float | None,
        arithmetic: Arithmetic,
        weights: WatchedWeights,
        rounded_because: tuple[str, ...],
    ) -> None:
        self._shared, self._work, self._way, self._peer, self._boundary = shared, work, way, peer, boundary
        self._moments, self._decision, self._deadline_s = moments, decision, deadline_s
        self._arithmetic, self._weights, self._rounded_because = arithmetic, weights, rounded_because
        self._wanted_codec, self._own_codec = way.codec or codec, codec
        self._specs = specs
        size_bytes = example_bytes = 0
        for spec, tensor in zip(self._specs, boundary, strict=True):
            example_bytes += spec.size_bytes
            size_bytes += tensor.nbytes
        self.scale = size_bytes / example_bytes if example_bytes else 1.0
        self._tried = [peer]
        self._is_bounded, self._reserved = peer.allowance.hourly_bytes is not None, object()
        self._asking: Steps[Answer] | None = None
        self._task: Task[Answer] | Ended[Answer] | None = None
        self._deadline: Deadline | None = None
        self._sent_s = 0.0
        self._why: Failure | None = None
        self._waiting = Waiting(shared.times, shared.parts, way, self.scale, expected, deadline_s)
        self._unwanted = False
        self.recorded = False
        """Whether its error has been recorded."""

    # --- sending ---

    def send(self, *, in_caller: bool = False) -> None:
        """Send the boundary tensors to the server; with ``in_caller``, from the thread that waits for the answer.

        Where the module falls back to the device, that thread may have the tail to run when the answer is late. So it
        sends the request itself only where that takes a moment, and the rest then goes on in another thread.
        """
        shared = self._shared
        if self._way.student is not None and self._way.codec is not None and not self._peer.has(self._way.codec):
            self._compute_without_student()
        metered = shared.servers.metered(self._way, self._work, self._reserved) if self._is_bounded else None
        if metered is not None:
            # Other calls have begun to send since this one was decided.
            if not shared.options.falls_back:
                raise ServerUnavailableError(f"no request may be sent: {metered.text}")
            self._task = Ended(error=MeteredError(metered.text))
            return
        self._sent_s = time.perf_counter()
        limit_s = self._peer.transport.timeout_s
        if self._deadline_s is not None and not shared.options.falls_back:
            limit_s = max(min(limit_s, self._deadline_s - self._sent_s), 1e-6)
        self._deadline = deadline = Deadline(limit_s)
        tensors = {spec.name: tensor for spec, tensor in zip(self._specs, self._boundary, strict=True)}
        self._codec = self._codec_now()
        exact = self._arithmetic if shared.options.exact else None
        backend = self._peer.profiles.to_name(None if self._way.row is None else self._way.row.server_backend)
        codecs = dict.fromkeys(tensors, self._codec)
        asking = self._peer.asking(
            tensors, codecs, deadline, exact, backend, reserved=self._reserved, record_sent=shared.ledger.record_sent
        )
        if self._is_bounded:
            self._asking = asking
        ask: Callable[[], Answer] = functools.partial(complete, asking, deadline)
        refusal = self._peer.refusal(self._kind()) if self._peer.refuses else None
        if refusal is not None:
            self._task = Ended(error=refusal)
            return
        self._peer.asked_s = time.monotonic()
        if in_caller and shared.options.falls_back and self._light() and not shared.pool.crowded:
            self._task = driven = Driven(asking, deadline, shared.pool)
            driven.begin()
            return
        in_caller = in_caller and not shared.options.falls_back
        if not in_caller:
            ask = below_current(ask)
        if self._boundary[0].is_cuda:
            # The thread that sends them has to wait for the CUDA stream on which this thread computes them.
            ask = functools.partial(_on_stream, torch.cuda.current_stream(self._boundary[0].device), ask)
        if not in_caller:
            try:
                self._task = shared.pool.submit(ask, deadline.cancel)
                return
            except NoThreadError as error:
                if shared.options.falls_back:
                    self._task = Ended(error=error)
                    return
        self._task = shared.pool.run_here(ask, deadline.cancel)

    def _light(self) -> bool:
        """Return whether it takes next to no time to make the request's bytes, and to read those of the answer.

        Whatever takes time is left to another thread, so that the tail here can begin meanwhile. So is what comes under
        ``torch.inference_mode()``, or only some answers would be inference tensors.
        """
        if self._codec.name != "raw" or self._shared.options.answer_codec.name != "raw":
            return False
        if torch.is_inference_mode_enabled() or not all(map(_is_plain, self._boundary)):
            return False
        answer_bytes = self._shared.local.graph.points[-1].size_bytes * self.scale
        return max(sum(tensor.nbytes for tensor in self._boundary), answer_bytes) <= _LIGHT_BYTES

    def _compute_without_student(self) -> None:
        """Have the model's own layers compute the boundary, for a server that does not decode what a student gives."""
        self._way = dataclasses.replace(self._way, codec=None)
        self._waiting.way = self._way
        self._wanted_codec = self._own_codec
        self._boundary = self._work.head(self._way.point)()

    def cancel(self) -> None:
        """Give the request up: nobody wants the answer any more."""
        self._unwanted = True
        self._release()
        if self._task is not None:
            self._task.give_up()
        if self._deadline is not None:
            # A signal handler may have raised after a thread had taken the request, and before this knew of its task.
            self._deadline.cancel()
            # Or just as this thread had asked by itself.
            self._shared.pool.forget(self._deadline.cancel)

    def _release(self) -> None:
        """Give back the bytes that were reserved for the request, unless it is under way and counts them at its end."""
        if self._asking is None or inspect.getgeneratorstate(self._asking) in (inspect.GEN_CREATED, inspect.GEN_CLOSED):
            self._peer.allowance.settle(self._reserved, 0.0)

    def _codec_now(self) -> Codec:
        codec = self._wanted_codec
        if isinstance(codec, Lossless):
            size_bytes = sum(tensor.nbytes for tensor in self._boundary)
            return codec.choose(self._way.point.place, size_bytes, self._peer.state.link.estimate().uplink.value)
        if self._peer.has(codec):
            return codec
        other = self._shared.servers.next_best(self._way.point)
        self._shared.servers.warn_of_codec(codec, other, self._peer)
        return other

    @property
    def _given_up(self) -> bool:
        """Whether nobody wants the server's answer any more, so that its end says nothing of the server."""
        closed = self._shared.pool.closed and not self._shared.options.falls_back
        return self._unwanted or closed

    # --- finishing ---

    def result(self) -> Any:
        """Return the model's result: the server's answer, or where the module falls back, the device's.

        Raises:
            ServerError: no server answered, and the module does not fall back.
        """
        try:
            return self._result()
        except BaseException as error:
            if self._given_up and isinstance(error, ServerError | TimeoutError) and not by_signal_handler(error):
                raise ServerUnavailableError(
                    "the SplitModule was closed, or nothing referred to it any more, while this call was under way"
                ) from error
            self.cancel()
            if isinstance(error, Exception):
                self.recorded = True
                self._shared.ledger.record_error(time.perf_counter() - self._moments.begun_s, error)
            raise
        finally:
            if self._is_bounded:
                self._release()

    def _result(self) -> Any:
        while True:
            task = self._task
            assert task is not None
            if not self._shared.options.falls_back:
                timeout_s = self._peer.transport.timeout_s
                if not task.wait(timeout_s + _QUEUED_S):
                    raise ServerUnavailableError(f"no thread could ask {self._peer.label} within {timeout_s:g} s")
                if self._shared.local.weights is not self._weights:
                    raise changed_midway()
                result, error = self._received(task)
                if error is None:
                    return result
                if self._given_up or not (self._failed(error) and self._next_peer(error)):
                    raise error
                self.send(in_caller=True)
                continue
            # A request that this thread drives is on its way already.
            brief_s = 0.0 if task.here else _BRIEF_S
            in_time = task.wait(brief_s)
            # From now on the request is on its way, and what this thread does meanwhile delays nothing.
            if self._shared.local.changed(self._weights):
                return self._with_new_weights(task)
            if not in_time:
                patience_s, late = self._waiting.patience(self._peer, first=self._peer is self._tried[0])
                # With a deadline it counts from now, and without one from when the request was sent, also where it was
                # waited for before, with fewer requests at the same server.
                if self._deadline_s is None:
                    patience_s -= time.perf_counter() - self._sent_s
                if not task.wait(patience_s):
                    if self._deadline_s is None and self._waiting.crowded(self._peer):
                        continue
                    self._why = late
                    return self._finished_on_device(task)
            if self._shared.local.weights is not self._weights:
                # Another call has noticed a change and shaken hands anew, and the server has that change, too. So it
                # may have finished an old head with new weights.
                return self._with_new_weights(task)
            result, error = self._received(task)
            if error is None:
                return result
            if self._unwanted:
                raise error
            if not (self._failed(error) and self._next_peer(error)):
                return self._finished_on_device(task)
            self.send(in_caller=True)

    def _received(self, task: Task[Answer] | Ended[Answer]) -> tuple[Any, BaseException | None]:
        """Return the model's result from the server's answer, or what is wrong with the answer.

        Errors are returned, so that whoever calls this need not catch any: what is raised has nothing to do with the
        server, such as the exception of a signal handler.
        """
        if task.error is not None:
            return None, task.error
        answer = task.result()
        try:
            check_answer(self._shared.local.graph, self._specs, self._boundary, answer.tensors)
            device = self._boundary[0].device
            result = self._work.result({name: tensor.to(device) for name, tensor in answer.tensors.items()})
        except Exception as error:
            if by_signal_handler(error):
                raise
            return None, error
        self._learn(answer)
        return result, None

    def _learn(self, answer: Answer) -> None:
        """Update the estimates from an answer that was right, and record the inference."""
        peer, shared = self._peer, self._shared
        end_s = time.perf_counter()
        peer.answered()
        if peer.tells_more(end_s):
            self._estimate(answer)
        else:
            peer.count(answer)
        if isinstance(self._wanted_codec, Lossless) and self._codec.zstd:
            size_bytes = sum(tensor.nbytes for tensor in self._boundary)
            timing = answer.timing
            # A transport of the program's own may not say what encoding took.
            encode_s = timing.send_start_s - self._sent_s if timing.encoded_s is None else timing.encode_s
            spent_s = encode_s + inference.seconds(answer.parameters.get("decode_s"))
            self._wanted_codec.observe(self._way.point.place, size_bytes, answer.timing.sent_bytes, spent_s)
        verdict, because = self._verdict(answer)
        account = functools.partial(
            inference.of_answer,
            self._way.point,
            answer.timing,
            answer.parameters,
            self._moments,
            end_s,
            shared.servers.round_trip_s if self._decision is None else self._decision.estimates.link.round_trip.value,
            degraded=None if self._why is None else str(self._why),
            server=peer.label,
            decision=self._decision,
            bits=verdict,
            inexact_because=because,
        )
        shared.ledger.record(
            self._way.name,
            account,
            None if self._why is None else self._why.kind,
            bits=verdict,
            total_s=end_s - self._moments.begun_s,
            received_bytes=answer.timing.received_bytes,
            by_server=True,
        )

    def _estimate(self, answer: Answer) -> None:
        """Update what is known of the server and the link from an answer that was right."""
        peer, row = self._peer, self._way.row
        # What the row foretells is the first server's time, and says nothing of another one that is asked instead.
        foretold_s = row.tail_s * self.scale if row is not None and peer is self._tried[0] else 0.0
        peer.observe(answer, foretold_s)
        if row is None or peer is not self._tried[0]:
            # In this order, since a transport of the program's own may not know when, and give NaN.
            taken_s = min(max(1e-6, answer.timing.end_s - self._sent_s), peer.transport.timeout_s)
            peer.record_duration(self._way.point, taken_s / (max(self.scale, 1.0) * self._waiting.share))

    def _verdict(self, answer: Answer) -> tuple[str, tuple[str, ...]]:
        """Return whether a server's answer has the model's own bits, and why if not."""
        options, ours = self._shared.options, self._arithmetic
        because = options.rounded_because + self._rounded_because
        if answer.parameters.get("arithmetic") != ours.digest:
            # The answer itself tells what counts; the handshake, which may be older, tells what differs.
            differing = self._peer.differences(ours)
            told = tuple(map(str, differing)) or ("the server computes with something else than it told",)
            because = (*because, *told)
        return bits.verdict(because, (self._codec, options.answer_codec))

    def _failed(self, error: BaseException) -> bool:
        """Record that the server failed, and return whether another server may do better."""
        self._why = failure = Failure.of(error)
        if isinstance(error, EncodingError | NoThreadError | MeteredError):
            # Nothing was sent, and nothing would be sent to another server.
            return False
        if isinstance(error, RequestRefusedError) and is_requests_fault(error) and self._unusual():
            self._peer.refuse(self._kind(), error)
            return False
        if is_requests_fault(error) and isinstance(self._codec, RatedCodec):
            # It may have been started anew without the codec's file, which a handshake finds out.
            self._peer.ready_in = -1
        self._peer.failed(failure)
        self._shared.keeper.wake()
        self._shared.servers.warn(failure)
        return True

    def _unusual(self) -> bool:
        """Return whether the request was unlike the example, so that a refusal may be right."""
        pairs = zip(self._specs, self._boundary, strict=True)
        return any(tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape for spec, tensor in pairs)

    def _kind(self) -> object:
        """Return what a server's refusal holds for: the cut, what is sent and how it is encoded, and what runs it."""
        point, row = self._way.point, self._way.row
        sent = tuple((tuple(tensor.shape), tensor.dtype) for tensor in self._boundary)
        return *point.place, sent, self._codec.name, None if row is None else row.server_backend

    def _next_peer(self, error: BaseException) -> bool:
        """Return whether there is another server to ask after one has failed with ``error``, and take it."""
        shared = self._shared
        if shared.pool.closed:
            return False
        peer = shared.servers.another(self._tried, self._arithmetic)
        if peer is None:
            return False
        metered = shared.servers.metered(self._way, self._work)
        if metered is not None:
            text = f"{peer.label} is not asked in place of {self._peer.label}, since {metered.text}"
            if not shared.options.falls_back:
                raise ServerUnavailableError(text) from error
            failure = Failure.of(error)
            self._why = Failure(failure.kind, f"{failure.text}; {text}")
            return False
        self._peer = peer
        self._tried.append(peer)
        return True

    # --- finishing on the device ---

    def _finished_on_device(self, task: Task[Answer] | Ended[Answer]) -> Any:
        """Run the tail on the device, and return its result, or the server's answer if that comes first."""
        begin_s = time.perf_counter()
        try:
            task.hand_over()
            tensors: Sequence[Tensor] = self._boundary
            tail = self._work.tail(tuple(spec.name for spec in self._specs))
            if self._way.student is not None:
                # What a student computed is near the model's own, which the device can give.
                tail, tensors = self._work.anew()
            # A request that has failed already will not bring an answer that could stop the tail.
            result, raised = self._run_tail(lambda: tail(tensors) if task.ended else tail.until(task.answered, tensors))
            if raised is not None:
                return self._answered_by_model(raised)
            if self._shared.local.changed(self._weights):
                return self._with_new_weights(task)
            if result is None:
                result, error = self._received(task)
                if error is None:
                    return result
                self._failed(error)
                result, raised = self._run_tail(lambda: tail(tensors))
                if raised is not None:
                    return self._answered_by_model(raised)
        finally:
            # Read first, so that what giving it up makes of the request is not taken for the server's failure.
            answered = task.ended
            if not answered:
                task.give_up()
        settle(result)
        end_s = time.perf_counter()
        self._shared.times.record_tail(self._way, self.scale, end_s - begin_s)
        self._judge(task.error if answered else None, end_s, answered=answered)
        moments = self._moments
        verdict, because = bits.verdict(self._shared.options.rounded_because)
        total_s = end_s - moments.begun_s
        account = functools.partial(
            inference.Inference,
            partition=self._way.point,
            total_s=total_s,
            head_s=moments.headed_s - moments.decided_s,
            decide_s=moments.decided_s - moments.begun_s,
            wait_s=begin_s - moments.headed_s,
            local_s=end_s - begin_s,
            degraded=None if self._why is None else str(self._why),
            decision=self._decision,
            bits=verdict,
            inexact_because=because,
            backend=moments.backend,
        )
        why = None if self._why is None else self._why.kind
        self._shared.ledger.record(self._way.name, account, why, bits=verdict, total_s=total_s)
        return result

    def _run_tail(self, tail: Callable[[], Any]) -> tuple[Any, Failure | None]:
        """Return the result of a tail, or that it has raised an error where the model itself can be asked."""
        try:
            return tail(), None
        except Exception as error:
            if self._work.uncut() is None or by_signal_handler(error):
                raise
            return None, Failure.of_part(error)

    def _answered_by_model(self, why: Failure) -> Any:
        """Return what the model itself answers, which raises what its layers raise, or catches it."""
        shared, begun_s = self._shared, self._moments.begun_s
        return shared.device.run(self._work, begun_s, why, self._decision, uncut=self._work.uncut())

    def _judge(self, error: BaseException | None, end_s: float, *, answered: bool) -> None:
        """Record that the device was finished before the server, and decide whether the server has failed.

        Args:
            error: why the request failed, if it has.
            end_s: when the device was finished (``time.perf_counter``).
            answered: whether the request had ended by then, with an answer or an error.
        """
        why = self._why
        if why is None or why.kind not in ("late", "deadline"):
            return
        if answered:
            if error is not None and not (is_requests_fault(error) and self._unusual()):
                self._failed(error)
            return
        expected, taken_s = self._waiting.expected(self._peer, first=self._peer is self._tried[0]), end_s - self._sent_s
        remote_s = FIRST_PATIENCE_S if expected is None else expected.remote_s
        if taken_s > remote_s:
            row = self._way.row if self._peer is self._tried[0] else None
            if row is not None:
                self._peer.missed(row.size_bytes * self.scale, taken_s - row.tail_s * self.scale)
            else:
                self._peer.waited(self._way.point, taken_s / (max(self.scale, 1.0) * self._waiting.share))
                self._peer.doubted = True
        if taken_s > max(_SLOW_FACTOR * remote_s, _LEAST_SLOW_S):
            self._peer.failed(why)
        self._shared.keeper.wake()

    def _with_new_weights(self, task: Task[Answer] | Ended[Answer]) -> Any:
        """Run the whole call on the device, as the model is now.

        Its weights have changed since the handshake, perhaps while the head ran, so neither head nor answer counts.
        """
        task.give_up()
        self._shared.connector.renew()
        why = Failure("weights", "this model's weights have changed since the handshake; load the same on the server")
        # The model takes another path where a tensor that it asks for is gone, and only the model itself knows it.
        changed = self._shared.local.departed()
        uncut = None if changed is None else self._work.uncut()
        if changed is not None:
            why = Failure("changed", changed)
        return self._shared.device.run(self._work, self._moments.begun_s, why, self._decision, uncut=uncut)


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor's bytes can be sent from where they are."""
    strided = tensor.is_cpu and tensor.layout is torch.strided
    return strided and (tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last))


def _on_stream(stream: torch.cuda.Stream, ask: Callable[[], Answer]) -> Answer:
    with torch.cuda.stream(stream):
        return ask()
