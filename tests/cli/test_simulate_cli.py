"""``torchsurgeon simulate``: what it prints of a frontier, and what it says of wrong input."""

from __future__ import annotations

from pathlib import Path

import pytest
from frontiers import frontier

from torchsurgeon import cli
from torchsurgeon.cli import completion
from torchsurgeon.simulate import SHAPES


@pytest.fixture
def saved(tmp_path: Path) -> str:
    frontier().save(tmp_path / "frontier.json")
    return str(tmp_path / "frontier.json")


def test_it_shows_times_and_highest_rates_of_both_ways(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--link", "8/8/0", "--servers", "2", "--rate", "30", "--limit", "0.5", "--service", "exponential"]
    assert cli.main(["simulate", saved, *arguments]) == 0
    shown = capsys.readouterr().out
    server, planned = (next(line for line in shown.splitlines() if name in line) for name in ("all on", "as planned"))
    # 30 inferences a second of 50 and of 30 ms for two servers.
    assert "75 %" in server
    assert "45 %" in planned
    assert "layer1" in planned
    assert "highest" in shown
    assert planned.split()[-1].endswith("/s)")


def test_where_nothing_reaches_the_servers_they_sustain_any_rate(
    saved: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", saved, "--link", "0.01/0.01/0", "--servers", "1", "--limit", "0.5"]) == 0
    planned = next(line for line in capsys.readouterr().out.splitlines() if "as planned" in line)
    assert "all on the device" in planned
    assert planned.split()[-1] == "any"


def test_overloaded_servers_have_no_percentile(saved: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", saved, "--link", "8/8/0", "--servers", "1", "--rate", "1000"]) == 0
    assert "ever longer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--servers", "2"], "there is nothing to simulate: give --rate"),
        (["--servers", "2", "--rate", "0"], "rate of inferences must be a positive number per second; got 0"),
        (["--servers", "1000000000", "--limit", "1"], "number of servers must be a whole number from 1 to 10,000"),
        (["--servers", "2", "--limit", "-1"], "limit must be a positive number of seconds; got -1"),
        (["--servers", "2", "--limit", "0.01"], "the limit must be at least"),
        (["--servers", "2", "--limit", "1", "--percentile", "100"], "percentile must be above 0 and below 100"),
        (["--servers", "2", "--rate", "1", "--arrivals", "normal"], "there is no shape 'normal'; use one of"),
    ],
)
def test_wrong_input_is_answered_in_a_line(
    saved: str, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["simulate", saved, *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert "\n" not in said.strip()


def test_a_slowdown_that_is_not_positive_is_refused_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["simulate", "absent.json", "--servers", "2", "--rate", "1", "--slowdown", "0"])
    assert "argument --slowdown: must be a positive number; got '0'" in capsys.readouterr().err


def test_a_file_that_is_no_frontier_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{}", "not JSON"):
        (tmp_path / "wrong.json").write_text(text)
        assert cli.main(["simulate", str(tmp_path / "wrong.json"), "--servers", "1", "--rate", "1"]) == 2
        assert "wrong.json" in capsys.readouterr().err


def test_the_shapes_that_a_shell_offers_are_those_that_there_are() -> None:
    assert tuple(SHAPES) == completion.SHAPES
