"""``torchsurgeon calibrate`` and ``torchsurgeon predict``: what a user types, and what they are told."""

from __future__ import annotations

import json
import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from paths import ROOT

import torchsurgeon as ts
from torchsurgeon import cli
from torchsurgeon.prediction.kinds import KINDS
from torchsurgeon.prediction.samples import read_csv
from torchsurgeon.profiling.origin import provenance

pytestmark = [
    pytest.mark.filterwarnings("ignore::torchsurgeon.ThrottledWarning"),
]


SPEC = "factories:tiny"


def conv_csv(folder: Path) -> Path:
    lines = ["in_channels,out_channels,in_size,out_size,kernel,ms"]
    lines += [f"{3 + i},{4 + i},{64 + i},{36 + i},9,{0.1 + i / 100}" for i in range(30)]
    (folder / "conv.csv").write_text("\n".join(lines))
    return folder / "conv.csv"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    path = tmp_path / "device.json"
    ts.Predictor.from_csv({"conv": conv_csv(tmp_path)}, "a board").save(path)
    return path


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")


def test_calibrate_fits_measurements_from_csv_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "board.json"
    source = conv_csv(tmp_path)
    assert cli.main(["calibrate", "--from-csv", f"conv={source}", "--name", "a board", "--out", str(out)]) == 0
    told = capsys.readouterr().out
    assert "a board" in told
    assert "within 20 %" in told
    assert "convolution" in told
    assert ts.Predictor.load(out).provenance["device"] == "a board"


