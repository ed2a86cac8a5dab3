"""Which models can be cut, how they were traced, and whether every cut gives the model's own bits.

Each model runs in a process of its own: it is traced, then cut at every point that the time budget allows (an even
spread otherwise, both ends always). Head and tail run with boundary tensors in memory of their own, and what comes out
must be the whole model's answer, bit for bit; so must the answers to calls of other sizes. Tracing is timed against the
tracing call itself, in alternation. Writes JSON and the page of the documentation. Run it in the environment that
``make coverage`` makes: models of packages that are not installed are left out.

    python -m benchmarks.coverage.sweep --jobs 2                      # all, going on where an earlier run stopped
    python -m benchmarks.coverage.sweep --only 'own:|int8' --fresh    # some, anew
"""

from __future__ import annotations

import argparse
import atexit
import gc
import importlib.util
import json
import multiprocessing
import re
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.coverage import packages
from benchmarks.coverage.models import cases
from benchmarks.coverage.page import page
from benchmarks.coverage.trial import measure

ROOT = Path(__file__).parent.parent.parent
PACKAGES = ("torchvision", "transformers", "timm", *packages.FAMILIES)
"""Families whose models come from a package; its distribution may have another name."""
DISTRIBUTIONS = {"open_clip": "open_clip_torch"}


def child(name: str, budget_s: float, memory_bytes: int, answer: Any) -> None:
    # The collector would walk through, and so copy, all that the preloaded packages hold.
    gc.freeze()
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    answer.send(measure(name, budget_s))


def run_all(names: Sequence[str], options: argparse.Namespace, done: dict[str, Any], save: Callable[[], None]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torchvision", "transformers", "timm", "torchsurgeon", "benchmarks.coverage.models"]
    )
    waiting: list[str] = list(names)
    running: dict[Any, tuple[str, Any, float]] = {}
    # A child outlives a parent that is told to end, unless it is ended with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    atexit.register(lambda: [process.kill() for _, process, _ in running.values()])
    while waiting or running:
        while waiting and len(running) < options.jobs:
            name = waiting.pop(0)
            here, there = context.Pipe(duplex=False)
            process = context.Process(
                target=child, args=(name, options.budget, int(options.memory_gb * 2**30), there), daemon=True
            )
            process.start()
            there.close()
            running[here] = (name, process, time.monotonic())
        ready = wait(list(running), timeout=1)
        for pipe, (name, process, since) in list(running.items()):
            late = time.monotonic() - since > options.timeout
            if pipe not in ready and not late:
                continue
            del running[pipe]
            try:
                row = pipe.recv() if pipe in ready else {"problem": f"not done in {options.timeout:.0f} s"}
            except EOFError:
                process.join()
                row = {"problem": f"the process ended with {process.exitcode}, memory limit {options.memory_gb} GB"}
            if late:
                process.kill()
            process.join()
            done[name] = {"model": name, **row}
            save()
            print(f"{len(done):4} {line(done[name])}", flush=True)


def line(row: dict[str, Any]) -> str:
    if "problem" in row:
        return f"{row['model']}: PROBLEM {row['problem']}"
    if "refused" in row:
        return f"{row['model']}: refused, as it should be: {row['refused']}"
    return (
        f"{row['model']}: {row['traced_by']}, {row['layers']} layers, {row['checked_points']} of {row['points']} points"
        f" equal, trace {row['trace_s']:.2f} s ({row['run_ratio']:.1f} runs), {row['total_s']:.0f} s"
    )


def environment() -> dict[str, Any]:
    from torchsurgeon.profiling import provenance

    installed = [name for name in PACKAGES if name not in absent()]
    return {
        **provenance(),
        "threads": 1,
        "packages": {name: version(DISTRIBUTIONS.get(name, name)) for name in installed},
    }


def absent() -> set[str]:
    """The families whose package is not installed."""
    return {name for name in PACKAGES if importlib.util.find_spec(name) is None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a regular expression that names have to match")
    parser.add_argument("--fresh", action="store_true", help="measure again what the JSON already holds")
    parser.add_argument("--failed", action="store_true", help="measure again what had a problem")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--budget", type=float, default=6.0, help="seconds of checking per model")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds per model")
    parser.add_argument("--memory-gb", type=float, default=12.0, help="memory per model")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "coverage.json")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "coverage.md")
    parser.add_argument("--list", action="store_true", help="only say which models there are")
    options = parser.parse_args()
    every = list(cases())
    left_out = absent()
    if left_out:
        print(f"not installed, and left out: {', '.join(sorted(left_out))}; make coverage installs them")
    names = [n for n in every if re.search(options.only, n) and n.partition(":")[0] not in left_out]
    if options.list:
        print("\n".join(names))
        return
    done: dict[str, Any] = {}
    if options.out.exists():
        done = {row["model"]: row for row in json.loads(options.out.read_text())["rows"] if row["model"] in every}
    if options.fresh or options.failed:
        again = {name for name in names if options.fresh or "problem" in done.get(name, {})}
        done = {name: row for name, row in done.items() if name not in again}

    def save() -> None:
        rows = sorted(done.values(), key=lambda row: every.index(row["model"]))
        missing = [name for name in every if name not in done]
        document = {"environment": environment(), "missing": missing, "rows": rows}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.page.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(document, indent=1) + "\n")
        options.page.write_text(page(document))

    run_all([name for name in names if name not in done], options, done, save)
    save()
    bad = [row for row in done.values() if "problem" in row]
    print(
        f"{len(done) - len(bad)} of {len(done)} models are as they should be: equal at every checked point, or refused"
    )
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
