"""``torchsurgeon bench-server``, as it is typed."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from serving import serving

from torchsurgeon import cli
from torchsurgeon.models import specs
from torchsurgeon.serve import Server


@pytest.fixture(scope="module")
def url() -> str:  # type: ignore[misc]
    loaded = specs.load("factories:tiny")
    with serving(loaded.model, loaded.args, name="tiny") as server:
        assert isinstance(server, Server)
        yield server.url


def test_rates_cuts_and_codecs_make_rows_a_file_and_a_picture(
    url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    pytest.importorskip("matplotlib")
    out, picture = tmp_path / "load.json", tmp_path / "load.png"
    arguments = ["bench-server", url, "tiny=factories:tiny", "--cut", "server", "--cut", "1", "--codec", "raw"]
    arguments += ["--codec", "int8", "--rate", "40", "--rate", "80", "--seconds", "0.5", "--warmup", "0.1"]
    assert cli.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r"^ +(?:40|80)/s .*\b(?:raw|int8)\b", printed, re.MULTILINE)) == 8
    told = json.loads(out.read_text())
    assert told["format"] == "torchsurgeon.load/1"
    assert [run["rate_per_s"] for run in told["runs"]] == [40.0, 80.0]
    for run in told["runs"]:
        assert [(kind["cut"], kind["codec"]) for kind in run["kinds"]] == [
            ("server", "raw"),
            ("server", "int8"),
            ("0", "raw"),
            ("0", "int8"),
        ]
        assert run["errors"] == {}
        latency_s = run["latency_s"]
        assert 0 < latency_s["p50"] <= latency_s["p99"] <= latency_s["max"]
        assert [percent for percent, _ in latency_s["curve"]] == list(range(1, 101))
        assert run["late_s"]["p50"] >= 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_recording_has_its_own_rate_and_a_closed_loop_has_none(url: str, tmp_path: Path) -> None:
    gaps, out = tmp_path / "gaps.txt", tmp_path / "load.json"
    gaps.write_text("0.01\n0.03\n")
    assert (
        cli.main(
            [
                "bench-server",
                url,
                "tiny",
                "--arrivals",
                str(gaps),
                "--seconds",
                "0.4",
                "--warmup",
                "0",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    told = json.loads(out.read_text())
    assert told["runs"][0]["rate_per_s"] == pytest.approx(50, rel=0.1)
    assert told["arrivals"] == str(gaps)
    assert (
        cli.main(
            ["bench-server", url, "tiny", "--closed-loop", "--seconds", "0.2", "--warmup", "0", "--json", str(out)]
        )
        == 0
    )
    told = json.loads(out.read_text())
    assert told["arrivals"] == "closed loop"
    assert told["runs"][0]["rate_per_s"] is None
    assert told["runs"][0]["answered_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["tiny"], "--rate"),
        (["tiny", "--rate", "5", "--closed-loop"], "--closed-loop"),
        (["tiny", "--rate", "5", "--cut", "1"], "tiny=SPEC"),
        (["tiny", "--rate", "5", "--input", "tiny=x:float32[1,3,8,8]"], "given with its SPEC"),
        (["tiny=factories:tiny", "--rate", "5", "--cut", "9"], "0 … 4"),
        (["tiny", "--rate", "5", "--arrivals", "sometimes"], "sometimes"),
        (["tiny", "--rate", "0"], "rate must be"),
        (["tiny", "--rate", "5", "--token-file", "absent"], "absent"),
        (["other", "--rate", "5"], "other"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(
    url: str, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench-server", url, *arguments]) == 2
    told = capsys.readouterr().err
    assert "torchsurgeon: " in told
    assert reason in told
    assert "Traceback" not in told
