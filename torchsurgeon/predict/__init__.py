"""Calibrate a device once; then predict what any model costs on it, layer by layer, without running it."""

from torchsurgeon.predict.calibration import ThrottledWarning, calibrate
from torchsurgeon.predict.predictor import PredictionWarning, Predictor
from torchsurgeon.predict.reference import costs_on, load_device, reference_device, reference_devices

__all__ = [
    "PredictionWarning",
    "Predictor",
    "ThrottledWarning",
    "calibrate",
    "costs_on",
    "load_device",
    "reference_device",
    "reference_devices",
]
