from __future__ import annotations

import ctypes
import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from paths import TESTS

from torchsurgeon import meters
from torchsurgeon.errors import DeviceError, MeterError, NativeUnavailableError
from torchsurgeon.meters import (
    CudaEventClock,
    CuptiClock,
    EnergyMeter,
    EnergySampler,
    EnergyTrace,
    JetsonMeter,
    NullMeter,
    NvmlMeter,
    RaplMeter,
    Reading,
    ReplayMeter,
    WallClock,
    board_state,
    find_meter,
    measure_idle,
    save_log,
)
from torchsurgeon.meters.jetson import find_rails

FIXTURES = TESTS / "fixtures" / "meters"
MS = 1_000_000
LOG = FIXTURES / "orin-nano.jsonl"


@pytest.fixture
def board(tmp_path: Path):
    """board("tx2-jetpack4") is a copy of that board's sysfs that a test may break."""
    return lambda name: Path(shutil.copytree(FIXTURES / name, tmp_path / name))


# Clocks


def test_the_wall_clock_tells_the_time_between_marks() -> None:
    ticks = iter([100, 250, 275, 1_000, 1_001])
    clock = WallClock(lambda: next(ticks))
    for _ in range(3):
        clock.mark()
    assert clock.intervals_ns() == [150, 25]
    assert clock.intervals_ns() == []
    clock.mark()
    clock.mark()
    assert clock.intervals_ns() == [1]


def test_a_clock_that_jumps_back_says_where_and_goes_on() -> None:
    ticks = iter([100, 250, 90, 5, 8])
    clock = WallClock(lambda: next(ticks))
    for _ in range(3):
        clock.mark()
    with pytest.raises(MeterError, match="went back 160 ns between marks 1 and 2"):
        clock.intervals_ns()
    clock.mark()
    clock.mark()
    assert clock.intervals_ns() == [3]


def test_clocks_of_a_missing_gpu_say_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(NativeUnavailableError, match="needs a CUDA device"):
        CudaEventClock(4)
    with pytest.raises(NativeUnavailableError, match="tracing CUDA kernels needs"):
        CuptiClock()


