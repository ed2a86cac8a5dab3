"""Calibrate a device once; then predict what any model costs on it, layer by layer, without running it."""

from torchsurgeon.prediction.calibration import ThrottledWarning, calibrate
from torchsurgeon.prediction.predictor import PredictionWarning, Predictor
from torchsurgeon.prediction.reference import costs_on, load_device, reference_device, reference_devices

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
