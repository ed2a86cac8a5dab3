"""Calibration files and CSV tables that are damaged or hold wrong values: what the error says."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import torchsurgeon as ts
from torchsurgeon.prediction.kinds import KINDS
from torchsurgeon.prediction.samples import read_csv

pytestmark = pytest.mark.usefixtures("few_forms")

HEADER = "in_channels,out_channels,in_size,out_size,kernel,ms"


def rows(count: int = 20) -> list[str]:
    return [f"{8 + i},{16 + i},{100 + i},{100 + i},9,{0.1 + i / 100}" for i in range(count)]


@pytest.fixture(scope="module")
def valid(few_forms: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The text of a small calibration."""
    path = tmp_path_factory.mktemp("csv") / "conv.csv"
    path.write_text("\n".join([HEADER, *rows()]))
    predictor = ts.Predictor.from_csv({"conv": path}, "a small device")
    predictor.save(path.with_suffix(".json"))
    return path.with_suffix(".json").read_text()


def refused(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "device.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ts.CalibrationError) as caught:
        ts.Predictor.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def test_every_prefix_of_a_calibration_is_refused_by_name(valid: str, tmp_path: Path) -> None:
    for end in range(len(valid)):
        message = refused(tmp_path, valid[:end])
        assert "cut short" in message
        assert "calibrate again" in message


def test_another_version_is_refused(valid: str, tmp_path: Path) -> None:
    data = json.loads(valid) | {"format": "torchsurgeon.predictor/99"}
    assert "'torchsurgeon.predictor/99'" in refused(tmp_path, json.dumps(data))
    assert "list" in refused(tmp_path, "[]")
    assert "this is a profile" in refused(tmp_path, json.dumps({"format": "torchsurgeon.profile/2"}))


def test_an_unfinished_one_says_how_to_go_on(valid: str, tmp_path: Path) -> None:
    data = json.loads(valid) | {"unfinished": True}
    message = refused(tmp_path, json.dumps(data))
    assert "interrupted" in message
    assert "torchsurgeon calibrate" in message


def changed(valid: str, change: Callable[[Any], Any]) -> str:
    data = json.loads(valid)
    change(data)
    return json.dumps(data)


def put(*path: Any) -> Callable[[Any], None]:
    *way, last, value = path

    def change(data: Any) -> None:
        for key in way:
            data = data[key]
        data[last] = value

    return change


def fewer(data: Any) -> None:
    table = data["samples"]["convolution"]
    table |= {name: values[:5] for name, values in table.items() if values is not None}


SAMPLES = ("samples", "convolution")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (put("roofline", "peak_flop_s", -1.0), "peak_flop_s"),
        (put("roofline", "bandwidth_byte_s", float("nan")), "bandwidth_byte_s"),
        (put("roofline", "overhead_s", "fast"), "overhead_s"),
        (put("roofline", "color", 1.0), "color"),
        (put("block", "slope", float("inf")), "slope"),
        (put("block", "slope", None), "slope"),
        (put("fitted", "convolution", "form", "magic"), "magic"),
        (put("fitted", "convolution", "form", ["trees"]), "list"),
        (put("fitted", "convolution", "held_out", "median", float("nan")), "median"),
        (put("fitted", "teleportation", {}), "form"),
        (put("fitted", []), ""),
        (put(*SAMPLES, "seconds", 3, -0.1), "seconds"),
        (put(*SAMPLES, "seconds", 3, 0.0), "seconds"),
        (put(*SAMPLES, "seconds", 3, float("nan")), "seconds"),
        (put(*SAMPLES, "seconds", 3, float("inf")), "seconds"),
        (put(*SAMPLES, "seconds", [1.0]), "length"),
        (put(*SAMPLES, "kernel", 3, -9), "sizes"),
        (put(*SAMPLES, "kernel", 3, 1e40), "sizes"),
        (put(*SAMPLES, "item_bytes", 3, 0), "item_bytes"),
        (put(*SAMPLES, "joules", [-1.0] * 20), "joules"),
        (put(*SAMPLES, "before_bytes", 3, -1), "before_bytes"),
        (put("samples", "teleportation", {}), "teleportation"),
        (put("samples", {}), "convolution"),
        (fewer, "5 samples of convolution"),
        (put("fitted", "convolution", "energy_form", "trees"), "0 of them with joules"),
        (put("provenance", 7), ""),
        (put("roofline", "peak_flop_s", 5e-324), "peak_flop_s"),
        (put("roofline", "overhead_s", 1e308), "overhead_s"),
        (put("block", "offset", 1e15), "math range"),
        (put("block", "offset", -1e15), "correction of whole models"),
        (put("block", "offset", 1e308), "offset"),
        (put("block", "longest_s", 0), "math domain"),
        (put("fitted", "convolution", "held_out", "sum_ratio", -1), "sum_ratio"),
        (put("fitted", "convolution", "held_out", "low", -1), "low"),
        (put(*SAMPLES, "seconds", 3, 5e-324), "seconds"),
        (put(*SAMPLES, "joules", [5e-324] * 20), "joules"),
    ],
)
def test_edited_values_are_refused(valid: str, tmp_path: Path, change: Callable[[Any], Any], named: str) -> None:
    message = refused(tmp_path, changed(valid, change))
    assert named in message
    assert "calibrate again" in message