@pytest.mark.cuda
@pytest.mark.parametrize("built", [True, False])
def test_cuda_events_tell_device_time(built: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsurgeon.meters.clock._native.available", lambda: built)
    x = torch.randn(2048, 2048, device="cuda")
    with CudaEventClock(3) as clock:
        for _ in range(2):
            clock.mark()
            for _ in range(20):
                x @ x
            clock.mark()
            clock.mark()
            work, nothing = clock.intervals_ns()
            assert work > 10 * nothing >= 0


@pytest.mark.cuda
def test_cupti_counts_only_the_time_kernels_ran() -> None:
    x = torch.randn(512, 512, device="cuda")
    x @ x
    with CuptiClock() as clock:
        clock.mark()
        x @ x
        clock.mark()
        time.sleep(0.01)
        clock.mark()
        work, nothing = clock.intervals_ns()
    assert work > 0
    assert nothing == 0


# The monitors of a Jetson


@pytest.mark.parametrize(
    ("name", "scope", "power_w"),
    [
        ("tx2-jetpack4", "VDD_IN", 5.912),
        ("agx-xavier-jetpack4", "GPU + CPU + SOC + CV + VDDRQ + SYS5V", 1.9 + 0.95 + 1.52 + 0.19 + 0.57 + 2.28),
        ("xavier-nx-jetpack5", "VDD_IN", 5.9808),
        ("orin-nano-jetpack6", "VDD_IN", 4.928),
        ("agx-orin-jetpack5", "VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 + VDDQ_VDD2_1V8AO", 4.0 + 1.0 + 4.0 + 0.5),
    ],
)
def test_each_board_tells_its_whole_power(name: str, scope: str, power_w: float) -> None:
    meter = JetsonMeter(sysfs=FIXTURES / name)
    assert (meter.name, meter.scope) == ("ina3221", scope)
    assert meter.read().power_w == pytest.approx(power_w)
    assert meter.faults == ()


@pytest.mark.parametrize(
    ("name", "rail", "power_w"),
    [("tx2-jetpack4", "VDD_SYS_GPU", 3.814), ("orin-nano-jetpack6", "VDD_CPU_GPU_CV", 0.9856)],
)
def test_one_rail_can_be_metered_alone(name: str, rail: str, power_w: float) -> None:
    assert JetsonMeter([rail], FIXTURES / name).read().power_w == pytest.approx(power_w)


def test_a_thor_tells_the_power_that_enters_the_board() -> None:
    meter = JetsonMeter(sysfs=FIXTURES / "agx-thor-jetpack7")
    assert (meter.name, meter.scope, meter.period_s) == ("ina238", "VIN", 0.05)
    assert meter.read().power_w == pytest.approx(26.5)
    assert meter.faults == ()


def test_a_rail_behind_the_input_of_a_thor_can_be_metered_alone() -> None:
    meter = JetsonMeter(["VDD_GPU"], FIXTURES / "agx-thor-jetpack7")
    assert (meter.name, meter.period_s) == ("ina3221", 0.02)
    assert meter.read().power_w == pytest.approx(4.8)


def test_a_thor_whose_input_cannot_be_read_tells_the_sum_of_its_rails(board) -> None:
    sysfs = board("agx-thor-jetpack7")
    next(sysfs.rglob("power1_input")).unlink()
    meter = JetsonMeter(sysfs=sysfs)
    assert meter.scope == "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0"
    assert meter.read().power_w == pytest.approx(4.8 + 8.0 + 6.0)
    assert ["rail VIN is left out" in str(fault) for fault in meter.faults] == [True]


def test_an_ina238_without_a_name_is_not_taken_for_the_input(board) -> None:
    sysfs = board("agx-thor-jetpack7")
    next(sysfs.rglob("hwmon6/label")).unlink()
    assert JetsonMeter(sysfs=sysfs).scope == "VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0"


def test_every_board_has_a_rail_that_feeds_the_gpu() -> None:
    from torchsurgeon.meters.jetson import GPU_RAILS, find_rails

    for name in (
        "tx2-jetpack4",
        "agx-xavier-jetpack4",
        "xavier-nx-jetpack5",
        "orin-nano-jetpack6",
        "agx-orin-jetpack5",
        "agx-thor-jetpack7",
    ):
        assert [rail.name for rail in find_rails(FIXTURES / name) if rail.name in GPU_RAILS] != []


def test_a_rail_the_board_lacks_lists_those_it_has() -> None:
    with pytest.raises(MeterError, match="one of VDD_IN, VDD_CPU_GPU_CV, VDD_SOC; got 'VDD_GPU'"):
        JetsonMeter(["VDD_GPU"], FIXTURES / "orin-nano-jetpack6")


def test_an_unreadable_rail_is_left_out_and_named(board) -> None:
    sysfs = board("agx-orin-jetpack5")
    (next(sysfs.rglob("hwmon3/curr2_input"))).unlink()
    meter = JetsonMeter(sysfs=sysfs)
    assert meter.scope == "VDD_GPU_SOC + VIN_SYS_5V0 + VDDQ_VDD2_1V8AO"
    assert meter.read().power_w == pytest.approx(8.5)
    (fault,) = meter.faults
    assert "rail VDD_CPU_CV is left out" in str(fault)
    assert "curr2_input failed: No such file or directory" in str(fault)


def test_a_board_whose_rails_are_all_unreadable_says_why(board) -> None:
    sysfs = board("tx2-jetpack4")
    for path in sysfs.rglob("in_power*_input"):
        path.write_text("busy\n")
    with pytest.raises(MeterError, match=r"every rail of this board failed to be read.*must hold a number"):
        JetsonMeter(sysfs=sysfs)


def test_a_machine_without_monitors_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="only Jetson boards have one"):
        JetsonMeter(sysfs=tmp_path)


# RAPL


