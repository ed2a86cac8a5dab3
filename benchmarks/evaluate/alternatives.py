"""torchsurgeon beside what a user would pick instead, in one run on the same emulated links and the same slow device.

The device is this process, on one core, where all that is computed for an answer takes ten times as long: layers,
encoding, and the choice of a cut. The server is on the other core, where there are two. Each rival's bytes cross an
emulated link of the same rates. All of them take turns in random order, over all links, and every answer is compared
with eager PyTorch's.

    python -m benchmarks.evaluate.alternatives                        # results/evaluation/alternatives.json
    python -m benchmarks.evaluate.alternatives --networks AlexNet     # this one anew
    python -m benchmarks.evaluate.alternatives --streams              # only the streams; latencies stay as recorded
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import random
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from benchmarks.evaluate.end_to_end import Runs
from benchmarks.evaluate.rivals import device_only, ours, server_only, serving, sockets
from benchmarks.evaluate.rivals.pipelining import Pipelining
from benchmarks.evaluate.rivals.rival import UNDER_WAY, Rival, seconds
from benchmarks.evaluate.study import LINKS, SLOWER, Study, on_one_core, slow_codecs
from benchmarks.support import result_file, tail_process
from torchsurgeon.backends import deviation
from torchsurgeon.backends.openvino import computes_bfloat16
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS
from torchsurgeon.profiling import provenance

OUT = result_file.RESULTS / "evaluation" / "alternatives.json"
NETWORKS = ("MobileNetV3", "AlexNet", "ResNet-50")
QUICK, SLOW = ("MobileNetV3",), ("ResNet-50",)
"""What the quick evaluation runs; and what takes ten minutes, so that ``make evaluate`` leaves its rows as they are."""
_PACKAGES = (
    "torch",
    "torchvision",
    "onnxruntime",
    "openvino",
    "scipy",
    "starlette",
    "uvicorn",
    "requests",
    "pillow",
    "zstandard",
)
_ROUNDS, _STREAMS, _PROFILE_S = 5, 3, 5.0
STREAM_FRAMES = 12
_OF_STREAMS = ("frames_s", "frames_low_s", "frames_high_s", "frames", "stream_cut")
ON_DEVICE = "device"
"""Stands for a link where everything runs on the device."""
_LONG_S, _LONG_ROUNDS = 1.0, 3
"""A call that takes longer than this is run in fewer rounds, since a longer one varies less."""
_LONG_STREAM_S = 6.0
"""Streams of one rival over one link are repeated for so long."""
_STREAM_S, _MOST_FRAMES = 2.0, 60
"""A quick stream has so many frames as come in so long, and at most so many."""
TOLERANCE = 0.05
"""How far an answer may be from eager PyTorch's, as a share of its largest value; bfloat16 comes nearest to it."""


def run(
    names: Iterable[str] = NETWORKS,
    links: Sequence[str] = LINKS,
    *,
    rounds: int = _ROUNDS,
    told: Callable[[str], None] = lambda what: None,
) -> dict[str, Any]:
    """Return by network what every rival takes over every link.

    Args:
        names: the networks.
        links: presets of links.
        rounds: how often each rival is run.
        told: takes what has been done, a line for each network.
    """
    found = {}
    for name in names:
        begun_s = time.monotonic()
        with _contest(name, links, rounds) as contest:
            found[name] = contest.run(rounds)
            found[name] |= {"bfloat16": computes_bfloat16(), "environment": provenance()}
        found[name]["seconds"] = round(time.monotonic() - begun_s)
        told(f"{name}: run beside the alternatives, {found[name]['seconds']} s")
    return found


