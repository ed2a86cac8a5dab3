"""Where a benchmark's results are written, with what they were taken on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torchsurgeon.profiling import provenance

RESULTS = Path(__file__).parent.parent / "results"
SUITES = RESULTS / "suites"
"""What ``pytest benchmarks/test_NAME.py --benchmark-json`` wrote, as NAME.json."""


def write(out: Path, results: Any, **more: Any) -> None:
    """Write ``results`` beside what a profile says of its origin, and ``more`` facts (other packages' versions)."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"environment": provenance() | more, "results": results}, indent=1) + "\n")
    print(f"written to {out}", flush=True)


def known(out: Path) -> dict[str, Any]:
    """Return the results in a file that ``write()`` has written; empty where there is no such file."""
    found: dict[str, Any] = json.loads(out.read_text())["results"] if out.exists() else {}
    return found


def show(page: Path, begin: str, end: str, text: str) -> None:
    """Put text between two marks of a page, as ``shown()`` finds it."""
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n{text}\n{end}{rest.partition(end)[2]}")


def shown(page: Path, begin: str, end: str) -> str:
    """Return the text between two marks of a page."""
    return page.read_text().partition(begin)[2].partition(end)[0][2:-1]


def suite(name: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a suite's file by group and rival; empty where there is no such file."""
    path = SUITES / f"{name}.json"
    groups: dict[str, dict[str, Any]] = {}
    for row in json.loads(path.read_text())["benchmarks"] if path.exists() else ():
        groups.setdefault(row["group"], {})[row["name"]] = row
    return groups
