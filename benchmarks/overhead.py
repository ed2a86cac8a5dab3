"""What wrapping a model costs when everything runs on the device: SplitModule against the eager model.

Runs of both alternate in one process on one thread; the ratio is that of each pair. Writes JSON.

    python -m benchmarks.overhead [--repeats 60] [--out benchmarks/results/overhead.json]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torchvision.models import get_model

import torchsurgeon as ts
from benchmarks.support.result_file import RESULTS, write

MODELS = ("alexnet", "mobilenet_v3_large", "resnet50")


def seconds(call: Callable[[torch.Tensor], Any], x: torch.Tensor) -> float:
    begin = time.perf_counter()
    call(x)
    return time.perf_counter() - begin


def compare(name: str, repeats: int) -> dict[str, Any]:
    model = get_model(name, weights=None).eval()
    x = torch.rand(1, 3, 224, 224)
    split = ts.SplitModule(model, x, partition="device")
    with torch.no_grad():
        for _ in range(5):
            seconds(model, x), seconds(split, x)
        pairs = []
        for i in range(repeats):
            # The order within a pair alternates, so that neither side always runs on the other's warm cache.
            first, second = (model, split) if i % 2 else (split, model)
            times = {first: seconds(first, x), second: seconds(second, x)}
            pairs.append((times[model], times[split]))
    ratios = sorted(split_s / eager_s for eager_s, split_s in pairs)
    low, middle, high = statistics.quantiles(ratios, n=4)
    eager_s, split_s = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "model": name,
        "eager_s": eager_s,
        "split_s": split_s,
        "ratio_median": middle,
        "ratio_quartiles": [low, high],
        "ratio_of_medians": split_s / eager_s,
        "repeats": repeats,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "overhead.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in MODELS:
        row = compare(name, options.repeats)
        rows.append(row)
        low, high = row["ratio_quartiles"]
        print(
            f"{name:20} eager {row['eager_s'] * 1e3:7.2f} ms  SplitModule {row['split_s'] * 1e3:7.2f} ms  "
            f"ratio {row['ratio_median']:.4f} ({low:.4f} … {high:.4f})"
        )
    write(options.out, rows)


if __name__ == "__main__":
    main()
