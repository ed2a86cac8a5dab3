"""Time layers of every kind on a device, and fit its prediction models.

This is the deployment phase of Neurosurgeon (Kang et al., ASPLOS 2017, section 4.1). Most of the time goes to networks
drawn at random, whose layers run among the neighbors that they have in real models. The rest goes to separate layers,
of the kinds that are predicted worst so far.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import random
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchsurgeon import _json_file, _whole_file
from torchsurgeon.errors import CalibrationError, ThrottledWarning, is_finite, short
from torchsurgeon.meters import CudaEventClock, EnergyMeter, NullMeter, find_meter
from torchsurgeon.prediction.damage import DAMAGE, numbers
from torchsurgeon.prediction.fitted import BlockCorrection
from torchsurgeon.prediction.kinds import KINDS, Array
from torchsurgeon.prediction.nets import random_net, settle
from torchsurgeon.prediction.operations import moved_bytes, operations
from torchsurgeon.prediction.predictor import FORMAT, Predictor
from torchsurgeon.prediction.pulse import Pulse
from torchsurgeon.prediction.regression import HeldOut, out_of_fold
from torchsurgeon.prediction.samples import FEWEST_SAMPLES, Sample, SampleTable, tables
from torchsurgeon.prediction.sweep import RARE_KINDS, Candidate, candidates, sweep_kinds
from torchsurgeon.profiling.joules import layer_energy
from torchsurgeon.profiling.measure import ModelRun
from torchsurgeon.profiling.origin import find_device, provenance
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.tracer import trace

# The share of networks among what is timed, and the most time that may go to metering.
_NETS_SHARE, _ENERGY_SHARE = 0.7, 0.3
_SAVE_EVERY_S, _REVIEW_EVERY_S = 15.0, 40.0
_MOST_SAMPLES = 2500
_LONGEST_S = 1e7

Progress = Callable[[float, float, str], None]


@dataclasses.dataclass(frozen=True)
class _TimedNet:
    """A network that was timed as a whole.

    Attributes:
        group: its number.
        whole_s: its seconds.
        sum_s: the sum of its layers' seconds.
        layers: how many layers it has.
    """

    group: int
    whole_s: float
    sum_s: float
    layers: int


def _timed_from(values: Sequence[Any]) -> _TimedNet:
    names = [field.name for field in dataclasses.fields(_TimedNet)]
    net = numbers(_TimedNet, dict(zip(names, values, strict=True)), least=0.0)
    if not (isinstance(net.group, int) and min(net.whole_s, net.sum_s, net.layers) > 0):
        raise ValueError(f"a network must have a whole number and positive times and layers; got {short(net)}")
    return net


def calibrate(
    device: str | torch.device = "cpu",
    *,
    budget_s: float = 300.0,
    out: str | Path | None = None,
    seed: int = 0,
    meter: EnergyMeter | str | None = "auto",
    progress: Progress | None = None,
    overwrite: bool = True,
) -> Predictor:
    """Time layers on a device, and return a predictor of it.

    Predictions hold for as many threads as PyTorch is set to (``torch.set_num_threads``). From then on, this process
    keeps freed memory (``keep_freed_memory()``).

    Args:
        device: "cpu", "cuda" or "cuda:1".
        budget_s: seconds to spend, above 0.
        out: the file to which the predictor is written and, until it is done, what has been measured so far. A call
            with the same file continues after an interruption, or where a calibration had a smaller budget. For a
            finished one that had the budget, ``overwrite`` says what happens.
        seed: the same seed draws the same networks and layers.
        meter: an energy meter, "auto" for the best one of the machine, or None.
        progress: is called after each network with the seconds spent, ``budget_s``, and what is being done.
        overwrite: whether a finished calibration in ``out`` that had the budget is replaced at the end of a new one.

    Raises:
        DeviceError: the device does not exist.
        CalibrationError: the budget is not positive, or ``out`` cannot be written, is no calibration or is that of
            another device; or it holds a finished calibration that had the budget, and ``overwrite`` is false.

    Warns:
        ThrottledWarning: the device became slower meanwhile. It was given pauses then, which the provenance counts.
    """
    if not (is_finite(budget_s) and budget_s > 0):
        raise CalibrationError(f"budget_s must be a positive number of seconds, such as 300; got {short(budget_s)}")
    target = find_device(device)
    calibration = _Calibration(target, seed, None if out is None else Path(out), budget_s, overwrite)
    with contextlib.ExitStack() as exit_stack:
        exit_stack.enter_context(torch.no_grad())
        chosen = exit_stack.enter_context(find_meter(target)) if meter == "auto" else meter
        if isinstance(chosen, str):
            raise CalibrationError(f"meter must be 'auto', None or a meter of torchsurgeon.meters; got {short(chosen)}")
        if target.type == "cuda":
            exit_stack.enter_context(torch.cuda.device(target))
        energy = _Energy(NullMeter() if chosen is None else chosen)
        try:
            calibration.run(energy, progress or (lambda *_: None))
        finally:
            calibration.save(energy)
    predictor = calibration.fitted()
    if out is not None:
        _json_file.write(out, predictor.to_json() | calibration.networks(), CalibrationError)
    return predictor


class _Calibration:
    """A calibration that is running: what has been measured so far, and what to measure next."""

    def __init__(self, device: torch.device, seed: int, out: Path | None, budget_s: float, overwrite: bool) -> None:
        self._device, self._out, self._budget_s = device, out, budget_s
        self._facts = provenance(device) | {"calibrated_for_s": 0.0, "seed": seed}
        self._samples: list[Sample] = []
        self._nets: list[_TimedNet] = []
        self._group = 0
        self._pulse = Pulse(device)
        self._errors: dict[str, float] = {}
        self._keeps_finished = False
        if out is not None:
            _whole_file.check_writable(out, CalibrationError)
            if out.exists():
                self._resume(out, budget_s, overwrite)
        self._rng = random.Random(seed * 1_000_003 + self._group)
        self._candidates = {kind: candidates(kind, seed * 7919 + self._group) for kind in sweep_kinds()}

    def run(self, energy: _Energy, progress: Progress) -> None:
        """Measure networks and layers until the budget is spent."""
        budget_s = self._budget_s
        spent_before_s = float(self._facts["calibrated_for_s"])
        begin = saved = reviewed = time.monotonic()
        while True:
            now = time.monotonic()
            spent_s = spent_before_s + now - begin
            self._facts["calibrated_for_s"] = round(spent_s, 1)
            if spent_s >= budget_s:
                break
            if now - saved > _SAVE_EVERY_S:
                saved = now
                self.save(energy)
            if now - reviewed > _REVIEW_EVERY_S:
                reviewed = now
                self._review()
            self._pulse.wait(budget_s - spent_s)
            alone = self._rng.random() > _NETS_SHARE
            model, example, what = self._separate_layers(self._worst()) if alone else self._net()
            self._measure(model, example, energy, whole=not alone)
            progress(spent_s, budget_s, f"{len(self._samples)} layers timed, now {what}")

    def fitted(self) -> Predictor:
        """Return the predictor, fitted to what was measured."""
        found = {kind: _thinned(table) for kind, table in tables(self._samples).items()}
        predictor = Predictor.fit(found, self._facts)
        if "throttled" in self._facts:
            facts = self._facts["throttled"]
            warnings.warn(
                f"the device became up to {facts['slowest'] - 1:.0%} slower while it was calibrated, and was given "
                f"{facts['pauses']} pauses of {facts['paused_s']:.0f} s in all; cool it, or stop what else runs, and "
                "calibrate again",
                ThrottledWarning,
                stacklevel=3,
            )
        # Samples of kinds that have too few for a model are kept: a calibration that continues adds to them.
        predictor.samples.update(found)
        predictor.block = _block(predictor, found, self._nets)
        return predictor

    def _net(self) -> tuple[nn.Module, torch.Tensor, str]:
        with torch.device("meta"):
            net = random_net(self._rng)
        example = net.example
        real = (
            torch.rand(example.shape) if example.is_floating_point() else torch.zeros(example.shape, dtype=torch.long)
        )
        return net.model, real, "a network"

    def _separate_layers(self, kind: str) -> tuple[nn.Module, torch.Tensor, str]:
        chosen: list[Candidate] = []
        for candidate in self._candidates[kind]:
            chosen.append(candidate)
            elements = sum(torch.Size(shape).numel() for c in chosen for shape in c.shapes)
            if len(chosen) == 12 or elements > 6e6 or sum(c.flops for c in chosen) > 1e9:
                break
        with torch.device("meta"):
            model = _SeparateLayers(chosen)
        return model, torch.zeros(()), kind

    def _measure(self, model: nn.Module, example: torch.Tensor, energy: _Energy, whole: bool) -> None:
        settle(model)
        graph = trace(model.eval().to(self._device), example.to(self._device))
        run = ModelRun(graph, self._device, [example])
        clock = CudaEventClock(len(run.whole.steps) + 1) if self._device.type == "cuda" else None
        with clock or contextlib.nullcontext():
            _, once = run.times(clock, 1, 1, 0.0, lambda: None)
            repeats = min(max(round(0.2 / once[0]), 3), 8)
            samples_s, whole_s = run.times(clock, repeats, 2, 0.0, lambda: None)
        layer_s = np.median(samples_s, axis=0)
        joules = energy.layer_j(run, layer_s, float(np.median(whole_s)))
        self._add_samples(graph, layer_s, joules)
        if whole:
            net = _TimedNet(self._group, float(np.median(whole_s)), float(layer_s.sum()), len(layer_s))
            self._nets.append(net)
        self._group += 1

    def _add_samples(self, graph: LayerGraph, layer_s: Array, joules: Array) -> None:
        before, moved = 0, [moved_bytes(layer) for layer in graph.layers]
        for found, seconds, energy_j, own in zip(operations(graph), layer_s, joules, moved, strict=True):
            if len(found) == 1 and found[0].kind in KINDS and seconds > 0:
                sample = Sample(found[0], float(seconds), float(energy_j), before, self._group, sum(moved))
                self._samples.append(sample)
            before = own

    def _review(self) -> None:
        """Find out how well each kind is predicted so far."""
        for kind, table in tables(self._samples).items():
            if len(table) >= FEWEST_SAMPLES:
                part = table.take(np.random.default_rng(0).permutation(len(table))[:1000])
                held_out = HeldOut.of(part.seconds, out_of_fold(part, part.seconds, "log-linear"))
                self._errors[kind] = held_out.median / math.sqrt(len(table))
                for name, (of, chosen) in RARE_KINDS.items():
                    if of == kind:
                        self._errors[name] = held_out.median / math.sqrt(max(int(chosen(table).sum()), 1))

    def _worst(self) -> str:
        """Return a kind to sample next, drawn in proportion to how much more samples should lower its error."""
        kinds = list(self._candidates)
        weights = [self._errors.get(kind, 0.05) for kind in kinds]
        return self._rng.choices(kinds, weights)[0]

    def save(self, energy: _Energy) -> None:
        """Write what was measured so far, so that another call can continue."""
        # Where this session has no meter but an earlier one had, the facts on that meter stay.
        self._facts = energy.facts() | self._facts if energy.is_none else self._facts | energy.facts()
        self._facts |= self._pulse.facts()
        if self._out is None or self._keeps_finished:
            return
        _json_file.write(
            self._out,
            {
                "format": FORMAT,
                "unfinished": True,
                "provenance": self._facts,
                "samples": {kind: table.to_json() for kind, table in tables(self._samples).items()},
            }
            | self.networks(),
            CalibrationError,
        )

    def networks(self) -> dict[str, Any]:
        """Return what is needed to continue this calibration, beside the predictor."""
        return {"networks": {"count": self._group, "timed": [dataclasses.astuple(net) for net in self._nets]}}

    def _resume(self, out: Path, budget_s: float, overwrite: bool) -> None:
        """Continue with what a file holds, unless that is finished and had the budget."""
        data = _json_file.read(out, CalibrationError, "delete it and calibrate again")
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise CalibrationError(
                f"{out} exists and is no calibration of this version; give another file, or delete it"
            )
        try:
            facts = dict(data["provenance"])
            spent_s = float(facts.get("calibrated_for_s", math.inf))
            self._check_same(out, facts, ("device",))
            if not data.get("unfinished") and spent_s >= budget_s:
                if not overwrite:
                    raise CalibrationError(
                        f"{out} is a finished calibration of {spent_s:g} s, as much as the budget of {budget_s:g} s or "
                        "more; give another file, or a larger budget, with which it goes on, or have it overwritten"
                    )
                # A finished calibration is only replaced by another that is finished.
                self._keeps_finished = True
                return
            found = {kind: SampleTable.from_json(kind, table) for kind, table in data["samples"].items()}
            group, nets = int(data["networks"]["count"]), [_timed_from(net) for net in data["networks"]["timed"]]
            if not (0 <= spent_s <= _LONGEST_S and group >= 0 and all(net.group < group for net in nets)):
                raise ValueError(f"the number of networks and the seconds must fit; got {group} in {spent_s} s")
            self._pulse.resume(facts)
        except CalibrationError:
            raise
        except DAMAGE as error:
            raise CalibrationError(
                f"{out} was cut short or edited ({short(error)}); delete it and calibrate again"
            ) from None
        self._check_same(out, facts, ("threads", "torch"))
        self._facts["calibrated_for_s"] = spent_s
        self._facts |= {name: facts[name] for name in ("meter", "idle_power_w") if name in facts}
        self._group, self._nets = group, nets
        self._samples = [sample for table in found.values() for sample in table.samples()]

    def _check_same(self, out: Path, facts: Mapping[str, Any], names: tuple[str, ...]) -> None:
        for name in names:
            if facts.get(name) != self._facts[name]:
                raise CalibrationError(
                    f"{out} holds a calibration with {name} {short(facts.get(name), 100)}, and this machine's is "
                    f"{short(self._facts[name], 100)}; give another file, or delete it"
                )


class _SeparateLayers(nn.Module):
    """Runs separate layers one after another, each on an input of its own, which was just written."""

    def __init__(self, chosen: list[Candidate]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([candidate.build() for candidate in chosen])
        self.feeds: list[list[str]] = []
        self.chosen = chosen
        for index, candidate in enumerate(chosen):
            names = [f"feed_{index}_{place}" for place in range(len(candidate.shapes))]
            dtype = torch.long if candidate.whole_below else torch.float32
            for name, shape in zip(names, candidate.shapes, strict=True):
                self.register_buffer(name, torch.empty(shape, dtype=dtype))
            self.feeds.append(names)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run every layer; ``x`` is a number that all results are added to."""
        # ``x`` makes each layer's input depend on the result of the one before, so that no result is unused.
        for layer, candidate, names in zip(self.layers, self.chosen, self.feeds, strict=True):
            given = [getattr(self, name) for name in names]
            out = layer(*(given if candidate.whole_below else [tensor + x for tensor in given]))
            # Of its result only one element is read, so that the memory is freed at once, as in a real network.
            x = x + torch.as_strided(out[0] if isinstance(layer, nn.RNNBase) else out, (), ())
        return x


