"""Every way to run a small random graph, with its costs added up layer by layer, for a plan to be compared with."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.codec.table import CodecCost, CodecRow, CodecTable
from torchsurgeon.profiling import LayerEnergy, LayerProfile

OBJECTIVES: tuple[Any, ...] = (
    "latency",
    "energy",
    "throughput",
    "server_time",
    {"latency": 1.0, "energy": 0.4},
    {"throughput": 1.0, "energy": 0.1, "latency": 0.5},
    {"server_time": 1.0, "latency": 0.1},
)


class RandomBranches(nn.Module):
    """Linear layers, tanh and concatenations, each of which reads one or two of the last few tensors."""

    def __init__(self, chance: random.Random, count: int) -> None:
        super().__init__()
        self.width = chance.choice([4, 8, 16])
        widths, self.reads = [self.width], []
        self.parts = nn.ModuleDict()
        for i in range(count):
            read = chance.randrange(max(0, i - 2), i + 1)
            kind = chance.random()
            if kind < 0.3 and i > 1:
                other = chance.randrange(max(0, i - 3), i + 1)
                self.reads.append((read, other))
                widths.append(widths[read] + widths[other])
                continue
            self.reads.append((read,))
            if kind < 0.55:
                widths.append(widths[read])
            else:
                widths.append(chance.choice([2, 4, 8, 32]))
                self.parts[str(i)] = nn.Linear(widths[read], widths[-1])
        read_by_some = {tensor for reads in self.reads for tensor in reads}
        self.results = [i for i in range(1, count + 1) if i not in read_by_some]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for i, reads in enumerate(self.reads):
            if len(reads) == 2:
                values.append(torch.cat([values[j] for j in reads], 1))
            elif str(i) in self.parts:
                values.append(self.parts[str(i)](values[reads[0]]))
            else:
                values.append(values[reads[0]].tanh())
        results = [values[i] for i in self.results]
        return torch.cat(results, 1) if len(results) > 1 else results[0]


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run the model, with what it costs; the names are those of objectives and constraints."""

    layers: tuple[int, ...]
    codec: str
    on_device: bool
    raw_input: bool
    memory_bytes: int
    latency: float
    energy: float
    throughput: float
    server_time: float

    def value(self, objective: Any) -> float:
        weights = {objective: 1.0} if isinstance(objective, str) else objective
        return float(sum(weight * getattr(self, name) for name, weight in weights.items()))

    def keeps(self, limits: dict[str, Any]) -> bool:
        return (
            self.latency <= limits.get("latency_s", np.inf)
            and self.energy <= limits.get("energy_j", np.inf)
            and self.memory_bytes <= limits.get("memory_bytes", np.inf)
            and len(self.layers) >= limits.get("min_layers", 0)
            and (limits.get("raw_input", True) or not self.raw_input)
            and (limits.get("server_allowed", True) or self.on_device)
        )


