"""Time heads, tails and whole models by each backend, beside eager PyTorch and the bare runtime, in one run.

The bare runtime is ONNX Runtime or OpenVINO without torchsurgeon: it reads an ONNX file of the same part, exported for
the example's shapes, and is fed NumPy arrays. All rivals take turns, so that each round gives a ratio of times that lie
close together. On one thread, ratios are of the processor time of the process, which other programs on the machine
disturb less; on several, they are of the time that passes. Inductor takes the longest to build, and runs the whole
model only, on one thread.

Each part is exported once for all backends and numbers of threads. The process starts itself anew with memory in huge
pages (glibc.malloc.hugetlb=1): in small ones, two equal sessions of one file differ by up to 20 %, for as long as they
live, by where their weights happen to lie.

    python -m benchmarks.backends                          # results/backends.json, about 20 minutes
    python -m benchmarks.backends --quick                  # a part of it in two minutes, into build/backends.json
    python -m benchmarks.backends --networks AlexNet BERT  # these anew; without it, those that are missing
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks import zoo
from benchmarks.support import exports, networks, result_file
from torchsurgeon.backends import BuiltPart, Part, deviation, find_backend, openvino
from torchsurgeon.backends import onnxruntime as ort

OUT = result_file.RESULTS / "backends.json"
QUICK = result_file.RESULTS.parents[1] / "build" / "backends.json"
PAGE = result_file.RESULTS.parents[1] / "docs" / "backends.md"
BEGIN, END = "<!-- times, by benchmarks.backends -->", "<!-- end of times -->"
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16")
WITHIN = 1.05
"""A part counts as near to the bare runtime up to this share of its time."""
_TUNABLE = "glibc.malloc.hugetlb=1"
_CUTS = (0.25, 0.5, 0.75)
"""Where each network is cut: at these shares of its points."""
_WARMUP = 2
# A turn of less than this begins with a run that is not timed, since the rivals before it have emptied the caches.
_SHORT_S = 0.02
_SPINS_S = 0.03

Rivals = dict[str, Callable[[], Any]]


def _torchvision(name: str) -> zoo.Made:
    return networks.network(name, torch.device("cpu"))


NETWORKS: dict[str, Callable[[], zoo.Made]] = {
    "AlexNet": functools.partial(_torchvision, "alexnet"),
    "MobileNetV3": functools.partial(_torchvision, "mobilenet_v3_large"),
    "EfficientNet-Lite0": functools.partial(zoo.make, "EfficientNet-Lite0"),
    "ResNet-50": functools.partial(_torchvision, "resnet50"),
    "ViT-B/16": functools.partial(_torchvision, "vit_b_16"),
    "SSDlite": functools.partial(zoo.make, "SSDlite"),
    "BERT": functools.partial(zoo.make, "BERT"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, help="time these anew (default: what is missing)")
    parser.add_argument("--cuts", nargs="*", type=float, default=_CUTS, help="shares of the points")
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--part-s", type=float, default=4.0, help="seconds of timing for each part, about")
    parser.add_argument("--no-inductor", action="store_true")
    parser.add_argument("--quick", action="store_true", help="two networks, one cut, one thread, no inductor")
    parser.add_argument("--page", action="store_true", help="write the table of what was timed, and time nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.cuts, options.threads, options.part_s, options.no_inductor = (0.5,), (1,), 1.0, True
    out = options.out or (QUICK if options.quick else OUT)
    if not options.page:
        _in_huge_pages()
        _time(out, options)
    if out == OUT:
        result_file.show(PAGE, BEGIN, END, page(result_file.known(OUT)))


def _in_huge_pages() -> None:
    """Start this process anew with malloc's memory in huge pages, unless it runs in them."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if _TUNABLE not in tunables:
        os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, (tunables, _TUNABLE)))
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.backends", *sys.argv[1:]])


