"""The ``torchsurgeon`` command. Reads arguments, calls the rooms, prints; no logic of its own."""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchsurgeon import __version__
from torchsurgeon.errors import TorchSurgeonError

if TYPE_CHECKING:
    from rich.console import Console

_EXTRAS = {
    "rich": "cli",
    "starlette": "server",
    "uvicorn": "server",
    "httptools": "server",
    "safetensors": "server",
    "torchvision": "vision",
    "PIL": "vision",
    "matplotlib": "plot",
    "plotly": "explore",
}

_RUNS = 10
# Where there is no terminal to draw a bar on.
_TELL_EVERY_S = 20.0
_WIDE = 160


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0, or 2 with the reason on standard error."""
    options = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that cannot show "×" shows "?"; the rest of the answer is worth having.
            stream.reconfigure(errors="replace")
    try:
        options.run(options)
    except TorchSurgeonError as error:
        print(f"torchsurgeon: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        print(
            f"torchsurgeon: this command needs {missing}: pip install 'torchsurgeon[{_EXTRAS[missing]}]'",
            file=sys.stderr,
        )
        return 2
    except BrokenPipeError:
        sys.stderr.close()
        return 1
    except OSError as error:
        print(f"torchsurgeon: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="torchsurgeon", description="Split a PyTorch model between a device and a server."
    )
    parser.add_argument("--version", action="version", version=f"torchsurgeon {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="everything on this machine, over emulated links")
    demo.add_argument("--out", type=Path, default=Path("demo-output"), help="folder for the pictures and the results")
    demo.add_argument(
        "--slow", type=float, default=10.0, metavar="FACTOR", help="how much slower the device is than this machine"
    )
    demo.add_argument("--repeats", type=_count, default=5, help="inferences measured in each setting")
    demo.set_defaults(run=_demo)

    trace = commands.add_parser("trace", help="list a model's layers and partition points")
    _model_arguments(trace)
    trace.add_argument("--json", action="store_true", help="print JSON instead of a table")
    trace.set_defaults(run=_trace)

    doctor = commands.add_parser(
        "doctor", help="tell what splitting a model is like: tracing, opaque parts, cuts that can pay"
    )
    _model_arguments(doctor)
    doctor.set_defaults(run=_doctor)

    profile = commands.add_parser("profile", help="measure each layer's time, memory and energy on this machine")
    _model_arguments(profile)
    profile.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    profile.add_argument("--out", type=Path, metavar="FILE", help="write the profile as JSON")
    profile.add_argument("--repeats", type=int, default=20, help="measured runs, each of the whole model")
    profile.add_argument("--warmup", type=int, default=3, help="runs before them")
    profile.add_argument("--threads", type=_count, help="CPU threads of one inference")
    profile.add_argument("--cooldown", type=float, default=0.0, metavar="SECONDS", help="rest before every 10 repeats")
    profile.add_argument("--no-energy", action="store_true", help="do not meter joules, which takes its time")
    profile.add_argument("--plot", type=Path, metavar="FILE", help="draw the layers as bars, e.g. profile.png")
    profile.add_argument("--trace", type=Path, metavar="FILE", help="write one run for ui.perfetto.dev")
    profile.set_defaults(run=_profile)

    calibrate = commands.add_parser("calibrate", help="time layers of every kind on this machine, to predict models")
    calibrate.add_argument("--out", type=Path, metavar="FILE", required=True, help="write the calibration as JSON")
    calibrate.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    calibrate.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="time to spend, default 300")
    calibrate.add_argument("--threads", type=_count, help="CPU threads of one inference")
    calibrate.add_argument("--seed", type=int, default=0, help="of the networks that are drawn")
    calibrate.add_argument(
        "--from-csv",
        action="append",
        default=[],
        metavar="KIND=FILE",
        help="fit measurements taken elsewhere instead, e.g. conv=conv.csv; docs/prediction.md lists the columns",
    )
    calibrate.add_argument("--name", default="an unnamed device", help="of the device in the CSV files")
    calibrate.set_defaults(run=_calibrate)

    predict = commands.add_parser("predict", help="predict each layer's time on a calibrated device, running nothing")
    _model_arguments(predict)
    predict.add_argument(
        "--device",
        required=True,
        metavar="DEVICE",
        help="a file of torchsurgeon calibrate, or tegra-k1-cpu, tegra-k1-gpu, tesla-k40, xeon-1-thread",
    )
    predict.add_argument("--profile", type=Path, metavar="FILE", help="a measured profile to compare with")
    predict.add_argument("--plot", type=Path, metavar="FILE", help="draw predicted over measured, e.g. predicted.png")
    predict.add_argument("--json", type=Path, metavar="FILE", help="write the prediction as a profile that plan reads")
    predict.set_defaults(run=_predict)

    codecs = commands.add_parser("codecs", help="measure what codecs save and change at the cuts that can pay")
    _model_arguments(codecs)
    codecs.add_argument("--weights", metavar="FILE", help=".safetensors, .pt, or 'default'")
    codecs.add_argument("--sample", type=Path, metavar="DIR", required=True, help="folder of your own images")
    codecs.add_argument("--most", type=_count, default=32, help="samples taken from the folder, default 32")
    codecs.add_argument(
        "--codecs", metavar="NAMES", help="separated by commas, e.g. zstd,int8+zstd,jpeg-75; default all"
    )
    codecs.add_argument(
        "--point", action="append", metavar="POINT", help="an index or a layer's name, for each to take"
    )
    codecs.add_argument("--max-top1-change", type=float, metavar="SHARE", help="predictions a lossy codec may change")
    codecs.add_argument("--min-cosine", type=float, metavar="COSINE", help="likeness of outputs that one must keep")
    codecs.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    codecs.add_argument("--out", type=Path, metavar="FILE", help="write the table as JSON")
    codecs.set_defaults(run=_codecs)

    plan = commands.add_parser("plan", help="find the best cut and codec for a link and an objective, and say why")
    _plan_arguments(plan)
    plan.add_argument("--load", type=float, default=1.0, metavar="K", help="the server takes K times its profile")
    plan.add_argument("--latency", type=float, metavar="SECONDS", help="at most")
    plan.add_argument("--energy", type=float, metavar="JOULES", help="of the device, at most")
    plan.add_argument("--memory", type=float, metavar="MB", help="of the head's weights and tensors, at most")
    plan.add_argument("--min-layers", type=int, default=0, metavar="N", help="run on the device at least")
    plan.add_argument("--no-raw-input", action="store_true", help="let no input of the model leave the device")
    plan.add_argument("--no-server", action="store_true", help="let nothing leave the device")
    plan.add_argument("--frontier", type=Path, metavar="FILE", help="write the rows that can win as JSON")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="draw what each cut costs, e.g. plan.png")
    plan.add_argument("--html", type=Path, metavar="FILE", help="write a page on which link and load can be moved")
    plan.set_defaults(run=_plan)

    sweep = commands.add_parser("sweep", help="the best cut and its gain over a grid of uplink rates and server loads")
    _plan_arguments(sweep)
    sweep.add_argument("--uplinks", default="0.1:1000:41", metavar="FROM:TO:N", help="Mbit/s, N rates between")
    sweep.add_argument("--loads", default="0.1:100:31", metavar="FROM:TO:N", help="times the server's profile")
    sweep.add_argument("--csv", type=Path, metavar="FILE", help="write one line for each pair")
    sweep.add_argument("--plot", type=Path, metavar="FILE", help="draw heat maps, e.g. sweep.png")
    sweep.set_defaults(run=_sweep)

    serve = commands.add_parser("serve", help="serve the tails of models")
    serve.add_argument(
        "models", nargs="+", metavar="NAME=SPEC", help="torchvision:NAME, package.module:factory, or a .pt2 file"
    )
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=_port, default=8000, help="0 takes a free one and says which")
    serve.add_argument(
        "--weights", action="append", default=[], metavar="NAME=FILE", help=".safetensors, .pt, or 'default'"
    )
    serve.add_argument(
        "--input", action="append", default=[], metavar="NAME=SPEC", help="e.g. resnet=x:float32[1,3,320,320]"
    )
    serve.add_argument("--seed", type=int, default=0, help="of random weights")
    serve.add_argument("--threads", type=_count, help="CPU threads of one inference")
    serve.add_argument("--max-batch", type=_count, default=64)
    serve.set_defaults(run=_serve)

    run = commands.add_parser("run", help="run a model split with a server, and show where it is cut and why")
    run.add_argument("spec", metavar="SPEC", help="torchvision:NAME, package.module:factory, or a .pt2 file")
    run.add_argument(
        "--server", action="append", required=True, metavar="URL", help="a torchsurgeon serve; for each to try"
    )
    run.add_argument("--name", help="the model's name on the server; default SPEC's own name")
    run.add_argument("--weights", metavar="FILE", help=".safetensors, .pt, or 'default'; the server's")
    run.add_argument("--input", default="random", metavar="FILE", help="an image, or 'random' numbers")
    run.add_argument("--count", type=_count, metavar="N", help="inferences; default 10, with --watch until interrupted")
    run.add_argument("--interval", type=float, default=0.0, metavar="SECONDS", help="from start to start, at least")
    run.add_argument("--partition", default="auto", help="auto, device, server, an index or a layer's name")
    run.add_argument("--deadline", type=float, metavar="SECONDS", help="of every inference")
    run.add_argument("--fallback", choices=("local", "error"), default="local", help="when no server answers")
    run.add_argument("--watch", action="store_true", help="draw a live view")
    run.set_defaults(run=_run)

    link = commands.add_parser("link", help="emulate a wireless link: a TCP proxy with a rate and a delay")
    link.add_argument("--listen", type=_port, required=True, metavar="PORT", help="0 takes a free one and says which")
    link.add_argument("--to", required=True, metavar="HOST:PORT")
    link.add_argument(
        "--profile", required=True, help="3g, lte, wifi, UP/DOWN/RTT (Mbit/s, s), or trace:UPFILE,DOWNFILE,RTT"
    )
    link.set_defaults(run=_link)
    return parser


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _port(text: str) -> int:
    # getaddrinfo takes 65536 and more, and means another port.
    if not (text.isascii() and text.isdigit()) or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; give one from 0 to 65535")
    return int(text)


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="SPEC", help="torchvision:NAME, package.module:factory, or a .pt2 file")
    parser.add_argument("--input", metavar="SPEC", help="example input, e.g. x:float32[1,3,224,224]")
    parser.add_argument(
        "--leaf", action="append", default=[], metavar="MODULE", help="keep this module whole, as one layer"
    )


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    _model_arguments(parser)
    what = "a measured profile, or the calibration or name of a device to predict for"
    parser.add_argument("--device", required=True, metavar="FILE", help=f"the device: {what}")
    parser.add_argument("--server", required=True, metavar="FILE", help="the server: as the device")
    parser.add_argument(
        "--link", default="lte", help="3g, lte, wifi, lte-2021, 5g-low, 5g-mmwave, or UP/DOWN/RTT (Mbit/s, s)"
    )
    parser.add_argument("--uplink", type=float, metavar="MBIT_S", help="in place of the link's own rate")
    parser.add_argument(
        "--objective",
        default="latency",
        help="latency, energy, throughput, server_time, or a sum of these with weights, e.g. latency=1,energy=0.5",
    )
    parser.add_argument("--codecs", type=Path, metavar="FILE", help="codecs measured by torchsurgeon codecs --out")
    parser.add_argument("--slowdown", type=float, default=1.0, metavar="S", help="the device takes S times its profile")


def _console() -> Console:
    """A terminal as wide as it is; a file or a pipe as wide as any table."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal or "COLUMNS" in os.environ else Console(width=_WIDE)


