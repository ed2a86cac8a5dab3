"""Tables of graphs, profiles and codecs, and what ``torchsurgeon doctor`` says. Computes nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group
from rich.table import Table
from rich.text import Text

from torchsurgeon.codec import CodecTable
from torchsurgeon.codec.table import CodecRow
from torchsurgeon.cutting.doctor import Diagnosis
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.report.narrow import BEFORE_NAMES, Column, FittingTable, names, shortened
from torchsurgeon.report.units import bytes_text, flops_text, joules_text, seconds_text
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.held import parameter_holdings
from torchsurgeon.tracing.specs import PartitionPoint, TensorSpec

# Names within sentences are shortened to this many characters.
_NAME = 40


def graph_table(graph: LayerGraph) -> FittingTable:
    """Return the layers of a graph, and what is sent when the model is cut after each of them."""
    layers = graph.layers
    points = {point.index: point for point in graph.points}

    def crossing(index: int) -> str:
        if index == len(layers):
            return "nothing"
        return _crossing(points[index]) if index in points else "no cut"

    return FittingTable(
        f"{type(graph.model).__name__}: {len(layers)} layers, {len(graph.points)} partition points",
        [
            Column("#", [str(index) for index in range(len(layers) + 1)], rank=5),
            names("layer", ["all on server", *(layer.name for layer in layers)]),
            Column("type", ["", *(layer.type for layer in layers)], rank=BEFORE_NAMES, left=True),
            Column(
                "output",
                ["", *("\n".join(map(_shape, layer.outputs)) for layer in layers)],
                rank=4,
                left=True,
                note="Output: the shape, N being the batch size; float32 unless another type is named.",
            ),
            Column(
                "FLOP",
                ["", *(flops_text(layer.flops).removesuffix("FLOP") if layer.flops else "" for layer in layers)],
                rank=3,
                note="FLOP: a multiply and an add count as two, as in PyTorch's flop counter.",
            ),
            Column(
                "weights",
                ["", *(bytes_text(layer.parameter_bytes) if layer.parameter_bytes else "" for layer in layers)],
                rank=2,
            ),
            Column("crosses", [crossing(index) for index in range(len(layers) + 1)]),
        ],
        f"Crosses: what is sent when this is the last layer on the device, and in how many tensors if more than one; "
        f"bytes are for a batch of {graph.batch}.",
    )


def codec_table(measured: CodecTable) -> FittingTable:
    """Return what each codec costs and changes at the points where it was measured."""
    rows = measured.rows
    places = [(row.point, row.layers) for row in rows]
    first = [i == 0 or places[i - 1] != place for i, place in enumerate(places)]
    measures = list(dict.fromkeys(finding.measure for row in rows for finding in row.findings))
    untested = any(row.untested for row in rows)
    left_out = measured.unfinished
    interrupted = (
        f" The measurement was interrupted before {left_out[0]}; {_count(len(left_out), 'point')} not measured."
        if left_out
        else ""
    )
    budget = measured.budget or "none was given, so no lossy codec is used (give --min-cosine or --max-top1-change)"

    def changed(row: CodecRow, measure: str) -> str:
        finding = row.finding(measure)
        return "" if finding is None else str(finding)

    def use(row: CodecRow) -> str:
        if row.cost.lossless:
            return "lossless"
        return "not tested" if row.untested else "yes" if row.cost.within_budget else "no"

    return FittingTable(
        f"{measured.model}: what codecs save and change, on {_count(measured.samples, 'sample')}",
        [
            Column("#", [str(row.point) if new else "" for row, new in zip(rows, first, strict=True)], rank=5),
            names("cut after", [row.name if new else "" for row, new in zip(rows, first, strict=True)]),
            Column("codec", [row.cost.codec for row in rows], left=True),
            Column(
                "crosses",
                [bytes_text(round(row.cost.size_bytes)) for row in rows],
                rank=8,
                note=f"Crosses: bytes sent for a batch of {measured.batch}.",
            ),
            Column(
                "ratio",
                [f"{row.ratio:.2f}" for row in rows],
                rank=6,
                note="Ratio: how many times smaller than without a codec.",
            ),
            Column("encode", [seconds_text(row.cost.encode_s) for row in rows], rank=4),
            Column("decode", [seconds_text(row.cost.decode_s) for row in rows], rank=3),
            Column(
                "error",
                ["" if row.boundary is None else f"{row.boundary.rmse:.2g}" for row in rows],
                rank=2,
                note="Error: root mean square of the difference between what the tail receives and the head sent.",
            ),
            *(
                Column(
                    measure,
                    [changed(row, measure) for row in rows],
                    rank=7,
                    note=""
                    if i
                    else f"{measure.capitalize()}: in brackets is the bound for all calls, not only these.",
                )
                for i, measure in enumerate(measures)
            ),
            Column("use", [use(row) for row in rows], left=True),
            *([Column("why not", [row.untested for row in rows], rank=1, left=True)] if untested else []),
        ],
        f"Use: whether a plan may use the codec, by the accuracy budget: {budget}.{interrupted}",
    )


def profile_table(graph: LayerGraph, profile: LayerProfile) -> FittingTable:
    """Return the measured time of each layer with its quartiles and its share, and its memory and energy where known.

    Raises:
        ProfileError: if the profile is of another model.
    """
    profile.check(graph)
    layers, medians_s, energy = graph.layers, profile.layer_s, profile.energy
    low_s, high_s = profile.quartiles_s()
    device = profile.provenance.get("device", "an unnamed device")
    fused = profile.parts is not None
    columns = [
        Column("#", [str(layer.index + 1) for layer in layers], rank=6),
        names("layer", [layer.name for layer in layers]),
        Column("type", [layer.type for layer in layers], rank=BEFORE_NAMES, left=True),
        Column("estimate" if fused else "median", [seconds_text(s) for s in medians_s]),
        *([] if fused else [Column("quartiles", [_interval(e) for e in zip(low_s, high_s, strict=True)], rank=2)]),
        Column(
            "share",
            [f"{share:.1%}" for share in medians_s / medians_s.sum()],
            rank=5,
            note="Shares are of the layers' sum.",
        ),
    ]
    if profile.memory_bytes is not None:
        columns.append(Column("memory", [bytes_text(float(size)) for size in profile.memory_bytes], rank=3))
    if energy is not None:
        columns.append(energy_column(energy.layer_j.tolist(), energy.interval_j.tolist(), percent=95, rank=4))
    caption = (
        f"Medians of {_count(len(profile.whole_s), 'run')}. The whole model was timed by itself: its layers add up to "
        f"{profile.sum_to_whole:.3f} of its time."
    )
    if fused:
        device += f" by {profile.backend}"
        caption = (
            f"The whole model was measured in {_count(len(profile.whole_s), 'run')}. No layer was: this backend fuses "
            "layers. An estimate is the layer's time in eager PyTorch times a factor for its kind of work."
        )
    return FittingTable(f"{profile.model} on {device}: {seconds_text(profile.total_s)}", columns, caption)


def energy_column(
    means_j: Sequence[float], intervals_j: Sequence[Sequence[float]], *, percent: int, rank: int
) -> Column:
    """Return a column of energies above idle, whose intervals are left out before any name is shortened.

    Args:
        means_j: the energies in joules, one for each row.
        intervals_j: the low and high end of each, in joules.
        percent: how sure the intervals are.
        rank: when the energies themselves are left out, as in ``Column``.
    """
    brief = Column("energy", [joules_text(mean) for mean in means_j], rank=rank, note="Energy is that above idle.")
    note = f"Energy is that above idle, with its {percent} % interval."
    full = [joules_text(mean, *interval) for mean, interval in zip(means_j, intervals_j, strict=True)]
    return Column("energy", full, rank=BEFORE_NAMES, instead=brief, note=note)


def diagnosis_text(diagnosis: Diagnosis) -> Group:
    """Return what ``torchsurgeon.cutting.doctor.examine()`` found, for people."""
    graph = diagnosis.graph
    flops = sum(layer.flops for layer in graph.layers)
    blocks = FittingTable(
        "Partition points by block",
        [
            names("block", list(diagnosis.points_per_block)),
            Column("points", [str(count) for count in diagnosis.points_per_block.values()]),
        ],
    )
    if not diagnosis.worthwhile:
        return Group(_facts(diagnosis, flops), blocks, "No cut sends less than the model's input.")
    done = np.cumsum([0] + [layer.flops for layer in graph.layers])
    cuts = FittingTable(
        f"Cuts that can pay: each sends less than the input ({bytes_text(graph.points[0].size_bytes)}) and than every "
        "cut before it",
        [
            Column("#", [str(point.index) for point in diagnosis.worthwhile], rank=3),
            names("cut after", [point.name for point in diagnosis.worthwhile]),
            Column("crosses", [bytes_text(point.size_bytes) for point in diagnosis.worthwhile]),
            Column(
                "compute before",
                [f"{done[point.index] / flops:.0%}" if flops else "" for point in diagnosis.worthwhile],
                rank=2,
            ),
        ],
        f"{diagnosis.too_big} of {_count(max(len(graph.points) - 2, 0), 'point')} would send more than the input.",
    )
    return Group(_facts(diagnosis, flops), blocks, cuts)


def _facts(diagnosis: Diagnosis, flops: int) -> Table:
    """How a model was traced and what is peculiar to it, a fact a line."""
    graph = diagnosis.graph
    how = {
        "recorded": "recording its calls of PyTorch",
        "export": "torch.export, since recording cannot follow this model's Python; layers are ATen operators",
        "hierarchical": "recording its calls of PyTorch; the modules that cannot be followed are kept whole",
    }[graph.traced_by]
    weights = sum(parameter_holdings(graph.model.modules()).values())
    facts = Table.grid(padding=(0, 2))

    def add(name: str, text: str) -> None:
        facts.add_row(name, Text(text))

    add("traced by", how)
    add("traced in", seconds_text(diagnosis.trace_s))
    add("layers", f"{len(graph.layers)}, {len(graph.points)} partition points")
    add("compute", f"{flops_text(flops)} (multiply and add count as two), {bytes_text(weights)} of weights")
    uncounted = [layer.name for layer in graph.layers if layer.uncounted]
    if uncounted:
        add("not counted", f"operators inside {_listed(uncounted)}")
    for path, why in graph.opaque.items():
        add("kept whole", f"{shortened(path, _NAME)}: {why}")
    if not graph.opaque:
        add("kept whole", "no module")
    for spec, free in zip(graph.inputs, diagnosis.free_sizes.values(), strict=True):
        sizes = "×".join(f"{n}{' (free)' if ok else ''}" for n, ok in zip(spec.shape, free, strict=True))
        add("input", f"{spec.name} {str(spec.dtype).removeprefix('torch.')}[{sizes}]")
    if graph.value_dependent:
        add("sizes", "depend on the inputs' values, so it is not known which input sizes are free")
    add("batch", "any size" if graph.batch_free else "only the example's size")
    checked = (
        f"the same bits as the model's: {', '.join(graph.verified)}"
        if graph.verified
        else "not compared with the model"
    )
    add("verified", checked)
    again = "the same bits in two runs" if diagnosis.repeatable else "DIFFERENT in two runs: no cut can give the same"
    add("answers", again)
    for note in diagnosis.notes:
        add("note", note)
    return facts


def _crossing(point: PartitionPoint) -> str:
    count = len(point.tensors)
    return bytes_text(point.size_bytes) + (f" in {count}" if count > 1 else "")


def _shape(spec: TensorSpec) -> str:
    """The shape of a tensor, after its type where that is not float32."""
    dtype, _, dims = str(spec).rpartition(" ")[2].removesuffix("]").partition("[")
    return f"{'' if dtype == 'float32' else dtype + ' '}{dims or 'one number'}"


def _interval(ends_s: Sequence[float]) -> str:
    return " … ".join(map(seconds_text, ends_s))


def _count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def _listed(texts: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(shortened(text, _NAME) for text in texts[:most])
    return shown + (f" and {len(texts) - most} more" if len(texts) > most else "")
