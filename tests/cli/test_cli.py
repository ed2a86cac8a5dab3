"""The command line: what a user types, and what they are told when it is wrong."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import parallel, tiny
from paths import environment

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.cli.screen import advising
from torchsurgeon.tracing import tracer
from torchsurgeon.transport import HttpTransport

SPEC = "factories:tiny"


@contextmanager
def command(*arguments: str, stderr: int | None = None) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "torchsurgeon", *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env=environment(),
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()  # type: ignore[union-attr]


def ready(process: subprocess.Popen[str]) -> int:
    assert process.stdout is not None
    for line in process.stdout:
        found = re.search(r"127\.0\.0\.1:(\d+)", line)
        if line.startswith("ready") and found:
            return int(found[1])
    raise AssertionError(f"the command ended with {process.wait()}")


def test_trace_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trace", SPEC, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["format"] == "torchsurgeon.graph/1"
    assert [layer["name"] for layer in told["layers"]] == ["0", "1", "2", "3"]
    assert [point["size_bytes"] for point in told["points"]] == [768, 576, 576, 576, 8]
    assert told["layers"][3]["flops"] == 2 * 144 * 2


def test_trace_prints_a_table(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert cli.main(["trace", "torchvision:resnet18", "--input", "x:float32[1,3,64,64]"]) == 0
    out = capsys.readouterr().out
    assert "69 layers, 70 partition points" in out
    assert "layer1.0.relu_1" in out
    assert "N×64×16×16" in out
    assert " in 2" in out
    assert "nothing" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["trace", "torchvision:resnet19"], "resnet18"),
        (["trace", "nothing"], "SPEC"),
        (["trace", SPEC, "--leaf", "absent"], "absent"),
        (["serve", "mine:f"], "a served model must be NAME=SPEC; got 'mine:f'; such as f=mine:f"),
        (["serve", f"a={SPEC}", "--weights", "w.pt"], "--weights must be NAME=FILE; got 'w.pt'"),
        (["serve", f"a={SPEC}", "--leaf", "0"], "--leaf must be NAME=MODULE; got '0'"),
        (["serve", f"a={SPEC}", f"a={SPEC}"], "twice"),
        (["link", "--listen", "0", "--to", "nowhere", "--profile", "lte"], "HOST:PORT"),
        (["link", "--listen", "0", "--to", "127.0.0.1:1", "--profile", "6g"], "3g, lte, wifi"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("torchsurgeon: ")
    assert reason in captured.err
    assert "Traceback" not in captured.err


def test_serve_and_link_carry_a_split_module() -> None:
    model, x = tiny()
    with command("serve", f"tiny={SPEC}", "--port", "0", "--threads", "1", "--seed", "3") as server:
        port = ready(server)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            model = tiny()[0].eval()
        with command("link", "--listen", "0", "--to", f"127.0.0.1:{port}", "--profile", "80/80/0.01") as link:
            url = f"http://127.0.0.1:{ready(link)}"
            with ts.SplitModule(model, x, server=url, name="tiny") as split, torch.no_grad():
                assert torch.equal(split(x), model(x))
                for point in split.graph.points:
                    split.partition = point.index
                    assert torch.equal(split(x), model(x))
                assert split.link is not None
                assert split.link.round_trip_s >= 0.01
        with HttpTransport(f"http://127.0.0.1:{port}") as direct:
            assert "layers" in direct.get_json("/v2/models/tiny/profile")
        server.send_signal(signal.SIGINT)
        assert server.wait(20) in (0, 130)


def test_a_server_that_is_interrupted_says_that_it_stops_and_no_more() -> None:
    with command("serve", f"tiny={SPEC}", "--port", "0", stderr=subprocess.STDOUT) as server:
        ready(server)
        server.send_signal(signal.SIGINT)
        assert server.stdout is not None
        said = server.stdout.read()
        assert re.fullmatch(r"(stopping: 0 .*\nstopped after .*: 0 .*\n)?(torchsurgeon: interrupted\n)?", said), said


def test_modules_kept_whole_on_both_sides_agree_and_on_one_side_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with command("serve", "net=factories:nested", "--leaf", "net=0", "--leaf", "net=1", "--port", "0") as server:
        url = f"http://127.0.0.1:{ready(server)}"
        run = ["run", "factories:nested", "--name", "net", "--server", url, "--partition", "1", "--fallback", "error"]
        assert cli.main([*run, "--leaf", "0", "--leaf", "1", "--count", "1"]) == 0
        assert cli.main([*run, "--leaf", "1", "--count", "1"]) == 2
    assert re.search(r"another graph.*same leaf_modules \(kept whole here: 1\)", capsys.readouterr().err)


@pytest.mark.parametrize("arguments", [["trace", SPEC], ["doctor", SPEC]])
@pytest.mark.parametrize("verifies", [True, False])
def test_no_verify_runs_nothing_to_compare(
    arguments: list[str], verifies: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compared: list[Any] = []
    monkeypatch.setattr(tracer, "verify_steps", lambda *args, **options: compared.append(args) or ())
    assert cli.main(arguments if verifies else [*arguments, "--no-verify"]) == 0
    assert len(compared) == verifies


def test_serve_and_run_take_no_verify(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tracer, "verify_steps", lambda *args, **options: pytest.fail("it was compared"))
    with command("serve", f"tiny={SPEC}", "--no-verify", "--port", "0") as server:
        url = f"http://127.0.0.1:{ready(server)}"
        run = ["run", SPEC, "--name", "tiny", "--server", url, "--partition", "1", "--no-verify", "--count", "1"]
        assert cli.main(run) == 0


def test_serve_ends_when_a_model_cannot_be_loaded() -> None:
    with command("serve", "a=torchvision:nothing", "--port", "0") as server:
        assert server.wait(60) == 2


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.strip() == f"torchsurgeon {metadata.version('torchsurgeon')}"


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_a_plan_with_a_bound_is_refused_unless_it_is_allowed(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    spec = "torchvision:squeezenet1_1"
    line = [command, spec, "--device", "jetson-orin-nano", "--server", "k40-gpu", "--link", "lte"]
    assert cli.main(line) == 2
    told = capsys.readouterr().err
    assert "jetson-orin-nano: a bound from data sheets" in told
    assert "--allow-bounds" in told
    assert cli.main([*line, "--allow-bounds"]) == 0
    assert "jetson-orin-nano: a bound from data sheets" in capsys.readouterr().err
    # A bound stays one when its prediction comes from a file.
    profile = str(tmp_path / "profile.json")
    assert cli.main(["predict", spec, "--device", "jetson-orin-nano", "--json", profile]) == 0
    capsys.readouterr()
    assert cli.main([command, spec, "--device", profile, "--server", "k40-gpu"]) == 2
    assert "profile.json: a bound from data sheets" in capsys.readouterr().err


def test_tables_in_a_pipe_are_not_cut_short(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert cli.main(["predict", "torchvision:squeezenet1_1", "--device", "xeon-1-thread"]) == 0
    assert "features.12.expand3x3_activation" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("plan absent:f --device absent.json --server k40-gpu", "absent.json"),
        ("plan absent:f --device k40-gpu --server absent.json", "absent.json"),
        ("plan absent:f --device k40-gpu --server k40-gpu --codecs absent.json", "absent.json"),
        ("plan absent:f --device k40-gpu --server k40-gpu --link 6g", "'6g'"),
        ("plan absent:f --device k40-gpu --server k40-gpu --objective latency=x", "'x'"),
        ("plan absent:f --device k40-gpu --server k40-gpu --objective speed", "'speed'"),
        ("sweep absent:f --device absent.json --server k40-gpu", "absent.json"),
        ("sweep absent:f --device k40-gpu --server k40-gpu --uplinks 5:1:3", "'5:1:3'"),
        ("predict absent:f --device absent.json", "absent.json"),
        ("predict absent:f --device k40-gpu --profile absent.json", "absent.json"),
        ("codecs absent:f --sample absent-folder", "absent-folder"),
        ("plan absent:f --device k40-gpu --server k40-gpu --frontier no/x.json", "no/x.json cannot be written"),
        ("plan absent:f --device k40-gpu --server k40-gpu --html no/x.html", "no/x.html cannot be written"),
        ("sweep absent:f --device k40-gpu --server k40-gpu --csv no/x.csv", "no/x.csv cannot be written"),
        ("predict absent:f --device k40-gpu --json no/x.json", "no/x.json cannot be written"),
        ("codecs absent:f --sample tests --out no/x.json", "no/x.json cannot be written"),
        ("profile absent:f --out no/x.json", "no/x.json cannot be written"),
        ("profile absent:f --trace no/x.json", "no/x.json cannot be written"),
        ("run absent:f --server http://127.0.0.1:9 --input absent.png", "'absent.png'"),
        ("run absent:f --server http://127.0.0.1:9 --weights absent.pt", "'absent.pt'"),
    ],
)
def test_a_missing_file_or_a_wrong_number_is_told_before_the_model_is_loaded(
    line: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(line.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("torchsurgeon: ")
    assert reason in captured.err
    assert "absent:f" not in captured.err


@pytest.mark.parametrize(
    "line",
    [
        "profile {}:f --repeats {}",
        "serve {}",
        "link --listen {} --to a:1 --profile lte",
        "link --listen 0 --to {} --profile lte",
        "link --listen 0 --to a:1 --profile {}",
        "calibrate --out x.json --device {}",
        "profile factories:tiny --device {}",
        "profile factories:tiny --leaf {}",
        "plan a:f --device k40-gpu --server k40-gpu --link {}",
        "plan a:f --device k40-gpu --server k40-gpu --objective {}",
        "predict factories:tiny --device {}",
        "run factories:tiny --server http://127.0.0.1:9 --partition {}",
        "demo --slow {}",
        "plan a:f --device {} --server k40-gpu",
        "sweep a:f --device k40-gpu --server k40-gpu --loads {}",
        "trace {}",
        "trace {}.pt2",
        "trace torchvision:{}",
        "trace {}:f",
        "trace factories:{}",
        "trace factories:tiny --input {}",
    ],
)
def test_a_mistake_quotes_at_most_300_characters_of_an_argument(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = cli.main(line.replace("{}", "x" * 5000).split())
    except SystemExit as stop:
        status = int(str(stop.code))
    assert status == 2
    assert sum(map(len, re.findall("x{20,}", capsys.readouterr().err))) <= 300


def test_a_noisy_profile_advises_what_the_command_has(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torchsurgeon.profiling.measure._NOISY_SPREAD", -1.0)
    assert cli.main(["profile", SPEC, "--no-energy", "--repeats", "4"]) == 0
    told = capsys.readouterr().err
    assert "4 runs differ widely: the middle half spans" in told
    assert "--repeats" in told
    assert "--cooldown" in told
    model, x = tiny()
    with warnings.catch_warnings(), advising():
        warnings.simplefilter("always", ts.NoisyProfileWarning)
        ts.profile(ts.trace(model.eval(), x), repeats=4, meter=None)
    told = capsys.readouterr().err
    assert told.startswith("torchsurgeon: warning: 4 runs differ widely: the middle half spans")
    assert "start this command again" in told
    assert "repeats" not in told


def test_only_the_own_warnings_are_printed_as_a_commands(capsys: pytest.CaptureFixture[str]) -> None:
    others: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
        with advising():
            warnings.showwarning(ts.MismatchWarning("another model"), ts.MismatchWarning, "file.py", 1)
            warnings.showwarning(UserWarning("of another library"), UserWarning, "file.py", 1)
    assert others == ["of another library"]
    assert capsys.readouterr().err == "torchsurgeon: warning: another model\n"


def written(folder: Path) -> dict[str, str]:
    """A file of each kind that commands read, by kind."""
    model, x = tiny()
    graph = ts.trace(model.eval(), x)
    profile = ts.profile(graph, repeats=3, meter=None)
    files = {kind: str(folder / f"{kind}.json") for kind in ("profile", "calibration", "frontier")}
    profile.save(files["profile"])
    ts.Frontier.build(graph, profile, profile).save(files["frontier"])
    ts.reference_device("k40-gpu").save(files["calibration"])
    return files


@pytest.mark.filterwarnings("ignore::torchsurgeon.NoisyProfileWarning")
def test_a_file_of_another_kind_names_the_command_that_writes_the_right_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = written(tmp_path)
    both = ["--device", "k40-gpu", "--server", "k40-gpu"]
    for line, needed, held in (
        (["predict", SPEC, "--device", files["profile"]], "calibrate", "a profile (torchsurgeon profile)"),
        (["predict", SPEC, "--device", "k40-gpu", "--profile", files["frontier"]], "profile", "a frontier"),
        (["simulate", files["profile"], "--servers", "1", "--rate", "1"], "plan --frontier", "a profile"),
        (["plan", SPEC, *both, "--codecs", files["calibration"]], "codecs --out", "a calibration"),
        (["plan", SPEC, "--device", files["frontier"], "--server", "k40-gpu"], "profile", "a frontier"),
    ):
        assert cli.main(line) == 2
        told = capsys.readouterr().err
        assert f"(torchsurgeon {needed}) is needed here, and this is {held}" in told
        assert "again" not in told


def test_a_codec_is_fitted_measured_and_served(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(12):
        pixels = torch.randint(256, (3, 3, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).resize((8, 8)).save(tmp_path / f"{number}.png")
    path = tmp_path / "first.fitted"
    line = ["codecs", SPEC, "--sample", str(tmp_path), "--codecs", "zstd", "--fit", str(path)]
    assert cli.main([*line, "--point", "1", "--out", str(tmp_path / "codecs.json")]) == 0
    written = capsys.readouterr().out
    name = re.search(r"wrote (fitted:0-[0-9a-f]{8}) to ", written)
    assert name is not None, written
    table = ts.CodecTable.load(tmp_path / "codecs.json")
    assert {row.cost.codec.partition("@")[0] for row in table.rows} == {"raw", "zstd", name[1]}
    assert cli.main([*line, "--point", "1", "--point", "2"]) == 2
    assert "--fit fits a codec to one --point; got 2 of them" in capsys.readouterr().err
    with command("serve", f"tiny={SPEC}", "--codec", f"tiny={path}", "--port", "0") as server:
        port = ready(server)
        told = HttpTransport(f"http://127.0.0.1:{port}").get_json("/v2/models/tiny")
        assert told["parameters"]["codecs"][-1] == name[1]
    with command("serve", "small=factories:small", "--codec", f"small={path}", "--port", "0", stderr=-1) as server:
        _, said = server.communicate()
        assert "fit a codec to this model" in said
        assert server.returncode == 2


def test_a_student_is_distilled_from_images_and_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(20):
        pixels = torch.randint(256, (5, 5, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        image.fromarray(pixels.numpy()).resize((16, 16)).save(tmp_path / f"{number}.png")
    path, spec = tmp_path / "first.student", "factories:thick"
    line = ["distill", spec, "--point", "3", "--data", str(tmp_path), "--minutes", "0.01", "--out", str(path)]
    assert cli.main([*line, "--share", "0.3"]) == 0
    written = " ".join(capsys.readouterr().out.split())
    name = re.search(r"wrote (fitted:2-[0-9a-f]{8}) to ", written)
    assert name is not None, written
    assert "of answers kept" in written
    assert not path.with_name("first.student.training").exists()
    line = ["codecs", spec, "--sample", str(tmp_path), "--codecs", "zstd", "--fitted", str(path), "--point", "3"]
    assert cli.main([*line, "--out", str(tmp_path / "codecs.json")]) == 0
    rows = {row.cost.codec.partition("@")[0]: row.cost for row in ts.CodecTable.load(tmp_path / "codecs.json").rows}
    assert rows[name[1]].head_share
    assert rows["zstd"].head_share is None


def test_a_student_without_a_folder_of_images_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["distill", SPEC, "--point", "1", "--data", str(tmp_path / "none"), "--out", str(tmp_path / "one.student")]
    assert cli.main(line) == 2
    assert "--data must be a folder of images" in capsys.readouterr().err


def test_codecs_are_measured_at_the_cuts_of_a_frontier_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(3):
        image.new("RGB", (8, 8), (number, 90, 200)).save(tmp_path / f"{number}.png")
    model, x = parallel()
    graph = ts.trace(model, x)
    device = ts.profile(graph, repeats=3, meter=None)
    frontier = ts.Frontier.build(graph, device, device.scaled(0.1))
    assert frontier.across(graph)
    frontier.save(tmp_path / "frontier.json")
    line = ["--sample", str(tmp_path), "--codecs", "int8", "--frontier", str(tmp_path / "frontier.json")]
    assert cli.main(["codecs", "factories:parallel", *line, "--out", str(tmp_path / "codecs.json")]) == 0
    table = ts.CodecTable.load(tmp_path / "codecs.json")
    assert {row.layers for row in table.rows if row.layers} == {point.layers for point in frontier.across(graph)}
    capsys.readouterr()
    assert cli.main(["codecs", SPEC, *line]) == 2
    assert "this frontier is of Parallel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--codecs", "zstd,int7"], "there is no codec 'int7'"),
        (["--max-top1-change", "0.01"], "299 calls are needed"),
        (["--fit", "."], "cannot be written"),
        (["--fit", "missing/first.fitted"], "missing/first.fitted cannot be written"),
        (["--out", "missing/table.json"], "missing/table.json cannot be written"),
    ],
)
def test_nothing_is_fitted_where_the_rest_would_fail(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = pytest.importorskip("PIL.Image")
    for number in range(4):
        image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
    monkeypatch.setattr(ts.codec, "fit_codec", lambda *args, **kwargs: pytest.fail("a codec was fitted"))
    path = tmp_path / "first.fitted"
    line = ["codecs", SPEC, "--sample", str(tmp_path), "--point", "1", "--fit", str(path), *options]
    assert cli.main(line) == 2
    assert said in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize(
    "arguments",
    [["--replicas", "2"], ["--max-replicas", "2"], ["--ongoing", "2"], ["--cpus", "2"], ["--gpus", "0.5"],
     ["--models-per-replica", "2"]],
)  # fmt: skip
def test_one_process_is_refused_what_only_a_cluster_has(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", f"tiny={SPEC}", *arguments]) == 2
    assert f"{arguments[0]} says how a Ray cluster serves" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--metrics"], "--metrics is not there with --ray"),
        (["--tls-cert", "cert.pem"], "--tls-cert is not there with --ray"),
        (["--host", "0.0.0.0"], "--token-file"),
        (["--gpus", "-1"], "gpus of the Ray deployment must be 0 or a positive number; got -1.0"),
    ],
)
def test_a_cluster_is_refused_what_it_does_not_have_before_it_starts(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["serve", f"tiny={SPEC}", "--ray", *arguments]) == 2
    assert reason in capsys.readouterr().err