def _planned(options: argparse.Namespace) -> tuple[dict[str, Any], str | dict[str, float]]:
    """What a plan is made of, and its objective; says where costs are guesses."""
    import warnings

    from torchsurgeon import specs
    from torchsurgeon.codec import CodecTable
    from torchsurgeon.graph import trace
    from torchsurgeon.link import Link
    from torchsurgeon.predict import PredictionWarning, costs_on

    model = specs.load(options.spec, input_spec=options.input)
    graph = trace(model.model, *model.args, leaf_modules=options.leaf, **model.kwargs)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PredictionWarning)
        device, server = costs_on(graph, options.device), costs_on(graph, options.server)
    notes = list(dict.fromkeys(str(warning.message) for warning in caught))
    notes += [
        f"{name}: a bound from data sheets, not a measured device; real times are longer"
        for name, costs in dict(zip((options.device, options.server), (device, server), strict=True)).items()
        if costs.provenance.get("predicted") and costs.interval_s is None
    ]
    for note in notes:
        print(f"torchsurgeon: warning: {note}", file=sys.stderr)
    link = Link.parse(options.link)
    if options.uplink is not None:
        link = dataclasses.replace(link, uplink_bit_s=options.uplink * 1e6)
    parts = {
        "graph": graph,
        "device": device,
        "server": server,
        "link": link,
        "codecs": None if options.codecs is None else CodecTable.load(options.codecs),
    }
    if "=" not in options.objective:
        return parts, str(options.objective)
    weights = {name: _number(text) for name, text in _pairs(options.objective.split(",")).items()}
    return parts, weights


