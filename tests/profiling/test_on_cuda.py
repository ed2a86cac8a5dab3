"""Profiling on an NVIDIA GPU. Apart from the others, so that it can run on a machine without the command's packages."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchsurgeon as ts
from torchsurgeon.profiling import layer_trace


@pytest.mark.cuda
def test_a_gpu_is_profiled_with_its_memory() -> None:
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 10)).cuda().eval()
    graph = ts.trace(model, torch.rand(64, 1024, device="cuda"))
    found = ts.profile(graph, "cuda", repeats=5)
    assert (found.samples_s > 0).all()
    assert found.memory_bytes is not None
    assert found.memory_bytes[0] >= 64 * (1024 + 4096) * 4
    assert found.provenance["clock"] == "cuda-events"
    assert found.provenance["device"] == torch.cuda.get_device_name()
    assert {layer.name for layer in layer_trace(graph).layers} >= {"0", "1", "2"}
