"""The kernels that other threads' calls take while a model is exported."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from importlib import import_module

from torch import Tensor, nn

# The function of torch.export that switches oneDNN, NNPACK and cuDNN off.
_SWITCH = "_ignore_backend_decomps"


@contextlib.contextmanager
def kernels_kept(model: nn.Module, tensors: Sequence[Tensor]) -> Iterator[None]:
    """Keep torch.export from switching oneDNN off for the whole process inside the block, where it need not.

    It does so to get no operators of oneDNN. Calls of other threads would meanwhile take other kernels, whose answers
    differ in the last bits. On a CPU only recurrent layers come apart into such operators.

    Args:
        model: what is exported.
        tensors: its inputs.
    """
    exporter = import_module("torch.export._trace")
    needed = any(isinstance(module, nn.RNNBase) for module in model.modules())
    if needed or any(tensor.device.type != "cpu" for tensor in tensors) or not hasattr(exporter, _SWITCH):
        yield
        return
    switch = getattr(exporter, _SWITCH)
    setattr(exporter, _SWITCH, contextlib.nullcontext)
    try:
        yield
    finally:
        setattr(exporter, _SWITCH, switch)