def _plan(options: argparse.Namespace) -> None:
    from torchsurgeon import plan, report

    parts, objective = _planned(options)
    found = plan(
        **parts,
        objective=objective,
        load=options.load,
        slowdown=options.slowdown,
        latency_s=options.latency,
        energy_j=options.energy,
        memory_bytes=None if options.memory is None else options.memory * 1e6,
        min_layers=options.min_layers,
        raw_input=not options.no_raw_input,
        server_allowed=not options.no_server,
    )
    console = _console()
    console.print(report.plan_table(found))
    console.print(found.explain(), highlight=False, markup=False, soft_wrap=True)
    if options.frontier is not None:
        found.frontier.save(options.frontier)
    if options.plot is not None:
        report.plan_picture(parts["graph"], found, options.plot)
    if options.html is not None:
        report.explorer(parts["graph"], found, options.html)


def _sweep(options: argparse.Namespace) -> None:
    from torchsurgeon.plan import Frontier, sweep
    from torchsurgeon.report import sweep_picture, sweep_table

    parts, objective = _planned(options)
    link = parts.pop("link")
    rates, loads = (
        [scale * value for value in _spread(text)] for text, scale in ((options.uplinks, 1e6), (options.loads, 1))
    )
    found = sweep(Frontier.build(**parts), link, rates, loads, objective, options.slowdown)
    _console().print(sweep_table(found))
    if options.csv is not None:
        found.save(options.csv)
    if options.plot is not None:
        sweep_picture(found, options.plot)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise TorchSurgeonError(f"{text!r} is not a number") from None