def counter(sysfs: Path, domain: str, value: int) -> None:
    (sysfs / "class" / "powercap" / domain / "energy_uj").write_text(f"{value}\n")


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("intel-laptop", "package-0"),
        ("intel-server", "package-0 + package-0 dram + package-1 + package-1 dram"),
        ("amd-desktop", "package-0"),
    ],
)
def test_rapl_counts_packages_and_memory_once(name: str, scope: str, board) -> None:
    sysfs = board(name)
    meter = RaplMeter(sysfs)
    assert meter.scope == scope
    assert meter.read().energy_j == 0
    for path in sysfs.rglob("energy_uj"):
        path.write_text(str(int(path.read_text()) + 1_500_000))
    assert meter.read().energy_j == pytest.approx(1.5 * len(scope.split(" + ")))


def test_a_counter_that_wraps_goes_on_counting(board) -> None:
    sysfs = board("amd-desktop")
    meter = RaplMeter(sysfs)
    for value in (65_532_000_000, 389_013, 1_389_013):
        counter(sysfs, "intel-rapl:0", value)
        energy_j = meter.read().energy_j
    assert energy_j == pytest.approx((65_532_610_987 - 7_000_000 + 1_389_013) * 1e-6)


def test_a_counter_that_falls_without_saying_where_it_wraps_leaves_the_energy_unknown(board) -> None:
    sysfs = board("amd-desktop")
    (sysfs / "class" / "powercap" / "intel-rapl:0" / "max_energy_range_uj").unlink()
    meter = RaplMeter(sysfs)
    counter(sysfs, "intel-rapl:0", 100)
    assert meter.read().energy_j is None
    assert "fell by 6999900 µJ" in str(meter.faults[-1])
    counter(sysfs, "intel-rapl:0", 1_000_100)
    assert meter.read().energy_j == pytest.approx(1.0)


def test_a_counter_that_was_set_back_leaves_the_energy_unknown(board) -> None:
    sysfs = board("amd-desktop")
    counter(sysfs, "intel-rapl:0", 7_000_000)
    meter = RaplMeter(sysfs)
    readings = [meter.read()]
    counter(sysfs, "intel-rapl:0", 0)
    readings.append(meter.read())
    counter(sysfs, "intel-rapl:0", 9_000_000)
    readings.append(meter.read())
    counter(sysfs, "intel-rapl:0", 10_000_000)
    readings.append(meter.read())
    assert readings[1].energy_j is None
    assert "it was set back" in str(meter.faults[-1])
    trace = EnergyTrace(readings)
    assert trace.energy_j(readings[0].time_ns, readings[2].time_ns) is None
    assert trace.energy_j(readings[2].time_ns, readings[3].time_ns) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_a_reading_that_is_no_energy_or_power_leaves_what_is_beside_it_unknown(value: float) -> None:
    watts = [
        Reading(0, 2.0),
        Reading(10 * MS, 2.0),
        Reading(20 * MS, value),
        Reading(30 * MS, 2.0),
        Reading(40 * MS, 2.0),
    ]
    trace = EnergyTrace(watts)
    assert trace.energy_j(0, 10 * MS) == pytest.approx(0.02)
    assert trace.energy_j(0, 20 * MS) is None
    assert trace.energy_j(15 * MS, 25 * MS) is None
    assert trace.energy_j(30 * MS, 40 * MS) == pytest.approx(0.02)
    assert trace.mean_power_w() == pytest.approx(2.0)
    assert "finite and not negative" in str(trace.faults[0])
    joules = EnergyTrace([Reading(0, None, 1.0), Reading(10 * MS, None, value), Reading(20 * MS, None, 3.0)])
    assert joules.energy_j(0, 20 * MS) is None


def test_a_rail_that_reads_a_negative_power_is_refused(board) -> None:
    sysfs = board("orin-nano-jetpack6")
    meter = JetsonMeter(sysfs=sysfs)
    current = next(path for path in sysfs.rglob("curr1_input"))
    current.write_text("-12")
    with pytest.raises(MeterError, match=r"must not be negative; VDD_IN reads -"):
        meter.read()


def test_a_rail_that_was_asked_for_and_cannot_be_read_is_an_error(board) -> None:
    sysfs = board("orin-nano-jetpack6")
    next(path for path in sysfs.rglob("curr1_input")).unlink()
    with pytest.raises(MeterError, match=r"rail VDD_IN was asked for and cannot be read: reading .*curr1_input failed"):
        JetsonMeter(["VDD_IN"], sysfs)