def _time(out: Path, options: argparse.Namespace) -> None:
    found = {} if options.quick else result_file.known(out)
    wanted = options.networks or [name for name in NETWORKS if name not in found]
    wanted = wanted[:2] if options.quick else wanted
    begun_s = time.monotonic()
    packages = {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime", "openvino")}
    for name in wanted:
        started_s = time.monotonic()
        found[name] = []
        with torch.no_grad():
            for row in rows(*NETWORKS[name](), options):
                found[name].append(row)
                print(f"[{time.monotonic() - begun_s:4.0f} s] {name}, {line(row)}", flush=True)
        print(f"{name} took {time.monotonic() - started_s:.0f} s", flush=True)
        ordered = {one: found[one] for one in NETWORKS if one in found}
        result_file.write(out, ordered, packages=packages, memory=_TUNABLE)


def rows(model: nn.Module, x: Tensor, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the times of all rivals on the whole model, and on head and tail of each cut, by number of threads."""
    graph = ts.trace(model, x)
    tensors = graph.tensors_of_call((x,), {})
    last = len(graph.points) - 1
    parts = [("whole", None, Part.head(graph, graph.points[-1]), tensors)]
    for share in options.cuts:
        point = graph.points[round(share * last)]
        head = Part.head(graph, point)
        boundary = [tensor.clone() for tensor in head.segment(*tensors)]
        tail = Part.tail(graph, [spec.name for spec in point.tensors])
        parts += [("head", point.name, head, tensors), ("tail", point.name, tail, boundary)]
    for what, at, part, given in parts:
        with exports.made_once():
            for threads in options.threads:
                torch.set_num_threads(threads)
                inductor = what == "whole" and threads == 1 and not options.no_inductor
                names = (*BACKENDS, "inductor") if inductor else BACKENDS
                row = {"part": what, "point": at, "threads": threads}
                yield row | {"rivals": timed(part, given, names, options.part_s)}


def timed(part: Part, tensors: Sequence[Tensor], backends: Sequence[str], part_s: float) -> dict[str, Any]:
    """Return what every rival takes for one part, and how far its results are from eager PyTorch.

    Args:
        part: the part.
        tensors: what it takes.
        backends: the backends.
        part_s: how long to time them, about.
    """
    expected = part.segment(*tensors)
    rivals: Rivals = {"eager": lambda: part.segment(*tensors)}
    facts: dict[str, dict[str, Any]] = {"eager": {}}
    for name in backends:
        begun_s = time.perf_counter()
        built = BuiltPart(part, find_backend(name), set())
        built.build(*tensors)
        facts[name] = {
            "build_s": round(time.perf_counter() - begun_s, 3),
            "reason": built.reason,
            "free_batch": built.free_batch,
            "deviation": max(deviation(a, b) for a, b in zip(built(*tensors), expected, strict=True)),
        }
        rivals[name] = lambda built=built: built(*tensors)  # type: ignore[misc]
        bare = None if built.reason is not None else bare_runtime(name, part, tensors)
        if bare is not None:
            rivals[f"bare {name}"], facts[f"bare {name}"] = bare, {}
    return measured(rivals, facts, part_s)


def bare_runtime(name: str, part: Part, tensors: Sequence[Tensor]) -> Callable[[], Any] | None:
    """Return a call of the runtime itself on an ONNX file of the part; None for a backend that is PyTorch's own."""
    if name == "inductor":
        return None
    arrays = {spec.name: one.contiguous().numpy() for spec, one in zip(part.inputs, tensors, strict=True)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        ort.write_onnx(part, tensors, path, free_batch=False)
        if name == "onnxruntime":
            session = ort.open_session(path, ["CPUExecutionProvider"])
            given = {one.name: arrays[one.name] for one in session.get_inputs()}
            return lambda: session.run(None, given)
        model = openvino.core().read_model(str(path))
        compiled = openvino.core().compile_model(
            model,
            "CPU",
            {
                "INFERENCE_PRECISION_HINT": "bf16" if name.endswith("bf16") else "f32",
                "INFERENCE_NUM_THREADS": torch.get_num_threads(),
                "PERFORMANCE_HINT": "LATENCY",
            },
        )
    request = compiled.create_infer_request()
    named = [next(arrays[known] for known in one.get_names() if known in arrays) for one in compiled.inputs]
    return lambda: request.infer(named, share_inputs=True)


def measured(rivals: Rivals, facts: dict[str, dict[str, Any]], part_s: float) -> dict[str, dict[str, Any]]:
    """Run all rivals in turns, and return each one's median, spread, and ratios to eager and to the bare runtime."""
    once_s: dict[str, float] = {}
    for _ in range(_WARMUP):
        for name, run in rivals.items():
            begun_s = time.perf_counter()
            run()
            once_s[name] = time.perf_counter() - begun_s
    rounds = max(9, min(60, round(part_s / sum(once_s.values()))))
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    order, shuffle = list(rivals.items()), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name, run in order:
            if torch.get_num_threads() > 1:
                # Until then, the threads of the rival before spin, and wait for more to do.
                time.sleep(_SPINS_S)
            if once_s["eager"] < _SHORT_S:
                run()
            cpu_s, wall_s = time.process_time(), time.perf_counter()
            run()
            wall[name].append(time.perf_counter() - wall_s)
            cpu[name].append(time.process_time() - cpu_s)
    return {
        name: facts[name]
        | {
            "wall_s": spread(wall[name]),
            "cpu_s": spread(cpu[name]),
            **{
                f"{what}_over_{rival.replace('bare ' + name, 'bare')}": spread(
                    [a / b for a, b in zip(times[name], times[rival], strict=True)]
                )
                for what, times in (("wall", wall), ("cpu", cpu))
                for rival in ("eager", f"bare {name}")
                if rival in rivals and rival != name
            },
        }
        for name in rivals
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return the median and the quartiles."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": float(f"{median:.4g}"), "low": float(f"{low:.4g}"), "high": float(f"{high:.4g}")}


def over(row: dict[str, Any], name: str, rival: str) -> float | None:
    """Return a rival's time over that of another (``"eager"`` or ``"bare"``); None where both were not timed."""
    what = "cpu" if row["threads"] == 1 else "wall"
    found = row["rivals"].get(name, {}).get(f"{what}_over_{rival}")
    return None if found is None else float(found["median"])


def line(row: dict[str, Any]) -> str:
    """Return one row as text: the time over that of eager PyTorch, and over that of the bare runtime."""
    parts = []
    for name in (*BACKENDS, "inductor"):
        of_eager, of_bare = over(row, name, "eager"), over(row, name, "bare")
        if of_eager is not None:
            parts.append(f"{name} {of_eager:.2f} of eager" + ("" if of_bare is None else f", {of_bare:.2f} of bare"))
    place = row["part"] if row["point"] is None else f"{row['part']} at {row['point']}"
    return f"{row['threads']} thread(s), {place}: {'; '.join(parts)}"


def page(found: dict[str, list[dict[str, Any]]]) -> str:
    """Return a table of whole models by each backend, and how many parts are near to the bare runtime, as Markdown."""
    if not found:
        return "Not measured yet.\n"
    names = (*BACKENDS, "inductor")
    columns = ("network", "threads", "eager", *names, f"parts at most {WITHIN - 1:.0%} over the bare runtime", "worst")
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for network, its_rows in found.items():
        for threads in sorted({row["threads"] for row in its_rows}):
            some = [row for row in its_rows if row["threads"] == threads]
            whole = next(row for row in some if row["part"] == "whole")
            clock = "cpu_s" if threads == 1 else "wall_s"
            shares = [over(whole, name, "eager") for name in names]
            ratios = [
                (ratio, name, row["part"])
                for row in some
                for name in BACKENDS
                if (ratio := over(row, name, "bare")) is not None
            ]
            worst = max(ratios, default=None)
            cells = (
                network,
                str(threads),
                f"{whole['rivals']['eager'][clock]['median'] * 1e3:.1f} ms",
                *("" if share is None else f"{share:.2f}" for share in shares),
                f"{sum(ratio <= WITHIN for ratio, *_ in ratios)} of {len(ratios)}",
                "" if worst is None else f"{worst[0]:.2f}, a {worst[2]} by {worst[1]}".replace("a whole", "the whole"),
            )
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
