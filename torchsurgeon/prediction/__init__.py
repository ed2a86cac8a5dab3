"""Calibrate a device once, then predict what each layer of any model costs on it, without running the model."""

from torchsurgeon.prediction.backends import calibrate_backend
from torchsurgeon.prediction.calibration import calibrate
from torchsurgeon.prediction.predictor import Predictor
from torchsurgeon.prediction.reference import (
    all_costs_on,
    costs_on,
    load_costs,
    load_device,
    reference_device,
    reference_devices,
)

__all__ = [
    "Predictor",
    "all_costs_on",
    "calibrate",
    "calibrate_backend",
    "costs_on",
    "load_costs",
    "load_device",
    "reference_device",
    "reference_devices",
]
