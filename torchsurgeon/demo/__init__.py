"""The demo: a server, an emulated link and a device on one machine, each in a process of its own.

AlexNet and ResNet-18 classify a photograph over 3G, LTE and Wi-Fi: on the device alone, on the server alone, and split
at the best cut between the two. The device is this process, made slower by a factor.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import socket
import statistics
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from torchsurgeon.emulate import SlowDevice
from torchsurgeon.errors import NoisyProfileWarning, ServerUnavailableError, short
from torchsurgeon.module import SplitModule
from torchsurgeon.planning import Terms, plan
from torchsurgeon.profiling import LayerProfile, profile
from torchsurgeon.report import bytes_text, layer_picture, plan_table, seconds_text
from torchsurgeon.report.narrow import CHOSEN, Column, FittingTable, names
from torchsurgeon.runtime import measure_link
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.structure import flatten
from torchsurgeon.tracing.tracer import trace
from torchsurgeon.transport import HttpTransport

MODELS = ("alexnet", "resnet18")
LINKS = ("3g", "lte", "wifi")
_START_S = 120.0
_DOWNLOAD_S = 10.0
_PATIENCE_S = 60.0
_WHERE = ("device", "server", "split")


class Photograph(nn.Module):
    """A classifier of photographs as a camera gives them: it takes ``uint8[N, 3, H, W]`` and returns class scores.

    Scaling and normalization are part of the model, so that the input that a server gets has one byte for each colour
    of a pixel, and not four.

    Args:
        net: the classifier of normalized photographs.
        mean: what is subtracted from each colour, which is scaled to 0 … 1 before; ImageNet's mean by default.
        deviation: what it is divided by then; ImageNet's deviation by default.
    """

    def __init__(
        self,
        net: nn.Module,
        mean: float | Sequence[float] = (0.485, 0.456, 0.406),
        deviation: float | Sequence[float] = (0.229, 0.224, 0.225),
    ) -> None:
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(1, -1, 1, 1))

    def forward(self, photo: torch.Tensor) -> torch.Tensor:
        return self.net((photo.float() / 255 - self.mean) / self.deviation)  # type: ignore[no-any-return, operator]


def alexnet() -> tuple[nn.Module, torch.Tensor]:
    """Return AlexNet as a ``Photograph``, and an example of its input."""
    return _photograph("alexnet")


def resnet18() -> tuple[nn.Module, torch.Tensor]:
    """Return ResNet-18 as a ``Photograph``, and an example of its input."""
    return _photograph("resnet18")


def _photograph(name: str) -> tuple[nn.Module, torch.Tensor]:
    from torchvision.models import get_model

    weights = "DEFAULT" if os.environ.get(_WEIGHTS) == "downloaded" else None
    return Photograph(get_model(name, weights=weights)).eval(), torch.zeros(1, 3, 224, 224, dtype=torch.uint8)


_WEIGHTS = "TORCHSURGEON_DEMO_WEIGHTS"


def download_weights() -> str:
    """Download torchvision's trained weights where that is possible, and return a sentence that says which are used."""
    from torchvision.models import get_model

    patience_s = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_S)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            for name in MODELS:
                get_model(name, weights="DEFAULT", progress=False)
    except OSError as error:
        reason = getattr(error, "reason", error)
        said = short(reason)
        return f"Weights are random, because torchvision's were not downloaded ({said}). Times and sizes are the same."
    finally:
        socket.setdefaulttimeout(patience_s)
    os.environ[_WEIGHTS] = "downloaded"
    return "Weights are torchvision's own, trained on ImageNet."


