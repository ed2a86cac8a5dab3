"""Distill students of EfficientNet-Lite's first layers, and keep how far each came after how long.

The student takes the place of the layers up to a block, for a share of the model's operations. It is trained on parts
of photographs that the network was not trained on (``benchmarks/support/pictures.py``), without labels. Its file stays
in the cache of photographs, where ``benchmarks.codec_rates`` finds it and judges it on photographs held out.

    python -m benchmarks.student_training lite0 --minutes 40   # results/student-training.json; goes on if interrupted
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import torch

import torchsurgeon as ts
from benchmarks.codec_rates import after_block
from benchmarks.support import pictures, result_file
from torchsurgeon.codec import Look

OUT = result_file.RESULTS / "student-training.json"
FOLDER = pictures.CACHE.parent / "students"
BLOCKS = {"lite0": 5, "lite2": 7}
"""The block after which the network is cut."""
_VIEWS = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=BLOCKS)
    parser.add_argument("--minutes", type=float, default=40.0, help="of training")
    parser.add_argument("--share", type=float, default=0.1, help="of the whole model's operations")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    known = json.loads(options.out.read_text())["results"] if options.out.exists() else {}
    known[options.network] = distilled(options.network, options.share, options.minutes * 60)
    known[options.network]["threads"] = options.threads
    result_file.write(options.out, known, **pictures.packages())


def file_of(network: str) -> Path:
    """Return where the student of a network is kept."""
    return FOLDER / f"{network}.student"


def distilled(network: str, share: float, training_s: float) -> dict[str, Any]:
    """Distill a student, keep its file, and return how far it came after how long."""
    sample = pictures.photographs(pictures.side(network), views=_VIEWS).sample
    model = pictures.classifier(network)
    graph = ts.trace(model, sample[:1])
    point = graph.point(after_block(graph, BLOCKS[network]))
    seen: dict[int, dict[str, float]] = {}
    said = -30.0

    def progress(done: float, total: float, what: str) -> None:
        nonlocal said
        if done - said >= 30 or not done:
            said = done
            print(f"{done:.0f} of {total:.0f} s: {what}", flush=True)
        # "263 steps, 16.1% of the boundary unexplained, 34.6% of answers kept"
        found = re.match(r"(\d+) steps, ([\d.]+)% .* unexplained, ([\d.]+)% of", what)
        if found is not None and int(found[1]) not in seen:
            seen[int(found[1])] = {
                "elapsed_s": round(done, 1),
                "unexplained": float(found[2]) / 100,
                "kept": float(found[3]) / 100,
            }

    FOLDER.mkdir(parents=True, exist_ok=True)
    codec = ts.distill(
        graph,
        point,
        list(sample.split(1)),
        share=share,
        training_s=training_s,
        name=f"{network}-student",
        checkpoint=FOLDER / f"{network}.training",
        progress=progress,
    )
    codec.save(file_of(network))
    assert codec.student is not None
    look = Look.of(codec.student)
    own = sum(layer.flops for layer in graph.layers[: point.index]) / sum(layer.flops for layer in graph.layers)
    return {
        "point": point.name,
        "block": BLOCKS[network],
        "photographs": len(sample),
        "flops_share": codec.student.flops_share,
        "own_flops_share": own,
        "steps": look.steps,
        "training_s": look.elapsed_s,
        "looks": [{"steps": steps, **values} for steps, values in sorted(seen.items())],
    }


if __name__ == "__main__":
    main()