def test_a_label_that_is_no_text_is_a_name_like_any_other(board) -> None:
    sysfs = board("orin-nano-jetpack6")
    next(path for path in sysfs.rglob("in1_label")).write_bytes(b"\xff\xfe")
    assert find_rails(sysfs)[0].name == r"\xff\xfe"


def test_counters_for_root_only_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    read_text = Path.read_text

    def refuse(path: Path, *args: str, **named: str) -> str:
        if path.name == "energy_uj":
            raise PermissionError(13, "Permission denied", str(path))
        return read_text(path, *args, **named)

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(MeterError, match=r"only root may read .*; run as root, or: sudo chmod a\+r .*energy_uj"):
        RaplMeter(FIXTURES / "amd-desktop")


# NVML


@pytest.fixture(scope="module")
def fake_nvml(build, tmp_path_factory: pytest.TempPathFactory):
    """fake_nvml("-DWITHOUT_COUNTER") compiles the stand-in for the driver's library."""

    def compiled(*flags: str) -> Path:
        library = tmp_path_factory.mktemp("nvml") / "libnvidia-ml.so.1"
        result = build("fake_nvml.cpp", "-shared", "-fPIC", *flags, "-o", library)
        assert result.returncode == 0, result.stderr
        return library

    return compiled


@pytest.fixture(scope="module")
def nvml_library(fake_nvml) -> Path:
    return fake_nvml()


@pytest.fixture
def open_nvml(monkeypatch: pytest.MonkeyPatch):
    """open_nvml(library) has nvidia-ml-py, loaded afresh, open ``library`` where it would open the driver's."""

    def use(library: Path | str) -> None:
        spec = importlib.util.find_spec("pynvml")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "pynvml", module)
        spec.loader.exec_module(module)

        def load(name: str) -> ctypes.CDLL:
            assert name == "libnvidia-ml.so.1"
            return ctypes.CDLL(str(library))

        monkeypatch.setattr(module, "CDLL", load)

    return use


@pytest.fixture
def nvml(open_nvml, nvml_library: Path) -> None:
    open_nvml(nvml_library)


def test_nvml_counts_energy(nvml: None) -> None:
    with NvmlMeter(0) as meter:
        first, second = meter.read(), meter.read()
    assert second.energy_j - first.energy_j == pytest.approx(2.0)
    assert NvmlMeter("GPU-1234").scope == "GPU GPU-1234"


