"""Tensors leave an accelerator."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in CPU memory, itself where it is there already, else a dense one's order of dimensions kept.

    A CUDA tensor is copied into pinned memory, which PyTorch keeps and uses again, on a stream of its own: the copy
    waits for what the caller's stream has queued so far, and not for the heads queued behind it.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    copies = _copies(tensor.device)
    copies.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(copies):
        host.copy_(tensor, non_blocking=True)
        # The caller's stream may reuse the tensor's memory only when it has been read.
        tensor.record_stream(copies)
        done = copies.record_event()
    done.synchronize()
    return host


@lru_cache(maxsize=64)
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
