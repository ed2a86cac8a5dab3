"""What ``torchsurgeon plan`` and ``sweep`` say of units, of limits and of times that are guesses."""

from __future__ import annotations

import re

import pytest

from torchsurgeon import cli
from torchsurgeon.cli import limits

LINE = ["plan", "factories:tiny", "--device", "tegra-k1-gpu", "--server", "k40-gpu"]


def plan(*arguments: str) -> int:
    return cli.main([*LINE, *arguments])


@pytest.mark.parametrize(("text", "limit"), [("50ms", "at most 0.05 s"), ("2s", "at most 2.0 s"), ("2", "at most 2.0")])
def test_a_limit_on_latency_is_in_seconds_or_in_the_unit_that_follows(
    text: str, limit: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert plan("--latency", text) == 0
    assert f"constraints: {limit}" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["ms", "1m", "fifty", "nan s", ""])
def test_what_is_no_duration_is_quoted_as_it_was_given(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("--latency", text)
    assert f"argument --latency: must be a finite number; got {text!r}" in capsys.readouterr().err


def test_a_limit_that_every_way_keeps_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--latency", "50") == 0
    told = capsys.readouterr().err
    assert "--latency 50 s rules nothing out, since the slowest way takes " in told
    assert "write 50ms if milliseconds are meant" in told
    assert plan("--latency", "50ms") == 0
    assert "rules nothing out" not in capsys.readouterr().err


def test_a_round_trip_that_must_be_in_milliseconds_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--link", "10/5/60") == 2
    assert "a round trip is in seconds; got 60 in '10/5/60'; write 60ms" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--load", "--slowdown", "--uplink"])
def test_a_factor_that_is_not_positive_is_refused_at_once(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan(option, "0")
    assert f"argument {option}: must be a positive number; got '0'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "absent:f", "--device", "k40-gpu", "--server", "k40-gpu", "--load", "-1"])


def test_a_limit_that_cannot_be_kept_is_told_as_it_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--latency", "1e-9") == 2
    told = capsys.readouterr().err
    found = re.fullmatch(
        r"torchsurgeon: --latency 1e-09 s cannot be kept: the least possible is (\S+) s; allow that, or plan for "
        r"another device, server or link\n",
        told,
    )
    assert found is not None, told
    # What is told to be possible is.
    assert plan("--latency", found[1]) == 0


def test_limits_that_exclude_each_other_are_told_with_the_changes_that_are_enough(
    capsys: pytest.CaptureFixture[str],
) -> None:
    # On this link the server is too far away.
    line = ["--link", "1/1/1", "--latency", "0.5", "--memory", "0"]
    assert plan(*line) == 2
    told = capsys.readouterr().err
    assert "--latency 0.5 s and --memory 0 MB cannot be kept together; change one of them: --latency 1." in told
    assert "latency_s" not in told
    found = re.search(r" s or --memory (\S+) MB; or plan for another", told)
    assert found is not None, told
    assert plan(*line[:-1], found[1]) == 0


def test_where_no_single_change_is_enough_it_is_told() -> None:
    least = {"latency_s": None, "energy_j": None, "raw_input": None}
    said = limits.unkept({"latency_s": 0.1, "energy_j": 2.0, "raw_input": False}, least)
    assert said.startswith("--latency 0.1 s and --energy 2 J and --no-raw-input cannot be kept together, nor without")


def test_a_negative_limit_is_told_before_the_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["plan", "absent:f", "--device", "k40-gpu", "--server", "k40-gpu", "--memory", "-1"]
    assert cli.main(line) == 2
    assert "must be zero or a positive number" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["plan", "--objective", "energy"], ["plan", "--energy", "1"], ["sweep"]])
def test_energy_over_a_link_without_a_radio_names_the_options(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = [arguments[0], "absent:f", *LINE[2:], "--link", "10/5/0.06", *arguments[1:]]
    assert cli.main(line if arguments[1:] else [*line, "--objective", "latency=1,energy=1"]) == 2
    told = capsys.readouterr().err
    assert "--link '10/5/0.06'" in told
    assert "such as wifi, whose rate --uplink sets" in told


@pytest.mark.parametrize("command", ["plan", "sweep"])
def test_rough_predictions_are_counted_for_each_side_and_listed_where_asked(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [command, *LINE[1:]]
    assert cli.main(line) == 0
    told = capsys.readouterr().err.splitlines()
    where = r"torchsurgeon: warning: {}: the times of \d of 4 layers are predicted roughly; --verbose lists them"
    assert len(told) == 2
    for said, side in zip(told, ("device tegra-k1-gpu", "server k40-gpu"), strict=True):
        assert re.fullmatch(where.format(side), said)
    assert cli.main([*line, "--verbose"]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) > 2
    assert any(re.match(r"torchsurgeon: warning: \d: no model was fitted for view", said) for said in told)


def test_an_error_stands_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan("--latency", "1e-9") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
