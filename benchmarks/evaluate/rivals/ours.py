"""torchsurgeon itself, with the way that its planner chooses; and DADS's minimum cut, run by torchsurgeon's runtime."""

from __future__ import annotations

import time

import numpy
from torch import Tensor

import torchsurgeon as ts
from benchmarks.evaluate.end_to_end import Runs
from benchmarks.evaluate.rivals.rival import UNDER_WAY, Rival, seconds, steady_rate
from benchmarks.evaluate.study import BACKENDS, Study, way_of
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Row
from torchsurgeon.planning.mincut import MinimumCut
from torchsurgeon.planning.objective import Objective
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.planning.sets import Units

_DECISIONS = 100
_MODE = "bfloat16"
_THROUGHPUT = Objective(throughput=1.0, in_flight=UNDER_WAY)


class Ours(Rival):
    """The way that ``plan()`` chooses over all backends and lossless codecs, before anything is run.

    Args:
        study: the network with its profiles and its frontier.
        runs: runs ways of it.
        emulator: the link.
        slower: how many times as long the device takes.
    """

    streams = True

    def __init__(self, study: Study, runs: Runs, emulator: LinkEmulator, slower: float) -> None:
        super().__init__("ours")
        self._study, self._runs, self._slower = study, runs, slower
        self._mode = study.modes[_MODE]
        self.emulators = [emulator]
        self._link = PRESETS["wifi"]
        self._row: Row | None = None
        self._chosen: dict[str, Row] = {}
        self._built: set[str] = set()

    def use(self, link: Link) -> None:
        """Take on a link, and choose the way for single calls."""
        super().use(link)
        self._link = link
        if link.name not in self._chosen:
            self._chosen[link.name] = self._study.planned(link.name, BACKENDS, BACKENDS, self._mode.codecs).terms.row
        self._row = self._chosen[link.name]
        self._cut(self._row)

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        assert self._row is not None
        split = self._split(self._row)
        answer: Tensor = split(self._study.example)
        assert split.last is not None
        assert split.last.degraded is None, split.last.degraded
        # Behind a part that the backend did not run, nothing would be slowed down.
        assert split.last.backend == self._row.backend, f"{split.last.backend} in place of {self._row.backend}"
        return answer

    def before_stream(self, count: int) -> None:
        """Cut where a stream's slowest stage is the quickest."""
        self._row = self._mode.frontier.best(self._link, objective=_THROUGHPUT)
        self._cut(self._row)

    def rate(self, count: int) -> float:
        """Return how many answers come in a second of so many, with up to four calls under way."""
        assert self._row is not None
        answers = self._split(self._row).map((self._study.example for _ in range(count)), depth=UNDER_WAY)
        return steady_rate([time.perf_counter() for _ in answers])

    def replanning_s(self) -> float:
        """Return what one decision for another link takes."""
        frontier, link = self._mode.frontier, self._link
        return self._slower * seconds(lambda: [frontier.best(link) for _ in range(_DECISIONS)]) / _DECISIONS

    def chosen(self) -> str:
        """Return where it cuts, by which backends, with which codec."""
        assert self._row is not None
        return way_of(self._row)

    def _split(self, row: Row) -> ts.SplitModule:
        return self._runs.split(row.backend, "eager" if row.on_device else row.server_backend)

    def _cut(self, row: Row) -> None:
        split = self._runs.cut(row)
        way = way_of(row)
        if way not in self._built:
            self._built.add(way)
            self._runs.ready(split)


class PerRequest(Rival):
    """DADS's minimum cut (Hu et al., INFOCOM 2019), found anew at every request, in eager PyTorch.

    Layers and tensors are the network's own, and the costs are measured, as ours are. The cut is found by
    ``torchsurgeon.planning.mincut`` over SciPy's maximum flow, for the whole network at once, as DADS has it: without
    codecs, without backends, and without what ours prepares before the first request.

    Args:
        study: the network with its profiles.
        runs: runs ways of it.
        emulator: the link.
        device: the slow device, which finds the cut.
    """

    def __init__(self, study: Study, runs: Runs, emulator: LinkEmulator, device: SlowDevice) -> None:
        super().__init__("DADS: a minimum cut per request")
        self._study, self._device, self.emulators = study, device, [emulator]
        self._split = runs.split("eager", "eager")
        self._costs = LayerCosts(study.graph, study.device["eager"], study.server["eager"])
        self._units = Units(self._costs)
        self._link = PRESETS["wifi"]

    def use(self, link: Link) -> None:
        """Take on a link."""
        super().use(link)
        self._link = link

    def infer(self) -> Tensor:
        """Return the network's answer for its example, from where the minimum cut lies now."""
        row = self._device.call(self._cut)
        self._split.codec = "raw"
        self._split.partition = "device" if row.on_device else row.point(self._study.graph)
        answer: Tensor = self._split(self._study.example)
        return answer

    def replanning_s(self) -> float:
        """Return what finding the cut takes."""
        return seconds(lambda: self._device.call(self._cut))

    def chosen(self) -> str:
        """Return where it cuts."""
        row = self._cut()
        return "device" if row.on_device else "server" if not row.head_s else row.name

    def _cut(self) -> Row:
        units = self._units
        network = MinimumCut(0, len(units.needs), units.needs, units.costs, units.tensors)
        inside = network.best(numpy.array([1.0, 8 / self._link.uplink_bit_s, 1.0, 0.0]))
        layers = units.layers_of(inside)
        if len(layers) == len(self._study.graph.layers):
            return next(row for row in self._costs.rows() if row.on_device)
        return self._costs.row_of(layers)
