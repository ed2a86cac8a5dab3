"""README.md and docs/: the blocks of code on their pages, and how one is run alone, as a reader would run it."""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)
# One process imports these once and is forked for each block: nothing a block does reaches the next.
_PRELOADED = ["torch", "torchvision", "torchsurgeon.serve"]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page: its language, "" where none is named, and the line of its first line of text."""

    page: Path
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages that name one of ``languages``."""
    found = []
    for page in PAGES:
        text = page.read_text()
        for match in _FENCE.finditer(text):
            line = text.count("\n", 0, match.start("text")) + 1
            found.append(Block(page, line, match["language"], match["text"]))
    return [block for block in found if block.language in languages]


def commands(block: Block) -> list[list[str]]:
    """The words of each command of a block of shell commands, without comments; lines that end in a \\ go on."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def run(text: str, folder: Path, limit_s: float) -> tuple[int | None, str]:
    """Run a Python program alone in ``folder``: its exit status, None when it took too long, and what it printed."""
    program, printed = folder / "block.py", folder / "printed.txt"
    program.write_text(text)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    process = context.Process(target=_run, args=(program, printed))
    process.start()
    try:
        process.join(limit_s)
        status = process.exitcode
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.join()
        process.close()
    return status, printed.read_text()


def _run(program: Path, printed: Path) -> None:
    import torch

    import torchsurgeon

    # On a busy machine, threads that wait for each other take many times as long as one.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)

    assert Path(torchsurgeon.__file__).is_relative_to(ROOT), "another copy of torchsurgeon: set PYTHONPATH"
    with open(printed, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    os.chdir(program.parent)
    runpy.run_path(str(program), run_name="__main__")


def spans() -> Iterator[tuple[Path, str]]:
    """The code spans in the running text of all pages."""
    for page in PAGES:
        text = _FENCE.sub("", page.read_text())
        for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", text):
            yield page, match[1]
