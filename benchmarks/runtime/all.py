"""Take all figures about the runtime, and write them into docs/runtime.md from the files they are kept in.

About ten minutes on a machine with two cores and nothing else to do; each recorded uplink takes three more.

    python -m benchmarks.runtime.all [--traces FILE …]
    python -m benchmarks.runtime.all --page        # only write the page
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS, SUITES, suite

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "runtime.md"
BEGIN, END = "<!-- figures, by benchmarks.runtime.all -->", "<!-- end of figures -->"
STUDIES = ("trace", "load", "faults", "soak")
SHOWN = ("streams",)
STREAM_WAYS = ("map", "4 threads", "one by one")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, nargs="*", default=[], metavar="FILE", help="recorded uplinks")
    parser.add_argument("--page", action="store_true", help="run nothing")
    options = parser.parse_args()
    failed = []
    for module, *arguments in [] if options.page else commands(options.traces):
        print(f"\n== {module} {' '.join(arguments)}", flush=True)
        if subprocess.run([sys.executable, "-m", module, *arguments], cwd=ROOT, check=False).returncode:
            failed.append(" ".join([module, *arguments]))
    text = PAGE.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{page()}\n{END}{after}")
    sys.exit(f"these say that something is not as it should be: {', '.join(failed)}" if failed else 0)


def commands(traces: list[Path]) -> list[list[str]]:
    SUITES.mkdir(exist_ok=True)
    found = [[f"benchmarks.runtime.{study}"] for study in STUDIES]
    found += [
        ["pytest", f"benchmarks/test_{name}.py", "--benchmark-json", str(SUITES / f"{name}.json")] for name in SHOWN
    ]
    for trace in traces:
        out = RESULTS / f"runtime_trace_{trace.stem}.json"
        found.append(["benchmarks.runtime.trace", "--trace", str(trace.resolve()), "--out", str(out)])
    return found


def page() -> str:
    """The tables, as Markdown, of whatever results there are."""
    parts = [traces()]
    for name, table in {"runtime_load": load, "runtime_faults": faults}.items():
        path = RESULTS / f"{name}.json"
        if path.exists():
            parts.append(table(json.loads(path.read_text())["results"]))
    parts.append(streams(suite("streams")))
    path = RESULTS / "soak.json"
    if path.exists():
        parts.append(soak(json.loads(path.read_text())["results"]))
    return "\n".join(part for part in parts if part)


def rows(head: list[str], lines: list[list[str]]) -> str:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ruler, *lines)) + "\n"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms"


def traces() -> str:
    lines = []
    for path in sorted(RESULTS.glob("runtime_trace*.json")):
        found = json.loads(path.read_text())["results"]
        ways = found["ways"]
        lines.append(
            [
                found["trace"],
                f"{found['mean_bit_s'] / 1e6:.2f}",
                *(ms(ways[way]["mean_s"]) for way in ("adaptive", "server", "device", "oracle")),
                f"{ways['adaptive']['ratio_to_oracle']:.2f}",
                f"{ways['adaptive']['ratio_to_better_fixed']:.2f}",
            ]
        )
    head = ["uplink", "Mbit/s", "adaptive", "all on server", "all on device", "oracle", "× oracle", "× better fixed"]
    return "**A varying uplink** (mean latency).\n\n" + rows(head, lines) if lines else ""


def load(found: dict[str, Any]) -> str:
    lines = [
        [
            f"{step['load']:.0%}",
            *(f"{ms(step[way]['mean_s'])}, {ms(step[way]['p95_s'])}" for way in ("adaptive", "server", "device")),
            f"{step['adaptive']['on_the_device']} of {step['adaptive']['inferences']}",
        ]
        for step in found["steps"]
    ]
    head = ["server's load", "adaptive", "all on server", "all on device", "adaptive on the device"]
    return "**A loaded server** (mean and 95th percentile).\n\n" + rows(head, lines)


def faults(found: dict[str, Any]) -> str:
    lines = [
        [
            kind,
            str(row["injected"]),
            ms(row["latency"]["median_s"]),
            ms(row["latest_s"]),
            f"{row['back_latest_s']:.2f} s",
            ", ".join(f"{count} {why}" for why, count in row["degraded"].items()),
        ]
        for kind, row in found["kinds"].items()
    ]
    head = ["fault", "times", "median", "latest", "back after at most", "why, or who answered"]
    struck_s = max(row["latest_s"] for row in found["kinds"].values())
    whose = ", in a call that met no fault" if found["latest_s"] > struck_s else ""
    return (
        f"**{found['faults']} faults in {found['inferences']:,} inferences**: {found['lost']} lost, {found['wrong']} "
        f"wrong, {found['late']} later than the deadline of {ms(found['deadline_s'])} plus 10 %, the latest after "
        f"{ms(found['latest_s'])}{whose}; {found['back_late']} returns to the server took more than 2 s.\n\n"
    ) + rows(head, lines)


def streams(found: dict[str, dict[str, Any]]) -> str:
    lines = []
    for group, rivals in found.items():
        facts = [rivals[name]["extra_info"] for name in STREAM_WAYS]
        rates = [f"{fact['answers_a_s']:.2f}" for fact in facts]
        link = group.split(", ")[-1]
        lines.append([link, facts[0]["cut"], *rates, facts[0]["slowest"], f"{facts[0]['of_the_bound']:.2f}"])
    head = ["link", "cut after", *STREAM_WAYS, "slowest stage", "`map` of 1/(slowest stage)"]
    return (
        "**A clip of frames** (answers a second, with the time until the first).\n\n" + rows(head, lines)
        if lines
        else ""
    )


def soak(found: dict[str, Any]) -> str:
    lines = [
        [
            f"{where}, {name.replace('_', ' ')}",
            f"{entry['first']:,}",
            f"{entry['last']:,}",
            f"{entry['each']:+.3f}",
        ]
        for where, row in found.items()
        for name, entry in row["growth"].items()
    ]
    count = sum(row["inferences"] for row in found.values())
    return f"**{count:,} inferences.**\n\n" + rows(["", "after a tenth", "at the end", "an inference"], lines)


if __name__ == "__main__":
    main()
