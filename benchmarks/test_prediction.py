"""Predicting what every layer of a model costs, beside simpler predictions and beside running the model.

How far predictions are off is a study of its own: ``python -m benchmarks.prediction``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from sklearn.linear_model import LinearRegression
from threadpoolctl import threadpool_limits
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import torchsurgeon as ts
from benchmarks.prediction import paper_regressors
from benchmarks.support.networks import Network
from benchmarks.support.side_by_side import SideBySide
from torchsurgeon.prediction.kinds import KINDS
from torchsurgeon.prediction.operations import operations
from torchsurgeon.prediction.samples import Sample, SampleTable


@pytest.fixture(scope="module")
def predictor(pytestconfig: pytest.Config) -> ts.Predictor:
    # Its models are trees, fitted when a kind of layer is met first. scikit-learn fits and predicts with OpenMP, whose
    # threads on a busy machine wait for each other by spinning.
    threadpool_limits(pytestconfig.getoption("--threads"))
    return ts.reference_device("xeon-1-thread")


def by_flops(model: nn.Module, x: torch.Tensor) -> Callable[[], object]:
    """The simplest prediction: PyTorch's count of flops, on tensors without data, by a rate."""

    def predict() -> float:
        with FakeTensorMode(allow_non_fake_inputs=True) as fake, FlopCounterMode(display=False) as counter:
            model(fake.from_tensor(x))
        return counter.get_total_flops() / 1e10

    return predict


def by_lines(predictor: ts.Predictor, graph: ts.LayerGraph) -> Callable[[], object]:
    """A line for each kind of layer, as Neurosurgeon's public re-implementations fit them."""
    tables = {kind: table for kind, table in predictor.samples.items() if KINDS[kind].columns}
    lines = {kind: LinearRegression().fit(paper_regressors(table), table.seconds) for kind, table in tables.items()}

    def predict() -> float:
        seconds = 0.0
        samples: dict[str, list[Sample]] = {}
        for layer in operations(graph):
            for operation in layer:
                samples.setdefault(operation.kind, []).append(Sample(operation, 1.0))
        for kind, found in samples.items():
            if kind in lines:
                seconds += lines[kind].predict(paper_regressors(SampleTable.of(kind, found))).sum()
        return seconds

    return predict


@pytest.mark.benchmark(group="predicting a model's layers")
@pytest.mark.filterwarnings("ignore::torchsurgeon.PredictionWarning")
@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_predicting(name: str, side_by_side: SideBySide, network: Network, predictor: ts.Predictor) -> None:
    model, x = network(name)
    graph = ts.trace(model, x)
    side_by_side(
        {
            "flop counter": by_flops(model, x),
            "linear regression": by_lines(predictor, graph),
            "torchsurgeon": lambda: predictor.predict(graph),
            "running the model": lambda: model(x),
        }
    )
