"""How many answers of a trained network backends keep that round coarsely, and how fast they are, in one run.

The network is EfficientNet-Lite0 with its trained weights. It runs as a whole, and as the head and as the tail of a cut
behind block 5, each by every backend, with the rest in eager PyTorch. The photographs held out judge
(``benchmarks/support/pictures.py``); those that calibrate are others. ``kept`` is the share of photographs whose top-1
answer is that of eager PyTorch. ``low`` is an exact binomial bound that holds with 95 %. All backends take turns, and
seconds are those of the process on one thread, for one photograph.

    python -m benchmarks.backend_accuracy   # results/backend-accuracy.json and the table in docs/backends.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import torchsurgeon as ts
from benchmarks.codec_rates import after_block
from benchmarks.support import pictures, result_file
from torchsurgeon.accuracy import Budget
from torchsurgeon.accuracy.bounds import share_bound
from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.backends import BuiltPart, Part, find_backend

OUT = result_file.RESULTS / "backend-accuracy.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- accuracy, by benchmarks.backend_accuracy -->", "<!-- end of accuracy -->"
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16", "onnxruntime:int8", "openvino:int8")
BLOCK = 5
# Nothing is to be refused here, since what is kept is to be seen.
_ANY = Budget(max_top1_change=1.0, decide_by="estimate")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, help="how many photographs judge, at most (default: all)")
    parser.add_argument("--rounds", type=int, default=60, help="in which every backend runs once")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = pictures.photographs(pictures.side("lite0"), held_out_views=2)
    judging = list(found.held_out[: options.pictures].split(1))
    graph = ts.trace(pictures.classifier("lite0"), judging[0])
    with torch.no_grad():
        results = measured(graph, list(found.sample.split(1)), judging, options.rounds)
    result_file.write(options.out, results, **pictures.packages())
    if options.out == OUT:
        result_file.show(PAGE, BEGIN, END, page(result_file.known(OUT)))


def measured(graph: ts.LayerGraph, sample: list[Tensor], judging: list[Tensor], rounds: int) -> dict[str, Any]:
    """Return what each backend keeps, and how long it takes, as the whole model and as head and tail of a cut."""
    point = graph.point(after_block(graph, BLOCK))
    head = Part.head(graph, point)
    tail = Part.tail(graph, [spec.name for spec in point.tensors])
    parts = {"whole": Part.head(graph, graph.points[-1]), "head": head, "tail": tail}
    boundaries = [head.segment(picture) for picture in judging]
    own = [tail.segment(*boundary)[0] for boundary in boundaries]
    rows: dict[str, Any] = {}
    for what, part in parts.items():
        given: Sequence[Sequence[Tensor]] = boundaries if what == "tail" else [[picture] for picture in judging]
        runs: dict[str, Callable[..., Sequence[Tensor]]] = {"eager": part.segment}
        rows[what] = {}
        for name in BACKENDS:
            backend = find_backend(name, sample=sample, budget=_ANY)
            begun_s = time.perf_counter()
            made = BuiltPart(part, backend, set())
            made.build(*given[0])
            assert made.reason is None, made.reason
            build_s = time.perf_counter() - begun_s
            runs[name] = made
            found = [made(*tensors) for tensors in given]
            answers = [tail.segment(*one)[0] if what == "head" else one[0] for one in found]
            changed = sum(int(a.argmax()) != int(b.argmax()) for a, b in zip(answers, own, strict=True))
            rows[what][name] = {
                "pictures": len(own),
                "changed": changed,
                "kept": round(1 - changed / len(own), 4),
                "low": round(1 - share_bound(changed, len(own), 0.95), 4),
                "cosine": round(statistics.mean(likeness([a], [b]) for a, b in zip(answers, own, strict=True)), 6),
                "build_s": round(build_s, 1),
            }
            print(what, name, rows[what][name], flush=True)
        for name, seconds in _seconds(runs, given, rounds).items():
            rows[what].setdefault(name, {}).update(seconds)
            print(what, name, seconds, flush=True)
    return {"point": point.name, "calibrating": len(sample) // 2, "parts": rows}


def _seconds(
    runs: dict[str, Callable[..., Sequence[Tensor]]], given: Sequence[Sequence[Tensor]], rounds: int
) -> dict[str, dict[str, float]]:
    """Return each one's median seconds, and its median share of eager PyTorch's in the same round."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for k in range(rounds + 3):
        for name, run in runs.items():
            begun_s = time.process_time()
            run(*given[k % len(given)])
            if k >= 3:
                times[name].append(time.process_time() - begun_s)
    return {
        name: {
            "cpu_s": float(f"{statistics.median(some):.4g}"),
            "of_eager": round(statistics.median(a / b for a, b in zip(some, times["eager"], strict=True)), 3),
        }
        for name, some in times.items()
    }


def page(results: dict[str, Any]) -> str:
    """Return a table of what backends keep, and how long they take, as Markdown."""
    if not results:
        return "Not measured yet.\n"
    lines = [
        "| `backend=` | runs | answers kept | at least | cosine | time of eager's |",
        "|---|---|---|---|---|---|",
    ]
    texts = {"whole": "the whole model", "head": f"the head at block {BLOCK}", "tail": f"the tail behind block {BLOCK}"}
    for name in BACKENDS:
        for what, text in texts.items():
            row = results["parts"][what][name]
            kept = f"{row['pictures'] - row['changed']} of {row['pictures']}"
            lines.append(
                f'| `"{name}"` | {text} | {kept} | {row["low"]:.1%} | {row["cosine"]:.5f} | {row["of_eager"]:.2f} |'
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
