"""How tensors are copied from an accelerator to CPU memory."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor


def on_host(tensor: Tensor) -> Tensor:
    """Return ``tensor`` in CPU memory: the tensor itself if it is there already, else a copy.

    A copy of a dense tensor keeps the order of its dimensions in memory. A CUDA tensor is copied into pinned memory,
    which PyTorch caches, on a stream of its own: the copy waits for the work that the caller's stream has queued so
    far, but not for the heads of later calls that are queued after it.
    """
    if not tensor.is_cuda:
        return tensor.cpu()
    copies = _copies(tensor.device)
    copies.wait_stream(torch.cuda.current_stream(tensor.device))
    host = torch.empty_like(tensor, device="cpu", pin_memory=True)
    with torch.cuda.stream(copies):
        host.copy_(tensor, non_blocking=True)
        # Keeps PyTorch from giving the tensor's memory to other work before this stream has read it.
        tensor.record_stream(copies)
        done = copies.record_event()
    done.synchronize()
    return host


# One stream per device, shared by all threads.
@lru_cache(maxsize=64)
def _copies(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