def _spread(text: str) -> list[float]:
    """The values that FROM:TO:N means, evenly spread in their logarithm."""
    parts = [_number(part) for part in text.split(":")]
    if len(parts) != 3 or not 0 < parts[0] < parts[1] < math.inf or not 2 <= parts[2] <= 1000:
        raise TorchSurgeonError(f"{text!r} is not FROM:TO:N with 0 < FROM < TO and 2 to 1000 values")
    count = int(parts[2])
    return [parts[0] * (parts[1] / parts[0]) ** (i / (count - 1)) for i in range(count)]


def _trace(options: argparse.Namespace) -> None:
    from torchsurgeon import specs
    from torchsurgeon.graph import trace

    model = specs.load(options.spec, input_spec=options.input)
    graph = trace(model.model, *model.args, leaf_modules=options.leaf, **model.kwargs)
    if options.json:
        print(json.dumps(graph.to_json()))
        return
    from torchsurgeon.report import graph_table

    _console().print(graph_table(graph))


def _doctor(options: argparse.Namespace) -> None:
    from torchsurgeon import doctor, specs
    from torchsurgeon.report import diagnosis_text

    model = specs.load(options.spec, input_spec=options.input)
    found = doctor.examine(model.model, *model.args, leaf_modules=options.leaf, **model.kwargs)
    _console().print(diagnosis_text(found))


