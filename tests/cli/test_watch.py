"""``torchsurgeon run``: what a user sees of a split model at work."""

from __future__ import annotations

import dataclasses
import io
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy
import pytest
import torch
from factories import scores
from PIL import Image
from rich.console import Console
from serving import process
from tcp import reserved_port

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.cli import watch
from torchsurgeon.emulate import LinkEmulator
from torchsurgeon.serve import ModelRegistry, Server, create_app

SPEC = "factories:scores"


@pytest.fixture
def server() -> Iterator[Server]:
    registry = ModelRegistry()
    registry.load("scores", SPEC)
    with Server(create_app(registry)) as running:
        yield running
    registry.close()


def run(*arguments: str) -> int:
    return cli.main(["run", SPEC, *arguments])


def test_each_inference_is_a_line_and_the_run_ends_with_a_summary_and_the_answer(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--server", server.url, "--count", "3", "--partition", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["1", "2", "3"]
    assert all("cut after 0" in line for line in lines[:3])
    assert lines[3].startswith("3 inferences, median ")
    assert lines[3].endswith("none degraded")
    assert "cut: after 0 3×" in lines[3]
    assert lines[4].startswith("answer: float32[1, 7], largest: ")


@pytest.mark.parametrize(
    ("times_ms", "says"),
    [
        ([5], "1 inferences, median 5.0 ms; "),
        ([90, 30], "2 inferences, median 60.0 ms, middle half 45.0 ms … 75.0 ms; "),
        ([1, 2, 3, 4, 9], "5 inferences, median 3.0 ms, middle half 2.0 ms … 4.0 ms; "),
    ],
)
def test_the_summary_tells_the_middle_half_of_what_was_measured(times_ms: list[float], says: str) -> None:
    log = watch.Log()
    log.done = len(times_ms)
    log.latencies_s.extend(one / 1e3 for one in times_ms)
    assert watch.summary(log).startswith(says)


def test_an_image_is_an_input(server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(numpy.arange(300, dtype=numpy.uint8).reshape(10, 10, 3)).save(path)
    assert run("--server", server.url, "--count", "1", "--partition", "server", "--input", str(path)) == 0
    with_image = capsys.readouterr().out.splitlines()[-1]
    assert run("--server", server.url, "--count", "1", "--partition", "server") == 0
    assert capsys.readouterr().out.splitlines()[-1] != with_image


def test_a_deadline_that_must_be_in_milliseconds_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["--server", "http://127.0.0.1:9", "--count", "1", "--partition", "device", "--deadline"]
    assert run(*line, "200") == 0
    assert "--deadline 200 s is longer than any server is waited for; write 200ms" in capsys.readouterr().err
    assert run(*line, "20000ms") == 0
    assert capsys.readouterr().err == ""


def test_a_server_that_is_gone_is_said_in_lines_and_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--server", "http://127.0.0.1:9", "--count", "2", "--partition", "1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "no server is in use" in lines[0]
    assert lines[2].endswith("degraded: unserved 2×")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--server", "http://127.0.0.1:9", "--fallback", "error", "--partition", "1"],
            "does not answer, or broke off",
        ),
        (["--server", "ftp://x"], "not a server's URL"),
        (["--server", "http://127.0.0.1:9", "--partition", "nowhere"], "nowhere"),
        (["--server", "http://127.0.0.1:9", "--input", "none.png", "--partition", "device"], "none.png"),
        (["--server", "http://127.0.0.1:9", "--deadline", "-1"], "deadline"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--count", "1") == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert says in error[0]


def test_the_live_view_shows_choice_estimates_times_and_what_went_wrong(server: Server) -> None:
    torch.set_num_threads(1)
    model, x = scores()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = scores()[0].eval()
    here = ts.profile(ts.trace(model, x), meter=None)
    log = watch.Log(40)
    # Behind such a link a busy machine's hiccup is no late answer, and behind such a device the link is worth it.
    far, slow = ts.Link("far", 1e8, 1e8, 0.3), here.scaled(100.0 / here.total_s)
    with (
        LinkEmulator(0, "127.0.0.1", server.port, far) as link,
        ts.SplitModule(
            model,
            x,
            server=f"http://127.0.0.1:{link.port}",
            name="scores",
            link=far,
            device_profile=slow,
            server_profile=here,
        ) as split,
    ):
        for _ in range(3):
            split(x)
            assert split.last is not None
            log.add(split.last)
        text = rendered(watch.view(split, log))
        assert split.last.server == f"http://127.0.0.1:{link.port}"
        server.stop()
        split(x)
        log.add(split.last)
        broken = rendered(watch.view(split, log))
        for i in range(30):
            log.cuts[f"after encoder.layers.encoder_layer_{i}.self_attention"] += 30 - i
            log.done += 30 - i
        crowded = watch.view(split, log)
    for width, height in ((80, 24), (60, 24), (40, 16)):
        lines = rendered(crowded, width, height).splitlines()
        # One line is left for the cursor.
        assert len(lines) < height
        assert {len(line) for line in lines} == {width}
        assert lines[-1].startswith("╰")
        assert lines[-1].endswith("╯")
        assert "degraded: unavailable" in " ".join(lines)
        assert any(line.startswith("│ █") and "█ │" in line for line in lines)
        if width > 40:
            for shown in ("slow-down", " more", "breaker", "up to"):
                assert shown in " ".join(lines), (width, lines)
    assert "scores, inference 3 of 40" in text
    for shown in (
        "took",
        "expected",
        "answered by",
        "Mbit/s",
        "round trip",
        "server's load",
        "slow-down",
        "■",
        "breaker closed",
    ):
        assert shown in text
    assert "degraded" not in text
    assert "degraded: unavailable" in broken
    assert all(len(line) <= 80 for line in text.splitlines())


def test_a_clock_that_stepped_back_spoils_no_view() -> None:
    model, x = scores()
    log = watch.Log()
    with ts.SplitModule(model.eval(), x, partition="device") as split:
        split(x)
        assert split.last is not None
        for total_s in (-3600.0, split.last.total_s):
            log.add(dataclasses.replace(split.last, total_s=total_s))
            assert "▁" in rendered(watch.view(split, log))
    assert min(log.latencies_s) == 0


def test_an_interrupt_ends_a_watched_run_with_its_summary() -> None:
    model, x = scores()
    calls = itertools.count()

    class Interrupted(ts.SplitModule):
        def forward(self, *args: object, **kwargs: object) -> object:
            if next(calls) == 4:
                raise KeyboardInterrupt
            return super().forward(*args, **kwargs)

    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with Interrupted(model.eval(), x, partition="device") as split:
        watch.run(split, (x,), {}, live=True, console=console)
    assert isinstance(console.file, io.StringIO)
    assert "4 inferences, median" in console.file.getvalue()


def rendered(view: object, width: int = 80, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, record=True)
    console.print(view)
    return console.export_text()


@pytest.fixture(scope="module")
def wide() -> Iterator[str]:
    """A server, in a process of its own, of a model whose last bits depend on the number of threads; it has one."""
    with reserved_port() as port, process("wide", "factories:wide", port):
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("always::torchsurgeon.MismatchWarning")
def test_run_says_whether_bits_are_the_same(wide: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["run", "factories:wide", "--server", wide, "--count", "2", "--partition", "server"]
    assert cli.main(arguments) == 0
    *lines, summary, _ = capsys.readouterr().out.splitlines()
    assert all("same to rounding" in line for line in lines)
    assert "same to rounding 2×" in summary
    assert cli.main([*arguments, "--exact"]) == 0
    printed = capsys.readouterr()
    assert "same bits 2×; degraded: unserved 2×" in printed.out
    (warning,) = printed.err.splitlines()
    assert warning.startswith("torchsurgeon: warning: ")
    assert "CPU threads (2 here, 1 on the server)" in warning
    assert cli.main([*arguments, "--exact", "--fallback", "error"]) == 2
    assert "Start the server with --threads 2" in " ".join(capsys.readouterr().err.split())
    assert cli.main([*arguments, "--exact", "--threads", "1", "--fallback", "error"]) == 0
    assert "same bits 2×; none degraded" in capsys.readouterr().out


@pytest.mark.usefixtures("two_threads")
def test_doctor_compares_with_a_server(wide: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "factories:wide", "--server", wide]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{wide} gives the same answers as this device to rounding only, because these differ: CPU threads (2 here, "
        "1 on the server)"
    )
    torch.set_num_threads(1)
    assert cli.main(["doctor", "factories:wide", "--server", wide]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{wide} gives the same bits as this device"
    assert cli.main(["doctor", "factories:tiny", "--server", wide, "--name", "wide"]) == 2
    assert "model 'wide' of the server is another model" in " ".join(capsys.readouterr().err.split())
