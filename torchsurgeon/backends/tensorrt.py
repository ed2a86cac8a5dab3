"""TensorRT by Torch-TensorRT, where that is installed."""

from __future__ import annotations

import importlib

import torch

from torchsurgeon.accuracy.budget import Budget
from torchsurgeon.backends.inductor import Inductor
from torchsurgeon.backends.judging import Sample
from torchsurgeon.errors import BackendError, short


class TensorRT(Inductor):
    """Torch-TensorRT as a compiler of ``torch.compile``, for models on an NVIDIA GPU.

    Raises:
        BackendError: the package is not installed, does not import, or there is no GPU.
    """

    name = "tensorrt"
    device = "cuda"
    tolerance = 1e-2  # TensorRT multiplies in TF32
    copies_weights = True
    keeps_nan = False
    packages = ("torch_tensorrt",)
    compiler = "torch_tensorrt"

    def __init__(self, *, sample: Sample | None = None, budget: Budget | None = None) -> None:
        super().__init__(sample=sample, budget=budget)
        if not torch.cuda.is_available():
            raise BackendError("backend 'tensorrt' needs an NVIDIA GPU, and PyTorch finds none; choose another backend")
        try:
            importlib.import_module("torch_tensorrt")
        except Exception as error:  # a vendor's package may fail in any way
            raise BackendError(
                f"backend 'tensorrt' needs torch_tensorrt, which fails to import: {short(error)}; install one for this "
                "PyTorch, or choose another backend"
            ) from error
