"""The paper's 48 configurations: eight applications, three links, and the Tegra K1's CPU and GPU before the K40.

For each configuration this package's planner chooses a cut for latency and another for the device's energy: first at
the costs that the authors measured, then at costs that our predictors say. Every choice is then charged at the measured
costs, and compared with the best of all cuts there are, which is found here by adding up, without the planner.

- A picture crosses as bytes, one for each value of a pixel; the authors' files count four. Making floats of them costs
  nothing here, since the authors did not time it.
- Links are those of the paper: uplink rates, no round trip and no time for the answer.
- Energy is the device's power while it computes, and its radio's while it sends, as the links' presets have it, without
  the 11.6 s that an LTE radio stays awake afterwards. ``VARIANTS`` has the other ways to count.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import torchsurgeon as ts
from benchmarks import zoo
from benchmarks.evaluate import devices
from benchmarks.evaluate.applications import APPLICATIONS, FILE, PEAKS, PICTURE_BYTES, POWER_W
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.prediction import Predictor
from torchsurgeon.prediction.roofline import Roofline
from torchsurgeon.profiling import LayerEnergy, LayerProfile
from torchsurgeon.tracing.graph import LayerGraph

Array = NDArray[np.float64]
LINKS = ("3g", "lte", "wifi")
PROCESSORS = ("cpu", "gpu")
GOALS = ("latency", "energy")
MEASURED = "measured"
HELD_OUT = "predicted, application held out"
SHIPPED = "predicted by the reference devices"
BOUNDS = "bounds from data sheets"
WAYS = (MEASURED, SHIPPED, HELD_OUT, BOUNDS)
DATA_SHEETS = {"cpu": (73.6e9, 14.9e9), **PEAKS}
"""Of the Tegra K1's CPU and GPU and the Tesla K40: floating-point operations and bytes per second, from data sheets."""
_CALL_S = 1e-5
PUBLISHED = {
    "latency_mean": 3.1,
    "latency_most": 40.7,
    "energy_saved_mean": 0.595,
    "energy_saved_most": 0.947,
    "share_of_optimal": 0.985,
}
"""What Kang et al., Neurosurgeon (ASPLOS 2017), report for their 48 configurations."""
# So fast that the answer takes no time that counts.
_DOWNLINK_BIT_S = 1e12


def paper_link(name: str) -> Link:
    """Return a preset as the paper counts links: no round trip, no time or energy for the answer, no tail."""
    preset = PRESETS[name]
    assert preset.radio is not None
    radio = dataclasses.replace(preset.radio, down_w_per_bit_s=0.0, tail_s=0.0)
    return dataclasses.replace(preset, downlink_bit_s=_DOWNLINK_BIT_S, round_trip_s=0.0, radio=radio)


def with_tail(name: str) -> Link:
    """Return a link as the paper counts it, with the time that the preset's radio stays awake."""
    link, radio = paper_link(name), PRESETS[name].radio
    assert link.radio is not None
    assert radio is not None
    return dataclasses.replace(link, radio=dataclasses.replace(link.radio, tail_s=radio.tail_s))


def with_round_trip(name: str) -> Link:
    """Return a link as the paper counts it, with the preset's round trip."""
    return dataclasses.replace(paper_link(name), round_trip_s=PRESETS[name].round_trip_s)


AS_ABOVE, BY_SWEEPS = "as above", "a GPU's total spread over its layers as the sweeps predict them"
VARIANTS: Mapping[str, tuple[Callable[[str], Link], bool]] = {
    AS_ABOVE: (paper_link, True),
    BY_SWEEPS: (paper_link, True),
    "pictures sent as float32, as in the authors' files": (paper_link, False),
    "with the round trip of each link": (with_round_trip, True),
    "with the 11.6 s that an LTE radio stays awake": (with_tail, True),
}
"""Ways to count: the links, and whether pictures cross as bytes."""


