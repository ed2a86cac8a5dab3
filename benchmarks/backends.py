"""Time heads, tails and whole models by each backend, beside eager PyTorch and the bare runtime, in one run.

The bare runtime is ONNX Runtime or OpenVINO without torchsurgeon: it reads an ONNX file and is fed NumPy arrays. For a
head or a tail the file is the exported part; for the whole model it is what ``torch.onnx.export`` makes of the model
itself. All rivals take turns, so that each round gives a ratio of times that lie close together. Seconds are told by
the wall clock and as processor time of the process, which other programs on the machine disturb less.

    python -m benchmarks.backends                          # results/backends.json, some minutes
    python -m benchmarks.backends --networks alexnet resnet50 --threads 1 2 --rounds 50
"""

from __future__ import annotations

import argparse
import importlib.metadata
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import torchsurgeon as ts
from benchmarks.support import networks, result_file
from torchsurgeon.backends import BuiltPart, Part, deviation, find_backend
from torchsurgeon.backends.onnxruntime import OPSET, open_session, write_onnx

OUT = result_file.RESULTS / "backends.json"
NETWORKS = ("alexnet", "mobilenet_v3_large", "resnet50", "vit_b_16")
BACKENDS = ("onnxruntime", "openvino", "openvino:bf16", "inductor")
_CUTS = (0.25, 0.5, 0.75)
"""Where each network is cut: at these shares of its points."""
_WARMUP = 3

Rivals = dict[str, Callable[[], Any]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS, metavar="NAME", help="of torchvision")
    parser.add_argument("--backends", nargs="+", default=BACKENDS, metavar="NAME")
    parser.add_argument("--cuts", nargs="*", type=float, default=_CUTS, help="shares of the points")
    parser.add_argument("--threads", nargs="+", type=int, default=(1,))
    parser.add_argument("--rounds", type=int, default=30, help="in which every rival runs once")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    found = []
    with torch.no_grad():
        for threads in options.threads:
            torch.set_num_threads(threads)
            for name in options.networks:
                model, x = networks.network(name, torch.device("cpu"))
                for row in rows(model, x, options.cuts, options.backends, options.rounds):
                    found.append({"network": name, "threads": threads, **row})
                    print(line(found[-1]), flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("onnx", "onnxscript", "onnxruntime", "openvino")}
    result_file.write(options.out, found, packages=versions)


def rows(
    model: nn.Module, x: Tensor, cuts: Sequence[float], backends: Sequence[str], rounds: int
) -> list[dict[str, Any]]:
    """Return the times of all rivals on the whole model, and on head and tail of each cut."""
    graph = ts.trace(model, x)
    last = len(graph.points) - 1
    found = [timed(Part.head(graph, graph.points[-1]), [x], backends, rounds, model) | {"part": "whole", "point": None}]
    for share in cuts:
        point = graph.points[round(share * last)]
        head = Part.head(graph, point)
        boundary = head.segment(x)
        tail = Part.tail(graph, [spec.name for spec in point.tensors])
        found.append(timed(head, [x], backends, rounds) | {"part": "head", "point": point.name})
        found.append(timed(tail, boundary, backends, rounds) | {"part": "tail", "point": point.name})
    return found


def timed(
    part: Part, tensors: Sequence[Tensor], backends: Sequence[str], rounds: int, model: nn.Module | None = None
) -> dict[str, Any]:
    """Return what every rival takes for one part, how long building took, and how far its results are from eager."""
    expected = part.segment(*tensors)
    rivals: Rivals = {"eager": lambda: part.segment(*tensors)}
    facts: dict[str, dict[str, Any]] = {"eager": {}}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "part.onnx"
        if model is None:
            write_onnx(part, tensors, path, free_batch=False)
        else:
            exported = torch.onnx.export(model, tuple(tensors), dynamo=True, opset_version=OPSET, verbose=False)
            assert exported is not None
            exported.save(path, external_data=True)
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
            bare = bare_runtime(name, path, tensors)
            if bare is not None:
                rivals[f"bare {name}"], facts[f"bare {name}"] = bare, {}
    return {"rivals": measured(rivals, facts, rounds)}


def bare_runtime(name: str, path: Path, tensors: Sequence[Tensor]) -> Callable[[], Any] | None:
    """Return a call of the runtime itself on an ONNX file; None for a backend whose runtime is PyTorch's."""
    arrays = [tensor.contiguous().numpy() for tensor in tensors]
    if name == "onnxruntime":
        session = open_session(path, ["CPUExecutionProvider"])
        given = dict(zip((one.name for one in session.get_inputs()), arrays, strict=True))
        return lambda: session.run(None, given)
    if name.startswith("openvino"):
        import openvino

        settings = {
            "INFERENCE_PRECISION_HINT": "bf16" if name.endswith("bf16") else "f32",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
        }
        core = openvino.Core()
        model = core.read_model(str(path))
        # With the example's shapes, as one who deploys it would fix them.
        model.reshape({one: list(array.shape) for one, array in zip(model.inputs, arrays, strict=True)})
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        return lambda: request.infer(arrays, share_inputs=True)
    return None


def measured(rivals: Rivals, facts: dict[str, dict[str, Any]], rounds: int) -> dict[str, dict[str, Any]]:
    """Run all rivals in turns, and return each one's median, spread, and ratios to eager and to the bare runtime."""
    for _ in range(_WARMUP):
        for run in rivals.values():
            run()
    wall: dict[str, list[float]] = {name: [] for name in rivals}
    cpu: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(rounds):
        for name, run in rivals.items():
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


def line(row: dict[str, Any]) -> str:
    """Return one row as text: processor time over that of eager PyTorch, and over that of the bare runtime."""
    parts = []
    for name, one in row["rivals"].items():
        if "cpu_over_eager" in one and not name.startswith("bare"):
            bare = f", {one['cpu_over_bare']['median']:.2f} of bare" if "cpu_over_bare" in one else ""
            parts.append(f"{name} {one['cpu_over_eager']['median']:.2f} of eager{bare}")
    place = row["part"] if row["point"] is None else f"{row['part']} at {row['point']}"
    return f"{row['network']}, {row['threads']} thread(s), {place}: {'; '.join(parts)}"


if __name__ == "__main__":
    main()