def test_calibrate_measures_this_machine_and_prints_what_its_models_are_worth(
    few_forms: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "device.json"
    assert cli.main(["calibrate", "--budget", "12", "--threads", "1", "--seed", "5", "--out", str(out)]) == 0
    told = capsys.readouterr()
    assert "median error" in told.out
    predictor = ts.Predictor.load(out)
    assert all(kind in told.out for kind in predictor.fitted)
    assert predictor.provenance["seed"] == 5


def measured_before(path: Path, spent_s: float) -> Path:
    """A finished calibration of this machine, as short ones are: it has samples of convolutions only."""
    predictor = ts.Predictor.from_csv({"conv": conv_csv(path.parent)})
    predictor.provenance = provenance(torch.device("cpu")) | {"calibrated_for_s": spent_s, "seed": 0}
    path.write_text(json.dumps(predictor.to_json() | {"networks": {"count": 0, "timed": []}}))
    return path


def test_a_finished_calibration_is_replaced_only_where_told_to(
    few_forms: None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured_before(tmp_path / "device.json", 10.0)
    before = path.read_bytes()
    assert cli.main(["calibrate", "--budget", "3", "--out", str(path)]) == 2
    told = capsys.readouterr().err
    assert f"{path} is a finished calibration of 10 s, as much as the budget of 3 s or more; give another file" in told
    assert path.read_bytes() == before
    monkeypatch.setattr("torchsurgeon.prediction.calibration._Calibration.run", lambda *_: None)
    monkeypatch.setattr("torchsurgeon.prediction.calibration._Calibration.fitted", lambda _: ts.Predictor.load(path))
    assert cli.main(["calibrate", "--budget", "3", "--out", str(path), "--overwrite"]) == 0


def test_a_calibration_that_is_too_short_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = measured_before(tmp_path / "device.json", 10.0)
    monkeypatch.setattr("torchsurgeon.prediction.calibration._Calibration.run", lambda *_: None)
    assert cli.main(["calibrate", "--budget", "20", "--out", str(path)]) == 0
    told = capsys.readouterr().err
    assert "warning: too few samples of " in told
    assert "linear" in told
    assert "the same command with --budget 300 goes on from here" in told
    assert cli.main(["calibrate", "--budget", "400", "--out", str(path)]) == 0
    assert "with --budget 800 goes on" in capsys.readouterr().err


def test_an_interrupted_calibration_says_how_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "device.json"
    # A background job of a shell is started with the signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    control_c = threading.Timer(3.0, os.kill, (os.getpid(), signal.SIGINT))
    control_c.start()
    try:
        assert cli.main(["calibrate", "--budget", "600", "--out", str(out)]) == 130
    finally:
        control_c.cancel()
        signal.signal(signal.SIGINT, before)
    assert f"interrupted; the same command goes on with {out}" in capsys.readouterr().err
    data = json.loads(out.read_text())
    assert data["unfinished"]
    assert data["samples"]


def test_predict_prints_every_layer_with_its_interval(device: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", SPEC, "--device", str(device)]) == 0
    told = capsys.readouterr()
    assert "Sequential on a board" in told.out
    assert "90 %" in told.out
    assert "whole model" in told.out
    assert told.out.count("roofline") >= 3
    assert "no model was fitted for linear" in told.err


def test_predict_writes_a_profile_that_plan_reads(device: Path, tmp_path: Path) -> None:
    written = tmp_path / "predicted.json"
    assert cli.main(["predict", SPEC, "--device", str(device), "--json", str(written)]) == 0
    profile = ts.LayerProfile.load(written)
    assert profile.interval_s is not None
    both = ["--device", str(written), "--server", str(written)]
    assert cli.main(["plan", SPEC, *both, "--link", "wifi"]) == 0


def test_predict_compares_with_a_measured_profile_and_says_where_it_cannot(
    device: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured, picture = tmp_path / "measured.json", tmp_path / "plot.png"
    assert cli.main(["profile", SPEC, "--no-energy", "--repeats", "3", "--out", str(measured)]) == 0
    capsys.readouterr()
    arguments = ["predict", SPEC, "--device", str(device), "--profile", str(measured), "--plot", str(picture)]
    assert cli.main(arguments) == 0
    told = capsys.readouterr()
    assert "measured" in told.out
    assert f"{measured}: its device is" in told.err
    assert "'a board'" in told.err
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_predict_takes_a_reference_device_and_says_that_all_is_a_bound(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["predict", SPEC, "--device", "jetson-orin-nano"]) == 0
    told = capsys.readouterr()
    assert "at least" in told.out
    # A caption is folded to its table's width.
    assert "ALL OF THIS IS A LOWER BOUND" in " ".join(told.out.split())
    assert "roofline" not in told.out
    assert told.err == ""


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["predict", SPEC, "--device", "tegra-k2"], "jetson-orin-nano (a bound), k40-gpu"),
        (["predict", SPEC, "--device", "k40-gpu", "--plot", "a.png"], "--profile"),
        (["predict", SPEC, "--device", "k40-gpu", "--profile", "absent.json"], "absent.json"),
        (["predict", SPEC, "--device", __file__], "not JSON"),
        (["calibrate", "--out", "x.json", "--from-csv", "conv"], "--from-csv must be KIND=FILE; got 'conv'"),
        (["calibrate", "--out", "x.json", "--from-csv", "conv=absent.csv"], "absent.csv cannot be read"),
        (["calibrate", "--out", "x.json", "--from-csv", f"magic={__file__}"], "no kind of layer 'magic'"),
        (["calibrate", "--out", "x.json", "--device", "cuda:99"], "cuda"),
        (["calibrate", "--out", "x.json", "--budget", "-1"], "budget"),
        (["calibrate", "--out", "x.json", "--budget", "2", "--backend", "magic"], "a backend is one of"),
        (["calibrate", "--out", "x.json", "--budget", "2", "--backend", "eager"], "name another backend"),
        (
            ["calibrate", "--out", "x.json", "--budget", "2", "--name", "a board"],
            "--name names the device of --from-csv",
        ),
        (["calibrate", "--out", "x.json", "--budget", "2", "--backend-budget", "5"], "for each --backend, and none"),
        (
            ["calibrate", "--out", "x.json", "--budget", "2", "--backend-budget", "0", "--backend", "onnxruntime"],
            "must be a positive number of seconds, such as 100; got 0",
        ),
        *(
            (["calibrate", "--out", "x.json", "--from-csv", "conv=absent.csv", option, value], f"{option} says how")
            for option, value in [
                *(("--device", "cuda"), ("--budget", "5"), ("--backend", "inductor")),
                *(("--threads", "1"), ("--seed", "3")),
            ]
        ),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err.lstrip()  # an empty progress bar ends its line
    assert told.startswith("torchsurgeon: ")
    assert reason in told
    assert "Traceback" not in told
    assert not (tmp_path / "x.json").exists()


DOCS = ROOT / "docs" / "prediction.md"


def test_the_documentation_lists_every_kind_with_its_columns() -> None:
    rows = {
        cells[1].strip(" `"): cells[2:]
        for line in DOCS.read_text().splitlines()
        if line.startswith("| `")
        for cells in [line.split("|")]
    }
    for kind in KINDS.values():
        if not kind.columns:
            continue
        needed = [name for name in kind.columns if name not in kind.optional]
        assert [name.strip(" `") for name in rows[kind.name][0].split(",")] == needed, kind.name
        assert [name.strip(" `") for name in rows[kind.name][1].split(",") if name.strip(" –")] == list(kind.optional)


def test_the_documentation_names_every_reference_device_and_its_sources() -> None:
    text = " ".join(DOCS.read_text().split())
    for name in ts.reference_devices():
        assert f"`{name}`" in text
    assert "DS-11105-001" in text
    assert "claritylab/djinn" in text


def test_the_documented_csv_file_is_read(tmp_path: Path) -> None:
    block = DOCS.read_text().split("```csv\n")[1].split("```")[0].strip().splitlines()
    path = tmp_path / "conv.csv"
    path.write_text("\n".join([block[0], *block[1:] * 20]))
    assert len(read_csv("conv", path)) >= 20