@dataclasses.dataclass(frozen=True)
class Application:
    """One of the paper's applications, with what the authors measured of it.

    Attributes:
        name: its name.
        layers: the authors' names of its layers.
        sizes_bytes: bytes of its input, of what each of its layers hands on, shape (layers + 1,).
        seconds: by "cpu", "gpu" and "server", the seconds of each layer.
        power_w: by "cpu" and "gpu", the device's power while it computes.
    """

    name: str
    layers: tuple[str, ...]
    sizes_bytes: Array
    seconds: dict[str, Array]
    power_w: dict[str, float]

    @staticmethod
    def read(name: str, *, as_bytes: bool = True) -> Application:
        """Return an application from the file of figures in this folder.

        Args:
            name: its name.
            as_bytes: whether its picture crosses as bytes.
        """
        data = json.loads(FILE.read_text())["applications"][name]
        sizes = np.array(data["sizes_bytes"], dtype=np.float64)
        if as_bytes:
            sizes[0] = PICTURE_BYTES.get(name, sizes[0])
        seconds = {where: np.array(data[f"{where}_s"]) for where in (*PROCESSORS, "server")}
        power = {where: devices.with_mean(POWER_W[where])[name] for where in PROCESSORS}
        return Application(name, tuple(data["layers"]), sizes, seconds, power)

    def costs(self, processor: str, link: Link) -> dict[str, Array]:
        """Return the latency in seconds and the energy in joules of every cut, each of shape (layers + 1,).

        The first cut leaves all to the server, the last one nothing.
        """
        assert link.radio is not None
        head_s = np.concatenate([[0.0], np.cumsum(self.seconds[processor])])
        tail_s = np.concatenate([np.cumsum(self.seconds["server"][::-1])[::-1], [0.0]])
        sends = np.arange(len(head_s)) < len(self.layers)
        send_s = np.where(sends, self.sizes_bytes * 8 / link.uplink_bit_s, 0.0)
        radio_j = send_s * link.radio.sending_w(link.uplink_bit_s) + sends * link.radio.tail_j
        return {
            "latency": head_s + np.where(sends, send_s + link.round_trip_s + tail_s, 0.0),
            "energy": head_s * self.power_w[processor] + radio_j,
        }


def profile(graph: LayerGraph, application: Application, where: str, seconds: Mapping[str, float]) -> LayerProfile:
    """Return a profile of a traced application from the seconds of the authors' layers; other layers cost nothing.

    Args:
        graph: the traced application.
        application: the application.
        where: "cpu", "gpu" or "server".
        seconds: the seconds of each of the authors' layers.
    """
    at = timed_layers(graph, application)
    own = np.zeros(len(graph.layers))
    for name, value in seconds.items():
        own[at[name]] = value
    energy = None
    if where in application.power_w:
        joules = own * application.power_w[where]
        whole = float(joules.sum())
        energy = LayerEnergy("the authors'", 0.0, joules, np.stack([joules, joules], axis=1), (whole, whole, whole))
    names = tuple(layer.name for layer in graph.layers)
    origin = {"device": where, "measured_by": devices.SOURCE}
    return LayerProfile(
        application.name, graph.fingerprint, graph.batch, names, own[None], own.sum()[None], origin, energy=energy
    )


def timed_layers(graph: LayerGraph, application: Application) -> dict[str, int]:
    """Return for each of the authors' layers the index of the traced layer that does its work."""
    found: dict[str, int] = {}
    for layer in graph.layers:
        root, _, rest = layer.name.partition(".")
        if root in application.layers and rest in ("", "bmm", "argmax"):
            found[root] = layer.index
    return found


def predicted(predictor: Predictor, graph: LayerGraph, application: Application) -> dict[str, float]:
    """Return what a predictor says of the authors' layers of an application, in seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ts.PredictionWarning)
        layer_s = predictor.predict(graph).layer_s.tolist()
    found = dict.fromkeys(application.layers, 0.0)
    for layer, seconds in zip(graph.layers, layer_s, strict=True):
        root = layer.name.partition(".")[0]
        if root in found:
            found[root] += seconds
    return found


def run(names: Iterable[str] = APPLICATIONS, told: Callable[[str], None] = lambda what: None) -> dict[str, Any]:
    """Return what every configuration costs in every way, and what the planner's choices cost in each.

    Args:
        names: the applications.
        told: takes what has been done, a line for each application.
    """
    found: dict[str, Any] = {"configurations": [], "layers": {}}
    for name in names:
        application = Application.read(name)
        graph = ts.trace(*zoo.make(name))
        ways = seconds_by_way(graph, application)
        found["layers"][name] = {
            way: {where: [float(f"{value:.5g}") for value in seconds.values()] for where, seconds in own.items()}
            for way, own in ways.items()
        }
        for processor in PROCESSORS:
            for link in LINKS:
                found["configurations"].append(configuration(graph, application, processor, link, ways))
        told(f"{name}: six configurations planned in {len(ways)} ways")
    return found


def seconds_by_way(graph: LayerGraph, application: Application) -> dict[str, dict[str, dict[str, float]]]:
    """Return by way and by "cpu", "gpu" and "server" the seconds of the authors' layers."""
    measured = {
        where: dict(zip(application.layers, own.tolist(), strict=True)) for where, own in application.seconds.items()
    }
    names = {"cpu": "tegra-k1-cpu", "gpu": "tegra-k1-gpu", "server": "k40-gpu"}
    ways: dict[str, dict[str, dict[str, float]]] = {way: {} for way in WAYS}
    ways[MEASURED] = measured
    for where, name in names.items():
        flop_s, byte_s = DATA_SHEETS[where]
        bound = Predictor({"device": f"{name} by its data sheet"}, {}, {}, Roofline(flop_s, byte_s, _CALL_S))
        ways[BOUNDS][where] = predicted(bound, graph, application)
        ways[HELD_OUT][where] = predicted(devices.held_out(name, application.name), graph, application)
        ways[SHIPPED][where] = predicted(ts.reference_device(name), graph, application)
    return ways


