"""What a shell offers when Tab is pressed (argcomplete). It runs at every press, so it imports no PyTorch."""

from __future__ import annotations

import argparse
import importlib.util
import re
from collections.abc import Callable, Iterable
from pathlib import Path

# The names that torchsurgeon.link.PRESETS and torchsurgeon.reference_devices() have, and those of them that are bounds
# from data sheets; a test compares them.
LINKS = ("3g", "lte", "wifi", "lte-2021", "5g-low", "5g-mmwave")
REFERENCE_DEVICES = ("jetson-orin-nano", "k40-gpu", "k40-server-cpu", "tegra-k1-cpu", "tegra-k1-gpu", "xeon-1-thread")
BOUNDS = ("jetson-orin-nano",)
# Names of torchsurgeon.backends.NAMES; a test compares them.
BACKENDS = ("eager", "inductor", "aot", "onnxruntime", "openvino", "openvino:bf16", "tensorrt")


Completer = Callable[..., Iterable[str]]

_REGISTERED = re.compile(r"@register_model\((?:name=\"(\w+)\")?\).*?\ndef (\w+)\(", re.DOTALL)
# The names that torchsurgeon.simulate.SHAPES has; a test compares them.
SHAPES = ("exponential", "constant", "web-search-arrivals", "web-search-service")


def marked_devices() -> str:
    """Return the names of the reference devices as a text lists them, with a mark at those that are bounds."""
    return ", ".join(f"{name} (a bound)" if name in BOUNDS else name for name in REFERENCE_DEVICES)


def completed(action: argparse.Action, completer: Completer) -> None:
    """Set what a shell offers for an argument.

    Args:
        action: the argument.
        completer: called with the text that is typed so far. What it returns is offered where it begins with that text.
    """
    vars(action)["completer"] = completer


def one_of(names: Iterable[str], *suffixes: str) -> Completer:
    """Return a completer that offers names, and files that end in one of ``suffixes``."""
    return lambda prefix, **_: [*names, *(_files(prefix, suffixes) if suffixes else ())]


def named(completer: Completer) -> Completer:
    """Return a completer of ``NAME=VALUE`` whose values are those of ``completer``."""

    def complete(prefix: str, **_: object) -> list[str]:
        name, equals, value = prefix.partition("=")
        return [f"{name}={one}" for one in completer(value)] if equals else []

    return complete


def specs(prefix: str, **_: object) -> list[str]:
    """Offer model SPECs: torchvision's models where it is installed, and ``.pt2`` files."""
    return [*(f"torchvision:{name}" for name in torchvision_models()), *_files(prefix, ("pt2",))]


def torchvision_models() -> list[str]:
    """Return the names of torchvision's models, read from its source, because importing it imports PyTorch."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return []
    sources = (Path(found.origin).parent / "models").rglob("*.py")
    return sorted(name or function for path in sources for name, function in _REGISTERED.findall(path.read_text()))


def _files(prefix: str, suffixes: tuple[str, ...]) -> list[str]:
    from argcomplete.completers import FilesCompleter

    return list(FilesCompleter(suffixes)(prefix))
