"""The section of docs/evaluation.md about uplinks and loads that change, from the studies in benchmarks.runtime."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.evaluate.markdown import listed, percent, picture, table, text
from benchmarks.support.result_file import RESULTS
from torchsurgeon.report.pictures import BLUE, ORANGE, RED, new_figure, save_figure

SIMULATED, LOAD, TRACES = "adapting.json", "runtime_load.json", "runtime_trace*.json"
LOAD_PICTURE = "load.png"
WAYS = {"adaptive": "ours", "server": "all on the server", "device": "all on the device"}
STATUS_QUO_S, STATUS_QUO_LOADED_S, NEUROSURGEON_LOADED_S = 0.105, 0.753, 0.380
"""Published: what a query takes on an idle server, at the highest load, and what Neurosurgeon keeps it below."""
STALL_S = 1.0
"""An uplink that carries nothing for longer than this stalls."""
AIM, AIM_WITH_STALLS = 1.05, 1.15
"""What was aimed at, as ratios to the latency of an oracle that knows the uplink's future."""


def section() -> str:
    """Return the section's text and tables."""
    simulated = _read(SIMULATED)["results"]["gains"]
    load = _read(LOAD)
    return "\n\n".join(
        [
            text(
                f"""
                **Uplinks, run.** AlexNet behind an emulated link that replays an uplink; device, link and server are
                processes of this machine ({load["environment"]["device"]}), and the device is paced so that the whole
                network takes 0.4 s on it. The oracle knows the uplink's future and takes what is the quickest over it.
                Means over time, and in brackets 95th percentiles, in milliseconds (`benchmarks.runtime.trace`).
                """
            ),
            table(("uplink", "Mbit/s", "oracle", *WAYS.values()), _run()),
            text(
                f"""
                **Uplinks, simulated.** The same question of whole recordings, of which the table above replays the
                first seconds, by `benchmarks.runtime.adapting`, as ratios to the oracle's mean latency. The rival,
                *averages*, has all that ours has, with moving averages in place of its estimates. Aimed at are
                {AIM} at most, and {AIM_WITH_STALLS} over uplinks that stall for longer than a second:
                {_reached(simulated)}.
                """
            ),
            table(
                ("uplink", "Mbit/s", "longest stall, s", "ours", "averages", *list(WAYS.values())[1:], ""),
                _recordings(simulated),
            ),
            text(
                f"""
                **A server under load** ({_name(LOAD)}, `benchmarks.runtime.load`). ResNet-50 over Wi-Fi; the device
                takes {load["results"]["device_s"] * 1e3:.0f} ms for the whole network, the server
                {load["results"]["server_s"] * 1e3:.0f} ms. Another process asks the server for whole inferences until
                these alone keep it busy for the share that is shown; three ways take turns. In the paper's experiment
                the status quo rises from {1e3 * STATUS_QUO_S:.0f} to {1e3 * STATUS_QUO_LOADED_S:.0f} ms (published),
                and Neurosurgeon stays below {1e3 * NEUROSURGEON_LOADED_S:.0f} ms, which is
                {STATUS_QUO_LOADED_S / NEUROSURGEON_LOADED_S:.1f} times less. {_loaded(load["results"]["steps"])}
                """
            ),
            picture(LOAD_PICTURE, "Mean latency of the three ways while the server's load rises and falls"),
        ]
    )


def draw(folder: Path) -> None:
    """Draw the load experiment into a folder."""
    steps = _read(LOAD)["results"]["steps"]
    figure = new_figure(8, 3.6)
    panel = figure.subplots()
    for (way, name), color in zip(WAYS.items(), (BLUE, ORANGE, RED), strict=True):
        panel.plot([1e3 * step[way]["mean_s"] for step in steps], "o-", color=color, label=name)
        panel.fill_between(
            range(len(steps)),
            [1e3 * step[way]["q1_s"] for step in steps],
            [1e3 * step[way]["q3_s"] for step in steps],
            color=color,
            alpha=0.15,
            linewidth=0,
        )
    panel.set_xticks(range(len(steps)), [percent(step["load"]) for step in steps])
    panel.set_xlabel("load of the server by others, one step after the other")
    panel.set_ylabel("ms: mean, and middle half")
    panel.set_ylim(0)
    panel.legend(frameon=False)
    panel.spines[["top", "right"]].set_visible(False)
    save_figure(figure, folder / LOAD_PICTURE)


def _run() -> Iterator[tuple[str, ...]]:
    for path in sorted(RESULTS.glob(TRACES)):
        results = json.loads(path.read_text())["results"]
        ways = results["ways"]
        yield (
            f"[{results['trace'].removeprefix('a ')}](../benchmarks/results/{path.name})",
            f"{results['mean_bit_s'] / 1e6:.1f}",
            *(f"{1e3 * ways[way]['mean_s']:.0f} ({1e3 * ways[way]['p95_s']:.0f})" for way in ("oracle", *WAYS)),
        )


def _recordings(gains: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    for name, row in gains.items():
        yield (
            name,
            f"{row['mean_bit_s'] / 1e6:.2f}",
            f"{row['longest_stall_s']:.1f}",
            *(f"{_ratio(row, way):.3f}" for way in ("adaptive", "averages", "server", "device")),
            "reached" if _ratio(row, "adaptive") <= _aim(row) else "missed",
        )


def _reached(gains: Mapping[str, Any]) -> str:
    within = sum(_ratio(row, "adaptive") <= _aim(row) for row in gains.values())
    better = sum(_ratio(row, "adaptive") <= _ratio(row, "averages") for row in gains.values())
    return f"{within} of {len(gains)} are within, and ours is at least as good as averages over {better}"


def _aim(row: Mapping[str, Any]) -> float:
    return AIM_WITH_STALLS if row["longest_stall_s"] > STALL_S else AIM


def _ratio(row: Mapping[str, Any], way: str) -> float:
    return float(row["ways"][way]["mean_s"] / row["ways"]["oracle"]["mean_s"])


def _loaded(steps: list[Mapping[str, Any]]) -> str:
    idle, most = steps[0], max(steps, key=lambda step: float(step["load"]))
    ours_s, server_s = most["adaptive"]["mean_s"], most["server"]["mean_s"]
    before = steps[1 : steps.index(most)]
    rising = listed(
        [f"{one['adaptive']['mean_s'] / one['server']['mean_s']:.2f} (at {percent(one['load'])})" for one in before]
    )
    counts = [step["adaptive"]["inferences"] for step in steps]
    ratio = f"{server_s / ours_s:.1f}"
    here = f"{most['adaptive']['on_the_device']} of {most['adaptive']['inferences']}"
    return (
        f"Here the server alone rises from {1e3 * idle['server']['mean_s']:.0f} to {1e3 * server_s:.0f} ms at "
        f"{percent(most['load'])}, and ours to {1e3 * ours_s:.0f} ms, {ratio} times less, since it runs {here} "
        f"inferences on the device. While the load rises, ours takes {rising} times as long as the server alone. These "
        f"are means of {min(counts)} to {max(counts)} inferences a step, whose waits differ widely."
    )


def _name(file: str) -> str:
    return f"[{file}](../benchmarks/results/{file})"


def _read(file: str) -> Any:
    return json.loads((RESULTS / file).read_text())
