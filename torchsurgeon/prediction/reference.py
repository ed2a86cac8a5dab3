"""Devices that come with the package: most were measured; of the others only a bound is known.

Every ``devices/NAME.json`` is a calibration file. Those of the Neurosurgeon paper's machines hold what the paper's
authors measured there, as ``provenance["samples"]`` says (``benchmarks/evaluate/devices.py`` writes them). Where there
are no measurements, the roofline was reconstructed from data sheets, which ``provenance["reconstructed_from"]`` lists;
what such a device predicts is a lower bound, and ``plan()`` refuses it unless told to allow bounds.
"""

from __future__ import annotations

import os
from importlib import resources
from pathlib import Path

from torchsurgeon import _json_file
from torchsurgeon.errors import CalibrationError, short
from torchsurgeon.prediction.predictor import Predictor
from torchsurgeon.profiling.record import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph


def reference_devices() -> tuple[str, ...]:
    """Return the names that ``reference_device()`` takes, in alphabetical order."""
    files = resources.files("torchsurgeon.prediction").joinpath("devices").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def listed_devices() -> str:
    """Return the names of the reference devices as a message lists them, with a mark at those that are bounds."""
    return ", ".join(
        f"{name} (a bound from data sheets)" if reference_device(name).is_bound else name
        for name in reference_devices()
    )


def reference_device(name: str) -> Predictor:
    """Return the predictor of a device that comes with the package.

    Args:
        name: one of ``reference_devices()``.

    Raises:
        CalibrationError: there is no such device; the message lists those that there are.
    """
    names = reference_devices()
    if name not in names:
        raise CalibrationError(f"there is no reference device {short(name)}; there are {listed_devices()}")
    with resources.as_file(resources.files("torchsurgeon.prediction").joinpath("devices", f"{name}.json")) as path:
        return Predictor.load(path)


def load_device(name_or_path: str | Path) -> Predictor:
    """Return the predictor in a file or, where there is no such file, of a reference device.

    Args:
        name_or_path: the file, or the name of the device.

    Raises:
        CalibrationError: there is neither, or the file is damaged.
    """
    # os.path.exists() also answers for a name that is too long for a file.
    if os.path.exists(name_or_path):
        return Predictor.load(name_or_path)
    names = reference_devices()
    if str(name_or_path) in names:
        return reference_device(str(name_or_path))
    raise CalibrationError(
        f"there is no file {short(Path(name_or_path))}, and no reference device of that name; there are "
        f"{listed_devices()}"
    )


def load_costs(name_or_path: str | Path) -> LayerProfile | Predictor:
    """Return what is known of a device's costs, measured or calibrated.

    Args:
        name_or_path: the file of a profile or calibration or, where there is no such file, the name of a reference
            device.

    Returns:
        The profile in the file, or the predictor in the file or of the reference device.

    Raises:
        ProfileError: the file holds a damaged profile.
        CalibrationError: there is neither a file nor a reference device of this name, or the calibration is damaged.
    """
    # os.path.exists() also answers for a name that is too long for a file.
    if os.path.exists(name_or_path):
        data = _json_file.read(name_or_path, CalibrationError, "measure or calibrate again")
        if not isinstance(data, dict) or not str(data.get("format")).startswith("torchsurgeon.predictor/"):
            return LayerProfile.load(name_or_path)
    return load_device(name_or_path)


def costs_on(graph: LayerGraph, where: str | Path | LayerProfile | Predictor) -> LayerProfile:
    """Return what a model costs on a device, measured or predicted.

    Args:
        graph: the traced model.
        where: the profile; the predictor by which the model is predicted; or what ``load_costs()`` takes.

    Raises:
        ProfileError: the profile is of another model or damaged.
        CalibrationError: there is neither a file nor a reference device of this name, or the calibration is damaged.
    """
    known = load_costs(where) if isinstance(where, str | Path) else where
    if isinstance(known, LayerProfile):
        known.check(graph)
        return known
    return known.predict(graph)


def all_costs_on(graph: LayerGraph, where: str | Path | LayerProfile | Predictor) -> list[LayerProfile]:
    """Return what a model costs on a device by each backend that is known there, in eager PyTorch first.

    Args:
        graph: the traced model.
        where: as ``costs_on()`` takes it.

    Raises:
        ProfileError, CalibrationError: as ``costs_on()`` raises them.
    """
    known = load_costs(where) if isinstance(where, str | Path) else where
    if isinstance(known, LayerProfile):
        return [costs_on(graph, known)]
    return [known.predict(graph, backend) for backend in ("eager", *known.backends)]
