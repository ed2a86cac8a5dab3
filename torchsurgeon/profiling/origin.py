"""On which device, and with which hardware and software, a measurement is made."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from torchsurgeon.errors import DeviceError, short
from torchsurgeon.meters.board import board_state
from torchsurgeon.tracing.graph import LayerGraph


def find_device(device: str | torch.device) -> torch.device:
    """Return a device with its number.

    Args:
        device: "cpu", "cuda" (the current CUDA device) or "cuda:1".

    Raises:
        DeviceError: there is no such device; the message lists those that there are.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    existing = ", ".join(["cpu", *(f"cuda:{index}" for index in range(count))])
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise DeviceError(f"{short(device)} is not a device; this machine has {existing}") from None
    if found.type == "cpu":
        return torch.device("cpu")
    if found.type != "cuda":
        raise DeviceError(f"only CPU and CUDA devices are profiled; got {str(found)!r}; this machine has {existing}")
    if not count:
        raise DeviceError(
            f"there is no device {str(found)!r}: PyTorch {torch.__version__} sees no CUDA device; this machine has "
            f"{existing}"
        )
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise DeviceError(f"there is no device {str(found)!r}; this machine has {existing}")
    return torch.device("cuda", index)


def device_of(graph: LayerGraph, wanted: str | torch.device | None) -> torch.device:
    """Return the device that a model is on.

    Args:
        graph: the traced model.
        wanted: the device that it must be on; None for any.

    Raises:
        DeviceError: the wanted device does not exist, or the model is on another one or on several.
    """
    tensors = (*graph.model.parameters(), *graph.model.buffers())
    places = sorted({str(tensor.device) for tensor in tensors})
    if len(places) > 1:
        raise DeviceError(
            f"the model is spread over {', '.join(places)}; profile it on one device: model.to(...) and trace it again"
        )
    if wanted is None:
        return find_device(places[0] if places else "cpu")
    found = find_device(wanted)
    if places and places[0] != str(found):
        raise DeviceError(
            f"the model is on {places[0]}, not on {found}: call model.to({str(found)!r}) and trace it again"
        )
    return found


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """Return hardware, software, date and load of this machine, as plain data to keep with a measurement.

    Clock rates and power mode are there only where they can be read.

    Args:
        device: the device that is measured.
    """
    target = torch.device(device)
    is_cuda = target.type == "cuda"
    facts = {
        "device": torch.cuda.get_device_name(target) if is_cuda else _processor(),
        "device_type": target.type,
        "backend": "eager",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torchsurgeon": _version(),
        "commit": _commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    if is_cuda:
        facts["cuda"] = torch.version.cuda
    return facts | board_state(target)


def _version() -> str | None:
    try:
        return importlib.metadata.version("torchsurgeon")
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _commit() -> str | None:
    """Return the commit of this checkout; None for an installed package, which has only its version."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],
            capture_output=True,
            text=True,
            timeout=5,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
