"""A hook of mkdocs: puts a file of results into a page, so that the page's script can read it without a network.

A page opened from a folder may not fetch files beside it. A line of the page says which file, under which name:
``<!-- data: benchmarks/results/NAME.json as ID -->``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = re.compile(r"<!-- data: (?P<path>\S+\.json) as (?P<id>[\w-]+) -->")


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Replace each mark by the results in its file."""
    return MARK.sub(_script, html)


def _script(mark: re.Match[str]) -> str:
    results = json.loads((ROOT / mark["path"]).read_text())["results"]
    text = json.dumps(results, separators=(",", ":")).replace("</", "<\\/")
    return f'<script type="application/json" id="{mark["id"]}">{text}</script>'
