"""Text, tables and figures as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence


def cut(name: str) -> str:
    return name if name in ("server", "device") else f"`{name}`"


def picture(name: str, what: str) -> str:
    return f"![{what}](../benchmarks/results/evaluation/{name})"


def times(value: float) -> str:
    return f"{value:.0f}×" if value >= 100 else f"{value:.1f}×"


def percent(value: float, digits: int = 1) -> str:
    return f"{100 * value:.{digits}f} %".replace(".0 %", " %")


def listed(words: Sequence[str]) -> str:
    """Return words as one lists them in a sentence."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def text(text: str) -> str:
    """Return a paragraph in lines of the usual width; links are not torn apart."""
    words = textwrap.dedent(text).strip().split()
    return textwrap.fill(" ".join(words), 120, break_long_words=False, break_on_hyphens=False)


def table(heads: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rows = [heads, ["---"] * len(heads), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)
