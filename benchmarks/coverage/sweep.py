"""Which models can be cut, how they were traced, and whether every cut gives the model's own bits.

Each model runs in a process of its own: it is traced, then cut at every point that the time budget allows (an even
spread otherwise, both ends always). Head and tail run with boundary tensors in memory of their own, and what comes out
must be the whole model's answer, bit for bit; so must the answer to a call of other sizes. Tracing is timed against the
tracing call itself, in alternation. Writes JSON and the page of the documentation.

    python -m benchmarks.coverage.sweep --jobs 2                      # all, going on where an earlier run stopped
    python -m benchmarks.coverage.sweep --only 'own:|int8' --fresh    # some, anew
"""

from __future__ import annotations

import argparse
import atexit
import functools
import gc
import json
import multiprocessing
import re
import resource
import signal
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
HOPE_RATIO, HOPE_CUT_S = 3.0, 0.010


# --- one model, in its own process ---


def measure(name: str, budget_s: float) -> dict[str, Any]:
    """Return the row of one model; ``problem`` is set when something is not as it should be."""
    import torch

    from benchmarks.coverage.models import cases

    torch.set_num_threads(1)
    row: dict[str, Any] = {"model": name}
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        begin = time.perf_counter()
        try:
            case = cases()[name]()
            row["load_s"] = time.perf_counter() - begin
            # A pass for real settles lazy modules and warms up; it also says what one run takes.
            case.model(*fresh(case.args), **fresh(case.kwargs))
        except Exception as error:
            return row | {"problem": f"the model itself does not run: {describe(error)}"}
        row["input"] = inputs_of(case)
        try:
            row |= followed(case) | checked(case, budget_s)
        except Exception as error:
            row["problem"] = describe(error)
            row["traceback"] = traceback.format_exc()[-4000:]
    row["total_s"] = time.perf_counter() - begin
    row["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return row


def describe(error: BaseException) -> str:
    text = re.sub(r"\S*site-packages/", "", " ".join(str(error).split()))
    return f"{type(error).__name__}: {text[:600]}"


def inputs_of(case: Any) -> str:
    from torchsurgeon.tracing.call import Call

    model = case.model._modules.get("_orig_mod") or case.model
    call = Call(model, case.args, case.kwargs)
    pairs = zip(call.names, call.tensors(case.args, case.kwargs), strict=True)
    inputs = ", ".join(f"{name} {str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for name, t in pairs)
    return f"{inputs}, {case.note}" if case.note else inputs


def followed(case: Any) -> dict[str, Any]:
    """How the model is traced, and in what time beside the tracing call."""
    import torchsurgeon as ts

    graph = ts.trace(case.model, *case.args, **case.kwargs)
    rival, call = tracing_call(case, graph)
    times: dict[str, list[float]] = {"trace": [], "rival": []}
    begin = time.perf_counter()
    while len(times["trace"]) < 5 and (len(times["trace"]) < 1 or time.perf_counter() - begin < 2):
        both: list[tuple[str, Callable[[], Any]]] = [
            ("rival", call),
            ("trace", lambda: ts.trace(case.model, *case.args, **case.kwargs)),
        ]
        for key, run in both if len(times["trace"]) % 2 else reversed(both):
            start = time.perf_counter()
            run()
            times[key].append(time.perf_counter() - start)
    case.__dict__["graph"] = graph
    return {
        "traced_by": graph.traced_by,
        "layers": len(graph.layers),
        "points": len(graph.points),
        "opaque": graph.opaque,
        "batch_free": graph.batch_free,
        "trace_s": statistics.median(times["trace"]),
        "tracing_call": rival,
        "tracing_call_s": statistics.median(times["rival"]),
        "trace_ratio": statistics.median(a / b for a, b in zip(times["trace"], times["rival"], strict=True)),
        "trace_runs": len(times["trace"]),
    }


def tracing_call(case: Any, graph: Any) -> tuple[str, Callable[[], Any]]:
    """The call that does nothing but trace: PyTorch's own where it can, else the one inside ``trace``."""
    import torch

    from torchsurgeon.tracing.adapters import Adapter, adapter_for
    from torchsurgeon.tracing.call import Call
    from torchsurgeon.tracing.capture_export import capture_export
    from torchsurgeon.tracing.capture_fx import capture_fx, left_as_it_was

    model = case.model._modules.get("_orig_mod") or case.model
    call = Call(model, case.args, case.kwargs)
    if graph.traced_by == "export":

        def export() -> Any:
            return torch.export.export(model, case.args, case.kwargs, strict=False)

        # Some results (caches) export does not know; what does then is inside ``trace``.
        within = functools.partial(capture_export, model, call, call.tensors(case.args, case.kwargs))
        return first_that_works(("torch.export.export", export), ("torch.export within trace", within))

    def symbolic_trace() -> Any:
        # It leaves its proxies in the caches of some models.
        with left_as_it_was(model):
            return torch.fx.symbolic_trace(model)

    adapter = adapter_for(model) or Adapter(type(model).forward)
    return first_that_works(
        ("torch.fx.symbolic_trace", symbolic_trace),
        ("torch.fx within trace", lambda: capture_fx(model, call, graph.opaque, adapter.forward)),
    )


def first_that_works(*calls: tuple[str, Callable[[], Any]]) -> tuple[str, Callable[[], Any]]:
    for name, call in calls[:-1]:
        try:
            call()
        except Exception:
            continue
        return name, call
    return calls[-1]


def checked(case: Any, budget_s: float) -> dict[str, Any]:
    """Cut and compare at as many points as the budget allows; at three with the call of other sizes."""
    graph = case.__dict__["graph"]
    expected, model_s = whole(case, (case.args, case.kwargs))
    again, _ = whole(case, (case.args, case.kwargs))
    if unlike(again, expected):
        return {"problem": "the model itself does not give the same answer twice"}
    points = spread(graph.points, max(5, int(budget_s / max(model_s, 1e-4))))
    cuts: list[float] = []
    wrong = [bad for p in points if (bad := differs(graph, p, (case.args, case.kwargs), expected, cuts))]
    found: dict[str, Any] = {
        "model_s": model_s,
        "checked_points": len(points),
        "cut_median_s": statistics.median(cuts),
        "cut_max_s": max(cuts),
    }
    other = case.other or (doubled(case) if graph.batch_free else None)
    if other is not None:
        try:
            truth, _ = whole(case, other)
        except Exception as error:
            found["other_sizes"] = f"the model itself refuses: {describe(error)[:80]}"
        else:
            few = spread(graph.points, 5 if model_s < 1 else 3)
            why = refused(graph, other)
            bad = [] if why else [bad for p in few if (bad := differs(graph, p, other, truth, []))]
            wrong += [f"other sizes: {text}" for text in bad]
            found["other_sizes"] = f"refused: {why}" if why else "wrong" if bad else f"{len(few)} points"
    if wrong:
        found["problem"] = f"{len(wrong)} cuts are not bit-equal: {'; '.join(wrong[:5])}"
    return found


def refused(graph: Any, call: Any) -> str:
    """Why a call of these sizes is not taken, by the device or by the server; nothing when it is."""
    from torchsurgeon.cutting.partition import check_shapes, tail_for
    from torchsurgeon.errors import PartitionError

    try:
        given = graph.bind(*call[0], **call[1])
        check_shapes(graph, tail_for(graph, list(given)), list(given), list(given.values()))
    except (TypeError, PartitionError) as error:
        return describe(error)[:300]
    return ""


def whole(case: Any, call: Any) -> tuple[Any, float]:
    args, kwargs = fresh(call[0]), fresh(call[1])
    begin = time.perf_counter()
    result = case.model(*args, **kwargs)
    return result, time.perf_counter() - begin


def spread(points: Sequence[Any], count: int) -> list[Any]:
    if len(points) <= count:
        return list(points)
    last = len(points) - 1
    return [points[round(i * last / (count - 1))] for i in range(count)]


def doubled(case: Any) -> Any:
    import torch

    from torchsurgeon.tracing.structure import flatten

    leaves, structure = flatten([case.args, case.kwargs])
    twice = {
        path: torch.cat([leaf, leaf.flip(-1)]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf
        for path, leaf in leaves
    }
    return structure.rebuild(twice)


def fresh(value: Any) -> Any:
    """``value`` with tensors in memory of their own, as a network would deliver them."""
    import torch

    from torchsurgeon.cutting.segment import clone
    from torchsurgeon.tracing.structure import flatten

    def copied(tensor: Any) -> Any:
        if tensor.is_quantized:
            return clone(tensor)
        if not is_dense(tensor):
            return tensor.clone(memory_format=torch.contiguous_format)
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    leaves, structure = flatten(value)
    return structure.rebuild({path: copied(t) if isinstance(t, torch.Tensor) else t for path, t in leaves})


def is_dense(tensor: Any) -> bool:
    step = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride != step:
                return False
            step *= size
    return True


def differs(graph: Any, point: Any, call: Any, expected: Any, cuts: list[float]) -> str:
    """What is wrong with a cut, or nothing."""
    import torchsurgeon as ts

    begin = time.perf_counter()
    partition = ts.cut(graph, point)
    cuts.append(time.perf_counter() - begin)
    args, kwargs = fresh(call[0]), fresh(call[1])
    try:
        boundary = partition.head(*args, **kwargs)
        if unlike([args, kwargs], [call[0], call[1]]):
            return f"{point.name}: the head changes its input"
        result = partition.tail(*fresh(boundary))
    except Exception as error:
        return f"{point.name}: {describe(error)[:200]}"
    what = unlike(result, expected)
    return f"{point.name}: {what}" if what else ""


def unlike(actual: Any, expected: Any) -> str:
    import torch

    from torchsurgeon.tracing.structure import flatten

    (ours, form), (theirs, wanted) = flatten(actual), flatten(expected)
    if form != wanted:
        return "another structure"
    for (path, a), (_, b) in zip(ours, theirs, strict=True):
        if not isinstance(b, torch.Tensor):
            same = type(a) is type(b) and (a == b or a is b)
        elif (a.dtype, a.shape) != (b.dtype, b.shape):
            same = False
        elif b.is_quantized:
            same = a.qscheme() == b.qscheme() and torch.equal(a, b)
        else:
            same = torch.equal(bits(a), bits(b))
        if not same:
            return f"output {'.'.join(path) or 'itself'} differs"
    return ""


def bits(tensor: Any) -> Any:
    import torch

    flat = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8)


# --- all models ---


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
    return (
        f"{row['model']}: {row['traced_by']}, {row['layers']} layers, {row['checked_points']} of {row['points']} points"
        f" equal, trace {row['trace_s']:.2f} s ({row['trace_ratio']:.1f}×), {row['total_s']:.0f} s"
    )


# --- the page ---

_HOW = """\
Every model is traced, then cut at its partition points; head and tail, with the boundary tensors copied to other memory
in between, must give the whole model's answer **bit for bit**. *Checked* says at how many of the points that was tried
(all, or an even spread with both ends, by what one run of the model takes), *other sizes* at how many with a call of
another batch, length or image size. *s* is the time `trace` takes, *×* its ratio to the time of the tracing call itself
(`torch.fx.symbolic_trace` or `torch.export.export` where they can follow the model, else the same inside `trace`).
Weights are random; transformers have small configurations of whole architectures."""
_COLUMNS = (
    *("model", "input", "traced by", "layers", "points", "checked", "equal", "other sizes", "batch free", "s", "×"),
    "opaque",
)


def page(document: dict[str, Any]) -> str:
    rows = document["rows"]
    where = document["environment"]
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        family = row["model"].partition(":")[0]
        groups.setdefault(family + (" (int8)" if "(int8)" in row["model"] else ""), []).append(row)
    text = [
        "# Models that can be cut",
        "",
        "<!-- Generated by benchmarks.coverage.sweep (make coverage); edit nothing here. -->",
        "",
        _HOW,
        "",
        f"Measured on {where['device']}, one thread, torch {where['torch']}, {where['date'][:10]}"
        + "".join(f", {name} {version}" for name, version in where["packages"].items())
        + ".",
        "",
        "| family | models | all equal | fx | export | hierarchical | with opaque layers | median × | worst × |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for family, members in groups.items():
        good = [row for row in members if "problem" not in row]
        ratios = [row["trace_ratio"] for row in good] or [float("nan")]
        counts = [sum(row["traced_by"] == how for row in good) for how in ("fx", "export", "hierarchical")]
        text.append(
            f"| {family} | {len(members)} | {len(good)} | {counts[0]} | {counts[1]} | {counts[2]} | "
            f"{sum(bool(row['opaque']) for row in good)} | {statistics.median(ratios):.1f} | {max(ratios):.1f} |"
        )
    good = [row for row in rows if "problem" not in row]
    slow = [row for row in good if row["trace_ratio"] > HOPE_RATIO]
    longest = max(good, key=lambda row: row["layers"], default=None)
    missing = document["missing"]
    if missing:
        text += ["", f"Not measured yet: {len(missing)} ({', '.join(missing)})."]
    text += ["", f"{len(slow)} of {len(good)} take more than {HOPE_RATIO:.0f}× the tracing call."]
    if longest is not None:
        text += [
            (
                f"Cutting the longest, {longest['model']} of {longest['layers']} layers, takes "
                f"{longest['cut_median_s'] * 1e3:.1f} ms (median; worst {longest['cut_max_s'] * 1e3:.1f} ms)."
            )
        ]
    for family, members in groups.items():
        text += [
            "",
            f"## {family}",
            "",
            f"| {' | '.join(_COLUMNS)} |",
            "|---|---|---|---:|---:|---:|---|---|---|---:|---:|---|",
        ]
        text += [table_row(row) for row in members]
    notes = {f"{name} {why}" for row in good for name, why in row["opaque"].items()}
    if notes:
        text += ["", "## Why layers are opaque", ""]
        for row in good:
            text += [f"- {row['model']}, `{path}`: {why}" for path, why in row["opaque"].items()]
    return "\n".join(text) + "\n"


def table_row(row: dict[str, Any]) -> str:
    name = row["model"].partition(":")[2].replace(" (int8)", "")
    if "problem" in row:
        problem = row["problem"].replace("|", "\\|")
        return f"| {name} | {row.get('input', '')} | **{problem}** | | | | no | | | | | |"
    opaque = ", ".join(f"`{path}`" for path in row["opaque"])
    return (
        f"| {name} | {row['input']} | {row['traced_by']} | {row['layers']} | {row['points']} | {row['checked_points']} "
        f"| yes | {row.get('other_sizes', '').replace('|', '')} | {'yes' if row['batch_free'] else 'no'} | "
        f"{row['trace_s']:.2f} | {row['trace_ratio']:.1f} | {opaque} |"
    )


def environment() -> dict[str, Any]:
    from importlib.metadata import version

    from torchsurgeon.profiling import provenance

    found = {"packages": {name: version(name) for name in ("torchvision", "transformers", "timm")}}
    return {**provenance(), "threads": 1, **found}


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
    from benchmarks.coverage.models import cases

    every = list(cases())
    names = [name for name in every if re.search(options.only, name)]
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
    print(f"{len(done) - len(bad)} of {len(done)} models give their own bits at every checked point")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
