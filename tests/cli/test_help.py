"""Help, completion and an interrupt: what the command line does before it loads PyTorch."""

from __future__ import annotations

import argparse
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torchvision
from paths import environment

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.cli import completion
from torchsurgeon.link import PRESETS
from torchsurgeon.models import specs

COMMANDS: dict[str, argparse.ArgumentParser] = next(
    action.choices  # type: ignore[misc]
    for action in cli.parser()._actions
    if isinstance(action, argparse._SubParsersAction)
)
WITHOUT_TORCH = """
import sys
sys.modules["torch"] = sys.modules["numpy"] = sys.modules["rich"] = None
from torchsurgeon import cli
cli.main()
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_two_examples_that_parse(name: str) -> None:
    _, _, text = COMMANDS[name].format_help().partition("examples:\n")
    examples = [shlex.split(line) for line in text.splitlines()]
    assert len(examples) >= 2
    for program, *arguments in examples:
        assert program == "torchsurgeon"
        assert arguments[0] == name
        cli.parser().parse_args(arguments)


def test_the_points_of_examples_are_points_of_their_models() -> None:
    named: dict[str, set[int | str]] = {}
    for parser in COMMANDS.values():
        for line in parser.format_help().partition("examples:\n")[2].splitlines():
            given = vars(cli.parser().parse_args(shlex.split(line)[1:]))
            points = given.get("points") or given.get("point") or []
            if points and "spec" in given:
                named.setdefault(given["spec"], set()).update([points] if isinstance(points, str) else points)
    assert len(named) >= 3
    for spec, points in named.items():
        loaded = specs.load(spec)
        graph = ts.trace(loaded.model, *loaded.args, verify=False, **loaded.kwargs)
        for point in points:
            graph.point(point)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_what_the_command_does_and_every_default(name: str) -> None:
    assert (COMMANDS[name].description or "").endswith(".")
    for action in COMMANDS[name]._actions:
        assert action.help, action.dest
        if action.option_strings and action.dest != "help" and not action.required:
            assert "(default: " in action.help, action.dest
    assert "None" not in COMMANDS[name].format_help()
    assert "[]" not in COMMANDS[name].format_help().replace("float32[]", "")


@pytest.mark.parametrize("line", ["--version", "--help", *(f"{name} --help" for name in COMMANDS)])
def test_help_and_version_need_neither_torch_nor_extras(line: str) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *line.split()],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith(("torchsurgeon ", "usage: torchsurgeon "))


def test_a_bare_command_shows_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert capsys.readouterr().out == cli.parser().format_help()


@pytest.mark.parametrize("name", ["profile", "calibrate", "serve"])
def test_help_names_the_backends(name: str) -> None:
    told = " ".join(COMMANDS[name].format_help().split()).replace("- ", "-")
    assert all(backend in told for backend in ("onnxruntime", "openvino", "openvino:bf16", "inductor", "aot")), told


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("trace absent.pt2", "there is no file 'absent.pt2'"),
        ("profile absent.pt2", "there is no file 'absent.pt2'"),
        ("doctor x:y --weights absent.pt", "there is no file 'absent.pt'"),
        ("run x:y --server http://127.0.0.1:9 --weights absent.pt", "there is no file 'absent.pt'"),
        ("predict x:y --device absent.json", "there is no file absent.json, and no reference device of that name"),
        ("predict x:y --device k40-gpu --profile absent.json", "absent.json cannot be read: there is no such file"),
        ("plan x:y --device absent.json --server k40-gpu", "there is no file absent.json, and no reference device"),
        ("plan x:y --device k40-gpu --server k40-gpu --codecs absent.json", "absent.json cannot be read"),
        ("sweep x:y --device k40-gpu --server absent.json", "there is no file absent.json, and no reference device"),
        ("simulate absent.json --servers 1 --rate 1", "absent.json cannot be read"),
        ("codecs x:y --sample . --frontier absent.json", "absent.json cannot be read"),
        ("distill absent.pt2 --point 1 --data . --out one.student", "there is no file 'absent.pt2'"),
        ("export x:y --out bundle --device absent.json", "there is no file absent.json, and no reference device"),
    ],
)
def test_a_file_that_is_not_there_is_told_without_torch(line: str, says: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH.replace("cli.main()", "sys.exit(cli.main())"), *line.split()],
        capture_output=True,
        text=True,
        env=environment(),
        cwd=tmp_path,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("torchsurgeon: ")
    assert says in done.stderr


def completions(line: str, folder: Path) -> set[str]:
    """What a shell offers for ``line`` in ``folder``, where torch cannot be imported."""
    for name in ("net.pt2", "device.json", "photo.png", "notes.txt"):
        (folder / name).touch()
    offered = folder / "offered"
    variables = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(offered),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run(
        command, env=environment(**variables), cwd=folder, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return {word.rstrip() for word in offered.read_text().splitlines()}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("torchsurgeon pro", {"profile"}),
        ("torchsurgeon trace torchvision:resnet5", {"torchvision:resnet50"}),
        ("torchsurgeon trace n", {"net.pt2"}),
        ("torchsurgeon serve r18=torchvision:resnet18", {"r18=torchvision:resnet18"}),
        ("torchsurgeon serve a=torchvision:alexnet --weights a=d", {"a=default"}),
        ("torchsurgeon profile x:y --device c", {"cpu", "cuda"}),
        ("torchsurgeon predict x:y --device te", {"tegra-k1-cpu", "tegra-k1-gpu"}),
        ("torchsurgeon plan x:y --server d", {"device.json"}),
        ("torchsurgeon plan x:y --link lte", {"lte", "lte-2021"}),
        ("torchsurgeon plan x:y --objective th", {"throughput"}),
        ("torchsurgeon run x:y --partition de", {"device"}),
        ("torchsurgeon run x:y --input p", {"photo.png"}),
        ("torchsurgeon run x:y --fallback ", {"local", "error"}),
        ("torchsurgeon link --profile wi", {"wifi"}),
    ],
)
def test_completion_offers_what_fits(line: str, words: set[str], tmp_path: Path) -> None:
    assert completions(line, tmp_path) == words


def test_completion_knows_the_names_there_are() -> None:
    assert tuple(PRESETS) == completion.LINKS
    assert ts.reference_devices() == completion.REFERENCE_DEVICES
    assert tuple(name for name in ts.reference_devices() if ts.reference_device(name).is_bound) == completion.BOUNDS
    assert completion.torchvision_models() == torchvision.models.list_models()


def test_an_interrupt_while_torch_loads_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import time\n"
        "print('loading', flush=True)\n"
        "try:\n    time.sleep(60)\n"
        "except BaseException as error:\n    raise ImportError('what a compiled module makes of it') from error\n"
    )
    # A background job of a shell is started with the signal ignored.
    program = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from torchsurgeon.cli import main; sys.exit(main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", program, "trace", "factories:tiny"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(tmp_path),
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "loading\n"
    child.send_signal(signal.SIGINT)
    out, error = child.communicate(timeout=30)
    assert (child.returncode, out, error) == (130, "", "torchsurgeon: interrupted\n")


def test_an_interrupt_that_is_ignored_or_handled_elsewhere_stays_so() -> None:
    from torchsurgeon.cli.screen import loading

    for handler in (signal.SIG_IGN, lambda *_: None):
        before = signal.signal(signal.SIGINT, handler)
        try:
            with loading():
                assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGINT) is handler
        finally:
            signal.signal(signal.SIGINT, before)
