"""Record which layer runs when, and which CUDA kernels it launches, while a block of code runs."""

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
# CUPTI's error codes.
_INSUFFICIENT_PRIVILEGES, _MULTIPLE_SUBSCRIBERS = (35, 40), 39


class Source(enum.IntEnum):
    """The clock from which the two times of a span were read."""

    CPU = 0
    CUDA_EVENT = 1
    CUPTI = 2


class SpanRecorder:
    """Records spans in storage that is allocated once; a context manager that frees it.

    Recording allocates nothing, and any thread may record.

    Args:
        capacity: how many spans find room; further ones are only counted, in ``dropped``.

    Raises:
        NativeUnavailableError: the compiled extension is missing.
    """

    def __init__(self, capacity: int) -> None:
        ops = _native.operators("recording spans")
        self._ops = ops
        self._begin, self._end, self._add = ops.span_begin.default, ops.span_end.default, ops.span_add.default
        self._handle: int = ops.span_recorder_open(capacity)

    def begin(self, span_id: int) -> int:
        """Begin a span now, and return its slot for ``end()``; -1 when the recorder is full."""
        slot: int = self._begin(self._handle, span_id)
        return slot

    def end(self, slot: int) -> None:
        """End the span of a slot now."""
        self._end(self._handle, slot)

    @property
    def mark(self) -> Callable[[int], None]:
        """A function that takes an id, ends the span that it began last, and begins one of this id at the same moment.

        With -1 it only ends. It times a straight line of layers with one operator call a layer, in one thread.
        """
        return functools.partial(self._ops.span_mark.default, self._handle)

    def add(self, span_id: int, start_ns: int, end_ns: int, source: Source) -> None:
        """Record a span whose times were read from another clock.

        Args:
            span_id: what the span is of.
            start_ns: when it began.
            end_ns: when it ended.
            source: the clock.
        """
        self._add(self._handle, span_id, start_ns, end_ns, int(source))

    def spans(self) -> tuple[Span, ...]:
        """Return the finished spans in the order in which they began."""
        return tuple(Span(*row) for row in self._ops.span_table(self._handle).tolist())

    @property
    def dropped(self) -> int:
        """How many spans were not recorded because the storage was full."""
        return int(self._ops.span_dropped(self._handle))

    def clear(self) -> None:
        """Forget every span, finished or not. No other thread may record meanwhile."""
        self._ops.span_clear(self._handle)

    def close(self) -> None:
        """Free the storage. Nothing may be recorded afterwards."""
        self._ops.span_recorder_close(self._handle)

    def __enter__(self) -> SpanRecorder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


class LayerRanges:
    """Says in which layer the calling thread is while a kernel trace runs; ``active()`` returns it.

    Args:
        ops: the operators of the compiled extension.
        recorder: where the layers' spans are recorded.
    """

    def __init__(self, ops: Any, recorder: SpanRecorder) -> None:
        self._push_id, self._pop_id = ops.cupti_push.default, ops.cupti_pop.default
        self._recorder = recorder
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._thread = threading.local()

    @property
    def names(self) -> list[str]:
        """The layers' names in the order of their ids."""
        return list(self._ids)

    def id_of(self, name: str) -> int:
        """Return the id of a layer's name. A loop that calls ``push()`` should look it up once, before it begins."""
        with self._lock:
            return self._ids.setdefault(name, len(self._ids))

    def push(self, layer: int) -> int:
        """Enter a layer by its id, and return a slot for ``pop()``.

        Kernels that this thread launches until then are the layer's. Modules that are called are no layers of their
        own.
        """
        self._thread.depth = self.depth + 1
        return self.push_module(layer)

    def pop(self, slot: int) -> None:
        """Leave the layer that was entered last, with the slot that ``push()`` returned."""
        self.pop_module(slot)
        self._thread.depth = self.depth - 1

    def push_module(self, layer: int) -> int:
        """Enter a layer like ``push()``, but let modules that are called inside be layers of their own."""
        slot = self._recorder.begin(layer)
        self._push_id(slot)
        return slot

    def pop_module(self, slot: int) -> None:
        """Leave the layer that ``push_module()`` entered last."""
        self._pop_id()
        self._recorder.end(slot)

    def before(self, step: Step, environment: Environment) -> int | None:
        """Enter the layer of a step of a head or tail; see ``Watcher``."""
        return self.push(self.id_of(step.name)) if step.kind == "call" and not self.depth else None

    def after(self, step: Step, environment: Environment, slot: int | None) -> None:
        """Leave the layer that ``before()`` entered, if it did."""
        if slot is not None:
            self.pop(slot)

    @property
    def depth(self) -> int:
        """How many layers this thread has entered with ``push()`` and not left."""
        return int(getattr(self._thread, "depth", 0))


_active: LayerRanges | None = None


def active() -> LayerRanges | None:
    """Return the ranges of the running kernel trace; None when none runs.

    A loop that must stay fast calls this once, before it begins, and then ``LayerRanges.push()`` for each layer.
    """
    return _active


@contextlib.contextmanager
def layer_range(name: str) -> Iterator[None]:
    """Attribute the kernels that this thread launches in the block to a layer; without a kernel trace, do nothing.

    Args:
        name: the layer's name.
    """
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
    """Trace every CUDA kernel that is launched in the ``with`` block. The device is synchronised once, at the end.

    Args:
        capacity: how many calls of layers are recorded; kernels of further ones count as outside any layer.

    Yields:
        The trace, which is filled when the block ends.

    Raises:
        NativeUnavailableError: the extension, a driver, a CUDA device, CUPTI or a permission is missing (the message
            says which), or another profiler uses CUPTI.
    """
    global _active
    if _active is not None:
        raise NativeUnavailableError(f"{_PURPOSE}: one kernel trace runs at a time, and one is running; end it first")
    if torch._C._autograd._profiler_enabled():
        raise NativeUnavailableError(
            f"{_PURPOSE}: CUPTI serves one profiler at a time, and torch.profiler is running; end it first"
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
            raise NativeUnavailableError(
                f"{_PURPOSE}: CUPTI returned no records: {_error_text(ops, code)}; trace again, with no other profiler"
            )
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
            "run as root on a Jetson, elsewhere let the driver allow it (NVreg_RestrictProfilingToAdminUsers=0); "
            "layer times from CUDA events need no permission"
        )
    elif code == _MULTIPLE_SUBSCRIBERS:
        advice = "another profiler (nsys, ncu, torch.profiler) uses it; end that first"
    raise NativeUnavailableError(f"{_PURPOSE}: CUPTI refuses with {_error_text(ops, code)}: {advice}")


def _error_text(ops: Any, code: int) -> str:
    return f"{ops.cupti_error_text(code) or 'an unknown error'} ({code})"


@contextlib.contextmanager
def _module_ranges(ranges: LayerRanges) -> Iterator[None]:
    """Make every call of a module in the block a layer, except inside layers that were named."""
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
        stack.append((module, ranges.push_module(ranges.id_of(name))))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        stack = vars(thread).get("stack")
        if stack and stack[-1][0] is module:
            _, slot = stack.pop()
            if slot is not None:
                ranges.pop_module(slot)

    hooks = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
