"""Which layer launched which CUDA kernels, as a table and as a trace file that ui.perfetto.dev opens."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTSIDE = "(outside any layer)"

_CPU, _GPU = 1, 2


@dataclass(frozen=True)
class Span:
    """One recorded span.

    Attributes:
        slot: its number in the recorder, which tells spans of the same id apart.
        id: what the span is of, such as a layer's number.
        start_ns: when it began, in nanoseconds of the clock that ``source`` names.
        end_ns: when it ended.
        source: the clock, as a ``Source``.
    """

    slot: int
    id: int
    start_ns: int
    end_ns: int
    source: int


@dataclass(frozen=True)
class LayerSpan:
    """One call of a layer on the host, in nanoseconds of the host's monotonic clock."""

    name: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True)
class Kernel:
    """One kernel, copy or fill on a device.

    Attributes:
        name: the kernel's name.
        layer: the innermost layer that launched it.
        call: the index of that layer's call in the trace's layers; None outside any layer.
        start_ns: when it began on the device, in nanoseconds of the host's monotonic clock.
        end_ns: when it ended.
        device: the number of the CUDA device.
        stream: the number of the CUDA stream.
        grid: blocks in x, y and z; (0, 0, 0) for a copy or fill.
        block: threads of a block in x, y and z.
    """

    name: str
    layer: str
    call: int | None
    start_ns: int
    end_ns: int
    device: int
    stream: int
    grid: tuple[int, int, int]
    block: tuple[int, int, int]

    @property
    def duration_s(self) -> float:
        """Seconds on the device."""
        return (self.end_ns - self.start_ns) * 1e-9


@dataclass(frozen=True)
class LayerKernels:
    """What one layer did on the device over the whole trace.

    Attributes:
        name: the layer.
        calls: how often it was called.
        launches: how many kernels, copies and fills it launched.
        busy_s: the sum of their seconds on the device.
        slowest: the name of the one that took longest.
    """

    name: str
    calls: int
    launches: int
    busy_s: float
    slowest: str


def attribute(
    spans: Sequence[Span],
    layer_names: Sequence[str],
    activities: Sequence[Sequence[int]],
    kernel_names: Sequence[str],
    offset_ns: int,
) -> tuple[tuple[LayerSpan, ...], tuple[Kernel, ...]]:
    """Return layers and kernels from what was recorded, both in order of time.

    Args:
        spans: the recorded calls of layers.
        layer_names: the name of each layer, by the id that its spans have.
        activities: rows of (external id, start, end, device, stream, grid x y z, block x y z, name). The external id
            is the slot of the layer's call that launched the activity, the name an index into ``kernel_names``.
        kernel_names: the names of the kernels.
        offset_ns: what is added to CUPTI's times to get the host's.
    """
    ordered = sorted(spans, key=lambda span: (span.start_ns, -span.end_ns, span.slot))
    layers = tuple(LayerSpan(layer_names[span.id], span.start_ns, span.end_ns) for span in ordered)
    call_of = {span.slot: index for index, span in enumerate(ordered)}
    kernels = []
    for external, start, end, device, stream, gx, gy, gz, bx, by, bz, name in activities:
        call = call_of.get(external)
        kernels.append(
            Kernel(
                name=kernel_names[name],
                layer=OUTSIDE if call is None else layers[call].name,
                call=call,
                start_ns=start + offset_ns,
                end_ns=end + offset_ns,
                device=device,
                stream=stream,
                grid=(gx, gy, gz),
                block=(bx, by, bz),
            )
        )
    return layers, tuple(sorted(kernels, key=lambda kernel: (kernel.start_ns, kernel.end_ns)))


