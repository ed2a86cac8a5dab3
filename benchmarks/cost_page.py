"""Writes what a call and an exchange cost into docs/runtime.md and docs/architecture.md, from what two suites measured.

pytest benchmarks/test_split_module.py -k sending --benchmark-json benchmarks/results/suites/split_module.json
pytest benchmarks/test_wire.py -k "150 and not bytes" --benchmark-json benchmarks/results/suites/wire.json
python -m benchmarks.cost_page
"""

from __future__ import annotations

from typing import Any

from benchmarks.support import result_file

DOCS = result_file.RESULTS.parents[1] / "docs"
CALLS, EXCHANGES = DOCS / "runtime.md", DOCS / "architecture.md"
BEGIN, END = "<!-- figures, by benchmarks.cost_page -->", "<!-- end of figures, by benchmarks.cost_page -->"


def main() -> None:
    result_file.show(CALLS, BEGIN, END, calls(result_file.suite("split_module")))
    result_file.show(EXCHANGES, BEGIN, END, exchanges(result_file.suite("wire")))


def calls(groups: dict[str, dict[str, Any]]) -> str:
    """Return the table of what a SplitModule adds to an inference of a tiny model, as Markdown."""
    return _table(("way", "an inference", "ratio", "added"), groups, "tiny model", added=True)


def exchanges(groups: dict[str, dict[str, Any]]) -> str:
    """Return the table of what 150 KB up and 4 KB down take, as Markdown."""
    return _table(("way", "an exchange", "ratio"), groups, "150 KB", added=False)


def _table(head: tuple[str, ...], groups: dict[str, dict[str, Any]], which: str, *, added: bool) -> str:
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for group, rivals in groups.items():
        if which not in group:
            continue
        for name, row in rivals.items():
            ratio, facts = row["extra_info"]["ratio"], [f"{group}: {name}", f"{row['stats']['median'] * 1e6:.0f} µs"]
            facts.append(f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})")
            if added:
                facts.append(f"{row['extra_info']['added_s']['median'] * 1e6:+.0f} µs")
            lines.append(f"| {' | '.join(facts)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