def test_the_library_is_opened_by_its_name(nvml_library: Path) -> None:
    command = "from torchsurgeon.meters import find_meter; print(find_meter('cuda:0').read().energy_j)"
    environment = {**os.environ, "LD_LIBRARY_PATH": str(nvml_library.parent), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", command], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(9.0)


def test_a_gpu_that_does_not_count_tells_its_power(nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_NVML", "power")
    reading = NvmlMeter(0).read()
    assert (reading.power_w, reading.energy_j) == (75.5, None)


def test_a_driver_from_before_the_counter_tells_power(open_nvml, fake_nvml) -> None:
    open_nvml(fake_nvml("-DWITHOUT_COUNTER"))
    reading = NvmlMeter(0).read()
    assert (reading.power_w, reading.energy_j) == (75.5, None)


@pytest.mark.parametrize(
    ("kind", "device", "message"),
    [
        ("jetson", 0, r"reports neither its energy nor its power: Not Supported \(3\)"),
        ("driver", 0, r"NVML, which comes with NVIDIA's driver, does not start: Driver Not Loaded \(9\)"),
        ("energy", 5, r"there is no GPU 5: Not Found \(6\)"),
        ("energy", "GPU-9", r"there is no GPU GPU-9: Not Found \(6\)"),
    ],
)
def test_an_nvml_that_cannot_meter_says_why(
    kind: str, device: int | str, message: str, nvml: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_NVML", kind)
    with pytest.raises(MeterError, match=message):
        NvmlMeter(device)


def test_a_reading_that_fails_is_a_meter_error(nvml: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with NvmlMeter(0) as meter:
        monkeypatch.setenv("FAKE_NVML", "jetson")
        with pytest.raises(MeterError, match=r"GPU 0 does not report its energy: Not Supported \(3\)"):
            meter.read()
        monkeypatch.setenv("FAKE_NVML", "energy")
        assert meter.read().energy_j is not None


def test_a_gpu_tells_its_clocks_and_why_they_are_low(nvml: None) -> None:
    with NvmlMeter(0) as meter:
        assert meter.state() == {
            "gpu_clock_mhz": 1410,
            "gpu_memory_clock_mhz": 1593,
            "throttled_by": ["power cap", "thermal limit"],
        }


def test_a_machine_without_nvml_says_so(open_nvml) -> None:
    open_nvml("libnothing.so.1")
    with pytest.raises(MeterError, match=r"does not start: NVML Shared Library Not Found \(12\)"):
        NvmlMeter(0)


def test_a_missing_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    meter = find_meter("cuda", tmp_path)
    assert isinstance(meter, NullMeter)
    assert "nvidia-ml-py is not installed; pip install 'torchsurgeon[nvidia]'" in str(meter.faults[-1])


# The board


def test_a_board_tells_its_power_mode_and_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters.board, "_nvml_state", lambda device: {})
    files = {
        "proc/device-tree/model": "NVIDIA Jetson Orin Nano\0",
        "var/lib/nvpmodel/status": "pmode:0001 fmode:quiet",
        "etc/nvpmodel.conf": "< POWER_MODEL ID=0 NAME=15W >\n< POWER_MODEL ID=1 NAME=7W >\n< PM_CONFIG DEFAULT=0 >\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_cur_freq": "729600\n",
        "sys/devices/system/cpu/cpufreq/policy0/cpuinfo_max_freq": "1510400\n",
        "sys/devices/system/cpu/cpufreq/policy0/scaling_governor": "schedutil\n",
        "sys/devices/system/cpu/cpufreq/policy4/scaling_cur_freq": "1510400\n",
        "sys/class/devfreq/17000000.ga10b/cur_freq": "306000000\n",
        "sys/class/thermal/thermal_zone0/temp": "48500\n",
        "sys/class/thermal/thermal_zone1/temp": "51062\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    common = {
        "board": "NVIDIA Jetson Orin Nano",
        "power_mode": "7W (1)",
        "cpu_clock_mhz": {"lowest": 729, "highest": 1510, "limit": 1510, "governor": "schedutil"},
        "temperature_c": pytest.approx(51.062),
    }
    assert board_state(torch.device("cpu"), tmp_path) == common
    assert board_state(torch.device("cuda"), tmp_path)["gpu_clock_mhz"] == 306


def test_a_thor_whose_gpu_is_without_power_tells_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meters.board, "_nvml_state", lambda device: {})
    for name, text in {
        "class/devfreq/gpu-gpc-0/cur_freq": "315000000\n",
        "class/devfreq/gpu-nvd-0/cur_freq": "621000000\n",
        "class/thermal/thermal_zone0/temp": "50781\n",
        "class/thermal/thermal_zone1/temp": "unused",
    }.items():
        (tmp_path / "sys" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sys" / name).write_text(text)
    read_text = Path.read_text

    def refuse(path: Path, *args: str) -> str:
        if path.parent.name != "thermal_zone1":
            return read_text(path, *args)
        # What sysfs does there, done by a pipe in which nothing has been written: EAGAIN.
        reader, writer = os.pipe()
        try:
            os.set_blocking(reader, False)
            with open(reader, encoding="utf-8") as file:
                return file.read()
        finally:
            os.close(writer)

    monkeypatch.setattr(Path, "read_text", refuse)
    state = board_state(torch.device("cuda"), tmp_path)
    assert state == {"gpu_clock_mhz": 315, "temperature_c": pytest.approx(50.781)}


def test_what_a_board_does_not_tell_is_left_out(tmp_path: Path) -> None:
    assert board_state(torch.device("cpu"), tmp_path) == {}
    (tmp_path / "var/lib/nvpmodel").mkdir(parents=True)
    (tmp_path / "var/lib/nvpmodel/status").write_text("pmode:0003")
    assert board_state(torch.device("cpu"), tmp_path) == {"power_mode": "3"}


# Choosing


@pytest.mark.parametrize(
    ("device", "name", "kind"),
    [
        ("cpu", "tx2-jetpack4", JetsonMeter),
        ("cuda", "orin-nano-jetpack6", JetsonMeter),
        ("cuda", "agx-thor-jetpack7", JetsonMeter),
        ("cpu", "intel-laptop", RaplMeter),
    ],
)
def test_the_machine_decides_the_meter(device: str, name: str, kind: type[EnergyMeter]) -> None:
    assert type(find_meter(device, FIXTURES / name)) is kind


def test_a_machine_without_meter_says_what_was_tried(tmp_path: Path) -> None:
    meter = find_meter("cpu", tmp_path)
    assert isinstance(meter, NullMeter)
    assert [str(fault)[:14] for fault in meter.faults] == ["no INA3221 or ", "no RAPL energy"]
    with pytest.raises(MeterError, match="no energy meter: no INA3221"):
        meter.read()


@pytest.mark.parametrize("device", ["gpu", "meta"])
def test_a_device_that_cannot_be_metered_is_refused(device: str) -> None:
    with pytest.raises(DeviceError, match=device):
        find_meter(device)


# Logs


def test_a_log_comes_back_as_it_was_recorded(tmp_path: Path) -> None:
    readings = [Reading(5, power_w=1.25), Reading(9, energy_j=3.5), Reading(11)]
    save_log(tmp_path / "log.jsonl", JetsonMeter(sysfs=FIXTURES / "tx2-jetpack4"), readings)
    replay = ReplayMeter(tmp_path / "log.jsonl")
    assert (replay.name, replay.scope) == ("ina3221", "VDD_IN")
    assert [replay.read(), replay.read(), replay.read()] == readings
    with pytest.raises(MeterError, match="has ended after 3 readings"):
        replay.read()


def test_a_log_can_be_moved_in_time() -> None:
    replay = ReplayMeter(LOG, start_ns=77)
    assert replay.read().time_ns == 77
    assert replay.read().time_ns == 77 + 10 * MS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must hold the format"),
        ("[1, 2, 3]\n", "must hold the format"),
        ('{"format": "torchsurgeon-energy-log", "version": 2}\n', "must have version 1; got 2"),
        ("not json", "reading the energy log .* failed"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[1, 2, null]\n[2, 1, 1]\n', "line 3 .* got '.2, 1, 1"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[1, 1e999, null]\n', "finite and not negative; got"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[1, null, -1]\n', "finite and not negative; got"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[1, NaN, null]\n', "finite and not negative; got"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[1, true, null]\n', "finite and not negative; got"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[true, 1, null]\n', "line 2"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n[99999999999999999999999, 1, null]\n', "line 2"),
        ('{"format": "torchsurgeon-energy-log", "version": 1}\n["1", 2.0, null]\n', "line 2"),
    ],
)
def test_a_damaged_log_says_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(text)
    with pytest.raises(MeterError, match=message):
        ReplayMeter(path)


def test_a_missing_log_says_so(tmp_path: Path) -> None:
    with pytest.raises(MeterError, match="reading the energy log"):
        ReplayMeter(tmp_path / "none.jsonl")


# Integration


def powers(*watts: float, period_ns: int = 10 * MS) -> list[Reading]:
    return [Reading(index * period_ns, power_w=power) for index, power in enumerate(watts)]


def test_a_recorded_load_costs_what_it_drew_above_idle() -> None:
    trace = EnergyTrace(ReplayMeter(LOG).readings)
    start = 1_000 * MS
    assert trace.energy_j(start + 250 * MS, start + 450 * MS) == pytest.approx(15.0 * 0.2)
    runs = [(start + 210 * MS + step * 40 * MS, start + 240 * MS + step * 40 * MS) for step in range(9)]
    estimate = trace.estimate(runs, idle_power_w=5.0)
    assert estimate is not None
    assert estimate.mean_j == pytest.approx(10.0 * 0.03)
    assert estimate.interval_j == pytest.approx((0.3, 0.3))
    assert (estimate.repeats, estimate.missing, estimate.resolved) == (9, 0, True)


@given(st.lists(st.floats(0, 100), min_size=3, max_size=30), st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_parts_of_a_stretch_cost_what_the_whole_costs(watts: list[float], cuts: list[float]) -> None:
    trace = EnergyTrace(powers(*watts))
    end = (len(watts) - 1) * 10 * MS
    edges = [0, *sorted(int(cut * end) for cut in cuts), end]
    parts = [trace.energy_j(first, second) for first, second in pairwise(edges)]
    assert None not in parts
    assert sum(part for part in parts if part is not None) == pytest.approx(trace.energy_j(0, end), abs=1e-9)


@given(st.integers(0, 2**62))
def test_times_far_from_boot_lose_no_digits(boot_ns: int) -> None:
    readings = [Reading(boot_ns + index * MS, power_w=2.0) for index in range(5)]
    assert EnergyTrace(readings).energy_j(boot_ns + 1_000_000, boot_ns + 1_000_500) == pytest.approx(
        2.0 * 500e-9, rel=1e-6
    )


def test_a_counter_is_spread_over_the_time_between_readings() -> None:
    trace = EnergyTrace(
        [Reading(0, energy_j=100.0), Reading(10 * MS, energy_j=100.5), Reading(20 * MS, energy_j=102.5)]
    )
    assert trace.energy_j(5 * MS, 15 * MS) == pytest.approx(0.25 + 1.0)
    assert trace.mean_power_w() == pytest.approx(125.0)


def test_nothing_is_made_up_outside_the_readings() -> None:
    trace = EnergyTrace(powers(1, 1, 1))
    assert trace.energy_j(-1, 5 * MS) is None
    assert trace.energy_j(5 * MS, 21 * MS) is None
    estimate = trace.estimate([(0, 10 * MS), (15 * MS, 25 * MS)])
    assert estimate is not None
    assert (estimate.repeats, estimate.missing, estimate.interval_j) == (1, 1, None)
    assert trace.estimate([(50 * MS, 60 * MS)]) is None
    assert EnergyTrace([]).estimate([(0, 1)]) is None
    assert EnergyTrace([]).mean_power_w() is None


def test_a_pause_in_the_readings_is_a_gap() -> None:
    readings = [*powers(2, 2, 2), Reading(500 * MS, power_w=2.0), Reading(510 * MS, power_w=2.0)]
    trace = EnergyTrace(readings)
    assert trace.energy_j(15 * MS, 100 * MS) is None
    assert trace.energy_j(100 * MS, 200 * MS) is None
    assert trace.energy_j(500 * MS, 510 * MS) == pytest.approx(0.02)
    assert trace.mean_power_w() == pytest.approx(2.0)


def test_a_clock_that_jumps_back_loses_one_reading_and_is_named() -> None:
    readings = [*powers(2, 2, 2), Reading(5 * MS, power_w=50.0), Reading(30 * MS, power_w=2.0)]
    trace = EnergyTrace(readings)
    assert trace.energy_j(0, 30 * MS) == pytest.approx(0.06)
    assert ["went back 15000000 ns" in str(fault) for fault in trace.faults] == [True]


def test_a_counter_that_is_reset_is_a_gap_and_is_named() -> None:
    readings = [
        Reading(0, energy_j=10.0),
        Reading(MS, energy_j=11.0),
        Reading(2 * MS, energy_j=0.5),
        Reading(3 * MS, energy_j=1.5),
    ]
    trace = EnergyTrace(readings)
    assert trace.energy_j(0, 3 * MS) is None
    assert trace.energy_j(0, MS) == pytest.approx(1.0)
    assert trace.energy_j(2 * MS, 3 * MS) == pytest.approx(1.0)
    assert ["went from 11.0 J to 0.5 J" in str(fault) for fault in trace.faults] == [True]


def test_spans_shorter_than_the_sampling_period_are_marked_as_smeared() -> None:
    estimate = EnergyTrace(powers(*[3.0] * 20)).estimate([(MS * step, MS * step + MS) for step in range(100)])
    assert estimate is not None
    assert not estimate.resolved
    assert estimate.mean_j == pytest.approx(3e-3)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        trace = EnergyTrace(powers(*(10.0 + rng.normal(0, 2.0, size=400))))
        estimate = trace.estimate([(step * 25 * MS, step * 25 * MS + 20 * MS) for step in range(150)])
        assert estimate is not None
        assert estimate.interval_j is not None
        low, high = estimate.interval_j
        held += low <= 10.0 * 0.02 <= high
    assert held >= 0.9 * 200


# Sampling


class Scripted(EnergyMeter):
    """Steady 4 W, failing whenever the script says so, on a clock that a reading moves on by the meter's period.

    On the machine's own clock readings may lie far apart while others hold the processor, and then energy is unknown.
    """

    name, scope, period_s = "scripted", "everything", 0.001

    def __init__(self, fails: Iterator[bool]) -> None:
        self.fails = fails
        self.now_ns = 0

    def read(self) -> Reading:
        self.now_ns += int(self.period_s * 1e9)
        if next(self.fails):
            raise MeterError("the bus is busy")
        return Reading(self.now_ns, power_w=4.0)

    def wait(self, readings: int) -> tuple[int, int]:
        """Wait for so many readings; when that began and ended on the meter's clock."""
        start_ns = self.now_ns
        while (end_ns := self.now_ns) < start_ns + readings * self.period_s * 1e9:
            time.sleep(1e-3)
        return start_ns, end_ns


def test_the_sampler_covers_what_runs_inside() -> None:
    meter = Scripted(iter(lambda: False, None))
    with EnergySampler(meter) as sampler:
        start, end = meter.wait(50)
    energy_j = sampler.trace().energy_j(start, end)
    assert energy_j == pytest.approx(4.0 * (end - start) * 1e-9)
    assert sampler.faults == []


def test_failing_reads_are_kept_as_faults_and_the_rest_goes_on() -> None:
    meter = Scripted(index % 3 == 1 for index in range(10**9))
    with EnergySampler(meter) as sampler:
        start, end = meter.wait(50)
    assert sampler.faults
    assert "the bus is busy" in str(sampler.faults[0])
    assert sampler.readings
    estimate = sampler.trace().estimate([(start, end)])
    assert estimate is None or math.isclose(estimate.mean_j, 4.0 * (end - start) * 1e-9)


def test_a_null_meter_is_not_read_and_costs_are_unknown() -> None:
    with EnergySampler(NullMeter()) as sampler:
        pass
    assert sampler.readings == []
    assert sampler.faults == []
    assert sampler.trace().is_empty
    assert measure_idle(NullMeter(), 0.0) is None


def test_idle_power_is_the_mean_while_waiting() -> None:
    assert measure_idle(Scripted(iter(lambda: False, None)), 0.02) == pytest.approx(4.0)


def test_a_replayed_log_is_sampled_like_a_meter() -> None:
    replay = ReplayMeter(LOG)
    with EnergySampler(replay, period_s=0.0001) as sampler:
        while len(sampler.readings) < len(replay.readings):
            time.sleep(0.001)
    assert sampler.trace().energy_j(1_000 * MS, 2_000 * MS) == EnergyTrace(replay.readings).energy_j(
        1_000 * MS, 2_000 * MS
    )
    assert "has ended" in str(sampler.faults[-1])


@pytest.mark.cuda
def test_this_gpu_is_metered_or_says_why_not() -> None:
    meter = find_meter("cuda")
    if isinstance(meter, NullMeter):
        pytest.skip(json.dumps([str(fault) for fault in meter.faults]))
    x = torch.randn(4096, 4096, device="cuda")
    with EnergySampler(meter) as sampler:
        start = time.perf_counter_ns()
        while time.perf_counter_ns() - start < 1_000 * MS:
            x @ x
            torch.cuda.synchronize()
        end = time.perf_counter_ns()
    energy_j = sampler.trace().energy_j(start + 100 * MS, end - 100 * MS)
    assert energy_j is not None
    assert energy_j > 1.0


def test_everything_named_is_there() -> None:
    assert all(hasattr(meters, name) for name in meters.__all__)
