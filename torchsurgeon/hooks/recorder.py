"""Records spans of layers and of CUDA kernels: the ranges that name layers, and the trace of a block of code."""

from __future__ import annotations

import contextlib
import enum
import functools
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from torchsurgeon import _native
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import NativeUnavailableError
from torchsurgeon.hooks.attribution import KernelTrace, Span, attribute
from torchsurgeon.tracing.step import Environment, Step

_PURPOSE = "tracing CUDA kernels"
_INSUFFICIENT_PRIVILEGES, _MULTIPLE_SUBSCRIBERS = (35, 40), 39


class Source(enum.IntEnum):
    """The clock a span's two times were read from."""

    CPU = 0
    CUDA_EVENT = 1
    CUPTI = 2


class SpanRecorder:
    """Spans (id, start, end, source) in storage the extension takes once; a context manager that gives it back.

    Recording allocates nothing, and any thread may do it. Spans beyond ``capacity`` are counted in :attr:`dropped`.
    Raises :class:`NativeUnavailableError` without the extension.
    """

    def __init__(self, capacity: int) -> None:
        ops = _native.operators("recording spans")
        self._ops = ops
        self._begin, self._end, self._add = ops.span_begin.default, ops.span_end.default, ops.span_add.default
        self._handle: int = ops.span_recorder_open(capacity)

    def begin(self, span_id: int) -> int:
        """Start a span now; returns the slot to hand to :meth:`end`, -1 where the recorder is full."""
        slot: int = self._begin(self._handle, span_id)
        return slot

    def end(self, slot: int) -> None:
        """End the span in ``slot`` now."""
        self._end(self._handle, slot)

    @property
    def mark(self) -> Callable[[int], None]:
        """A function that ends the span it began last and begins span ``id`` at the same moment; -1 only ends.

        The cheapest way to time a straight line, one operator call a layer; for one thread.
        """
        return functools.partial(self._ops.span_mark.default, self._handle)

    def add(self, span_id: int, start_ns: int, end_ns: int, source: Source) -> None:
        """Record a span whose times were taken elsewhere."""
        self._add(self._handle, span_id, start_ns, end_ns, int(source))

    def spans(self) -> tuple[Span, ...]:
        """The finished spans in the order they began."""
        return tuple(Span(*row) for row in self._ops.span_table(self._handle).tolist())

    @property
    def dropped(self) -> int:
        """How many spans found no room."""
        return int(self._ops.span_dropped(self._handle))

    def clear(self) -> None:
        """Forget every span, finished or not; no other thread may be recording."""
        self._ops.span_clear(self._handle)

    def close(self) -> None:
        """Give the storage back; the recorder cannot be used any more."""
        self._ops.span_recorder_close(self._handle)

    def __enter__(self) -> SpanRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class LayerRanges:
    """Marks which layer the calling thread is in while a kernel trace runs; :func:`active` returns it."""

    def __init__(self, ops: Any, recorder: SpanRecorder) -> None:
        self._push_id, self._pop_id = ops.cupti_push.default, ops.cupti_pop.default
        self._recorder = recorder
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._thread = threading.local()

    @property
    def names(self) -> list[str]:
        """Layer names in the order of their ids."""
        return list(self._ids)

    def id_of(self, name: str) -> int:
        """The number of a layer name; ask once, before the loop that pushes it."""
        with self._lock:
            return self._ids.setdefault(name, len(self._ids))

    def push(self, layer: int) -> int:
        """Enter a layer; hand the returned slot to :meth:`pop`. Until then kernels of this thread are the layer's."""
        self._thread.depth = self.depth + 1
        return self.push_found(layer)

    def pop(self, slot: int) -> None:
        """Leave the layer entered last."""
        self.pop_found(slot)
        self._thread.depth = self.depth - 1

    def push_found(self, layer: int) -> int:
        """Enter a layer that was not named by hand, so that others may be found inside it."""
        slot = self._recorder.begin(layer)
        self._push_id(slot)
        return slot

    def pop_found(self, slot: int) -> None:
        """Leave what :meth:`push_found` entered."""
        self._pop_id()
        self._recorder.end(slot)

    def before(self, step: Step, environment: Environment) -> int | None:
        """Enter the layer of a head's or tail's step (a :class:`~torchsurgeon.cutting.segment.Watcher`)."""
        return self.push(self.id_of(step.name)) if step.kind == "call" and not self.depth else None

    def after(self, step: Step, environment: Environment, slot: int | None) -> None:
        """Leave it."""
        if slot is not None:
            self.pop(slot)

    @property
    def depth(self) -> int:
        """How many ranges opened by name this thread is in."""
        return int(getattr(self._thread, "depth", 0))


