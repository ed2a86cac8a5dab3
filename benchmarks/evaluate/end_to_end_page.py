"""The section of docs/evaluation.md that shows what benchmarks.evaluate.end_to_end has run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evaluate import end_to_end, pictures
from benchmarks.evaluate.markdown import cut, listed, percent, table, text, times
from benchmarks.evaluate.study import SLOWER

GOAL_SHARE = 0.985
"""The share of the best possible that the paper reports, and that is aimed at."""
_SHORT = {"eager": "eager", "onnxruntime": "ORT", "openvino:bf16": "bf16"}


class Case(NamedTuple):
    """One network over one link, with every way that was run and is allowed.

    Attributes:
        network: the network.
        link: the link's name.
        mode: what may be done: ``"float32"``, ``"bfloat16"``, or how many answers may change.
        ways: what each way took, by its key.
        chosen: the key of the way that the planner chose.
    """

    network: str
    link: str
    mode: str
    ways: Mapping[str, Mapping[str, Any]]
    chosen: str

    @property
    def taken_s(self) -> float:
        """What the planner's choice took."""
        return float(self.ways[self.chosen]["measured_s"])

    @property
    def best_s(self) -> float:
        """What the best way took of all that were run."""
        return min(float(way["measured_s"]) for way in self.ways.values())

    def end_s(self, end: str) -> float:
        """Return what the best way of an end took: ``"device"`` or ``"server"``."""
        return min(float(way["measured_s"]) for way in self.ways.values() if way["cut"] == end)

    @property
    def gain(self) -> float:
        """How many times as fast the planner's choice is as the better end."""
        return min(self.end_s("device"), self.end_s("server")) / self.taken_s


def cases(results: Mapping[str, Any]) -> Iterator[Case]:
    """Yield every network over every link, with everything that may be done.

    On a processor that does not compute in bfloat16, that mode is float32 once more, and is left out.
    """
    for network, own in results.items():
        for link, row in own["links"].items():
            for mode, found in row["modes"].items():
                if mode == "bfloat16" and not own.get("bfloat16", True):
                    continue
                ways = {key: row["ways"][key] for key in found["ways"] if _as_named(key, row["ways"][key])}
                yield Case(network, link, mode, ways, found["chosen"])