def test_every_missing_field_is_refused(valid: str, tmp_path: Path) -> None:
    def holes(data: Any, path: tuple[str, ...] = ()) -> Any:
        for key, value in data.items():
            yield (*path, key)
            if isinstance(value, dict) and key != "provenance":
                yield from holes(value, (*path, key))

    data = json.loads(valid)
    for path in holes(data):
        if path[:1] == ("provenance",) and len(path) > 1:
            continue
        damaged = copy.deepcopy(data)
        inside = damaged
        for key in path[:-1]:
            inside = inside[key]
        del inside[path[-1]]
        if path == ("fitted", "convolution"):
            continue  # a kind without a model is bounded
        refused(tmp_path, json.dumps(damaged))


def test_what_is_no_text_at_all_is_refused(tmp_path: Path) -> None:
    refused(tmp_path, b"\xff\xfe\x00")
    refused(tmp_path, "[" * 100_000)
    refused(tmp_path, "9" * 5_000)
    with pytest.raises(ts.CalibrationError, match="cannot be read"):
        ts.Predictor.load(tmp_path / "absent.json")
    with pytest.raises(ts.CalibrationError, match="cannot be read"):
        ts.Predictor.load(tmp_path)


def test_a_calibration_that_cannot_be_written_says_so(valid: str, tmp_path: Path) -> None:
    with pytest.raises(ts.CalibrationError, match="cannot be written"):
        ts.Predictor.from_json(json.loads(valid)).save(tmp_path / "absent" / "device.json")


def test_two_processes_write_one_file_whole(valid: str, tmp_path: Path) -> None:
    path, source = tmp_path / "device.json", tmp_path / "valid.json"
    source.write_text(valid)
    script = (
        "import sys; from torchsurgeon import CalibrationError as E\n"
        "from torchsurgeon._json_file import read, write\n"
        "data = read(sys.argv[1], E, '')\n"
        "for i in range(300): write(sys.argv[2], data | {'filler': 'x' * i * 200}, E); read(sys.argv[2], E, '')"
    )
    command = [sys.executable, "-c", script, str(source), str(path)]
    writers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [writer.communicate()[1] for writer in writers] == ["", ""]
    assert ts.Predictor.load(path).fitted
    assert sorted(tmp_path.iterdir()) == [path, source]