def configuration(
    graph: LayerGraph,
    application: Application,
    processor: str,
    link_name: str,
    ways: Mapping[str, Mapping[str, Mapping[str, float]]],
) -> dict[str, Any]:
    """Return what one configuration costs: all on the server, all on the device, at best, and as chosen in each way."""
    link = paper_link(link_name)
    costs = application.costs(processor, link)
    at = timed_layers(graph, application)
    row: dict[str, Any] = {"application": application.name, "device": processor, "link": link_name}
    for goal in GOALS:
        own = costs[goal]
        best = int(own.argmin())
        row[goal] = {
            "server_only": float(own[0]),
            "device_only": float(own[-1]),
            "best": float(own[best]),
            "best_cut": cut_name(application, best),
            "chosen": {},
        }
        for way, seconds in ways.items():
            device = profile(graph, application, processor, seconds[processor])
            server = profile(graph, application, "server", seconds["server"])
            plan = ts.plan(graph, device=device, server=server, link=link, objective=goal)
            cut = sum(index < plan.point.index for index in at.values())
            row[goal]["chosen"][way] = {"cut": cut_name(application, cut), "costs": float(own[cut])}
    return row


def cut_name(application: Application, cut: int) -> str:
    """Return how tables call a cut: "server", "device", or the last layer on the device."""
    if cut == 0:
        return "server"
    return "device" if cut == len(application.layers) else application.layers[cut - 1]


def summary(rows: Iterable[Mapping[str, Any]], way: str) -> dict[str, float]:
    """Return what the choices made in one way gain over all on the server, and how near they come to the best.

    Args:
        rows: configurations of ``run()``.
        way: one of ``WAYS``.
    """
    rows = list(rows)
    found: dict[str, float] = {"configurations": len(rows)}
    for goal in GOALS:
        own = [row[goal] for row in rows]
        regret = [part["chosen"][way]["costs"] / part["best"] for part in own]
        found[f"{goal}_optimal"] = sum(value <= 1 + 1e-9 for value in regret)
        found[f"{goal}_regret_mean"], found[f"{goal}_regret_most"] = statistics.fmean(regret), max(regret)
        gains = [part["server_only"] / part["chosen"][way]["costs"] for part in own]
        most = [part["server_only"] / part["best"] for part in own]
        found[f"{goal}_share_of_optimal"] = statistics.fmean(a / b for a, b in zip(gains, most, strict=True))
        if goal == "latency":
            found["latency_mean"], found["latency_most"] = statistics.fmean(gains), max(gains)
            found["latency_geometric_mean"] = math.exp(statistics.fmean(map(math.log, gains)))
        else:
            saved = [1 - 1 / gain for gain in gains]
            found["energy_saved_mean"], found["energy_saved_most"] = statistics.fmean(saved), max(saved)
            all_j = sum(part["server_only"] for part in own)
            found["energy_saved_in_all"] = 1 - sum(part["chosen"][way]["costs"] for part in own) / all_j
    return found


def variants(layers: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> dict[str, dict[str, float]]:
    """Return by way to count what the best of all cuts gain at measured costs, language apart and with it.

    Args:
        layers: by application, way and machine the seconds of each layer, as ``run()`` returns them.
    """
    found = {}
    for variant, (link_of, as_bytes) in VARIANTS.items():
        gains: dict[str, list[float]] = {goal: [] for goal in GOALS}
        languages = [name for name in layers if name in zoo.LANGUAGE]
        ordered = [*(name for name in layers if name not in zoo.LANGUAGE), *languages]
        for name in ordered:
            application = Application.read(name, as_bytes=as_bytes)
            if variant == BY_SWEEPS:
                application = respread(application, layers[name][SHIPPED])
            for processor in PROCESSORS:
                for link in LINKS:
                    for goal, own in application.costs(processor, link_of(link)).items():
                        gains[goal].append(float(own[0] / own.min()))
        saved = [1 - 1 / gain for gain in gains["energy"]]
        apart = len(PROCESSORS) * len(LINKS) * (len(ordered) - len(languages))
        found[variant] = {
            "latency_mean": statistics.fmean(gains["latency"][:apart]),
            "latency_most": max(gains["latency"][:apart]),
            "energy_saved_mean": statistics.fmean(saved[:apart]),
            "energy_saved_mean_of_all": statistics.fmean(saved),
        }
    return found


def respread(application: Application, by: Mapping[str, list[float]]) -> Application:
    """Return an application with its totals on the GPUs spread over the layers in other shares.

    Args:
        application: the application.
        by: by machine the seconds that a layer's share is in proportion to.
    """
    seconds = dict(application.seconds)
    for where in ("gpu", "server"):
        share = np.array(by[where])
        seconds[where] = seconds[where].sum() * share / share.sum()
    return dataclasses.replace(application, seconds=seconds)