def _as_named(key: str, way: Mapping[str, Any]) -> bool:
    """Return whether the head of a way ran by the backend in its key, so that it was slowed down.

    Rows from before that was asserted say by what it ran, and a few ran by another.
    """
    ran_by = way.get("ran_by")
    return ran_by is None or ran_by == key.split("|")[1]


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return what all cases together show. Means of ratios are geometric."""
    every = list(cases(results))
    ways = {(case.network, case.link, key): way for case in every for key, way in case.ways.items()}
    errors = [abs(way["foretold_s"] / way["measured_s"] - 1) for way in ways.values()]
    # A way that is chosen in two modes has been run once.
    between = {
        (case.network, case.link, case.chosen): case.gain
        for case in every
        if case.ways[case.chosen]["cut"] not in ("server", "device")
    }
    return {
        "cases": len(every),
        "ways": len(errors),
        "share": statistics.geometric_mean(case.best_s / case.taken_s for case in every),
        "regret_most": max(case.taken_s / case.best_s - 1 for case in every),
        "error_median": statistics.median(errors),
        "gain": statistics.geometric_mean(case.gain for case in every),
        "between": sorted(between.values(), reverse=True),
        "over_device": statistics.geometric_mean(case.end_s("device") / case.taken_s for case in every),
        "over_server": statistics.geometric_mean(case.end_s("server") / case.taken_s for case in every),
    }


def splits(gains: Sequence[float]) -> str:
    """Return in a sentence how many choices are splits, and how many times as fast as the better end each one is."""
    if not gains:
        return "No choice is a split."
    each = listed([f"{gain:.2f}×" for gain in gains])
    if len(gains) == 1:
        return f"One choice is a split, which is {each} as fast as the better end."
    return (
        f"{len(gains)} choices are splits, which are {each} as fast as the better end; one that two tables share counts"
        " once."
    )


def section(folder: Path) -> str:
    """Return the section's text and tables; one sentence where nothing has been run.

    Args:
        folder: where the files of results are.
    """
    path = folder / end_to_end.OUT.name
    if not path.exists():
        return "Nothing is recorded here yet: `python -m benchmarks.evaluate.end_to_end` runs it."
    read = json.loads(path.read_text())
    results, machine = read["results"], read["environment"]["device"]
    found = summary(results)
    parts = [
        text(
            f"""
            Measured and emulated: a device, a link and a server that really run, on {machine}. The device is a process
            on one core, on which backends and codecs take {SLOWER:g} times as long; the server is another
            process on the other core, and the link is emulated. Each side runs its part by eager PyTorch, ONNX Runtime
            (ORT) or OpenVINO in bfloat16 (bf16). “Device” and “server” are everything there, on the quickest backend
            and with the photograph in the quickest form that the heading of the table allows. “Ours” is the way that
            `plan()` chooses from profiles, before anything is run. The gain is how many times as fast that is as the
            better of both ends. The best is the quickest of all ways that were run: both ends, what the planner chooses
            for each pair of backends, and up to six ways that are foretold to take at most 1.5 times as long as the one
            that is foretold to be the quickest.
            """
        ),
        text(
            f"""
            Over all {found["cases"]} cases below, ours reaches {percent(found["share"], 2)} of the best speed-up
            (aimed at: {percent(GOAL_SHARE)}), and takes at most {percent(found["regret_most"])} longer than the best.
            What a way takes from end to end was foretold with a median error of {percent(found["error_median"])}, over
            {found["ways"]} ways. Ours is {times(found["over_device"])} as fast as the device alone on its best backend,
            {times(found["over_server"])} as fast as the server alone, and {found["gain"]:.3f}× as fast as the better of
            both, which one does not know beforehand (geometric means over all cases). {splits(found["between"])} All
            others are one of both ends. Where ours is an end, a gain other than 1 means
            that another form of that end turned out quicker or slower than was foretold.
            """
        ),
        *without_bfloat16(results),
        *_left(results),
    ]
    for mode, heading, words in MODES:
        own = [case for case in cases(results) if (case.mode == mode if mode else "change" in case.mode)]
        if own:
            parts += [f"### {heading}", text(words), _table(own, with_mode=not mode)]
    return "\n\n".join([*parts, "### Each pair of backends", _pairs(results)])


MODES = (
    (
        "float32",
        "Answers the same to rounding",
        "Eager PyTorch and ONNX Runtime, both in float32. What crosses keeps its bits: as it is, zstd, or PNG.",
    ),
    (
        "bfloat16",
        "In bfloat16, too",
        """
        The same, and OpenVINO in bfloat16, which rounds more coarsely:
        [how many answers that changes](backends.md#backends-that-round-coarsely).
        """,
    ),
    (
        "",
        "Where some answers may change",
        """
        EfficientNet-Lite0 with its trained weights, in float32, with codecs and pictures that kept so many answers of
        photographs held out ([which](codecs.md)). Not among them are students, since those that have been trained here
        keep [little more than half of the answers](codecs.md#a-student-in-place-of-the-first-layers), and codecs fitted
        to a cut, of which [the bytes](codecs.md#bytes-against-answers) are known, but not what a split with them takes.
        """,
    ),
)
"""What may be done, with the heading of its table and the words above it; the last is for all budgets together."""


def without_bfloat16(results: Mapping[str, Any]) -> list[str]:
    """Say of which networks OpenVINO has computed in float32, where there are any."""
    names = [name for name, found in results.items() if not found.get("bfloat16", True)]
    if not names:
        return []
    return [
        text(
            f"""
            {listed(names)} ran on a processor that does not compute in bfloat16. OpenVINO computes in float32 there, so
            what is called bf16 is float32 in their rows.
            """
        )
    ]


def _left(results: Mapping[str, Any]) -> list[str]:
    """Say what the evaluation leaves as it is recorded, where that is shown."""
    slow = [name for name in end_to_end.SLOW if name in results]
    if not slow:
        return []
    minutes = sum(results[name]["seconds"] for name in slow) / 60
    return [
        text(
            f"""
            `make evaluate` leaves {len(slow)} of the networks as they are recorded, since they take {minutes:.0f}
            minutes: `python -m benchmarks.evaluate.end_to_end --networks {" ".join(slow)}` runs them anew.
            """
        )
    ]


def _table(cases: Sequence[Case], *, with_mode: bool) -> str:
    heads = ("network", "link", "device, ms", "server, ms", "ours, ms", "where ours cuts", "gain", "share of the best")
    lines = [_line(case) for case in cases]
    if with_mode:
        heads = ("answers", *heads[1:])
        lines = [(case.mode, *line[1:]) for case, line in zip(cases, lines, strict=True)]
    return table(heads, lines)


def _line(case: Case) -> tuple[str, ...]:
    return (
        case.network,
        pictures.LINK_NAMES[case.link],
        _ms(case.end_s("device")),
        _ms(case.end_s("server")),
        _ms(case.taken_s),
        way_in_words(case.chosen),
        f"{case.gain:.2f}×",
        percent(case.best_s / case.taken_s),
    )


def way_in_words(way: str) -> str:
    """Return where a way is cut, what runs its parts, and how the boundary crosses, from its key."""
    where, *sides = way.split("|")
    if where == "device":
        return f"device, {_SHORT[sides[0]]}"
    if where == "server":
        return f"server, {_SHORT[sides[1]]}, {sides[2]}"
    return ", ".join((cut(where.partition(" ")[0]), _SHORT[sides[0]], _SHORT[sides[1]], sides[2]))


def _pairs(results: Mapping[str, Any]) -> str:
    words = text(
        """
        What the planner's choice for a pair of backends takes, in milliseconds: the device's backend, then the
        server's. The last column is the device alone on its best backend, which a split has to beat.
        """
    )
    lines = []
    heads: tuple[str, ...] = ()
    for network, own in results.items():
        for link, row in own["links"].items():
            heads = tuple(f"{_SHORT[pair['device']]}, {_SHORT[pair['server']]}" for pair in row["pairs"])
            taken = (_ms(row["ways"][pair["chosen"]]["measured_s"]) for pair in row["pairs"])
            alone = min(way["measured_s"] for way in row["ways"].values() if way["cut"] == "device")
            lines.append((network, pictures.LINK_NAMES[link], *taken, _ms(alone)))
    return f"{words}\n\n{table(('network', 'link', *heads, 'device'), lines)}"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"