def csv(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "conv.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def told(tmp_path: Path, text: str | bytes, kind: str = "conv") -> str:
    path = csv(tmp_path, text)
    with pytest.raises(ts.CalibrationError) as caught:
        read_csv(kind, path)
    return str(caught.value).replace(str(path), "conv.csv")


def table(*lines: str, header: str = HEADER) -> str:
    return "\n".join([header, *rows(), *lines])


def test_samples_are_read_in_any_unit_order_and_line_ending(tmp_path: Path) -> None:
    plain = read_csv("conv", csv(tmp_path, table()))
    assert plain[0].operation.sizes == (1, 8, 16, 1, 100, 100, 9, 1, 1)
    assert plain[0].operation.variant == "2d"
    assert plain[0].seconds == pytest.approx(1e-4)
    assert len({sample.group for sample in plain}) == len(plain)
    assert read_csv("convolution", csv(tmp_path, table().replace("\n", "\r\n"))) == plain
    assert read_csv("conv", csv(tmp_path, b"\xef\xbb\xbf" + table().encode())) == plain
    assert read_csv("conv", csv(tmp_path, table().replace("\n", "\n\n") + "\n\n")) == plain
    turned = "\n".join(",".join(reversed(line.split(","))) for line in table().splitlines())
    assert read_csv("conv", csv(tmp_path, turned)) == plain
    micro = table().replace("ms", "us")
    assert read_csv("conv", csv(tmp_path, micro))[0].seconds == pytest.approx(1e-7)


def test_variants_energy_and_element_sizes_are_read(tmp_path: Path) -> None:
    text = "rows,in_features,out_features,seconds,joules,item_bytes,variant\n" + "4,8,16,0.001,0.5,2,linear\n" * 20
    sample = read_csv("fc", csv(tmp_path, text))[0]
    assert (sample.joules, sample.operation.item_bytes, sample.operation.variant) == (0.5, 2, "linear")


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("8,16,100,100,9", ("must have 6 cells, as many as the first line names columns", "got 5")),
        ("8,16,100,100,9,0.1,7", ("must have 6 cells", "got 7")),
        ("8,16,100,100,9,-0.1", ("ms must be", "got '-0.1'")),
        ("8,16,100,100,9,0", ("ms must be", "got '0'")),
        ("8,16,100,100,9,nan", ("ms must be", "got 'nan'")),
        ("8,16,100,100,9,inf", ("ms must be", "got 'inf'")),
        ("8,16,100,100,9,1e9", ("ms must be", "got '1e9'")),
        ("8,16,100,100,9,soon", ("ms must be", "got 'soon'")),
        ("8,16,100,100,9,", ("ms must be", "got ''")),
        ("8,16,100,100,2.5,0.1", ("kernel must be", "got '2.5'")),
        ("8,16,100,100,0,0.1", ("kernel must be", "got '0'")),
        ("8,16,100,100,-9,0.1", ("kernel must be", "got '-9'")),
        ("8,16,100,100,nan,0.1", ("kernel must be", "got 'nan'")),
        ("eight,16,100,100,9,0.1", ("in_channels must be", "got 'eight'")),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, line: str, what: tuple[str, str]) -> None:
    message = told(tmp_path, table(line))
    assert message.startswith("conv.csv:22: ")
    assert all(words in message for words in what), message


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (HEADER.replace("kernel", "filter"), "no column 'kernel'"),
        (HEADER.replace("in_channels", "").replace("kernel", ""), "no column 'in_channels', 'kernel'"),
        (HEADER.replace("ms", "minutes"), "'minutes'"),
        (HEADER.replace("ms", "groups"), "seconds, ms, us"),
        (HEADER + ",seconds", "seconds, ms, us"),
        (HEADER + ",strid", "'strid'"),
        (HEADER + ",kernel", "more than one column 'kernel'"),
        (HEADER.replace(",", ";"), "separated by commas"),
    ],
)
def test_wrong_columns_are_named_with_those_there_are(tmp_path: Path, header: str, what: str) -> None:
    message = told(tmp_path, table(header=header))
    assert message.startswith("conv.csv:1: ")
    assert what in message
    assert "in_channels, out_channels, in_size, out_size, kernel" in message


def test_too_few_rows_and_empty_files_say_what_is_needed(tmp_path: Path) -> None:
    assert "19 samples" in told(tmp_path, "\n".join([HEADER, *rows(19)]))
    assert "at least 20" in told(tmp_path, HEADER)
    assert "is empty" in told(tmp_path, "")
    assert "is empty" in told(tmp_path, "\n\n")


def test_files_that_are_no_csv_say_so(tmp_path: Path) -> None:
    assert "not a CSV file" in told(tmp_path, b"\xff\xfe\x01")
    assert "not a CSV file" in told(tmp_path, HEADER + "\n" + "9" * 200_000)
    with pytest.raises(ts.CalibrationError, match="cannot be read"):
        read_csv("conv", tmp_path / "absent.csv")


@pytest.mark.parametrize("kind", ["teleportation", "view", ""])
def test_an_unknown_kind_lists_those_there_are(tmp_path: Path, kind: str) -> None:
    assert "convolution, depthwise convolution" in told(tmp_path, table(), kind)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind].columns])
def test_every_kind_can_be_imported(tmp_path: Path, kind: str) -> None:
    columns = KINDS[kind].columns
    lines = [",".join([*(str(2 + i % 7) for _ in columns), str(0.001 + i / 1e5)]) for i in range(25)]
    path = csv(tmp_path, "\n".join([",".join([*columns, "seconds"]), *lines]))
    predictor = ts.Predictor.from_csv({kind.replace(" ", "_"): path})
    assert list(predictor.fitted) == [kind]
    assert predictor.provenance["imported_from"] == ["conv.csv"]


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_else(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any"
    path.write_bytes(data)
    with pytest.raises(ts.CalibrationError):
        read_csv("conv", path)
    with pytest.raises(ts.CalibrationError):
        ts.Predictor.load(path)


def test_what_a_link_points_to_is_written_and_the_link_stays(valid: str, tmp_path: Path) -> None:
    target, link = tmp_path / "target.json", tmp_path / "link.json"
    target.write_text("{}")
    link.symlink_to(target)
    ts.Predictor.from_json(json.loads(valid)).save(link)
    assert link.is_symlink()
    assert ts.Predictor.load(target).fitted


def test_a_pipe_is_written_to_and_not_replaced(valid: str, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    ts.Predictor.from_json(json.loads(valid)).save(pipe)
    reader.join(30)
    assert pipe.is_fifo()
    assert json.loads(read[0])["format"] == json.loads(valid)["format"]
