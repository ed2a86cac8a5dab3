"""Calibrate a device once, then predict what each layer of any model costs on it, without running the model."""

from torchsurgeon.prediction.calibration import calibrate
from torchsurgeon.prediction.predictor import Predictor
from torchsurgeon.prediction.reference import costs_on, load_costs, load_device, reference_device, reference_devices

__all__ = [
    "Predictor",
    "calibrate",
    "costs_on",
    "load_costs",
    "load_device",
    "reference_device",
    "reference_devices",
]
