"""A model of a bundle, split between a device without PyTorch and a server."""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from torchsurgeon._interrupts import NoThreadError
from torchsurgeon.adapting import Decision, check_deadline
from torchsurgeon.edge.bundle import Bundle, BundlePoint, OnnxPart
from torchsurgeon.edge.choice import Choices
from torchsurgeon.edge.ends import check_answer, checked_inputs, result_of
from torchsurgeon.edge.inference import EdgeInference, times_of
from torchsurgeon.edge.message import ArrayAnswer
from torchsurgeon.edge.server import EdgeServer, Task, in_words
from torchsurgeon.edge.session import Sessions
from torchsurgeon.errors import (
    BundleError,
    MismatchWarning,
    ModelMismatchError,
    NoServerWarning,
    ProtocolError,
    ServerError,
    TorchSurgeonError,
    warn_caller,
)
from torchsurgeon.planning.costs import Expected
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.row import Row
from torchsurgeon.transport.deadline import Deadline

Array = np.ndarray[Any, Any]
# How long the first call waits for the server to be made ready.
_SETUP_S = 5.0
# The device may be finished before the answer comes. The server then counts as failed only if the answer has already
# taken this many times what was expected of it, and at least this long.
_SLOW_FACTOR, _LEAST_SLOW_S = 2.0, 0.05


@dataclass(eq=False)
class _Call:
    """One call: its inputs, and when its stages ended (``time.perf_counter``)."""

    inputs: Mapping[str, Array]
    batch: int
    scale: float
    begun_s: float
    deadline_s: float | None
    decision: Decision[Row] | None = None
    decided_s: float = 0.0
    headed_s: float = 0.0

    @property
    def due_s(self) -> float | None:
        """When its answer is due; None without a deadline."""
        return None if self.deadline_s is None else self.begun_s + self.deadline_s

    def account(self, end_s: float, partition: str, codec: str | None, **known: Any) -> EdgeInference:
        """Return the account of the call, which ended at ``end_s``."""
        known = {"head_s": self.headed_s - self.decided_s, **known}
        return EdgeInference(
            partition,
            codec,
            end_s - self.begun_s,
            decide_s=self.decided_s - self.begun_s,
            decision=self.decision,
            **known,
        )


