"""Devices that come with the package: measured ones, and the paper's, reconstructed as rooflines from data sheets.

Every ``devices/NAME.json`` is a calibration file. ``provenance["reconstructed_from"]`` lists the sources of one that
was never measured; all it predicts is a lower bound.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from torchsurgeon import _json_file
from torchsurgeon.errors import CalibrationError
from torchsurgeon.prediction.predictor import Predictor
from torchsurgeon.profiling.record import LayerProfile
from torchsurgeon.tracing.graph import LayerGraph


def reference_devices() -> tuple[str, ...]:
    """Return the names that :func:`reference_device` takes, in alphabetical order."""
    files = resources.files("torchsurgeon.prediction").joinpath("devices").iterdir()
    return tuple(sorted(file.name.removesuffix(".json") for file in files if file.name.endswith(".json")))


def reference_device(name: str) -> Predictor:
    """Return the predictor of a device that comes with the package.

    Raises :class:`~torchsurgeon.errors.CalibrationError`, listing those there are, for another name.
    """
    names = reference_devices()
    if name not in names:
        raise CalibrationError(f"there is no reference device {name!r}; there are {', '.join(names)}")
    with resources.as_file(resources.files("torchsurgeon.prediction").joinpath("devices", f"{name}.json")) as path:
        return Predictor.load(path)


def load_device(name_or_path: str | Path) -> Predictor:
    """Return the predictor in a file, or where there is no such file the reference device of that name.

    Raises :class:`~torchsurgeon.errors.CalibrationError` where there is neither, or the file is damaged.
    """
    if Path(name_or_path).exists():
        return Predictor.load(name_or_path)
    names = reference_devices()
    if str(name_or_path) in names:
        return reference_device(str(name_or_path))
    raise CalibrationError(
        f"there is no file {name_or_path}, and no reference device of that name; there are {', '.join(names)}"
    )


def load_costs(name_or_path: str | Path) -> LayerProfile | Predictor:
    """Return what a file tells of a device's costs, or where there is no such file, the reference device of that name.

    Returns:
        The profile in the file of a measured profile, the predictor in the file of a calibration.

    Raises:
        ProfileError: the file is a damaged profile.
        CalibrationError: the file is a damaged calibration or neither, or there is no such file and no such device.
    """
    if Path(name_or_path).exists():
        data = _json_file.read(name_or_path, CalibrationError, "measure or calibrate again")
        if not isinstance(data, dict) or not str(data.get("format")).startswith("torchsurgeon.predictor/"):
            return LayerProfile.load(name_or_path)
    return load_device(name_or_path)


def costs_on(graph: LayerGraph, where: str | Path | LayerProfile | Predictor) -> LayerProfile:
    """Return what each layer of ``graph`` costs on a device, measured or predicted.

    Args:
        graph: the model.
        where: what :func:`load_costs` takes or returns.

    Raises:
        ProfileError: a measured profile is of another graph, or what :func:`load_costs` raises.
        CalibrationError: what :func:`load_costs` raises.
    """
    known = load_costs(where) if isinstance(where, str | Path) else where
    if isinstance(known, LayerProfile):
        known.check(graph)
        return known
    return known.predict(graph)
