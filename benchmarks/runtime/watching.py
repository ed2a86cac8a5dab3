"""What it takes to notice that weights have changed, for three models on the CPU.

For each model it times, on one thread: the check at every call (premises, weights, and the few bytes that are read
besides); reading all weights once for their checksums, and once for SHA-256 digests. These are processor times. Then
the background thread runs for a while as if the model were called, and its processor time is read. Last, single
elements are written in a way that PyTorch does not count, and it is waited until the thread has noticed.

    python -m benchmarks.runtime.watching [--seconds 10] [--out benchmarks/results/watching.json] [--page]

The table in docs/runtime.md is written from the file.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchvision.models import get_model

from benchmarks.support.result_file import RESULTS, write
from torchsurgeon.models.checksums import Sample
from torchsurgeon.models.premises import Premises
from torchsurgeon.models.watching import Patrol, WatchedWeights
from torchsurgeon.models.weights import Snapshot, weight_digests
from torchsurgeon.tracing.reading import plain_tensors, read_model

PAGE = Path(__file__).parent.parent.parent / "docs" / "runtime.md"
BEGIN, END = "<!-- figures, by benchmarks.runtime.watching -->", "<!-- end of watching -->"
MODELS = ("a tiny model", "resnet50", "vit_b_16")
WRITES = 5


class Owner:
    """Holds what a patrol watches."""

    def __init__(self, weights: WatchedWeights) -> None:
        self.weights = weights
        self.patrol = Patrol(self.now)

    def now(self) -> WatchedWeights:
        return self.weights


def median_s(function: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begun_s = time.thread_time()
        function()
        times.append(time.thread_time() - begun_s)
    return statistics.median(times)


def measure(name: str, seconds: float) -> dict[str, float]:
    model: nn.Module = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8))
    if name != MODELS[0]:
        model = get_model(name, weights=None)
    model = model.eval().requires_grad_(False)
    reading = read_model(model)
    plain = list(plain_tensors(model, reading).values())
    snapshot, premises = Snapshot(model, plain), Premises(model, reading)
    sample = Sample(snapshot.tensors)
    weights = WatchedWeights(model, plain)
    weights.remember()
    row = {
        "weights_bytes": float(sum(tensor.nbytes for tensor in snapshot.tensors)),
        "premises_s": median_s(premises.hold, 300),
        "versions_s": median_s(snapshot.same_weights, 300),
        "sample_s": median_s(sample.same, 300),
        "checksums_s": median_s(weights.same_in_full, 15),
        "digests_s": median_s(lambda: weight_digests(model, reading), 5),
    }
    return row | in_the_background(model, plain, seconds)


def in_the_background(model: nn.Module, plain: list[torch.Tensor], seconds: float) -> dict[str, float]:
    noticed_s = []
    owner = Owner(WatchedWeights(model, plain))
    owner.weights.remember()
    owner.patrol.start()
    (thread,) = (one for one in threading.enumerate() if one.name == "torchsurgeon-weights")
    assert thread.ident is not None
    clock = time.pthread_getcpuclockid(thread.ident)
    worked_s, begun_s = time.clock_gettime(clock), time.perf_counter()
    while time.perf_counter() - begun_s < seconds:
        owner.patrol.used()
        time.sleep(0.1)
    share = (time.clock_gettime(clock) - worked_s) / (time.perf_counter() - begun_s)
    parameters = list(model.parameters())
    for _ in range(WRITES):
        random.choice(parameters).data.view(-1)[-1] += 1
        begun_s = time.perf_counter()
        while not owner.weights._changed:
            owner.patrol.used()
            time.sleep(0.005)
        noticed_s.append(time.perf_counter() - begun_s)
        weights = WatchedWeights(model, plain)
        weights.remember()
        owner.weights = weights
    owner.patrol.close()
    return {"background_share": share, "noticed_s": statistics.median(noticed_s), "noticed_at_most_s": max(noticed_s)}


def page(results: dict[str, dict[str, float]]) -> str:
    lines = [
        "| model | weights | premises | versions | few bytes | checksums | SHA-256 | background | noticed after |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in results.items():
        cells = [
            name,
            f"{row['weights_bytes'] / 1e6:.3g} MB",
            *(f"{row[key] * 1e6:.0f} µs" for key in ("premises_s", "versions_s", "sample_s")),
            *(f"{row[key] * 1e3:.3g} ms" for key in ("checksums_s", "digests_s")),
            f"{row['background_share']:.1%} of a core",
            f"{row['noticed_s']:.1f} s, at most {row['noticed_at_most_s']:.1f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--seconds", type=float, default=10.0, help="how long to watch the thread (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "watching.json")
    parser.add_argument("--page", action="store_true", help="only write the table, from the file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random.seed(0)
    if not options.page:
        results: dict[str, Any] = {}
        for name in MODELS:
            results[name] = measure(name, options.seconds)
            print(name, results[name], flush=True)
        write(options.out, results)
    before, _, rest = PAGE.read_text().partition(BEGIN)
    table = page(json.loads(options.out.read_text())["results"])
    PAGE.write_text(f"{before}{BEGIN}\n\n{table}\n\n{END}{rest.partition(END)[2]}")


if __name__ == "__main__":
    main()