def photo() -> torch.Tensor:
    """Return the middle of a photograph that comes with scikit-learn, as ``uint8[1, 3, 224, 224]``."""
    from sklearn.datasets import load_sample_image

    image = torch.from_numpy(load_sample_image("china.jpg").copy()).permute(2, 0, 1)[None]
    side = min(image.shape[-2:])
    top, left = (image.shape[-2] - side) // 2, (image.shape[-1] - side) // 2
    square = image[..., top : top + side, left : left + side].float()
    small = nn.functional.interpolate(square, size=(224, 224), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Result:
    """What was measured in one setting.

    Attributes:
        model: the model's name.
        link: the link's name.
        where: ``"device"`` or ``"server"`` for all layers there, ``"split"`` for the best cut between the two.
        cut: the last layer on the device, or on which side all layers are.
        index: the index of the partition point.
        predicted_s: predicted latency.
        measured_s: median of the measured latencies.
        low_s: their lower quartile.
        high_s: their upper quartile.
        sent_bytes: bytes sent to the server for one inference.
        equal: whether every answer was bit for bit the whole model's.
        chosen: whether a plan chooses this cut.
    """

    model: str
    link: str
    where: str
    cut: str
    index: int
    predicted_s: float
    measured_s: float
    low_s: float
    high_s: float
    sent_bytes: int
    equal: bool
    chosen: bool


def run(out: Path, *, slow: float = 10.0, repeats: int = 5, console: Console | None = None) -> list[Result]:
    """Run the demo, print its table, and write ``results.json`` and a picture of each model.

    Args:
        out: the folder to write into; it is made where there is none.
        slow: how many times slower than this machine the device is.
        repeats: how many inferences are measured in each setting.
        console: where to print; standard output by default.

    Returns:
        A result for each model, link and cut.

    Raises:
        DeviceError: ``slow`` is below 1 or not finite.
    """
    console = console or Console()
    device = SlowDevice(slow)
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    console.print(download_weights(), style="dim")
    rows: list[Result] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with contextlib.ExitStack() as stack, Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting the server", total=3 + len(MODELS) * len(LINKS) * (3 * (repeats + 1)))

        def step(what: str) -> None:
            progress.update(task, advance=1, description=what)

        specs = [f"{name}=torchsurgeon.demo:{name}" for name in MODELS]
        server = stack.enter_context(_process("serve", *specs, "--port", "0", "--threads", "1"))
        port = server(r"ready: .*:(\d+)")
        links = {}
        for name in LINKS:
            step(f"starting the {name} link")
            link = stack.enter_context(
                _process("link", "--listen", "0", "--to", f"127.0.0.1:{port}", "--profile", name)
            )
            links[name] = "http://127.0.0.1:" + link(r"listening on [^ ]*:(\d+)")
        image = photo()
        for name in MODELS:
            rows += _measure(name, image, links, f"http://127.0.0.1:{port}", device, repeats, out, step, console)
    console.print(_table(rows, slow))
    (out / "results.json").write_text(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    pictures = ", ".join(str(out / f"{name}.png") for name in MODELS)
    console.print(f"Pictures: {pictures}; numbers: {out / 'results.json'}")
    return rows


def _measure(
    name: str,
    image: torch.Tensor,
    links: dict[str, str],
    server: str,
    device: SlowDevice,
    repeats: int,
    out: Path,
    step: Callable[[str], None],
    console: Console,
) -> list[Result]:
    # The server draws its random weights from seed 0, too.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, _ = globals()[name]()
    with torch.no_grad():
        truth = model(image)
    graph = trace(model, image)
    here = _profile(name, graph, image, console).scaled(device.factor)
    with HttpTransport(server, _PATIENCE_S) as direct:
        there = LayerProfile.from_json(direct.get_json(f"/v2/models/{name}/profile"))
    rows: list[Result] = []
    stars: dict[int, list[str]] = {}
    for link, url in links.items():
        with HttpTransport(url, _PATIENCE_S) as transport:
            split = SplitModule(
                model,
                image,
                server=transport,
                name=name,
                partition="server",
                link=measure_link(transport, name=link),
                device_profile=here,
                server_profile=there,
                backend=device.wrap,
                fallback="error",
            )
            assert split.link is not None
            planned = plan(graph, device=here, server=there, link=split.link)
            stars.setdefault(planned.row.index, []).append(link)
            if link == "lte":
                console.print(plan_table(planned))
            assert planned.server_only is not None
            inside = (row for row in planned.rows if not row.on_device and row.index)
            split_best = min(
                (planned.frontier.terms(row, planned.link) for row in inside), key=lambda terms: terms.latency_s
            )
            ways = zip(_WHERE, (planned.device_only, planned.server_only, split_best), strict=True)
            for where, terms in ways:
                announce = functools.partial(step, f"{name} over {link}: {where}")
                setting = (name, link, where, terms.row.name if where == "split" else f"all on {where}")
                chosen = terms.row == planned.row
                rows.append(_row(split, image, truth, setting, terms, chosen, repeats, announce))
    devices = [(f"device (this machine, {device.factor:g}× slower)", here), ("server", there)]
    named = [(", ".join(names), index) for index, names in stars.items()]
    layer_picture(name, graph, devices, named, out / f"{name}.png")
    return rows


def _profile(name: str, graph: LayerGraph, image: torch.Tensor, console: Console) -> LayerProfile:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoisyProfileWarning)
        measured = profile(graph, inputs=[image], repeats=20, meter=None)
    for warning in caught:
        if isinstance(warning.message, NoisyProfileWarning):
            console.print(f"{name}: {warning.message.finding}", style="dim")
    return measured


def _row(
    split: SplitModule,
    image: torch.Tensor,
    truth: Any,
    setting: tuple[str, str, str, str],
    terms: Terms,
    chosen: bool,
    repeats: int,
    step: Callable[[], None],
) -> Result:
    split.partition = terms.row.point(split.graph)
    equal = True
    times = []
    for repeat in range(repeats + 1):
        answer = split(image)
        equal &= all(torch.equal(a, b) for (_, a), (_, b) in zip(flatten(answer)[0], flatten(truth)[0], strict=True))
        # The first inference opens the connection and makes the server build the tail.
        if repeat and split.last is not None:
            times.append(split.last.total_s)
        step()
    low_s, middle_s, high_s = statistics.quantiles(times, n=4) if len(times) > 1 else (times[0],) * 3
    sent = split.last.sent_bytes if split.last is not None else 0
    return Result(*setting, terms.row.index, terms.latency_s, middle_s, low_s, high_s, sent, equal, chosen)


def _table(rows: list[Result], slow: float) -> FittingTable:
    alone = {(row.model, row.link): row.measured_s for row in rows if row.where == "device"}
    first = [row.where == "device" for row in rows]
    return FittingTable(
        f"One photograph, one machine; the device is {slow:g}× slower than the server, one thread each",
        [
            Column("model", [row.model if new else "" for row, new in zip(rows, first, strict=True)], left=True),
            Column("link", [row.link if new else "" for row, new in zip(rows, first, strict=True)], left=True),
            names("cut after", [(CHOSEN if row.chosen else "") + row.cut for row in rows]),
            Column("sent", [bytes_text(row.sent_bytes) if row.sent_bytes else "–" for row in rows], rank=3),
            Column("predicted", [seconds_text(row.predicted_s) for row in rows], rank=2),
            Column("measured", [seconds_text(row.measured_s) for row in rows], note="Measured is the median latency."),
            Column(
                "gain",
                [f"{alone[row.model, row.link] / row.measured_s:.2f}×" for row in rows],
                rank=4,
                note="Gain is how many times faster than the device alone.",
            ),
            Column(
                "equal",
                ["yes" if row.equal else "NO" for row in rows],
                rank=5,
                note="Equal says whether every answer is bit for bit the model's own.",
            ),
        ],
        "★ is the plan's choice. The third row of each link is the best cut between device and server.",
        bold=[i for i, row in enumerate(rows) if row.chosen],
        ends=[i for i, row in enumerate(rows) if row.where == "split"],
    )


@contextlib.contextmanager
def _process(*arguments: str) -> Iterator[Callable[[str], str]]:
    """Run a torchsurgeon command within the context.

    Yields:
        A function that waits for an output line in which a pattern is found, and returns the pattern's first group.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "torchsurgeon", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    seen: list[str] = []

    def wait(pattern: str) -> str:
        while True:
            try:
                line = lines.get(timeout=_START_S)
            except Empty:
                line = None
            if line is None:
                said = "".join(seen[-20:]) or "(nothing)"
                raise ServerUnavailableError(
                    f"torchsurgeon {' '.join(arguments)} is not ready: it ended, or said nothing for {_START_S:g} s. "
                    f"Its last lines were:\n{said}"
                )
            seen.append(line)
            found = re.search(pattern, line)
            if found:
                return found[1]

    try:
        yield wait
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()  # type: ignore[union-attr]