class Problem:
    """A random graph with profiles, link and codecs, and questions to ask about it."""

    def __init__(self, seed: int, most_layers: int = 8) -> None:
        self.chance = chance = random.Random(seed)
        torch.manual_seed(seed)
        model = RandomBranches(chance, chance.randint(1, most_layers)).eval()
        self.graph = ts.trace(model, torch.rand(chance.choice([1, 3]), model.width), verify=False)
        self.device, self.server = self._profile(chance.choice([1, 10]), True), self._profile(chance.choice([0.1, 1]))
        self.across = dict(self._across())
        self.codecs = self._codecs() if chance.random() < 0.7 else None
        radio = ts.Radio(
            chance.random() * 1e-6, chance.random() * 1e-6, chance.random(), chance.choice([0, 0.1]), chance.random()
        )
        rates = [10 ** chance.uniform(3.5, 7) for _ in range(2)]
        self.link = ts.Link("drawn", *rates, chance.choice([0, 1e-3, 0.02]), radio=radio)
        self.load, self.slowdown = chance.choice([0.3, 1, 5]), chance.choice([0.5, 1, 4])
        self.ways = list(self._ways())

    def question(self) -> tuple[Any, dict[str, Any]]:
        """Return an objective, and constraints that each at least one way keeps."""
        chance, limits = self.chance, {}
        if chance.random() < 0.4:
            limits["latency_s"] = chance.choice(self.ways).latency * (1 + 1e-7)
        if chance.random() < 0.3:
            limits["energy_j"] = chance.choice(self.ways).energy * (1 + 1e-7)
        if chance.random() < 0.3:
            limits["memory_bytes"] = chance.choice(self.ways).memory_bytes
        if chance.random() < 0.2:
            limits["min_layers"] = chance.randint(1, len(self.graph.layers))
        if chance.random() < 0.3:
            limits["raw_input"] = False
        if chance.random() < 0.1:
            limits["server_allowed"] = False
        return chance.choice(OBJECTIVES), limits

    def plan(self, objective: Any, limits: dict[str, Any]) -> ts.Plan:
        return ts.plan(
            self.graph,
            device=self.device,
            server=self.server,
            link=self.link,
            objective=objective,
            codecs=self.codecs,
            load=self.load,
            slowdown=self.slowdown,
            **limits,
        )

    def least(self, objective: Any, limits: dict[str, Any], but: tuple[int, ...] | None = None) -> float | None:
        """Return the least value among all ways, those on the layers ``but`` left out; None where there is none."""
        values = [way.value(objective) for way in self.ways if way.keeps(limits) and way.layers != but]
        return min(values, default=None)

    def _profile(self, scale: float, metered: bool = False) -> LayerProfile:
        graph, draw = self.graph, np.random.default_rng(self.chance.randrange(1 << 30))
        count = len(graph.layers)
        seconds = draw.choice([0, 1e-4, 1e-3, 5e-3], size=count) * draw.random(count) * scale
        seconds[0] = seconds[0] or 1e-4
        energy = None
        if metered:
            joules = draw.random(count) * draw.choice([1e-3, 1e-2, 0.1], size=count)
            whole = float(joules.sum()) * 1.1
            energy = LayerEnergy("drawn", 1.0, joules, np.stack([joules, joules], 1), (whole, 0.0, 1.0))
        return LayerProfile(
            type(graph.model).__name__,
            graph.fingerprint,
            graph.batch,
            tuple(layer.name for layer in graph.layers),
            seconds[None],
            np.array([seconds.sum() * self.chance.choice([0.9, 1, 1.2])]),
            {},
            draw.integers(10, 5000, count),
            energy,
        )

    def _codecs(self) -> CodecTable:
        chance, rows = self.chance, []
        measured = [point for point in self.across.values() if chance.random() < 0.3]
        for point in (*self.graph.points[:-1], *measured):
            for codec, share in (("raw", 1), ("zstd", 0.7), ("int8", 0.3)):
                if chance.random() < 0.5:
                    lossless = codec != "int8"
                    cost = CodecCost(
                        codec,
                        point.size_bytes * share,
                        chance.random() * 1e-3,
                        chance.random() * 1e-3,
                        lossless,
                        lossless or chance.random() < 0.6,
                    )
                    rows.append(CodecRow(point.index, point.name, point.size_bytes, cost, layers=point.layers))
        name = type(self.graph.model).__name__
        return CodecTable(name, self.graph.fingerprint, self.graph.batch, 1, "", tuple(rows))

    def _across(self) -> Iterator[tuple[tuple[int, ...], ts.PartitionPoint]]:
        """Give the closed sets of layers that are not simply the first ones, with their cuts."""
        prefixes = {tuple(range(point.index)) for point in self.graph.points}
        for mask in range(1 << len(self.graph.layers)):
            layers = tuple(i for i in range(len(self.graph.layers)) if mask >> i & 1)
            if layers not in prefixes:
                with contextlib.suppress(ts.PartitionError):
                    yield layers, self.graph.point_of(layers)

    def _ways(self) -> Iterator[Way]:
        prefixes = {tuple(range(point.index)): point for point in self.graph.points}
        for layers, point in (prefixes | self.across).items():
            yield from (self._way(layers, point, *codec) for codec in self._codecs_at(point))

    def _codecs_at(self, point: ts.PartitionPoint) -> list[tuple[str, float, float, float]]:
        if point.index == len(self.graph.layers):
            return [("raw", 0.0, 0.0, 0.0)]
        costs = [] if self.codecs is None else [cost for cost in self.codecs.costs(point) if cost.within_budget]
        found = [(cost.codec, cost.size_bytes, cost.encode_s, cost.decode_s) for cost in costs]
        return found if any(codec == "raw" for codec, *_ in found) else [("raw", point.size_bytes, 0.0, 0.0), *found]

    def _way(
        self, layers: tuple[int, ...], point: Any, codec: str, size_bytes: float, encode_s: float, decode_s: float
    ) -> Way:
        graph, device, link, chosen = self.graph, self.device, self.link, list(layers)
        device_s, server_s, joules = np.diff(device.head_s), -np.diff(self.server.tail_s), np.diff(device.head_j)
        on_device = len(layers) == len(graph.layers)
        head_s, tail_s = device_s[chosen].sum(), server_s.sum() - server_s[chosen].sum() + decode_s
        latency = throughput = self.slowdown * (head_s + encode_s)
        energy = joules[chosen].sum() + device.head_j[-1] / device.total_s * encode_s
        if not on_device:
            radio, answer_bytes = link.radio, sum(output.size_bytes for output in graph.outputs)
            up_s, down_s = 8 * size_bytes / link.uplink_bit_s, 8 * answer_bytes / link.downlink_bit_s
            latency += up_s + link.round_trip_s + down_s + self.load * tail_s
            throughput = max(throughput, up_s, self.load * tail_s, down_s)
            energy += up_s * (radio.up_w_per_bit_s * link.uplink_bit_s + radio.base_w)
            energy += down_s * (radio.down_w_per_bit_s * link.downlink_bit_s + radio.base_w)
            energy += radio.tail_s * radio.tail_w
        inputs = {spec.name for spec in graph.inputs}
        weights = sum(graph.layers[i].parameter_bytes for i in layers)
        return Way(
            layers,
            codec,
            on_device,
            raw_input=not on_device and any(spec.name in inputs for spec in point.tensors),
            memory_bytes=int(max((device.memory_bytes[i] for i in layers), default=0) + weights),
            latency=float(latency),
            energy=float(energy),
            throughput=float(throughput),
            server_time=float(tail_s),
        )