class _Energy:
    """Meters the layers of some of the networks, as long as that takes at most a share of the time."""

    def __init__(self, meter: EnergyMeter) -> None:
        self._meter, self.is_none = meter, isinstance(meter, NullMeter)
        self._begin, self._spent_s, self._idle_w = time.monotonic(), 0.0, math.nan

    def layer_j(self, run: ModelRun, layer_s: Array, whole_s: float) -> Array:
        """Return the joules of each layer, shape (layers,); all NaN where metering has had its share of the time."""
        unknown = np.full(len(layer_s), np.nan)
        began = time.monotonic()
        if self.is_none or self._spent_s > _ENERGY_SHARE * (began - self._begin):
            return unknown
        found = layer_energy(
            run.whole, run.tensors, run.ranks, layer_s, whole_s, self._meter, run.synchronize, lambda: None
        )
        self._spent_s += time.monotonic() - began
        if found is None:
            return unknown
        self._idle_w = found.idle_power_w
        return np.where(found.layer_j > 0, found.layer_j, np.nan)

    def facts(self) -> dict[str, Any]:
        """Return the meter and the idle power, for the provenance."""
        if self.is_none:
            return {"meter": "none" + "".join(f"; {fault}" for fault in self._meter.faults)}
        idle_w = {} if math.isnan(self._idle_w) else {"idle_power_w": self._idle_w}
        return {"meter": f"{self._meter.name} {self._meter.scope}", **idle_w}


