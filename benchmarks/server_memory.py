"""The memory of a server that 200 devices ask for 50 cuts of one model, and what bounds it.

``torchsurgeon serve`` runs in a process of its own. 200 emulated devices, each with a connection, send requests at 50
cuts of MobileNetV2, each device at one of them, the next once it has its answer. Then they leave, and others come that
ask for 50 other cuts, more than the server keeps tails for, and so on in turn. After each, and at last when nobody has
asked for a while, the resident memory of the process is read, with the highest that it had so far, and its open
descriptors.

    python -m benchmarks.server_memory [--seconds 15]
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.evaluate.markdown import table
from benchmarks.support import result_file
from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.loadtest import LoadRequest, Target, cut_requests, drive
from torchsurgeon.models import specs
from torchsurgeon.tracing import trace
from torchsurgeon.transport import HttpTransport

OUT = RESULTS / "server_memory.json"
PAGE = RESULTS.parents[1] / "docs" / "serving.md"
BEGIN, END = "<!-- memory, by benchmarks.server_memory -->", "<!-- end of memory -->"
SPEC = "torchvision:mobilenet_v2"
DEVICES, CUTS = 200, 50
TURNS = (
    *("50 cuts", "50 others", "the first again", "the others again"),
    *("the first for the third time", "the others for the third time"),
    *("the first for the fourth time", "the others for the fourth time"),
)
_SETTLE_S = 3.0
# A server gives memory back after ten to twenty seconds without a request.
_IDLE_S = 25.0


@contextmanager
def server() -> Iterator[tuple[int, str]]:
    """Run ``torchsurgeon serve``; yields its process and its URL once it is ready."""
    command = [sys.executable, "-m", "torchsurgeon", "serve", f"net={SPEC}", "--port", "0", "--threads", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        ready = next(line for line in process.stdout if line.startswith("ready: "))
        yield process.pid, ready.split()[-1]
    finally:
        process.terminate()
        process.wait()


def state(pid: int, url: str) -> dict[str, float]:
    """Return a process' resident memory and the highest that it had, in bytes, and its open descriptors."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    with HttpTransport(url) as transport:
        cuts = len(transport.get_json("/v2/load")["models"]["net"]["cuts"])
    return {
        "resident_bytes": int(lines["VmRSS"].split()[0]) * 1024,
        "peak_bytes": int(lines["VmHWM"].split()[0]) * 1024,
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "cuts": cuts,
    }


def measure(seconds: float) -> dict[str, Any]:
    """Return the states of the server in their order, and what bounds its memory."""
    loaded = specs.load(SPEC)
    graph = trace(loaded.model, *loaded.args, **loaded.kwargs)
    names = [point.index for point in graph.points[:-1]]
    # Two halves, so that the second asks for none of the cuts of the first.
    halves = [names[0::2][:CUTS], names[1::2][:CUTS]]
    weights = sum(tensor.nbytes for tensor in itertools.chain(loaded.model.parameters(), loaded.model.buffers()))
    rows: dict[str, dict[str, float]] = {}
    with server() as (pid, url):
        target = Target.at(url)
        asked = [
            cut_requests(target, "net", graph, loaded.args, loaded.kwargs, cuts=half, codecs=["raw"]) for half in halves
        ]
        rows["ready"] = state(pid, url)
        for turn, what in enumerate(TURNS):
            rates = ask(target, asked[turn % 2], seconds)
            time.sleep(_SETTLE_S)
            rows[what] = {**state(pid, url), "rate_s": rates}
            print(what, rows[what], flush=True)
        time.sleep(_IDLE_S)
        rows[f"{_IDLE_S:.0f} s without a request"] = state(pid, url)
    largest = max(request.size_bytes for request in itertools.chain(*asked))
    return {
        "rows": rows,
        "weights_bytes": weights,
        "largest_body_bytes": largest,
        "bodies_bytes": DEVICES * largest,
    }


def ask(target: Target, requests: list[LoadRequest], seconds: float) -> float:
    """Have the devices ask, and return how many answers a second they get."""
    run = drive(target, requests, None, devices=DEVICES, seconds=seconds)
    if run.errors:
        raise RuntimeError(f"{dict(run.errors)} {dict(run.reasons)}")
    return run.answered_per_s


def page(results: Mapping[str, Any]) -> str:
    """Return the table of the server's memory, as Markdown."""
    lines = [
        (
            what,
            f"{row['resident_bytes'] / 2**20:.0f}",
            f"{row['peak_bytes'] / 2**20:.0f}",
            f"{row['descriptors']:.0f}",
            f"{row['rate_s']:.0f}" if "rate_s" in row else "",
        )
        for what, row in results["rows"].items()
    ]
    heads = ("after", "resident, MiB", "highest so far, MiB", "descriptors", "answers a second")
    return (
        table(heads, lines)
        + f"\n\nThe weights are {results['weights_bytes'] / 2**20:.0f} MiB, and the largest request "
        + f"{results['largest_body_bytes'] / 2**20:.1f} MiB; {DEVICES} of these at once are "
        + f"{results['bodies_bytes'] / 2**20:.0f} MiB.\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = measure(options.seconds)
    write(options.out, found, seconds=options.seconds, devices=DEVICES, cuts=CUTS)
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(found))


if __name__ == "__main__":
    main()
