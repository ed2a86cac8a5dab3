"""docs/evaluation.md, from the files in benchmarks/results/evaluation. No number on the page is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import zoo
from benchmarks.device import split
from benchmarks.evaluate import adaptation_page, alternatives_page, end_to_end_page, page_sections, pictures
from benchmarks.evaluate.configurations import (
    BOUNDS,
    GOALS,
    HELD_OUT,
    MEASURED,
    PUBLISHED,
    SHIPPED,
    WAYS,
    summary,
)
from benchmarks.evaluate.markdown import cut, percent, picture, table, text, times
from benchmarks.support.result_file import RESULTS

FOLDER = RESULTS / "evaluation"
PAGE = RESULTS.parents[1] / "docs" / "evaluation.md"
CONFIGURATIONS, TODAY, DATACENTER = "configurations.json", "today.json", "datacenter.json"
GOALS_SET = {
    "latency_mean": 4.6,
    "energy_saved_mean": 0.65,
    "share_of_optimal": 0.995,
    "regret_most": 1.02,
}
"""What this project set out to reach."""


def page(folder: Path = FOLDER) -> str:
    """Return the page, as Markdown.

    Args:
        folder: where the files of results are.
    """
    found = read(folder, CONFIGURATIONS)
    results, machine = found["results"], found["environment"]["device"]
    rows = results["configurations"]
    parts = [
        OPENING,
        "## The networks",
        page_sections.networks(results["networks"], results["lenet_right"]),
        "## Beside the published figures",
        _published(rows),
        picture(pictures.GAINS, "For each configuration, how many times faster and more sparing the best cut is"),
        "## How near the choices come to the best",
        _nearness(rows),
        "## What was aimed at",
        _goals(rows),
        "## All configurations",
        page_sections.configurations(rows),
        "## Other ways to count",
        page_sections.variants(results["variants"]),
        "## AlexNet, layer by layer",
        page_sections.alexnet(),
        "## Networks of today",
        page_sections.networks_of_today(read(folder, TODAY)["results"], machine),
        "## Servers and devices by the thousand",
        page_sections.datacenter(folder / DATACENTER),
        "## End to end",
        end_to_end_page.section(folder),
        "### A server with a GPU",
        split.section(),
        "## While link and load change",
        adaptation_page.section(),
        "## Beside the alternatives",
        alternatives_page.section(folder),
    ]
    return "\n\n".join(parts) + "\n"


def read(folder: Path, name: str) -> Any:
    """Return what a file of results holds."""
    return json.loads((folder / name).read_text())


OPENING = """# Evaluation