def _profile(options: argparse.Namespace) -> None:
    import warnings

    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils import _pytree

    from torchsurgeon import report, specs
    from torchsurgeon.graph import trace
    from torchsurgeon.profile import NoisyProfileWarning, find_device, layer_trace, profile

    device = find_device(options.device)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    loaded = specs.load(options.spec, input_spec=options.input)
    loaded.model.to(device)
    args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (loaded.args, loaded.kwargs))
    graph = trace(loaded.model, *args, leaf_modules=options.leaf, **kwargs)
    console = _console()
    with Progress(console=Console(stderr=True), transient=True) as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", NoisyProfileWarning)
        task = bar.add_task("profiling", total=None)
        measured = profile(
            graph,
            device,
            repeats=options.repeats,
            warmup=options.warmup,
            meter=None if options.no_energy else "auto",
            cooldown_s=options.cooldown,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if options.out is not None:
        measured.save(options.out)
    console.print(report.profile_table(graph, measured))
    console.print(str(measured), highlight=False, markup=False)
    for warning in caught:
        print(f"torchsurgeon: warning: {warning.message}", file=sys.stderr)
    if options.plot is not None:
        report.profile_picture(graph, measured, options.plot)
    if options.trace is not None:
        layer_trace(graph, device).save(options.trace)


def _calibrate(options: argparse.Namespace) -> None:
    import warnings

    import torch
    from rich.console import Console
    from rich.progress import Progress

    from torchsurgeon.predict import Predictor, ThrottledWarning, calibrate
    from torchsurgeon.report import calibration_table

    if options.from_csv:
        predictor = Predictor.from_csv(_pairs(options.from_csv), options.name)
        predictor.save(options.out)
        _console().print(calibration_table(predictor))
        return
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    with Progress(console=Console(stderr=True), transient=True) as bar, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ThrottledWarning)
        task = bar.add_task("calibrating", total=options.budget)
        told_s = 0.0

        def tell(spent_s: float, budget_s: float, what: str) -> None:
            nonlocal told_s
            bar.update(task, completed=spent_s, description=what)
            if not sys.stderr.isatty() and spent_s - told_s >= _TELL_EVERY_S:
                told_s = spent_s
                print(f"{spent_s:.0f} of {budget_s:g} s: {what}", file=sys.stderr, flush=True)

        try:
            predictor = calibrate(
                options.device,
                budget_s=options.budget,
                out=options.out,
                seed=options.seed,
                progress=tell,
            )
        except KeyboardInterrupt:
            bar.stop()
            print(f"torchsurgeon: interrupted; the same command goes on with {options.out}", file=sys.stderr)
            raise
    _console().print(calibration_table(predictor))
    print(f"written to {options.out}")
    for warning in caught:
        print(f"torchsurgeon: warning: {warning.message}", file=sys.stderr)


def _predict(options: argparse.Namespace) -> None:
    import warnings

    from torchsurgeon import report, specs
    from torchsurgeon.graph import trace
    from torchsurgeon.predict import PredictionWarning, load_device
    from torchsurgeon.profile import LayerProfile

    if options.plot is not None and options.profile is None:
        raise TorchSurgeonError("--plot draws predictions over measurements; give these with --profile FILE")
    predictor = load_device(options.device)
    model = specs.load(options.spec, input_spec=options.input)
    graph = trace(model.model, *model.args, leaf_modules=options.leaf, **model.kwargs)
    measured = None if options.profile is None else LayerProfile.load(options.profile)
    if measured is not None:
        measured.check(graph)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PredictionWarning)
        predicted = predictor.predict(graph)
    if options.json is not None:
        predicted.save(options.json)
    _console().print(report.prediction_table(graph, predictor, predicted, measured))
    notes = [] if measured is None else [f"{options.profile}: {what}" for what in predictor.mismatches(measured)]
    for note in [*(warning.message for warning in caught), *notes]:
        print(f"torchsurgeon: warning: {note}", file=sys.stderr)
    if measured is not None and options.plot is not None:
        report.prediction_picture(graph, predicted, measured, options.plot)


