"""A network of today: what it takes by each backend on a slow device and on this machine, and what may be done to it.

Each side may run its part by eager PyTorch, by ONNX Runtime, or by OpenVINO in bfloat16, and the boundary may cross as
it is, or compressed without loss; pictures also as PNG. EfficientNet-Lite0, whose weights are trained, may also change
some of its answers, by codecs that benchmarks.codec_rates has judged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import threading
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks import codec_rates, split_plane, zoo
from benchmarks.support import tail_process
from torchsurgeon.codec import Codec, CodecTable, find_codec, measure
from torchsurgeon.emulate import SlowDevice
from torchsurgeon.errors import CodecError
from torchsurgeon.link import PRESETS
from torchsurgeon.planning import Frontier, Row

SLOWER = 10.0
"""How many times as long the emulated device takes."""
LINKS = ("3g", "lte", "wifi")
BACKENDS = ("eager", "onnxruntime", "openvino:bf16")
FLOAT32, LOSSLESS = BACKENDS[:2], ("zstd", "png")
TRAINED, CURVES = "EfficientNet-Lite0", ("raw", "zstd", "int8+zstd", "int4+zstd")
"""The network with trained weights, and what may cross in between, besides every form of pictures."""
_BUDGET_S = 10.0


class _FirstToken(nn.Module):
    """What classifiers of texts take from BERT: the features of the first token, and not those of all."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, tokens: Tensor) -> Tensor:
        return self.bert(tokens).last_hidden_state[:, 0]  # type: ignore[no-any-return]


def network(name: str) -> zoo.Made:
    """Return a network and its example; pictures are a photograph, as a camera gives it."""
    from torchsurgeon.demo import photo

    if name == "AlexNet":
        return tail_process.seeded(lambda: zoo.classifier("alexnet")[0], 0), photo()
    model, example = zoo.make(name)
    if name == "BERT":
        model, tokens = zoo.make(name)
        return _FirstToken(model).eval(), tokens
    if name == "SSDlite":
        picture = nn.functional.interpolate(photo().float(), size=(320, 320)).round().to(torch.uint8)
        return zoo.named(("pixels", zoo.Pixels()), ("model", model)), picture
    return model, photo() if example.dtype == torch.uint8 else example


@contextmanager
def on_one_core() -> Iterator[int | None]:
    """Compute on one core and one thread without gradients in the block; yields the core that is left for a server."""
    threads, everywhere = torch.get_num_threads(), os.sched_getaffinity(0)
    own, other = tail_process.two_cores()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", ts.NoisyProfileWarning)
        warnings.simplefilter("ignore", ts.BackendWarning)
        torch.set_num_threads(1)
        try:
            if own is not None:
                os.sched_setaffinity(0, {own})
            yield other
        finally:
            torch.set_num_threads(threads)
            os.sched_setaffinity(0, everywhere)


class Mode(NamedTuple):
    """What may be done to a model: by which backends its parts may run, and how boundaries may cross."""

    backends: tuple[str, ...]
    codecs: CodecTable
    frontier: Frontier

    def allows(self, key: str, lossless: bool) -> bool:
        """Return whether a way is allowed, going by its backends, and by whether it crosses without loss."""
        where, *sides = key.split("|")
        return set(sides[:2] if where != "device" else sides) <= set(self.backends) and (lossless or where == "device")