def stream(name: str, links: Sequence[str], earlier: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of a network, with its rivals' streams measured anew.

    Args:
        name: the network.
        links: presets of links.
        earlier: what ``run()`` has returned for it.
    """
    with _contest(name, links, 1) as contest:
        rows, environment = contest.run(0)["rivals"], provenance()
    rivals = {
        one: {link: known | rows.get(one, {}).get(link, {}) for link, known in of.items()}
        for one, of in earlier["rivals"].items()
    }
    return {**earlier, "rivals": rivals, "streams_environment": environment}


@contextmanager
def _contest(name: str, links: Sequence[str], rounds: int) -> Iterator[_Contest]:
    """All rivals for a network, with their servers on the other core."""
    with on_one_core() as other, ExitStack() as stack:
        study = Study(name, rounds, _PROFILE_S)
        stack.enter_context(slow_codecs())
        yield _Contest(study, _rivals(study, other, stack), links)


def versions() -> dict[str, str]:
    """Return the versions of what the rivals rest on."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def _rivals(study: Study, core: int | None, stack: ExitStack) -> list[Rival]:
    """Return all rivals for a network, with their servers on a core."""
    device = SlowDevice(SLOWER)
    served = stack.enter_context(tail_process.apart(serving.serve, study.name, core))
    local = list(device_only.all_of(study.model, study.example, study.graph, device))
    ports = served.recv()
    emulator = stack.enter_context(LinkEmulator(0, "127.0.0.1", ports["torchsurgeon"], PRESETS["wifi"]))
    runs = Runs(study, f"http://127.0.0.1:{emulator.port}", served, stack)
    return [
        ours.Ours(study, runs, emulator, SLOWER),
        sockets.Search(study, ports["tails"], device, stack),
        sockets.OneWay(study, ports["tails"], device, stack),
        ours.PerRequest(study, runs, emulator, device),
        Pipelining(study, core, device, stack),
        *(server_only.OnServer(form, ports[form], study.example, device, stack) for form in server_only.FORMS),
        *local,
    ]


class _Contest:
    """Rounds of all rivals over all links, for one network."""

    def __init__(self, study: Study, rivals: Sequence[Rival], links: Sequence[str]) -> None:
        self._rivals, self._links = rivals, links
        self._expected: Tensor = study.model(study.example)
        self._taken_s: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._sent_bytes: dict[tuple[str, str], list[int]] = defaultdict(list)
        self._facts: dict[tuple[str, str], dict[str, Any]] = defaultdict(dict)

    def run(self, rounds: int) -> dict[str, Any]:
        """Return what every rival takes over every link; without rounds, only its streams."""
        random.seed(0)
        for number in range(-1, rounds):
            for link in random.sample(self._links, len(self._links)):
                for rival in random.sample(self._rivals, len(self._rivals)):
                    self._call(rival, link, number)
        for link in self._links:
            for rival in random.sample(self._rivals, len(self._rivals)):
                if rival.streams:
                    self._stream(rival, link)
        if not rounds:
            streamed = [rival.name for rival in self._rivals if rival.streams]
            return {"rivals": {one: {link: self._of_stream(one, link) for link in self._links} for one in streamed}}
        return {
            "rivals": {
                rival.name: {link: self._row(rival, link) for link in self._links_of(rival)} for rival in self._rivals
            }
        }

    def _links_of(self, rival: Rival) -> Sequence[str]:
        """Return the links over which a rival is measured; what stays on the device is measured once."""
        return self._links if rival.emulators else (ON_DEVICE,)

    def _call(self, rival: Rival, link: str, number: int) -> None:
        """Run a rival once; round -1 prepares it, and compares its answer."""
        if not rival.emulators and link != self._links[0]:
            return
        key = (rival.name, link if rival.emulators else ON_DEVICE)
        taken_s = self._taken_s[key]
        if len(taken_s) >= _LONG_ROUNDS and taken_s[0] > _LONG_S:
            return
        rival.use(PRESETS[link])
        if number >= 0:
            before = rival.sent_bytes()
            taken_s.append(seconds(rival.infer))
            self._sent_bytes[key].append(rival.sent_bytes() - before)
            return
        far = deviation(rival.infer(), self._expected)
        assert not rival.lossless or far <= TOLERANCE, f"{rival.name} gives another answer, {far:g} away"
        self._facts[key] |= {
            "lossless": rival.lossless,
            "deviation": float(f"{far:.2g}"),
            "cut": rival.chosen(),
            "replanning_s": rival.replanning_s(),
        }

    def _stream(self, rival: Rival, link: str) -> None:
        """Run streams of a rival that has several inferences under way at once."""
        rival.use(PRESETS[link])
        rival.before_stream(STREAM_FRAMES)
        rates: list[float] = []
        begun_s = time.monotonic()
        rates.append(rival.rate(STREAM_FRAMES))
        count = min(2 * UNDER_WAY + math.ceil(_STREAM_S * rates[0]), _MOST_FRAMES)
        if rival.of_any_length and count > STREAM_FRAMES:
            # Answers that share a link come in bunches, so a longer stream tells more.
            rates.clear()
        else:
            count = STREAM_FRAMES
        while len(rates) < _STREAMS and time.monotonic() - begun_s < _LONG_STREAM_S:
            rates.append(rival.rate(count))
        self._facts[rival.name, link] |= {
            "frames_s": round(statistics.median(rates), 4),
            "frames_low_s": round(min(rates), 4),
            "frames_high_s": round(max(rates), 4),
            "frames": count,
            "stream_cut": rival.chosen(),
        }

    def _of_stream(self, name: str, link: str) -> dict[str, Any]:
        return {key: value for key, value in self._facts[name, link].items() if key in _OF_STREAMS}

    def _row(self, rival: Rival, link: str) -> dict[str, Any]:
        taken_s = self._taken_s[rival.name, link]
        low, median, high = statistics.quantiles(taken_s, n=4)
        return {
            "latency_s": round(median, 6),
            "low_s": round(low, 6),
            "high_s": round(high, 6),
            "runs": len(taken_s),
            "sent_bytes": round(statistics.median(self._sent_bytes[rival.name, link])),
            # Where nothing overlaps, a stream is one call after the other.
            "frames_s": round(1 / median, 4),
            **self._facts[rival.name, link],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument("--links", nargs="+", choices=LINKS, default=LINKS)
    parser.add_argument("--rounds", type=int, default=_ROUNDS)
    parser.add_argument("--streams", action="store_true", help="only the streams anew; latencies stay as recorded")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = result_file.known(options.out)
    for name in options.networks:
        if options.streams:
            found[name] = stream(name, options.links, found[name])
        else:
            found |= run([name], options.links, rounds=options.rounds, told=lambda what: print(what, flush=True))
        result_file.write(options.out, {one: found[one] for one in NETWORKS if one in found}, packages=versions())


if __name__ == "__main__":
    main()
