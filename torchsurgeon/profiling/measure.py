"""Measure how long every layer of a model takes on this machine.

The traced steps run in one straight line, and a clock is read between them. That costs well under a microsecond a layer
on a CPU, and some microseconds on a GPU (benchmarks/results/device/overhead.json). Each pass times all layers of one
run, so it also gives the time until each partition point is reached. That cannot be computed from the layers' medians:
a sum of medians is not the median of the sum.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from torchsurgeon import hooks
from torchsurgeon._allocator import keep_freed_memory
from torchsurgeon.backends import Backend, find_backend
from torchsurgeon.backends.eager import Eager
from torchsurgeon.cutting.partition import tail_for
from torchsurgeon.errors import (
    BackendWarning,
    MeterError,
    NoisyProfileWarning,
    ProfileError,
    is_finite,
    is_whole,
    short,
    warn_caller,
)
from torchsurgeon.hooks.attribution import KernelTrace, LayerSpan
from torchsurgeon.meters import Clock, CudaEventClock, EnergyMeter, NullMeter, find_meter
from torchsurgeon.profiling.energy import Array, LayerEnergy
from torchsurgeon.profiling.fused import fused_profile
from torchsurgeon.profiling.joules import layer_energy
from torchsurgeon.profiling.memory import layer_memory
from torchsurgeon.profiling.origin import device_of, provenance
from torchsurgeon.profiling.record import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import TensorSpec

# Above these, relative to the median, profile() warns.
_NOISY_SPREAD, _NOISY_DRIFT = 0.25, 0.1
# How many repeats may heat the machine between two pauses.
_REPEATS_BETWEEN_PAUSES = 10

Progress = Callable[[int, int], None]


def example_inputs(graph: LayerGraph, device: torch.device | str = "cpu") -> list[torch.Tensor]:
    """Return tensors like the graph's inputs: uniformly random in [0, 1) for floats, zeros for integers.

    Args:
        graph: the traced model.
        device: where the tensors lie.
    """
    return [_random_like(spec).to(device) for spec in graph.inputs]


def _random_like(spec: TensorSpec) -> torch.Tensor:
    if spec.dtype.is_floating_point or spec.dtype.is_complex:
        return torch.rand(spec.shape, dtype=torch.complex64 if spec.dtype.is_complex else None).to(spec.dtype)
    return torch.zeros(spec.shape, dtype=spec.dtype)


def profile(
    graph: LayerGraph,
    device: str | torch.device | None = None,
    *,
    repeats: int = 10,
    warmup: int = 3,
    inputs: Sequence[torch.Tensor] | None = None,
    meter: EnergyMeter | str | None = "auto",
    cooldown_s: float = 0.0,
    progress: Progress | None = None,
    backend: str | Backend = "eager",
    budget_s: float = 10.0,
    points: Sequence[int] | None = None,
    eager: LayerProfile | None = None,
    on_noise: Callable[[NoisyProfileWarning], None] = warn_caller,
) -> LayerProfile:
    """Measure every layer of a model on the device that the model is on.

    Passes with a clock between the layers alternate with passes of the model as it is. On CUDA, the times are those
    between events on the current stream, and nothing is synchronised inside a pass.

    A backend other than eager PyTorch fuses layers, so none has a time of its own. Heads and tails are then measured
    at a few partition points, and interpolated between these by the layers' times in eager PyTorch.

    Args:
        graph: the traced model.
        device: "cpu", "cuda" or "cuda:1"; the model must be on it. By default, the device that the model is on.
        repeats: how many passes of each kind are measured, at least 1.
        warmup: how many passes of each kind run before that, at least 0.
        inputs: the model's input tensors. By default random ones, whose values most models' speed does not depend on.
        meter: an energy meter, "auto" for the best one of the machine, or None. Metering takes about thirteen of the
            meter's periods a layer, a quarter of a second on a Jetson.
        cooldown_s: seconds that the device rests before every ten repeats; it is warmed up again after each rest.
        progress: is called with the number of passes and metered layers that are done, and of all, after each; with a
            backend, with the numbers of points.
        backend: what runs the model, as ``SplitModule`` takes it.
        budget_s: with a backend, the seconds within which points are measured; one more may be under way at their end.
        points: with a backend, the indices of the partition points to measure, whatever that takes. By default they are
            chosen.
        eager: with a backend, the profile in eager PyTorch on this device, if there is one; it is measured otherwise.
        on_noise: is called with the warning that the machine was not quiet. By default it is given at the caller's
            line.

    Returns:
        The profile. Where no meter gave a reading its ``energy`` is None, and ``provenance["meter"]`` says why. By a
        backend it has neither joules nor memory.

    Raises:
        DeviceError: the device does not exist, or the model is not on it.
        ProfileError: an argument is out of its range.
        MeterError: the clock jumped back during a pass.
        BackendError: there is no such backend here.

    Warns:
        NoisyProfileWarning: the machine was not quiet, or became slower.
        BackendWarning: the backend does not take a part of the model, which was measured in eager PyTorch.
    """
    if not isinstance(graph, LayerGraph):
        raise ProfileError(
            f"profile takes a traced model; got {type(graph).__name__}; call profile(trace(model, example))"
        )
    for name, count, least in (("repeats", repeats, 1), ("warmup", warmup, 0)):
        if not is_whole(count) or count < least:
            raise ProfileError(f"{name} must be a whole number from {least} on; got {short(count)}")
    if not (is_finite(cooldown_s) and cooldown_s >= 0):
        raise ProfileError(f"cooldown_s must be 0 or more seconds; got {short(cooldown_s)}")
    if not (is_finite(budget_s) and budget_s >= 0):
        raise ProfileError(f"budget_s must be 0 or more seconds; got {short(budget_s)}")
    target = device_of(graph, device)
    runs = find_backend(backend)
    if not isinstance(runs, Eager):
        if eager is None:
            eager = profile(
                graph,
                device,
                repeats=repeats,
                warmup=warmup,
                inputs=inputs,
                meter=None,
                cooldown_s=cooldown_s,
                on_noise=on_noise,
            )
        eager.check(graph)
        given = example_inputs(graph) if inputs is None else inputs
        tensors = [tensor.detach().to(target) for tensor in given]
        fused = fused_profile(
            graph, runs, eager, tensors, repeats=repeats, budget_s=budget_s, points=points, progress=progress
        )
        if fused.provenance["not_by_backend"]:
            where = short(", ".join(fused.provenance["not_by_backend"]), 300, quote=False)
            warn_caller(
                f"backend {runs.name!r} does not run all parts of the model, and what it does not take of them was "
                f"measured in eager PyTorch; these parts begin or end at: {where}",
                BackendWarning,
            )
        return fused
    origin = provenance(target)
    with contextlib.ExitStack() as exit_stack:
        exit_stack.enter_context(torch.no_grad())
        energy_meter = exit_stack.enter_context(_meter(meter, target))
        if target.type == "cuda":
            exit_stack.enter_context(torch.cuda.device(target))
        run = ModelRun(graph, target, inputs)
        total = warmup + repeats + (0 if isinstance(energy_meter, NullMeter) else len(graph.layers) + 1)
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            if progress is not None:
                progress(done, total)

        clock = CudaEventClock(len(run.whole.steps) + 1) if target.type == "cuda" else None
        if clock is not None:
            exit_stack.enter_context(clock)
        samples_s, whole_s = run.times(clock, repeats, warmup, cooldown_s, tick)
        memory = layer_memory(run.whole, run.tensors, run.columns, len(graph.layers), target)
        energy: LayerEnergy | None = None
        origin["meter"] = "none" + "".join(f"; {fault}" for fault in energy_meter.faults)
        if not isinstance(energy_meter, NullMeter):
            origin["meter"] = f"{energy_meter.name} {energy_meter.scope}"
            layer_s, plain_s = np.median(samples_s, axis=0), float(np.median(whole_s))
            energy = layer_energy(
                run.whole, run.tensors, run.ranks, layer_s, plain_s, energy_meter, run.synchronize, tick
            )
            if energy is None:
                origin["meter"] = f"none; {energy_meter.name} {energy_meter.scope} gave no reading"
    measured = LayerProfile(
        type(graph.model).__name__,
        graph.fingerprint,
        graph.batch,
        tuple(layer.name for layer in graph.layers),
        samples_s,
        whole_s,
        origin | {"warmup": warmup, "cooldown_s": cooldown_s, "clock": "wall" if clock is None else clock.name},
        memory,
        energy,
    )
    noise = _noise_in(measured)
    if noise is not None:
        on_noise(noise)
    return measured


@contextlib.contextmanager
def _meter(wanted: EnergyMeter | str | None, device: torch.device) -> Iterator[EnergyMeter]:
    if isinstance(wanted, EnergyMeter):
        yield wanted
    elif wanted == "auto":
        with find_meter(device) as found:
            yield found
    elif wanted is None:
        yield NullMeter()
    else:
        raise ProfileError(f"meter must be 'auto', None or a meter of torchsurgeon.meters; got {short(wanted)}")


def _noise_in(measured: LayerProfile) -> NoisyProfileWarning | None:
    """Return the warning that the machine was not quiet while it was measured; None where it was."""
    repeats = len(measured.whole_s)
    if repeats >= 4 and measured.spread > _NOISY_SPREAD:
        finding = (
            f"{repeats} runs differ widely: the middle half spans {measured.spread:.0%} of the median, so the machine "
            "is busy or changes its clocks"
        )
        return NoisyProfileWarning(finding, "stop what else runs on it, or take more repeats")
    if measured.drift > _NOISY_DRIFT and _is_apart(measured.whole_s):
        finding = f"the last runs took {measured.drift:.0%} longer than the first: the machine throttles or became busy"
        return NoisyProfileWarning(finding, "let it rest with cooldown_s, or cool it")
    return None


def _is_apart(whole_s: Array) -> bool:
    """Return whether three quarters of the last third of the runs took longer than three quarters of the first."""
    third = len(whole_s) // 3
    return bool(np.quantile(whole_s[:third], 0.75) < np.quantile(whole_s[-third:], 0.25))


class ModelRun:
    """A model that is ready to be measured. From its creation on, this process keeps freed memory.

    See ``keep_freed_memory()``.

    Args:
        graph: the traced model.
        device: the device that the model is on.
        inputs: the model's input tensors; None for random ones.

    Attributes:
        whole: the whole model as one segment.
        tensors: its inputs, on the device.
        layers: how many layers it has.
        ranks: by step index, the layer that the step is.
        columns: by step index, the layer to which the step's time counts.
    """

    def __init__(self, graph: LayerGraph, device: torch.device, inputs: Sequence[torch.Tensor] | None) -> None:
        keep_freed_memory()
        self.whole = tail_for(graph, [spec.name for spec in graph.inputs])
        given = example_inputs(graph) if inputs is None else inputs
        self.tensors = [tensor.detach().to(device) for tensor in given]
        self.layers = len(graph.layers)
        self.ranks = {step: rank for rank, step in enumerate(graph.flow.layers)}
        # A step that is no layer reads a size, or takes one of several results; its time counts to the next layer.
        self.columns: dict[int, int] = {}
        column = self.layers - 1
        for step in reversed(self.whole.steps):
            self.columns[step] = column = self.ranks.get(step, column)
        self._starts = np.array([self.columns[step] for step in self.whole.steps])
        self._device = device

    def synchronize(self) -> None:
        """Wait until the device has done all that it was given."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def times(
        self, clock: Clock | None, repeats: int, warmup: int, cooldown_s: float, tick: Callable[[], None]
    ) -> tuple[Array, Array]:
        """Measure the layers, and the model as it is.

        Args:
            clock: the clock; None for the host's monotonic clock.
            repeats: how many passes of each kind are measured.
            warmup: how many passes of each kind run before that, and after each rest.
            cooldown_s: seconds of rest before every ten repeats.
            tick: is called after each repeat, and after each of the first warm-up passes.

        Returns:
            Seconds of each layer, shape (repeats, layers), and of the whole model as it is, shape (repeats,).
        """
        samples, plain = np.zeros((repeats, self.layers)), np.zeros(repeats)
        for repeat in range(repeats):
            if repeat == 0 or (cooldown_s and repeat % _REPEATS_BETWEEN_PAUSES == 0):
                time.sleep(cooldown_s)
                for _ in range(warmup):
                    self._steps_ns(clock), self._plain_ns(clock)
                    if repeat == 0:
                        tick()
            np.add.at(samples[repeat], self._starts, self._steps_ns(clock) / 1e9)
            plain[repeat] = self._plain_ns(clock) / 1e9
            tick()
        return samples, plain

    def _steps_ns(self, clock: Clock | None) -> Any:
        if clock is None:
            steps_ns = np.diff(np.asarray(self.whole.timed(self.tensors, time.perf_counter_ns), dtype=np.int64))
            if steps_ns.min() < 0:
                raise MeterError(
                    f"the clock jumped back by {-steps_ns.min()} ns during a run; measure again, and keep the machine "
                    "from sleeping or migrating meanwhile"
                )
            return steps_ns
        self.whole.timed(self.tensors, clock.mark)  # type: ignore[arg-type]
        return np.asarray(clock.intervals_ns(), dtype=np.int64)

    def _plain_ns(self, clock: Clock | None) -> int:
        if clock is None:
            begin = time.perf_counter_ns()
            self.whole(*self.tensors)
            return time.perf_counter_ns() - begin
        clock.mark()
        self.whole(*self.tensors)
        clock.mark()
        return clock.intervals_ns()[0]


def layer_trace(
    graph: LayerGraph, device: str | torch.device | None = None, inputs: Sequence[torch.Tensor] | None = None
) -> KernelTrace:
    """Return one run of the model as a trace: its layers, and on CUDA the kernels that each launched.

    The model is run once before that, to warm up.

    Args:
        graph: the traced model.
        device: as for ``profile()``.
        inputs: as for ``profile()``.

    Raises:
        DeviceError: the device does not exist, or the model is not on it.
        NativeUnavailableError: on CUDA, as ``kernel_trace()`` raises it.
    """
    target = device_of(graph, device)
    run = ModelRun(graph, target, inputs)
    with torch.no_grad():
        run.whole(*run.tensors)
        if target.type == "cuda":
            with torch.cuda.device(target), hooks.kernel_trace() as trace:
                run.whole(*run.tensors)
            return trace
        stamps = run.whole.timed(run.tensors, time.perf_counter_ns)
    names = {step: graph.layers[rank].name for step, rank in run.ranks.items()}
    spans = zip(run.whole.steps, pairwise(stamps), strict=True)
    return KernelTrace(layers=tuple(LayerSpan(names[step], *span) for step, span in spans if step in names))