The experiments of [Kang et al., Neurosurgeon](https://doi.org/10.1145/3037697.3037698) (ASPLOS 2017), done again with
this package's planner and predictors on what the paper's authors measured, beside the figures that they published; and
the same questions asked of networks of today.

```bash
make evaluate        # most of this page, within an hour; what it leaves as recorded is said where it stands
make evaluate-quick  # a part of it, within five minutes, into build/evaluation/
```

Both run from a clean clone. The authors' files are not part of this repository, and are not needed: what is used of
them stands in the project's own formats, in `benchmarks/evaluate/applications.json` (layers of the eight applications)
and in four [reference devices](prediction.md#reference-devices). Whoever has a copy of the files (public repository
`claritylab/djinn`, branch `mobile`, folder `graph-gen/offloading`) writes both anew with `make evaluate
DJINN=DIRECTORY`.

Where numbers come from is said with each:

- **measured**: by the paper's authors in 2015, or by this project on the machine that is named. Of a GPU the authors'
  files give only the total of a network in a way that can be believed; it is spread over the layers by flops and bytes.
- **predicted**: by this package, without running the network on that machine.
- **emulated**: measured on one machine and multiplied by the factor that is named.
- **simulated**: queries that arrive and are served in a model of servers, at measured costs.
- **published**: printed in the paper."""


def _published(rows: Sequence[Mapping[str, Any]]) -> str:
    every, apart = summary(rows, MEASURED), summary(without_language(rows), MEASURED)
    near = [percent(summary(own, HELD_OUT)["latency_share_of_optimal"], 2) for own in (rows, without_language(rows))]
    return "\n\n".join(
        [
            text(
                """
                Eight applications, three links (3G, LTE, Wi-Fi), and the Tegra K1's CPU and GPU as the device make 48
                configurations. The status quo runs all of a network on the server's Tesla K40. “Ours” is the cut that
                `plan()` chooses at measured costs. What is gained is the ratio of the status quo's latency or energy to
                ours. The energy is the device's: its measured power while it computes, and its radio's while it sends,
                by the model of Huang et al. (MobiSys 2012) that the presets of `torchsurgeon.link` hold. The authors
                give no power for LeNet (dig); the mean of the others stands in.
                """
            ),
            table(
                ("", "published", f"ours, all {int(every['configurations'])}", "ours, vision and speech"),
                [
                    (what, form(PUBLISHED[name]), *(form(own[name]) for own in (every, apart)))
                    for what, name, form in (
                        ("times faster, mean (measured)", "latency_mean", times),
                        ("times faster, at most (measured)", "latency_most", times),
                        ("device's energy saved, mean (measured)", "energy_saved_mean", percent),
                        ("device's energy saved, at most (measured)", "energy_saved_most", percent),
                    )
                ]
                + [
                    (
                        "share of the optimal speed-up (predicted costs)",
                        percent(PUBLISHED["share_of_optimal"]),
                        *near,
                    )
                ],
            ),
            text(
                """
                The applications of language (pos, ner, chk) are apart since they take a millisecond in the authors'
                files, which hold no fixed cost of a request; with any such cost their gains are smaller, and the mean
                over all is mostly theirs. The paper does not say in which form pictures are sent. Here they are sent as
                bytes, which makes the status quo four times as fast to send as the floats in the authors' files, and
                brings the largest gain near the published one; [other ways to count](#other-ways-to-count) shows the
                rest.
                """
            ),
        ]
    )


def _nearness(rows: Sequence[Mapping[str, Any]]) -> str:
    lines = []
    for way in WAYS:
        own = summary(rows, way)
        count = own["configurations"]
        lines += [
            (
                f"{way}, for {goal}",
                f"{own[f'{goal}_optimal']} of {count}",
                percent(own[f"{goal}_share_of_optimal"], 2),
                f"{own[f'{goal}_regret_mean']:.3f}",
                f"{own[f'{goal}_regret_most']:.3f}",
            )
            for goal in GOALS
        ]
    return "\n\n".join(
        [
            text(
                f"""
                A choice is charged at measured costs, whatever it was made from. The best is found by adding up every
                cut, without the planner. *{SHIPPED[0].upper()}{SHIPPED[1:]}*: by `tegra-k1-cpu`, `tegra-k1-gpu` and
                `k40-gpu` as they come with the package, which have seen these networks' layers beside the authors'
                sweeps. *{HELD_OUT[0].upper()}{HELD_OUT[1:]}*: by the same devices fitted without any time of the
                application in question. *{BOUNDS[0].upper()}{BOUNDS[1:]}*: from peak rates alone, which `plan()`
                refuses. A regret of 1.02 means that the choice takes 2 % longer than the best.
                """
            ),
            table(("costs", "best cut chosen", "share of the optimal gain", "mean regret", "worst regret"), lines),
            _misses(rows),
        ]
    )


def _misses(rows: Sequence[Mapping[str, Any]]) -> str:
    found = [
        f"{row['application']} on the {row['device'].upper()} over {pictures.LINK_NAMES[row['link']]} "
        f"({cut(chosen['cut'])} instead of {cut(row['latency']['best_cut'])}, "
        f"{chosen['costs'] / row['latency']['best']:.2f})"
        for row in rows
        for chosen in [row["latency"]["chosen"][HELD_OUT]]
        if chosen["costs"] > row["latency"]["best"] * (1 + 1e-9)
    ]
    if not found:
        return text("With the application held out every choice is the best for latency.")
    return text(f"Missed for latency with the application held out, with the regret: {'; '.join(found)}.")


def _goals(rows: Sequence[Mapping[str, Any]]) -> str:
    measured, apart = summary(rows, MEASURED), summary(without_language(rows), MEASURED)
    shipped, held = summary(rows, SHIPPED), summary(rows, HELD_OUT)
    count = int(measured["configurations"])

    def line(what: str, aim: str, got: str, reached: bool) -> tuple[str, ...]:
        return what, aim, got, "reached" if reached else "missed"

    aims = GOALS_SET
    lines = [
        line(
            "best cuts at measured costs, latency",
            f"{count} of {count}",
            f"{measured['latency_optimal']} of {count}",
            measured["latency_optimal"] == count,
        ),
        line(
            "the same, energy",
            f"{count} of {count}",
            f"{measured['energy_optimal']} of {count}",
            measured["energy_optimal"] == count,
        ),
    ]
    for name, own in (("reference devices", shipped), ("application held out", held)):
        share, regret = own["latency_share_of_optimal"], own["latency_regret_most"]
        lines.append(
            line(
                f"share of the optimal speed-up, {name}",
                f"≥ {percent(aims['share_of_optimal'])}",
                percent(share, 2),
                share >= aims["share_of_optimal"],
            )
        )
        lines.append(
            line(f"worst regret, {name}", f"≤ {aims['regret_most']}", f"{regret:.3f}", regret <= aims["regret_most"])
        )
    lines.append(
        line(
            "times faster in the mean, vision and speech",
            f"≥ {aims['latency_mean']}×",
            f"{apart['latency_mean']:.2f}×",
            apart["latency_mean"] >= aims["latency_mean"],
        )
    )
    lines.append(
        line(
            "device's energy saved in the mean, all",
            f"≥ {percent(aims['energy_saved_mean'])}",
            percent(measured["energy_saved_mean"]),
            measured["energy_saved_mean"] >= aims["energy_saved_mean"],
        )
    )
    return "\n\n".join(
        [
            table(("what", "aim", "here", ""), lines),
            text(
                """
                With the application held out, AlexNet's normalization is predicted from no layer of its kind, and
                LeNet's layers from much larger pictures. What is gained is that of the best cuts there are, so no
                planner could gain more at these costs. The speed-up depends on how a GPU's total is spread over the
                layers: the authors timed layers without waiting for the GPU, and if these times were taken as they
                stand, AlexNet's convolutions would seem to cost next to nothing. What energy is saved is decided by the
                radio and by the form in which pictures are sent.
                """
            ),
        ]
    )


def without_language(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the configurations of vision and speech."""
    return [row for row in rows if row["application"] not in zoo.LANGUAGE]