@dataclass
class KernelTrace:
    """What one trace recorded.

    Attributes:
        layers: the calls of layers, in order of time.
        kernels: the kernels, copies and fills, in order of time.
        dropped: how many records are missing because the storage was full.
    """

    layers: tuple[LayerSpan, ...] = ()
    kernels: tuple[Kernel, ...] = ()
    dropped: int = 0

    def by_layer(self) -> tuple[LayerKernels, ...]:
        """Return a row for each layer that launched anything, in the order of their first calls.

        Kernels that were launched outside any layer come last.
        """
        launched: dict[str, list[Kernel]] = {layer.name: [] for layer in self.layers}
        launched[OUTSIDE] = []
        calls = dict.fromkeys(launched, 0)
        for layer in self.layers:
            calls[layer.name] += 1
        for kernel in self.kernels:
            launched[kernel.layer].append(kernel)
        return tuple(
            LayerKernels(
                name=name,
                calls=calls[name],
                launches=len(kernels),
                busy_s=sum(kernel.duration_s for kernel in kernels),
                slowest=max(kernels, key=lambda kernel: kernel.duration_s).name,
            )
            for name, kernels in launched.items()
            if kernels
        )

    def table(self) -> str:
        """Return ``by_layer()`` as text: calls, launches, device time in µs, share of all, and the slowest kernel."""
        rows = self.by_layer()
        total_s = sum(row.busy_s for row in rows) or 1.0
        width = max((len(row.name) for row in rows), default=0)
        lines = [f"{'layer':{width}}  {'calls':>6} {'launches':>8} {'device µs':>11} {'share':>6}  slowest kernel"]
        lines += [
            f"{row.name:{width}}  {row.calls:6d} {row.launches:8d} {row.busy_s * 1e6:11.1f} "
            f"{row.busy_s / total_s:6.1%}  {row.slowest[:60]}"
            for row in rows
        ]
        if self.dropped:
            lines.append(f"{self.dropped} records are missing: the storage was full, give kernel_trace more capacity")
        return "\n".join(lines)

    def to_chrome(self) -> dict[str, Any]:
        """Return the trace in Chrome's trace event format, in its JSON object form.

        Layers stand on one track, and each stream's kernels on one of its own. Times are microseconds since the first
        event.
        """
        starts = [layer.start_ns for layer in self.layers] + [kernel.start_ns for kernel in self.kernels]
        origin_ns = min(starts, default=0)
        return {"displayTimeUnit": "ns", "traceEvents": [*self._tracks(), *self._events(origin_ns)]}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write ``to_chrome()`` to ``path``; ui.perfetto.dev and chrome://tracing open it."""
        Path(path).write_text(json.dumps(self.to_chrome()), encoding="utf-8")

    def _tracks(self) -> Iterator[Mapping[str, Any]]:
        yield _label("process_name", "Host", _CPU)
        yield _label("thread_name", "layers", _CPU, thread=1)
        for device in sorted({kernel.device for kernel in self.kernels}):
            yield _label("process_name", f"CUDA device {device}", _GPU + device)
        for device, stream in sorted({(kernel.device, kernel.stream) for kernel in self.kernels}):
            yield _label("thread_name", f"kernels, stream {stream}", _GPU + device, thread=stream)

    def _events(self, origin_ns: int) -> Iterator[Mapping[str, Any]]:
        for layer in self.layers:
            yield _complete("layer", layer.name, layer.start_ns - origin_ns, layer.end_ns - layer.start_ns, _CPU, 1, {})
        for kernel in self.kernels:
            details = {"layer": kernel.layer, "grid": list(kernel.grid), "block": list(kernel.block)}
            start_ns, duration_ns = kernel.start_ns - origin_ns, kernel.end_ns - kernel.start_ns
            yield _complete("kernel", kernel.name, start_ns, duration_ns, _GPU + kernel.device, kernel.stream, details)


def _label(kind: str, name: str, process: int, thread: int = 0) -> dict[str, Any]:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "args": {"name": name}}


def _complete(
    category: str, name: str, start_ns: int, duration_ns: int, process: int, thread: int, details: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": category,
        "name": name,
        "ts": start_ns / 1e3,
        "dur": duration_ns / 1e3,
        "pid": process,
        "tid": thread,
        "args": dict(details),
    }
