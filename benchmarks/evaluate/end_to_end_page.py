"""The section of docs/evaluation.md that shows what benchmarks.evaluate.end_to_end has run."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.evaluate import end_to_end, pictures
from benchmarks.evaluate.markdown import cut, percent, table, text, times

GOAL_SHARE = 0.985
"""The share of the best possible that the paper reports, and that is aimed at."""
_SHORT = {"eager": "eager", "onnxruntime": "ORT", "openvino:bf16": "bf16"}


class Case(NamedTuple):
    """One network over one link, with every way that was run.

    Attributes:
        network: the network.
        link: the link's name.
        ways: what each way took, by its key.
        chosen: the key of the way that the planner chose.
        pairs: the ways that it chose for each pair of backends.
    """

    network: str
    link: str
    ways: Mapping[str, Mapping[str, Any]]
    chosen: str
    pairs: list[Mapping[str, str]]

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

    def eager_s(self, end: str) -> float:
        """Return what an end took in eager PyTorch."""
        return min(
            float(way["measured_s"])
            for key, way in self.ways.items()
            if way["cut"] == end and set(key.split("|")[1 : 2 if end == "device" else 3]) == {"eager"}
        )


def cases(results: Mapping[str, Any]) -> Iterator[Case]:
    """Yield every network over every link."""
    for network, own in results.items():
        for link, row in own["links"].items():
            yield Case(network, link, {way["way"]: way for way in row["ways"]}, row["chosen"], row["pairs"])


def summary(results: Mapping[str, Any]) -> dict[str, float]:
    """Return what all cases together show."""
    every = list(cases(results))
    errors = [abs(way["foretold_s"] / way["measured_s"] - 1) for case in every for way in case.ways.values()]
    return {
        "cases": len(every),
        "ways": len(errors),
        "share": statistics.mean(case.best_s / case.taken_s for case in every),
        "regret_most": max(case.taken_s / case.best_s - 1 for case in every),
        "error_median": statistics.median(errors),
        "split": sum(case.ways[case.chosen]["cut"] not in ("server", "device") for case in every),
        "gain_mean": statistics.mean(min(map(case.end_s, ("device", "server"))) / case.taken_s for case in every),
        "gain_most": max(min(map(case.end_s, ("device", "server"))) / case.taken_s for case in every),
    }


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
    return "\n\n".join(
        [
            text(
                f"""
                Measured and emulated: a device, a link and a server that really run, on {machine}. The device is a
                process on one core, on which backends take {end_to_end.SLOWER:g} times as long; the server is another
                process on the other core, and the link is emulated. Each side runs its part by eager PyTorch, ONNX
                Runtime (ORT) or OpenVINO in bfloat16 (bf16), and what crosses keeps its bits, as it is or compressed
                (zstd, PNG). “Device” and “server” are the quickest backend there, with the photograph in its smallest
                form. “Ours” is the way that `plan()` chooses, from profiles, before anything is run. The best is the
                quickest of all ways that were run: both ends, what the planner chooses for each pair of backends, and
                up to eight ways that are foretold to come within half as long again as the best.
                """
            ),
            table(
                ("network", "link", "device, ms", "server, ms", "ours, ms", "where ours cuts", "gain", "best, of ours"),
                [_line(case) for case in cases(results)],
            ),
            text(
                f"""
                Over all {found["cases"]:g} cases, ours reaches {percent(found["share"], 2)} of the best speed-up (aimed
                at: {percent(GOAL_SHARE)}), and takes at most {percent(found["regret_most"])} longer than the best. What
                a way takes from end to end was foretold with a median error of {percent(found["error_median"])}, over
                {found["ways"]:g} ways. In {found["split"]:g} cases the model is cut in between. Beside the better of
                both ends, ours is {found["gain_mean"]:.2f}× as fast in the mean, and {times(found["gain_most"])} at
                most. Where ours is an end, the gain is 1, or what two runs of the same way differ by.
                """
            ),
            "### Each pair of backends",
            text(
                """
                What the planner's choice for a pair takes, in milliseconds: the device's backend, then the server's.
                The last column is the device alone on its best backend, which a split has to beat.
                """
            ),
            table(
                (
                    "network",
                    "link",
                    *(f"{_SHORT[one['device']]}, {_SHORT[one['server']]}" for one in next(cases(results)).pairs),
                    "device",
                ),
                [
                    (
                        case.network,
                        pictures.LINK_NAMES[case.link],
                        *(_ms(case.ways[pair["chosen"]]["measured_s"]) for pair in case.pairs),
                        _ms(case.end_s("device")),
                    )
                    for case in cases(results)
                ],
            ),
        ]
    )


def _line(case: Case) -> tuple[str, ...]:
    way = case.ways[case.chosen]
    parts = case.chosen.split("|")
    if way["cut"] == "device":
        where = f"device, {_SHORT[parts[1]]}"
    else:
        sides = _SHORT[parts[2]] if way["cut"] == "server" else f"{_SHORT[parts[1]]}, {_SHORT[parts[2]]}"
        where = f"{cut(way['cut'])}, {sides}, {parts[3]}"
    gain = min(case.end_s("device"), case.end_s("server")) / case.taken_s
    return (
        case.network,
        pictures.LINK_NAMES[case.link],
        _ms(case.end_s("device")),
        _ms(case.end_s("server")),
        _ms(case.taken_s),
        where,
        f"{gain:.2f}×",
        percent(case.best_s / case.taken_s),
    )


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}"
