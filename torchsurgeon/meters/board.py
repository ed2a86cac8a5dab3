"""The state of a board while it is measured: its clocks, power mode and temperature, as far as they can be read.

Linux shows the processor's clocks in cpufreq, and a Jetson's GPU clock in devfreq. A Jetson's power mode is the number
that nvpmodel writes to ``/var/lib/nvpmodel/status``; ``/etc/nvpmodel.conf`` holds its name. Other GPUs answer to NVML.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchsurgeon.errors import MeterError
from torchsurgeon.meters.nvml import NvmlMeter, nvml_name

if TYPE_CHECKING:
    import torch


def board_state(device: torch.device, root: Path = Path("/")) -> dict[str, Any]:
    """Return what can be read of the board's state, and leave out the rest.

    Args:
        device: the device that is measured.
        root: where the file system's root is.

    Returns:
        Any of ``board``, ``power_mode``, ``cpu_clock_mhz``, ``temperature_c``, ``gpu_clock_mhz``, and by NVML a GPU's
        memory clock, power limit and reasons for lowered clocks.
    """
    found: dict[str, Any] = {
        "board": _text(root / "proc/device-tree/model").rstrip("\0"),
        "power_mode": _power_mode(root),
        "cpu_clock_mhz": _cpu_clocks(root / "sys/devices/system/cpu"),
        "temperature_c": _hottest_c(root / "sys/class/thermal"),
    }
    if device.type == "cuda":
        found["gpu_clock_mhz"] = _tegra_gpu_clock_mhz(root / "sys/class/devfreq")
        found |= _nvml_state(device)
    return {name: value for name, value in found.items() if value}


def _power_mode(root: Path) -> str:
    number = re.match(r"pmode:(\d+)", _text(root / "var/lib/nvpmodel/status"))
    if number is None:
        return ""
    mode = int(number[1])
    named = re.search(rf"POWER_MODEL\s+ID={mode}\s+NAME=(\S+)", _text(root / "etc/nvpmodel.conf"))
    return f"{named[1]} ({mode})" if named else str(mode)


def _cpu_clocks(folder: Path) -> dict[str, Any]:
    policies = sorted(folder.glob("cpufreq/policy*")) or sorted(folder.glob("cpu[0-9]*/cpufreq"))
    now = [mhz for policy in policies if (mhz := _number(policy / "scaling_cur_freq") // 1000)]
    if not now:
        return {}
    limits = [_number(policy / "cpuinfo_max_freq") // 1000 for policy in policies]
    governors = sorted({text for policy in policies if (text := _text(policy / "scaling_governor"))})
    return {"lowest": min(now), "highest": max(now), "limit": max(limits), "governor": ", ".join(governors)}


def _tegra_gpu_clock_mhz(folder: Path) -> int:
    # gp10b is TX2's GPU, gv11b Xavier's, ga10b Orin's; later kernels call it 17000000.gpu. Thor's is gpu-gpc-0, beside
    # gpu-nvd-0 for its video engines.
    names = ("*.gp10b", "*.gv11b", "*.ga10b", "*.gpu", "gpu*")
    found = [path for name in names for path in folder.glob(name) if not path.name.startswith("gpu-nvd")]
    return max((_number(path / "cur_freq") // 1_000_000 for path in found), default=0)


def _hottest_c(folder: Path) -> float:
    return max((_number(path) / 1000 for path in folder.glob("thermal_zone*/temp")), default=0.0)


def _nvml_state(device: torch.device) -> dict[str, Any]:
    try:
        meter = NvmlMeter(nvml_name(device))
    except MeterError:
        return {}
    with meter:
        return meter.state()


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    # A thermal zone of Thor's GPU answers EAGAIN while the GPU is without power. Python's buffered reader then gets
    # no bytes at all, and raises a TypeError instead of an OSError.
    except (OSError, UnicodeDecodeError, TypeError):
        return ""


def _number(path: Path) -> int:
    text = _text(path)
    return int(text) if text.lstrip("-").isdigit() else 0