class EdgeModel:
    """A model that is called with NumPy arrays and returns NumPy arrays; ``open()`` makes it. A context manager.

    One thread at a time may call it.

    Args:
        bundle: what the device has of the model.
        server: the server; None to run everything on the device.
        sessions: what runs the bundle's parts.
        partition: as ``open()`` takes it, like all that follow.
        fallback: whether the device answers a call when the server does not.
        objective: what to minimize.
        codec: how to encode boundary arrays.
        timeout_s: the longest wait for an answer.

    Raises:
        BundleError: the bundle lacks what these arguments ask for.

    Attributes:
        bundle: what the device has of the model.
        last: what happened at the last call; None before the first.
    """

    def __init__(
        self,
        bundle: Bundle,
        server: EdgeServer | None,
        sessions: Sessions,
        *,
        partition: int | str,
        fallback: Literal["local", "error"],
        objective: str | Mapping[str, float] | Objective,
        codec: str | None,
        timeout_s: float,
    ) -> None:
        self.bundle = bundle
        self.last: EdgeInference | None = None
        self._server, self._sessions, self._timeout_s = server, sessions, timeout_s
        self._falls_back = fallback == "local"
        if bundle.whole is None and (server is None or partition == "device" or self._falls_back):
            raise BundleError(
                "this bundle holds no whole model, so the device cannot answer alone; give server= with a partition of "
                "the bundle and fallback='error', or export it without --no-whole"
            )
        self._choices = Choices(bundle, server, partition=partition, objective=objective, codec=codec)
        self._prepared = self._warned = False
        if server is not None and self._choices.fixed is not None and not self._falls_back:
            server.measures = False  # nothing is chosen by it
        self._load()

    def __enter__(self) -> EdgeModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections to the server. Closing twice is harmless."""
        if self._server is not None:
            self._server.close()

    def prepare(self) -> EdgeModel:
        """Do what the first call would do before its inference: compare the models and measure the link.

        Raises:
            ServerError: the server could not be made ready, and the device does not answer in its place.
        """
        self._prepare(_SETUP_S)
        return self

    def _prepare(self, wait_s: float) -> None:
        """Do what ``prepare()`` does, and wait for the server's fingerprint for ``wait_s`` at most."""
        self._prepared = True
        server = self._server
        if server is None or self._choices.on_device:
            return
        if not self._falls_back:
            try:
                server.connect(wait_s)
            except TorchSurgeonError as error:
                server.failed(error)
                raise
            return
        try:
            task = Task(server.connect)
        except NoThreadError as error:
            server.failed(error)
            return
        if not task.wait(wait_s):
            server.failed(f"unready: {server.url} is still loading the model, or does not answer")
        elif task.error is not None:
            self._failed(task.error)
        if not (server.usable or self._warned):
            self._warned = True
            text = f"no server is in use, so the device answers alone until one can be used: {server.failure}"
            warn_caller(text, NoServerWarning)

    @property
    def server_failure(self) -> str | None:
        """Why the server's last answer could not be used; None after one that could."""
        return None if self._server is None else self._server.failure

    @property
    def decisions(self) -> Sequence[Decision[Row]]:
        """The last choices of where to cut, the newest at the end; empty where the cut is fixed."""
        return self._choices.decider.decisions

    # --- one call ---

    def __call__(self, *arrays: Array, deadline_s: float | None = None, **named: Array) -> Any:
        """Return the model's result for NumPy arrays.

        Args:
            *arrays: the inputs in their order.
            deadline_s: seconds within which the answer is due. What the first call waits for the server to be made
                ready does not count where the device answers in its place.
            **named: inputs by name.

        Returns:
            An array, a tuple of arrays, or a dict of arrays by name, as the model returns them.

        Raises:
            TypeError: an input is missing, unknown, of another dtype or of a shape that the model does not take.
            DeadlineError: no way of running the call can keep the deadline.
            ServerError: the server did not answer, and the device does not answer in its place.
        """
        inputs, batch = checked_inputs(self.bundle, arrays, named)
        if deadline_s is not None:
            check_deadline(deadline_s, 0.0, "")
        if self._falls_back and not self._prepared:
            self._prepare(_SETUP_S)
        call = _Call(inputs, batch, batch / self.bundle.example_batch, time.perf_counter(), deadline_s)
        if not self._prepared:
            self._prepare(_patience_s(call))
        row, call.decision, why = self._choose(call)
        if deadline_s is not None:
            row = self._choices.within(deadline_s, row, call.scale, split=why is None)
        call.decided_s = time.perf_counter()
        return self._on_device(call, why) if row.on_device else self._split(call, row)

    def _on_device(self, call: _Call, why: str | None) -> Any:
        """Run a call on the device as a whole; ``why`` says why it was not split as planned."""
        result = self._whole(call)
        end_s = time.perf_counter()
        self.last = call.account(end_s, "device", None, head_s=end_s - call.decided_s, degraded=why)
        if self._server is not None and not self._choices.on_device:
            self._server.attend()
        return result

    def _split(self, call: _Call, row: Row) -> Any:
        """Run the head of a call and ask the server for the rest."""
        server, point, codec = self._server, self._choices.point_of(row), self._choices.codec_of(row)
        assert server is not None
        head, is_student = self._choices.head_of(row, codec)
        boundary = self._boundary(point, head, call.inputs)
        call.headed_s = time.perf_counter()
        if head is not None and is_student == row.student:
            self._choices.slowdown.observe(call.headed_s - call.decided_s, row.head_s * call.scale)
        limit_s = self._timeout_s
        if call.due_s is not None and not self._falls_back:
            limit_s = max(min(limit_s, call.due_s - call.headed_s), 1e-6)
        deadline = Deadline(limit_s)
        ask = functools.partial(server.ask, boundary, codec, deadline)
        try:
            if self._falls_back:
                task = Task(ask)
                wait_s, late, expected = self._choices.patience(row, call.scale, call.due_s)
                if not task.wait(wait_s):
                    return self._rescued(call, row, point, task, deadline, late, expected)
                answer = task.result()
            else:
                answer = ask()
            check_answer(self.bundle, answer.arrays, call.batch)
        except (ServerError, ProtocolError) as error:
            self._failed(error)
            if not self._falls_back:
                raise
            return self._finished_here(call, point, in_words(error))
        end_s = time.perf_counter()
        server.answered()
        server.observe(answer, row.tail_s * call.scale)
        round_trip_s = server.state.link.estimate().round_trip.value
        self.last = call.account(
            end_s,
            point.name,
            codec.name,
            server=server.url,
            where=row.where,
            **times_of(answer, call.headed_s, end_s, round_trip_s),
        )
        return result_of(self.bundle, answer.arrays)

    def _rescued(
        self,
        call: _Call,
        row: Row,
        point: BundlePoint,
        task: Task[ArrayAnswer],
        deadline: Deadline,
        late: str,
        expected: Expected,
    ) -> Any:
        """Run the whole model here, since the answer is late, and find out whether the server has failed."""
        server = self._server
        assert server is not None
        result = self._finished_here(call, point, late)
        taken_s = time.perf_counter() - call.headed_s
        if task.ended:
            if task.error is not None:
                self._failed(task.error)
            return result
        deadline.cancel()
        if taken_s > expected.remote_s:
            waited_s = taken_s - row.tail_s * call.scale
            server.state.link.missed(up_bytes=int(row.size_bytes * call.scale), waited_s=waited_s)
        if taken_s > max(_SLOW_FACTOR * expected.remote_s, _LEAST_SLOW_S):
            server.failed(late)
        return result

    def _finished_here(self, call: _Call, point: BundlePoint, why: str) -> Any:
        """Run the whole model here, since the server's answer was not used."""
        begin_s = time.perf_counter()
        result = self._whole(call)
        end_s = time.perf_counter()
        self.last = call.account(
            end_s,
            point.name,
            None,
            head_s=call.headed_s - call.decided_s,
            wait_s=begin_s - call.headed_s,
            local_s=end_s - begin_s,
            degraded=why,
        )
        return result

    def _failed(self, error: BaseException) -> None:
        """Record that the server failed, and warn once if it holds another model."""
        assert self._server is not None
        self._server.failed(error)
        if isinstance(error, ModelMismatchError) and self._falls_back and not self._warned:
            self._warned = True
            warn_caller(f"the server's answers are not used: {error}", MismatchWarning)

    # --- the choice ---

    def _choose(self, call: _Call) -> tuple[Row, Decision[Row] | None, str | None]:
        """Return how to run a call, what that was chosen on, and why it is not split as planned."""
        server = self._server
        if server is None or self._choices.on_device:
            return self._choices.device, None, None
        if self._falls_back:
            if not server.usable:
                return self._choices.device, None, f"unserved: no server is in use: {server.failure}"
        elif not server.ready:
            self._prepare(_patience_s(call))
        return *self._choices.choose(call.scale), None

    # --- the parts ---

    def _load(self) -> None:
        """Load the parts that calls may need, so that none waits for it."""
        rows = [] if self._server is None else self._choices.rows
        split = [row for row in rows if not row.on_device]
        parts = [(head, self._choices.point_of(row).tensors) for row in split for head in self._choices.heads_of(row)]
        if self._falls_back or any(row.on_device for row in self._choices.rows):
            parts.append((self.bundle.whole, self.bundle.outputs))
        taken = [spec.name for spec in self.bundle.inputs]
        for part, results in parts:
            if part is not None:
                self._sessions.prepare(part, taken, [spec.onnx for spec in results])

    def _boundary(self, point: BundlePoint, head: OnnxPart | None, inputs: Mapping[str, Array]) -> dict[str, Array]:
        if head is None:
            return {spec.name: inputs[spec.name] for spec in point.tensors}
        found = self._sessions.run(head, inputs, [spec.onnx for spec in point.tensors])
        return dict(zip((spec.name for spec in point.tensors), found, strict=True))

    def _whole(self, call: _Call) -> Any:
        whole, outputs = self.bundle.whole, self.bundle.outputs
        assert whole is not None
        begin_s = time.perf_counter()
        found = self._sessions.run(whole, call.inputs, [spec.onnx for spec in outputs])
        self._choices.slowdown.observe(time.perf_counter() - begin_s, self._choices.device.head_s * call.scale)
        return result_of(self.bundle, dict(zip((spec.name for spec in outputs), found, strict=True)))


def _patience_s(call: _Call) -> float:
    """Return how long a call may wait for a server without which it has no answer."""
    if call.due_s is None:
        return _SETUP_S
    return min(max(call.due_s - time.perf_counter(), 1e-6), _SETUP_S)