def _codecs(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console
    from rich.progress import Progress
    from torch.utils import _pytree

    from torchsurgeon import codec, specs
    from torchsurgeon.graph import trace
    from torchsurgeon.profile import find_device
    from torchsurgeon.report import codec_table

    device = find_device(options.device)
    loaded = specs.load(options.spec, input_spec=options.input, weights=options.weights)
    loaded.model.to(device)
    args, kwargs = _pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (loaded.args, loaded.kwargs))
    graph = trace(loaded.model, *args, leaf_modules=options.leaf, **kwargs)
    budget = None
    if options.max_top1_change is not None or options.min_cosine is not None:
        budget = codec.Budget(max_top1_change=options.max_top1_change, min_cosine=options.min_cosine)
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring codecs", total=None)
        measured = codec.measure(
            graph,
            codec.image_sample(graph, options.sample, options.most),
            None if options.codecs is None else options.codecs.split(","),
            points=None if options.point is None else [int(p) if p.isdigit() else p for p in options.point],
            budget=budget,
            device=device,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if options.out is not None:
        measured.save(options.out)
    _console().print(codec_table(measured))


def _serve(options: argparse.Namespace) -> None:
    import torch

    from torchsurgeon import serve
    from torchsurgeon.profile import profile

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    models, weights, inputs = _pairs(options.models), _pairs(options.weights), _pairs(options.input)
    for name in (*weights, *inputs):
        if name not in models:
            raise TorchSurgeonError(f"no model {name!r} is served; --weights and --input take {', '.join(models)}")
    serve.run(
        models,
        options.host,
        options.port,
        weights=weights,
        input_specs=inputs,
        seed=options.seed,
        max_batch=options.max_batch,
        profiler=lambda graph: profile(graph, meter=None).to_json(),
    )


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise TorchSurgeonError(f"{text!r} is not NAME=VALUE")
        if name in pairs:
            raise TorchSurgeonError(f"the name {name!r} is given twice")
        pairs[name] = value
    return pairs


def _link(options: argparse.Namespace) -> None:
    from torchsurgeon.emulate import LinkEmulator, parse_profile

    host, colon, port = options.to.rpartition(":")
    if not colon or not (port.isascii() and port.isdigit()):
        raise TorchSurgeonError(f"--to {options.to!r} is not HOST:PORT")
    link = parse_profile(options.profile)
    emulator = LinkEmulator(options.listen, host.strip("[]"), int(port), link)
    print(f"ready: {link}; listening on {emulator.host}:{emulator.port}, to {options.to}", flush=True)
    emulator.run()


def _run(options: argparse.Namespace) -> None:
    from torchsurgeon import codec, specs, watch
    from torchsurgeon.module import SplitModule

    model = specs.load(options.spec, weights=options.weights)
    args, kwargs = model.args, model.kwargs
    partition: str | int = int(options.partition) if options.partition.isdigit() else options.partition
    with SplitModule(
        model.model,
        kwargs or args,
        server=options.server,
        name=options.name or specs.short_name(options.spec),
        partition=partition,
        fallback=options.fallback,
        deadline_s=options.deadline,
    ) as split:
        if options.input != "random":
            args, kwargs = (codec.image_call(split.graph, options.input),), {}
        count = options.count or (None if options.watch else _RUNS)
        answer = watch.run(split, args, kwargs, count=count, interval_s=options.interval, live=options.watch)
        print(watch.answer_text(answer))


def _demo(options: argparse.Namespace) -> None:
    from torchsurgeon.demo import run

    # The default would end this process without a word and leave its server and links running.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run(options.out, slow=options.slow, repeats=options.repeats)