_active: LayerRanges | None = None


def active() -> LayerRanges | None:
    """The running kernel trace's ranges, None when none runs. A straight-line loop asks once and then pushes ids."""
    return _active


@contextlib.contextmanager
def layer_range(name: str) -> Iterator[None]:
    """Kernels launched inside by this thread belong to layer ``name``; does nothing when no kernel trace runs."""
    ranges = _active
    if ranges is None:
        yield
        return
    slot = ranges.push(ranges.id_of(name))
    try:
        yield
    finally:
        ranges.pop(slot)


@contextlib.contextmanager
def kernel_trace(capacity: int = 1 << 18) -> Iterator[KernelTrace]:
    """Trace every CUDA kernel launched inside the ``with`` block; at most ``capacity`` layer calls are told apart.

    The device is synchronised once, at the end. Raises :class:`NativeUnavailableError`, saying which is missing, where
    there is no extension, driver, CUDA device, CUPTI or permission, and where another profiler has hold of CUPTI.
    """
    global _active
    if _active is not None:
        raise NativeUnavailableError(f"{_PURPOSE}: a kernel trace is running already; end it first")
    if torch._C._autograd._profiler_enabled():
        raise NativeUnavailableError(
            f"{_PURPOSE}: torch.profiler is running, and CUPTI serves one profiler; end it first"
        )
    ops = _native.open_cuda_driver(_PURPOSE)
    if not torch.cuda.is_available():
        raise NativeUnavailableError(
            f"{_PURPOSE} needs a PyTorch built for CUDA that sees a device; this is {torch.__version__}, and "
            "torch.cuda.is_available() is False"
        )
    torch.cuda.init()
    _native.open_cupti(_PURPOSE)
    trace = KernelTrace()
    with SpanRecorder(capacity) as recorder:
        ranges = LayerRanges(ops, recorder)
        _start(ops)
        try:
            _active = Segment.watcher = ranges
            with _module_ranges(ranges):
                yield trace
        finally:
            _active = Segment.watcher = None
            torch.cuda.synchronize()
            code = ops.cupti_stop()
            offset_ns = ops.cupti_clock_offset()
        if code != 0:
            raise NativeUnavailableError(f"{_PURPOSE}: CUPTI did not give up its records: {_error_text(ops, code)}")
        trace.layers, trace.kernels = attribute(
            recorder.spans(), ranges.names, ops.cupti_activities().tolist(), ops.cupti_names().splitlines(), offset_ns
        )
        trace.dropped = recorder.dropped + ops.cupti_dropped()


def _start(ops: Any) -> None:
    code = ops.cupti_start()
    if code == 0:
        return
    advice = "look it up in CUPTI's documentation"
    if code in _INSUFFICIENT_PRIVILEGES:
        advice = (
            "on a Jetson run as root, elsewhere let the driver allow it (NVreg_RestrictProfilingToAdminUsers=0); "
            "layer times from CUDA events need no permission"
        )
    elif code == _MULTIPLE_SUBSCRIBERS:
        advice = "another profiler (nsys, ncu, a torch.profiler) has hold of CUPTI; end it first"
    raise NativeUnavailableError(f"{_PURPOSE}: CUPTI refuses with {_error_text(ops, code)}: {advice}")


def _error_text(ops: Any, code: int) -> str:
    return f"{ops.cupti_error_text(code) or 'an unknown error'} ({code})"


@contextlib.contextmanager
def _module_ranges(ranges: LayerRanges) -> Iterator[None]:
    """Every module call is a range, except inside ranges that were opened by name."""
    thread = threading.local()
    names: dict[nn.Module, dict[nn.Module, str]] = {}

    def enter(module: nn.Module, args: Any) -> None:
        stack = vars(thread).setdefault("stack", [])
        if ranges.depth:
            stack.append((module, None))
            return
        root = stack[0][0] if stack else module
        if root not in names:
            names[root] = {child: name for name, child in root.named_modules() if name}
        name = names[root].get(module, type(module).__name__)
        stack.append((module, ranges.push_found(ranges.id_of(name))))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack = vars(thread).get("stack")
        if stack and stack[-1][0] is module:
            _, slot = stack.pop()
            if slot is not None:
                ranges.pop_found(slot)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
