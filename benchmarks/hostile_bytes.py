"""A coverage-guided fuzzer (atheris) against everything that reads bytes of strangers.

The targets stand in ``tests/support/fuzz_targets.py``: the decoders of requests and answers, and a whole connection to
a server, with the parser of heads, the way past ASGI, and the application. Each runs in a process of its own, beginning
from the corpus in ``tests/fixtures/fuzz`` and from valid messages. Afterwards the corpus is reduced to the texts that
reach something no smaller one reaches, and is written back. ``tests/wire/test_fuzz_corpus.py`` replays it.

    pip install atheris
    python -m benchmarks.hostile_bytes [--seconds 60] [--target NAME]

Printed and written are, for each target, how many texts were tried, how many branches were reached, and how many texts
the corpus has. A text for which a target raises ends the run; the text is written beside the corpus as ``crash-…``.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.support.result_file import RESULTS, known, write

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "support"))
OUT = RESULTS / "hostile_bytes.json"
NAMES = ("request", "response", "connection")
MAX_BYTES = 2048


def fuzz(target: str, arguments: list[str]) -> None:
    """Be the fuzzer's process. The first argument is the program by which it starts itself again."""
    import atheris

    with atheris.instrument_imports(include=["torchsurgeon.wire", "torchsurgeon.serve", "torchsurgeon.codec"]):
        import fuzz_targets
    logging.disable(logging.CRITICAL)
    # What is imported at the first use takes longer than any text may.
    for data in fuzz_targets.seeds(target):
        fuzz_targets.TARGETS[target](data)
    atheris.Setup(arguments, fuzz_targets.TARGETS[target])
    atheris.Fuzz()


def run(target: str, seconds: int) -> dict[str, Any]:
    """Fuzz a target for some seconds, reduce its corpus, and return what was found."""
    import fuzz_targets

    with tempfile.TemporaryDirectory() as folder:
        grown, small = Path(folder) / "grown", Path(folder) / "small"
        grown.mkdir()
        small.mkdir()
        for data in (*fuzz_targets.seeds(target), *fuzz_targets.lines_of(target)):
            (grown / hashlib.sha256(data).hexdigest()).write_bytes(data)
        before = len(list(grown.iterdir()))
        command = str(Path(folder) / "fuzzer")
        inside = shlex.join([sys.executable, "-m", "benchmarks.hostile_bytes", "--inside", target, "--", command])
        Path(command).write_text(f'#!/bin/sh\nexec {inside} "$@"\n')
        Path(command).chmod(0o700)
        limits = [f"-max_len={MAX_BYTES}", "-timeout=60", "-rss_limit_mb=4096", f"-artifact_prefix={ROOT}/"]
        log = _run([command, *limits, f"-max_total_time={seconds}", "-print_final_stats=1", str(grown)])
        tried = int(re.findall(r"stat::number_of_executed_units: +(\d+)", log)[-1])
        covered = int(re.findall(r"cov: (\d+)", log)[-1])
        _run([command, *limits, "-merge=1", str(small), str(grown)])
        kept = [path.read_bytes() for path in small.iterdir()]
    fuzz_targets.write_lines(target, kept)
    row = {"tried": tried, "seconds": seconds, "branches": covered, "began_with": before, "corpus": len(kept)}
    print(f"{target:11} {tried:9,} texts in {seconds} s, {covered} branches, {len(kept)} texts kept", flush=True)
    return row


def _run(command: list[str]) -> str:
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise SystemExit(ended.stderr[-6000:])
    return ended.stderr


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--target", action="append", choices=NAMES, help="by default all")
    parser.add_argument("--inside", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        fuzz(options.inside, options.rest)
        return
    rows = known(OUT) | {target: run(target, options.seconds) for target in options.target or NAMES}
    write(OUT, rows)


if __name__ == "__main__":
    main()