def _thinned(table: SampleTable) -> SampleTable:
    """Return a table that is small enough to fit in seconds: common variants lose samples, rare ones keep theirs.

    The same table gives the same result.
    """
    if len(table) <= _MOST_SAMPLES:
        return table
    order = np.random.default_rng(0).permutation(len(table))
    counts = dict(zip(*np.unique(table.variants, return_counts=True), strict=True))
    seen: dict[str, int] = {}
    rank = np.zeros(len(table))
    for row in order:
        variant = str(table.variants[row])
        seen[variant] = seen.get(variant, 0) + 1
        # With n samples of a variant, the first ranks 1/√n: all variants share, and rare ones lose the least.
        rank[row] = seen[variant] / math.sqrt(counts[variant])
    return table.take(np.sort(np.argsort(rank)[:_MOST_SAMPLES]))


def _block(predictor: Predictor, found: Mapping[str, SampleTable], nets: list[_TimedNet]) -> BlockCorrection:
    """Fit whole networks' times to the sums of their layers, as predicted by models that were fitted without them."""
    truth, guess = np.zeros(1 + max((net.group for net in nets), default=0)), np.zeros(0)
    guess = truth.copy()
    for kind, table in found.items():
        model = predictor.model(kind)
        if model is None or model.unseen is None:
            continue
        inside = table.groups < len(truth)
        np.add.at(truth, table.groups[inside], table.seconds[inside])
        np.add.at(guess, table.groups[inside], model.unseen[inside])
    rows = []
    for net in nets:
        # Layers without a sample (several operations in one, or left out to save time) count with their measured time.
        sum_s = net.sum_s - truth[net.group] + guess[net.group]
        if truth[net.group] > 0.5 * net.sum_s and sum_s > 0:
            rows.append((math.log(sum_s / net.layers), math.log(net.whole_s / sum_s)))
    if len(rows) < FEWEST_SAMPLES:
        return BlockCorrection()
    size, ratio = np.array(rows).T
    slope, offset = np.polyfit(size, ratio, 1)
    if np.median(np.abs(ratio - np.median(ratio))) <= np.median(np.abs(ratio - slope * size - offset)):
        slope, offset = 0.0, float(np.median(ratio))
    low, high = np.exp(np.quantile(ratio - slope * size - offset, (0.05, 0.95)))
    shortest_s, longest_s = np.exp(np.quantile(size, (0.02, 0.98)))
    return BlockCorrection(
        float(offset), float(slope), float(shortest_s), float(longest_s), min(float(low), 1.0), max(float(high), 1.0)
    )
