"""A split model as a part of what other libraries run: Lightning, accelerate, PyTorch's own wrappers and loops."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from classifier import EXAMPLE, Frozen, degraded, remote, right, split_of, top, truth, until
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

import torchsurgeon as ts
from torchsurgeon.serve import Server

INPUTS = torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(2))
LABELS = torch.arange(12) % 2
BATCHES = DataLoader(TensorDataset(INPUTS, LABELS), batch_size=4)


@pytest.fixture
def split(server: Server) -> Iterator[ts.SplitModule]:
    with split_of(server, partition=2, fallback="error") as module:
        yield module.requires_grad_(False)


def trained(model: nn.Module, step: Callable[[torch.Tensor], object] = torch.Tensor.backward) -> nn.Module:
    """``model`` after an epoch of training what is not frozen."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for x, labels in BATCHES:
        optimizer.zero_grad()
        step(functional.cross_entropy(model.train()(x), labels))
        optimizer.step()
    return model


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


# --- Lightning ---

# Lightning asks for a type that PyTorch has deprecated, advises to load data in other processes, and remarks that what
# is frozen is in evaluation mode.
REMARKS = (
    r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
    "ignore:The '.*_dataloader' does not have many workers",
    "ignore:Found .* in eval mode at the start of training",
)


def under_lightning(test: Any) -> Any:
    for remark in REMARKS:
        test = pytest.mark.filterwarnings(remark)(test)
    return test


@pytest.fixture
def lightning() -> Any:
    return pytest.importorskip("pytorch_lightning")


