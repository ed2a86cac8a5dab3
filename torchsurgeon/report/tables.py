"""Tables for the terminal: graphs, codecs, diagnoses, profiles, estimates. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from torchsurgeon.codec import CodecTable
from torchsurgeon.cutting.doctor import Diagnosis
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.narrow import Fitting, Name
from torchsurgeon.report.units import bytes_text, flops_text, joules_text, seconds_text
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec


def graph_table(graph: LayerGraph) -> Fitting:
    """Return the layers of a graph, and what crosses when it is cut after each. Narrow terminals show no types."""
    return Fitting(_layers(graph, brief=False), _layers(graph, brief=True))


def _layers(graph: LayerGraph, *, brief: bool) -> Table:
    table = Table(
        title=f"{type(graph.model).__name__}: {len(graph.layers)} layers, {len(graph.points)} partition points",
        caption=(
            "FLOP counts multiply and add as two, as PyTorch's flop counter does. Tensors are float32 unless named; N "
            f"is the batch size, and bytes are for N={graph.batch}. Crosses: what is sent when this is the last layer "
            "on the device, and in how many tensors if not one."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("layer")
    for column in ("output",) if brief else ("type", "output"):
        table.add_column(column, no_wrap=True)
    for column in ("FLOP", "weights", "crosses"):
        table.add_column(column, justify="right", no_wrap=True)
    points = {point.index: point for point in graph.points}
    table.add_row("0", Name("all on server"), *[""] * (3 if brief else 4), _crossing(points[0]))
    for layer in graph.layers:
        index = layer.index + 1
        last = index == len(graph.layers)
        table.add_row(
            str(index),
            Name(layer.name),
            *([] if brief else [layer.type]),
            "\n".join(_shape(spec) for spec in layer.outputs),
            flops_text(layer.flops).removesuffix("FLOP") if layer.flops else "",
            bytes_text(layer.parameter_bytes) if layer.parameter_bytes else "",
            "nothing" if last else _crossing(points[index]) if index in points else "no cut",
        )
    return table


def codec_table(measured: CodecTable) -> Table:
    """Return what each codec costs and changes at the points where it was measured."""
    budget = measured.budget or "none given, so nothing that loses something is used (--min-cosine, …)"
    table = Table(
        title=f"{measured.model}: codecs of what crosses, on {measured.samples} samples",
        caption=(
            f"Sizes for a batch of {measured.batch}, against the plain tensors. Error: root mean square of what the "
            f"tail gets. Budget: {budget}."
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("point", overflow="fold")
    table.add_column("codec", no_wrap=True)
    for column in ("crosses", "ratio", "encode", "decode", "error", "answers", "use"):
        table.add_column(column, justify="right", no_wrap=column != "answers")
    last = None
    for row in measured.rows:
        cost = row.cost
        changes = {"{:.1%} changed": row.top1_change, "cosine {:.5f}": row.output_cosine, "{:.0%} fine": row.accepted}
        table.add_row(
            f"{row.point} {row.name}" if row.point != last else "",
            cost.codec,
            bytes_text(round(cost.size_bytes)),
            f"{row.ratio:.2f}",
            seconds_text(cost.encode_s),
            seconds_text(cost.decode_s),
            "" if row.boundary is None else f"{row.boundary.rmse:.2g}",
            ", ".join(text.format(value) for text, value in changes.items() if value is not None),
            "lossless" if cost.lossless else "yes" if cost.within_budget else "no",
        )
        last = row.point
    return table


def profile_table(graph: LayerGraph, profile: LayerProfile) -> Fitting:
    """Return the measured time of each layer with quartiles and share, and its memory and joules where known. Narrow
    terminals show no types and no intervals of joules."""
    profile.check(graph)
    return Fitting(_measured(graph, profile, brief=False), _measured(graph, profile, brief=True))


def _measured(graph: LayerGraph, profile: LayerProfile, *, brief: bool) -> Table:
    device = profile.provenance.get("device", "an unnamed device")
    table = Table(
        title=f"{profile.model} on {device}: {seconds_text(profile.total_s)}",
        caption=(
            f"Medians of {len(profile.whole_s)} runs. Layers sum to {profile.sum_to_whole:.3f} of the whole model's "
            "time, which is measured by itself; shares are of the layers' sum."
            + (" Joules are above idle" + ("." if brief else ", with their 95 % interval.") if profile.energy else "")
        ),
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("layer")
    if not brief:
        table.add_column("type", no_wrap=True)
    for name in ("median", "quartiles", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    if profile.memory_bytes is not None:
        table.add_column("memory", justify="right", no_wrap=True)
    if profile.energy is not None:
        table.add_column("energy", justify="right", no_wrap=True)
    low, high = profile.quartiles_s()
    total_s = profile.layer_s.sum()
    for layer, median_s, low_s, high_s in zip(graph.layers, profile.layer_s, low, high, strict=True):
        cells: list[str | Name] = [
            str(layer.index + 1),
            Name(layer.name),
            *([] if brief else [layer.type]),
            seconds_text(median_s),
            f"{seconds_text(low_s)} … {seconds_text(high_s)}",
            f"{median_s / total_s:.1%}",
        ]
        if profile.memory_bytes is not None:
            cells.append(bytes_text(float(profile.memory_bytes[layer.index])))
        if profile.energy is not None:
            interval_j = [] if brief else profile.energy.interval_j[layer.index].tolist()
            cells.append(joules_text(float(profile.energy.layer_j[layer.index]), *interval_j))
        table.add_row(*cells)
    return table


def diagnosis_text(diagnosis: Diagnosis) -> Group:
    """Return what :func:`torchsurgeon.cutting.doctor.examine` found, for people."""
    graph = diagnosis.graph
    how = {
        "fx": "torch.fx",
        "export": "torch.export (its Python could not be followed by torch.fx); layers are ATen operators",
        "hierarchical": "torch.fx, around modules that it cannot follow",
    }[graph.traced_by]
    facts = Table.grid(padding=(0, 2))
    facts.add_row("traced by", how)
    facts.add_row("in", seconds_text(diagnosis.trace_s))
    facts.add_row("layers", f"{len(graph.layers)}, {len(graph.points)} partition points")
    flops = sum(layer.flops for layer in graph.layers)
    weights = sum(p.numel() * p.element_size() for p in graph.model.parameters())
    facts.add_row("compute", f"{flops_text(flops)} (multiply and add count as two), {bytes_text(weights)} of weights")
    uncounted = [layer.name for layer in graph.layers if layer.uncounted]
    if uncounted:
        facts.add_row("not counted", f"operators inside {_listed(uncounted)}")
    for path, why in graph.opaque.items():
        facts.add_row("kept whole", f"{path}: {why}")
    if not graph.opaque:
        facts.add_row("kept whole", "nothing")
    for spec, free in zip(graph.inputs, diagnosis.free_sizes.values(), strict=True):
        sizes = "×".join(f"{n}{' (free)' if ok else ''}" for n, ok in zip(spec.shape, free, strict=True))
        facts.add_row("input", f"{spec.name} {str(spec.dtype).removeprefix('torch.')}[{sizes}]")
    if graph.value_dependent:
        facts.add_row("sizes", "depend on values, so which input sizes are free is not known")
    facts.add_row("batch", "free" if graph.batch_free else "fixed at the example's")
    again = "the same bits twice" if diagnosis.repeatable else "DIFFERENT from run to run: no cut can give the same"
    facts.add_row("answers", again)
    for note in diagnosis.notes:
        facts.add_row("note", note)
    blocks = Table(title="Partition points by block", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    blocks.add_column("block")
    blocks.add_column("points", justify="right")
    for block, count in diagnosis.points_per_block.items():
        blocks.add_row(block, str(count))
    start_bytes = graph.points[0].size_bytes
    cuts = Table(
        title=f"Cuts that can pay: each sends less than the input ({bytes_text(start_bytes)}) and all before it",
        caption=f"{diagnosis.too_big} of {max(len(graph.points) - 2, 0)} points send more than the input.",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    cuts.add_column("#", justify="right")
    cuts.add_column("cut after")
    for column in ("crosses", "compute before"):
        cuts.add_column(column, justify="right")
    done = np.cumsum([0] + [layer.flops for layer in graph.layers])
    for point in diagnosis.worthwhile:
        share = f"{done[point.index] / flops:.0%}" if flops else ""
        cuts.add_row(str(point.index), point.name, bytes_text(point.size_bytes), share)
    return Group(facts, blocks, cuts if diagnosis.worthwhile else "No cut sends less than the input does.")


def _crossing(point: PartitionPoint) -> str:
    count = len(point.tensors)
    return bytes_text(point.size_bytes) + (f" in {count}" if count > 1 else "")


def _shape(spec: TensorSpec) -> str:
    return str(spec).rpartition(" ")[2].removeprefix("float32").strip("[]") or "one number"


def _listed(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