class Study:
    """One network, with its profiles and with what may be done to it.

    Args:
        name: the network.
        repeats: how often each way is run.
        budget_s: how long each backend is measured.
        backends: by what its parts may run on the device.
        server: the server's profiles by backend; None where its backends take what they take here.
    """

    def __init__(
        self,
        name: str,
        repeats: int,
        budget_s: float = _BUDGET_S,
        *,
        backends: tuple[str, ...] = BACKENDS,
        server: dict[str, ts.LayerProfile] | None = None,
    ) -> None:
        self.name, self.repeats = name, repeats
        self.model, self.example = network(name)
        self.graph = ts.trace(self.model, self.example)
        eager = ts.profile(self.graph, repeats=20, meter=None)
        here = {"eager": eager}
        for backend in backends[1:]:
            here[backend] = ts.profile(self.graph, backend=backend, eager=eager, budget_s=budget_s, meter=None)
        self.server = here if server is None else server
        self.device = {backend: profile.scaled(SLOWER) for backend, profile in here.items()}
        lossless = _slowed(_lossless(self.graph, self.example))
        self.modes = {
            "float32": self._mode(FLOAT32, lossless),
            "bfloat16": self._mode(backends, lossless),
        }
        if name == TRAINED:
            for budget in (0.01, 0.03):
                self.modes[f"{budget:.0%} may change"] = self._mode(FLOAT32, _slowed(_judged(self.graph, budget)))
        self.answer_bytes = sum(spec.size_bytes for spec in self.graph.outputs)

    def _mode(self, backends: tuple[str, ...], codecs: CodecTable) -> Mode:
        device, server = ([side[one] for one in backends if one in side] for side in (self.device, self.server))
        return Mode(backends, codecs, Frontier.build(self.graph, device, server, codecs))

    def planned(self, link: str, devices: Iterable[str], servers: Iterable[str], codecs: CodecTable | None) -> ts.Plan:
        """Return where the planner cuts for a link, over backends of both sides and codecs."""
        return ts.plan(
            self.graph,
            device=[self.device[one] for one in devices],
            server=[self.server[one] for one in servers],
            link=PRESETS[link],
            codecs=codecs,
        )

    def foretold_s(self, row: Row, link: str) -> float:
        """Return what a row is foretold to take over a link, in seconds."""
        if row.on_device:
            return row.head_s
        crossing_s = PRESETS[link].request_s(row.size_bytes, self.answer_bytes)
        return row.head_s + row.encode_s + crossing_s + row.decode_s + row.tail_s


def way_of(row: Row) -> str:
    """Return a way in one text: where it is cut, what runs the parts, and how the boundary crosses."""
    if row.on_device:
        return f"device|{row.backend}"
    if row.index == 0 and row.layers is None:
        return f"server|eager|{row.server_backend}|{row.codec}"
    layers = "" if row.layers is None else f" {','.join(map(str, row.layers))}"
    return f"{row.name}{layers}|{row.backend}|{row.server_backend}|{row.codec}"


def _lossless(graph: ts.LayerGraph, example: Tensor) -> CodecTable:
    """Return what the codecs without loss make of every point."""
    names = [name for name in LOSSLESS if name != "png" or example.dtype == torch.uint8]
    return measure(graph, [example], names, points=list(range(len(graph.layers))))


def _judged(graph: ts.LayerGraph, budget: float) -> CodecTable:
    """Return the codecs that change at most such a share of the answers, as benchmarks.codec_rates has measured."""
    rows = json.loads(codec_rates.OUT.read_text())["results"]["lite0"]["rates"]
    runnable = [row for row in rows if (row["where"] == "input" or row["curve"] in CURVES) and _is_codec(row["name"])]
    return split_plane.codec_table(graph, runnable, "kept", 1.0, budget)


def _is_codec(name: str) -> bool:
    """Return whether a way to encode is a codec of the package, and not another setting of an encoder."""
    try:
        find_codec(name)
    except CodecError:
        return False
    return True


def _slowed(codecs: CodecTable) -> CodecTable:
    """Return what codecs take where the device is slower."""
    slower = (
        dataclasses.replace(row, cost=dataclasses.replace(row.cost, encode_s=SLOWER * row.cost.encode_s))
        for row in codecs.rows
    )
    return dataclasses.replace(codecs, rows=tuple(slower))


@contextmanager
def slow_codecs() -> Iterator[None]:
    """Have all codecs of this process take as long to encode as on the slow device, one after the other on its core."""
    device, encode, core = SlowDevice(SLOWER), Codec.encode, threading.RLock()

    @functools.wraps(encode)
    def slowly(*args: Any, **kwargs: Any) -> Any:
        with core:
            return device.call(encode, *args, **kwargs)

    with mock.patch.object(Codec, "encode", slowly):
        yield