@pytest.fixture
def classifier(lightning: Any) -> Callable[[nn.Module], Any]:
    """Makes a LightningModule of a frozen part and a layer that is trained."""
    from torchmetrics.classification import MulticlassAccuracy

    class Classifier(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self, backbone: nn.Module) -> None:
            super().__init__()
            self.save_hyperparameters(ignore=["backbone"])
            self.backbone, self.top = backbone, top()
            self.accuracy = MulticlassAccuracy(num_classes=2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.top(self.backbone(x))

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            return functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch: Any, number: int) -> None:
            self.accuracy(self(batch[0]), batch[1])
            self.log("accuracy", self.accuracy)

        def predict_step(self, batch: Any, number: int) -> torch.Tensor:
            return self(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return Classifier


@pytest.fixture
def trainer(lightning: Any) -> Callable[..., Any]:
    """Makes a trainer that leaves no files behind."""

    def make(**options: Any) -> Any:
        fixed = {"accelerator": "cpu", "devices": 1, "logger": False, "enable_checkpointing": False}
        return lightning.Trainer(**fixed, enable_progress_bar=False, max_epochs=2, **options)

    return make


@under_lightning
def test_lightning_trains_what_stands_behind_a_frozen_split(
    split: ts.SplitModule, trainer: Any, classifier: Any
) -> None:
    own, ours = classifier(Frozen().requires_grad_(False)), classifier(split)
    accuracy = []
    for model in (own, ours):
        fit = trainer()
        fit.fit(model, BATCHES, BATCHES)
        accuracy.append(fit.callback_metrics["accuracy"])
    assert same_weights(own, ours)
    assert not torch.equal(ours.top.weight, top().weight)
    assert accuracy[0] == accuracy[1]
    assert split.last is not None
    assert split.last.server is not None
    assert right(split)


@under_lightning
@pytest.mark.parametrize("inference_mode", [True, False])
def test_lightning_predicts_with_a_split(
    split: ts.SplitModule, trainer: Any, classifier: Any, inference_mode: bool
) -> None:
    answers = [
        trainer(inference_mode=inference_mode).predict(classifier(model), BATCHES) for model in (Frozen(), split)
    ]
    assert all(torch.equal(own, ours) for own, ours in zip(*answers, strict=True))
    assert split.last is not None
    assert split.last.server is not None


@under_lightning
@pytest.mark.parametrize("precision", ["bf16-mixed", "64-true"])
def test_lightning_predicts_in_another_precision_and_the_device_answers(
    server: Server, trainer: Any, classifier: Any, precision: str
) -> None:
    with split_of(server) as split:
        answers = [trainer(precision=precision).predict(classifier(model), BATCHES) for model in (Frozen(), split)]
        assert all(torch.equal(own, ours) for own, ours in zip(*answers, strict=True))
        assert "dtype" in degraded(split) or "autocast" in degraded(split)


@under_lightning
@pytest.mark.filterwarnings("ignore::torchsurgeon.ChangedModelWarning")
def test_lightnings_summary_of_every_layer_leaves_the_split_right(
    server: Server, trainer: Any, classifier: Any, lightning: Any
) -> None:
    with split_of(server, partition=2) as split:
        model = classifier(split.requires_grad_(False))
        # It hooks every layer, also those of the split, and calls the model.
        model.example_input_array = INPUTS[:1]
        trainer(callbacks=[lightning.callbacks.ModelSummary(max_depth=-1)]).fit(model, BATCHES, BATCHES)
        assert right(split)
        until(lambda: remote(split), split)


# --- accelerate ---


@pytest.fixture
def accelerator() -> Iterator[Callable[..., Any]]:
    accelerate = pytest.importorskip("accelerate")
    yield lambda **options: accelerate.Accelerator(cpu=True, **options)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_accelerate_prepares_a_split_and_its_loader(split: ts.SplitModule, accelerator: Any) -> None:
    prepared, loader = accelerator().prepare(split, BATCHES)
    assert all(torch.equal(prepared(x), truth(x)) for x, _ in loader)


def test_accelerate_trains_what_stands_behind_a_split(split: ts.SplitModule, accelerator: Any) -> None:
    accelerate = accelerator()
    ours = accelerate.prepare(nn.Sequential(split, top()))
    own = nn.Sequential(Frozen().requires_grad_(False), top())
    assert same_weights(trained(ours, accelerate.backward), trained(own))


def test_accelerate_calls_a_split_in_mixed_precision_and_the_device_answers(server: Server, accelerator: Any) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        own = truth(EXAMPLE).float()
    with split_of(server) as split:
        assert torch.equal(accelerator(mixed_precision="bf16").prepare(split)(EXAMPLE), own)
        assert "autocast" in degraded(split)


# --- PyTorch's own wrappers ---


def test_data_parallel_without_a_gpu_calls_the_split(split: ts.SplitModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert right(nn.DataParallel(split))  # type: ignore[arg-type]
    own, ours = nn.Sequential(Frozen().requires_grad_(False), top()), nn.Sequential(split, top())
    assert same_weights(trained(nn.DataParallel(ours)), trained(own))


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is functional.linear else result


class DoublesProducts(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is torch.ops.aten.addmm.default else result


@pytest.mark.parametrize("mode", [Doubles, DoublesProducts])
def test_under_a_mode_that_changes_operators_the_model_itself_answers(server: Server, mode: Any) -> None:
    with split_of(server) as split, mode():
        assert right(split)
        assert degraded(split).startswith(f"mode: {mode.__name__} is active here")
    with split_of(server, fallback="error") as split, mode(), pytest.raises(ts.TraceError, match=r"or its \.model"):
        split(EXAMPLE)


def test_the_default_device_is_no_such_mode(split: ts.SplitModule) -> None:
    with torch.device("cpu"):
        until(lambda: remote(split), split, right)


# --- loops of one's own ---

MODES = [torch.no_grad, torch.inference_mode, torch.enable_grad]


@pytest.mark.parametrize("partition", ["auto", "device", 2])
@pytest.mark.parametrize("first", MODES)
def test_answers_under_every_mode_of_gradients_are_right_whatever_the_first_was(
    server: Server, first: Any, partition: Any
) -> None:
    with split_of(server, partition=partition) as split:
        with first():
            split.prepare() if partition == "auto" else split(EXAMPLE)
        for made in MODES:
            with made():
                x = torch.rand(1, 3, 32, 32)
            for mode in MODES:
                with mode():
                    answers = [split(x), split.submit(x).result(), *split.map([x])]
                assert all(torch.equal(answer, truth(x)) and not answer.requires_grad for answer in answers)
        layer = top()
        layer(split(EXAMPLE)).sum().backward()
        assert layer.weight.grad is not None


def test_a_metric_is_updated_with_a_splits_answers(split: ts.SplitModule, lightning: Any) -> None:
    from torchmetrics import MeanSquaredError

    own, ours = MeanSquaredError(), MeanSquaredError()
    with torch.inference_mode():
        for x, _ in BATCHES:
            own.update(truth(x), torch.zeros(4, 5))
            ours.update(split(x), torch.zeros(4, 5))
    assert torch.equal(own.compute(), ours.compute())


@pytest.mark.parametrize("partition", ["server", 2, "device"])
def test_a_stream_takes_a_frame_before_its_numpy_buffer_is_filled_again(server: Server, partition: Any) -> None:
    buffer = np.empty((1, 3, 32, 32), np.float32)

    def frames() -> Iterator[torch.Tensor]:
        for number in range(20):
            buffer[:] = number
            yield torch.from_numpy(buffer)

    with split_of(server, partition=partition) as split:
        for number, answer in enumerate(split.map(frames(), depth=4)):
            assert torch.equal(answer, truth(torch.full((1, 3, 32, 32), float(number))))
        futures = [split.submit(frame) for frame in frames()]
        for number, future in enumerate(futures):
            assert torch.equal(future.result(), truth(torch.full((1, 3, 32, 32), float(number))))
