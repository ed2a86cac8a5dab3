"""Writes how long a choice among many codecs and rates takes into docs/planning.md, from what the suite measured.

pytest benchmarks/test_planning.py -k choosing_a_rate --benchmark-json benchmarks/results/suites/choosing_a_rate.json
python -m benchmarks.planning_page
"""

from __future__ import annotations

from typing import Any

from benchmarks.support import result_file

PAGE = result_file.RESULTS.parents[1] / "docs" / "planning.md"
BEGIN, END = "<!-- figures, by benchmarks.planning_page -->", "<!-- end of figures, by benchmarks.planning_page -->"
_GROUP = "choosing among many codecs and rates, "
_RIVALS = ("adding up, NumPy", "torchsurgeon", "torchsurgeon, for throughput")


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(result_file.suite('choosing_a_rate'))}\n{END}{rest.partition(END)[2]}")


def table(groups: dict[str, dict[str, Any]]) -> str:
    """Return the table for the page, as Markdown."""
    columns = ("model", "cuts with a codec and rate", "in the frontier", "adding all of them up, in NumPy")
    columns += ("`best`, latency", "`best`, throughput")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for group, found in groups.items():
        if not group.startswith(_GROUP):
            continue
        facts = found["torchsurgeon"]["extra_info"]
        times = [f"{found[name]['stats']['median'] * 1e6:.1f} µs" for name in _RIVALS]
        counts = [f"{facts[name]:,}" for name in ("points_and_codecs", "frontier")]
        lines.append("| " + " | ".join([group.removeprefix(_GROUP), *counts, *times]) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
