"""Tensors as NumPy's arrays and back, as the runtimes of other projects take and give them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def as_array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor's elements in the main memory, without a copy where they lie there one after the other."""
    if tensor.requires_grad or not tensor.is_cpu:
        tensor = tensor.detach().cpu()
    return tensor.contiguous().numpy()


def as_tensors(arrays: Iterable[Any], like: Sequence[Tensor]) -> list[Tensor]:
    """Return a runtime's results as tensors, without a copy where that is possible, on the device of others.

    Args:
        arrays: the results.
        like: the tensors on whose device they are wanted.
    """
    # One that is not the caller's own to write to is copied. A scalar is no array.
    found = [
        torch.from_numpy(one if isinstance(one, np.ndarray) and one.flags.writeable else np.array(one))
        for one in arrays
    ]
    if like and not like[0].is_cpu:
        return [tensor.to(like[0].device) for tensor in found]
    return found
