"""What is found out about one model, in a process of its own: how it is traced, and whether its cuts are right."""

from __future__ import annotations

import contextlib
import inspect
import re
import resource
import statistics
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

TABLES = ("_parameters", "_buffers", "_modules")


def measure(name: str, budget_s: float) -> dict[str, Any]:
    """Return the row of one model; ``problem`` is set when something is not as it should be."""
    import torch

    from benchmarks.coverage.models import cases
    from torchsurgeon.errors import TraceError

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
            if case.refusal and isinstance(error, TraceError) and re.search(case.refusal, str(error)):
                row["refused"] = describe(error)
            else:
                row["problem"] = describe(error)
                row["traceback"] = traceback.format_exc()[-4000:]
        else:
            if case.refusal:
                row["problem"] = f"is not refused by a message like {case.refusal!r}; {row.get('problem', '')}"
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
    """How the model is traced, and in what time beside the tracing call and beside a run of the model."""
    import torchsurgeon as ts

    def traced(**options: Any) -> Any:
        return ts.trace(case.model, *case.args, **case.kwargs, **options)

    begin = time.perf_counter()
    graph = case.__dict__["graph"] = traced()
    first_s = time.perf_counter() - begin
    unverified = {"verify": False} if "verify" in inspect.signature(ts.trace).parameters else {}
    rival, call = tracing_call(case, graph)
    runs: dict[str, Callable[[], Any]] = {
        "run": lambda: whole(case, (case.args, case.kwargs)),
        "trace": traced,
        "follow": lambda: traced(**unverified),
        **({"rival": call} if call else {}),
    }
    times: dict[str, list[float]] = {key: [] for key in runs}
    begin = time.perf_counter()
    while len(times["trace"]) < 5 and (len(times["trace"]) < 1 or time.perf_counter() - begin < 2):
        for key in runs if len(times["trace"]) % 2 else reversed(runs):
            start = time.perf_counter()
            runs[key]()
            times[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(samples) for key, samples in times.items()}
    return {
        "traced_by": graph.traced_by,
        "verified": list(getattr(graph, "verified", ())),
        "layers": len(graph.layers),
        "points": len(graph.points),
        "opaque": graph.opaque,
        "batch_free": graph.batch_free,
        "first_trace_s": first_s,
        "trace_s": medians["trace"],
        "unverified_trace_s": medians["follow"],
        "tracing_call": rival,
        "tracing_call_s": medians.get("rival"),
        "trace_ratio": medians["follow"] / medians["rival"] if call else None,
        "run_ratio": medians["trace"] / medians["run"],
        "trace_runs": len(times["trace"]),
    }


def tracing_call(case: Any, graph: Any) -> tuple[str | None, Callable[[], Any] | None]:
    """The first call of PyTorch's that does nothing but trace and can follow this model, if there is one."""
    import torch

    model = case.model._modules.get("_orig_mod") or case.model

    def symbolic_trace() -> Any:
        with restored(model):
            return torch.fx.symbolic_trace(model)

    def export() -> Any:
        with restored(model):
            return torch.export.export(model, case.args, case.kwargs, strict=False)

    calls: dict[str, Callable[[], Any]] = {"torch.fx.symbolic_trace": symbolic_trace}
    if not graph.opaque:  # else it fails after a minute, and prints thousands of lines
        calls["torch.export.export"] = export
    for name, call in calls.items():
        with contextlib.suppress(Exception):
            call()
            return name, call
    return None, None


@contextlib.contextmanager
def restored(model: Any) -> Iterator[None]:
    """Undo what the block leaves in the attributes of the modules: PyTorch's tracing leaves stand-ins in caches."""
    before = [
        (module, dict(vars(module)), {key: dict(vars(module)[key]) for key in TABLES}) for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, tables in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for key, table in tables.items():
                attributes[key].clear()
                attributes[key].update(table)


def checked(case: Any, budget_s: float) -> dict[str, Any]:
    """Cut and compare at as many points as the budget allows, and at a few with calls of other sizes."""
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
        "other_sizes": {},
    }
    few = spread(graph.points, 5 if model_s < 1 else 3)
    for what, calls in other_calls(case).items():
        call, truth = first_taken(case, calls)
        if call is None:
            continue
        why = refused(graph, call)
        bad = [] if why else [bad for p in few if (bad := differs(graph, p, call, truth, []))]
        wrong += [f"other {what}: {text}" for text in bad]
        found["other_sizes"][what] = f"refused: {why}" if why else "wrong" if bad else "equal"
    if wrong:
        found["problem"] = f"{len(wrong)} cuts are not bit-equal: {'; '.join(wrong[:5])}"
    return found


def other_calls(case: Any) -> dict[str, list[Any]]:
    """Calls of other sizes, by what is different; of each list, the first that the model itself takes is tried."""
    found = {"call": [case.other]} if case.other else {"batch": [doubled(case)]}
    return found | {"image": [resized(case, 1, 32, 64), resized(case, 2, 0, 0), resized(case, 1, 0, 64)]}


def first_taken(case: Any, calls: list[Any]) -> tuple[Any, Any]:
    for call in calls:
        if call is not None:
            with contextlib.suppress(Exception):
                return call, whole(case, call)[0]
    return None, None


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


def resized(case: Any, factor: int, taller: int, wider: int) -> Any:
    """The call with images of another size, or nothing where there are none."""
    import torch

    from benchmarks.coverage.case import images
    from torchsurgeon.tracing.structure import flatten

    def other(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or leaf.dim() < 4 or min(leaf.shape[-2:]) < 16:
            return leaf
        height, width = leaf.shape[-2:]
        return images(*leaf.shape[:-2], factor * height + taller, factor * width + wider).to(leaf.dtype)

    leaves, structure = flatten([case.args, case.kwargs])
    changed = {path: other(leaf) for path, leaf in leaves}
    return structure.rebuild(changed) if any(changed[path] is not leaf for path, leaf in leaves) else None


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
