"""How long models take by a backend on a device that was calibrated in eager PyTorch.

A backend fuses layers, so layers cannot be timed by it one by one. What can be timed are whole networks, by the backend
and in eager PyTorch in turns. From these follows by what factor each kind of work takes longer by the backend.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import torch

from torchsurgeon.backends import Backend, BuiltPart, Part, find_backend
from torchsurgeon.backends.eager import Eager
from torchsurgeon.errors import BackendError, CalibrationError, is_finite, short
from torchsurgeon.prediction.factors import BackendFactors, Net
from torchsurgeon.prediction.nets import random_net, settle
from torchsurgeon.prediction.predictor import Predictor
from torchsurgeon.profiling.measure import ModelRun
from torchsurgeon.profiling.origin import find_device
from torchsurgeon.profiling.parts import works
from torchsurgeon.tracing.tracer import trace

Progress = Callable[[float, float, str], None]


def calibrate_backend(
    predictor: Predictor,
    backend: str | Backend,
    device: str | torch.device = "cpu",
    *,
    budget_s: float = 100.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Predictor:
    """Return a predictor that also predicts what models take by a backend.

    Random networks are timed by the backend and in eager PyTorch, in turns, until the budget is spent.

    Args:
        predictor: the ``Predictor`` of this device, as ``calibrate()`` returned it.
        backend: the backend, or its name.
        device: the device, as ``calibrate()`` took it.
        budget_s: seconds to spend, above 0.
        seed: the same seed draws the same networks.
        progress: is called after each network with the seconds spent, ``budget_s``, and what has been done.

    Raises:
        BackendError: there is no such backend here, or it is eager PyTorch.
        CalibrationError: the budget is not positive, or too short for eight networks.
        DeviceError: the device does not exist.
    """
    runs, target = calibratable(backend, budget_s), find_device(device)
    rng = random.Random(seed * 1_000_003 + 7)
    begun_s = time.monotonic()
    nets: list[Net] = []
    while (spent_s := time.monotonic() - begun_s) < budget_s:
        timed = _timed(rng, runs, target)
        if timed is not None:
            nets.append(timed)
        if progress is not None:
            progress(spent_s, budget_s, f"{len(nets)} networks timed by {runs.name}")
    known = {**predictor.backends, runs.name: BackendFactors.fit(nets)}
    return Predictor(
        predictor.provenance, predictor.samples, predictor.fitted, predictor.roofline, predictor.block, known
    )


def calibratable(backend: str | Backend, budget_s: float) -> Backend:
    """Return a backend that can be calibrated, before anything else is measured for it.

    Args:
        backend: as ``calibrate_backend()`` takes it.
        budget_s: as ``calibrate_backend()`` takes it.

    Raises:
        BackendError: there is no such backend here, or it is eager PyTorch.
        CalibrationError: the budget is not positive.
    """
    if not (is_finite(budget_s) and budget_s > 0):
        raise CalibrationError(f"budget_s must be a positive number of seconds, such as 100; got {short(budget_s)}")
    found = find_backend(backend)
    if isinstance(found, Eager):
        raise BackendError("eager PyTorch is what calibrate() calibrates; name another backend")
    return found


def _timed(rng: random.Random, backend: Backend, device: torch.device) -> Net | None:
    """Time a network that is drawn at random; None where the backend does not take it."""
    with torch.device("meta"):
        net = random_net(rng)
    real = torch.rand if net.example.is_floating_point() else _zeros
    settle(net.model)
    example = real(net.example.shape).to(device)
    with torch.no_grad():
        graph = trace(net.model.eval().to(device), example)
        part = Part.head(graph, graph.points[-1])
        built = BuiltPart(part, backend, None)
        built.build(example)
        # Where eager PyTorch runs a part of it, its time says little of the backend.
        if built.reason is not None or built.rest is not None:
            return None
        run = ModelRun(graph, device, [example])
        _, once_s = run.times(None, 1, 1, 0.0, lambda: None)
        repeats = min(max(round(0.2 / once_s[0]), 3), 8)
        samples, ratios = [], []
        for _ in range(repeats):
            layers_s, whole_s = run.times(None, 1, 0, 0.0, lambda: None)
            begin_s = time.perf_counter()
            built(example)
            run.synchronize()
            samples.append(layers_s[0] * (whole_s[0] / layers_s[0].sum()))
            ratios.append((time.perf_counter() - begin_s) / whole_s[0])
    eager_s = np.median(samples, axis=0)
    return works(graph), eager_s, float(np.median(ratios)) * float(eager_s.sum())


def _zeros(shape: torch.Size) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long)
