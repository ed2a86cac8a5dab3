"""Backends that round coarsely are calibrated and judged on a sample of the user's, under an accuracy budget."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from serving import serving
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.accuracy import Budget
from torchsurgeon.accuracy.scores import likeness
from torchsurgeon.backends import Backend, BuiltPart, Part, find_backend
from torchsurgeon.backends.openvino import computes_bfloat16

INT8 = ("onnxruntime:int8", "openvino:int8")
SAMPLE = list(torch.rand(24, 1, 3, 16, 16, generator=torch.Generator().manual_seed(3)))
LIKE = Budget(min_cosine=0.98, decide_by="estimate")
SAME = Budget(max_top1_change=0.0, decide_by="estimate")


class Net(nn.Module):
    """A classifier with a branch and several boundary tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.body(y) + y)
        return self.head(y.amax((2, 3)))


class Scaled(Backend):
    """Eager PyTorch with other results: each is multiplied, and something is added to its first element."""

    name = "scaled"

    def __init__(self, factor: float = 1.0, added: float = 0.0, **judged: object) -> None:
        super().__init__(**judged)  # type: ignore[arg-type]
        self.factor, self.added, self.judged = factor, added, 0

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        def run(*tensors: Tensor) -> Sequence[Tensor]:
            self.judged += 1
            found = [one.clone() * self.factor for one in part.segment(*tensors)]
            found[0].view(-1)[0] += self.added
            return found

        return run


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net().eval()


def cosine(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    return likeness(list(found), list(wanted))


@pytest.mark.parametrize("name", INT8)
def test_whole_numbers_answer_nearly_at_every_batch_size_and_not_exactly(name: str, net: nn.Module) -> None:
    graph = ts.trace(net, SAMPLE[0])
    backend = find_backend(name, sample=SAMPLE, budget=LIKE)
    point = graph.point("norm")
    head, tail = Part.head(graph, point), Part.tail(graph, [spec.name for spec in point.tensors])
    for part in (head, tail, Part.head(graph, graph.points[-1])):
        made = BuiltPart(part, backend, set())
        for x in (SAMPLE[0], torch.cat(SAMPLE[:2]), torch.cat(SAMPLE[:5])):
            tensors = [x] if part is not tail else head.segment(x)
            made.build(*tensors)
            assert made.reason is None
            assert made.free_batch
            assert made.takes(tensors)
            found, wanted = made(*tensors), part.segment(*tensors)
            assert cosine(found, wanted) > 0.97
            assert not torch.equal(found[0], wanted[0])
            assert [one.dtype for one in found] == [one.dtype for one in wanted]


@pytest.mark.parametrize("name", ["onnxruntime:int8", "openvino:bf16"])
def test_a_part_that_breaks_the_budget_is_not_used_and_the_warning_says_by_how_much(name: str, net: nn.Module) -> None:
    pytest.importorskip("openvino")
    if name == "openvino:bf16" and not computes_bfloat16():
        pytest.skip("this processor does not compute in bfloat16, so OpenVINO changes nothing")
    graph = ts.trace(net, SAMPLE[0])
    strict = Budget(min_cosine=1.0, decide_by="estimate")
    made = BuiltPart(Part.head(graph, graph.points[-1]), find_backend(name, sample=SAMPLE, budget=strict), set())
    with pytest.warns(ts.BackendWarning, match=r"cosine [01]\.\d+ \(≥ [01]\.\d+\), limit 1\.00000, over"):
        made.build(SAMPLE[0])
    assert not made.takes([SAMPLE[0]])
    assert torch.equal(made(SAMPLE[0])[0], net(SAMPLE[0]))


def test_answers_that_change_are_counted_and_not_how_far_numbers_are(net: nn.Module) -> None:
    graph = ts.trace(net, SAMPLE[0])
    whole = Part.head(graph, graph.points[-1])
    # Twice the scores are the same classes, though no tolerance would allow them.
    doubled = BuiltPart(whole, Scaled(factor=2.0, sample=SAMPLE, budget=SAME), set())
    doubled.build(SAMPLE[0])
    assert doubled.reason is None
    spoiled = BuiltPart(whole, Scaled(added=1e3, sample=SAMPLE, budget=SAME), set())
    with pytest.warns(ts.BackendWarning, match=r"top-1 changed .*limit 0\.0%"):
        spoiled.build(SAMPLE[0])


def test_a_part_is_judged_by_the_models_answers_behind_it(net: nn.Module) -> None:
    graph = ts.trace(net, SAMPLE[0])
    head = Part.head(graph, graph.point("stem"))
    backend = Scaled(added=1e3, sample=SAMPLE, budget=Budget(min_cosine=0.999999, decide_by="estimate"))
    made = BuiltPart(head, backend, set())
    with pytest.warns(ts.BackendWarning, match="between 'x' and 'stem' it changes more answers"):
        made.build(SAMPLE[0])
    # The same change where nothing behind it looks at its size: the last point's tensors are the answers themselves.
    quiet = Scaled(factor=1.0, sample=SAMPLE, budget=SAME)
    BuiltPart(head, quiet, set()).build(SAMPLE[0])
    assert quiet.judged >= len(SAMPLE)


def test_half_of_the_sample_calibrates_and_the_other_half_judges(net: nn.Module) -> None:
    graph = ts.trace(net, SAMPLE[0])
    backend = find_backend("onnxruntime:int8", sample=SAMPLE, budget=LIKE)
    assert backend.judge is not None
    whole = Part.head(graph, graph.points[-1])
    calibrating = [tensors[0] for tensors in backend.judge.calibrating(whole)]
    assert len(calibrating) == 12
    seen: list[Tensor] = []
    run = lambda x: seen.append(x) or whole.segment(x)  # type: ignore[func-returns-value]  # noqa: E731
    backend.judge.judge(whole, run, [SAMPLE[0]])
    assert len(seen) == 12
    assert not any(torch.equal(one, other) for one in calibrating for other in seen)


# --- what is refused ---


@pytest.mark.parametrize("name", INT8)
def test_without_a_sample_the_error_says_what_to_give(name: str, net: nn.Module) -> None:
    with pytest.raises(ts.BackendError, match=rf"'{name}' is calibrated.*missing: sample and budget\. Give find"):
        ts.SplitModule(net, SAMPLE[0], partition="device", backend=name)
    with pytest.raises(ts.BackendError, match="missing: budget"):
        find_backend(name, sample=SAMPLE)
    with pytest.raises(ts.BackendError, match="missing: sample"):
        find_backend("openvino:bf16", budget=LIKE)
    with pytest.raises(ts.BackendError, match="go with the name of a backend"):
        find_backend(find_backend("openvino"), sample=SAMPLE, budget=LIKE)


def test_a_sample_that_is_too_small_or_unlike_the_example_is_refused_at_once(net: nn.Module, tmp_path: Path) -> None:
    def split(backend: Backend) -> None:
        ts.SplitModule(net, SAMPLE[0], partition="device", backend=backend)

    with pytest.raises(ts.CodecError, match="must be a list of calls"):
        find_backend("openvino:int8", sample=torch.cat(SAMPLE), budget=LIKE)  # type: ignore[arg-type]
    with pytest.raises(ts.SampleSizeError, match=r"299 calls are needed.*12 judge here"):
        split(find_backend("openvino:int8", sample=SAMPLE, budget=Budget(max_top1_change=0.01)))
    with pytest.raises(ts.CodecError, match=r"the traced example has torch\.float32 of shape \[1, 3, 16, 16\]"):
        split(find_backend("openvino:int8", sample=[torch.rand(1, 3, 8, 8)] * 4, budget=LIKE))
    with pytest.raises(ts.CodecError, match="is not readable"):
        split(find_backend("openvino:int8", sample=tmp_path / "none", budget=LIKE))
    with pytest.raises(ts.BackendError, match=r"two calls or more.*the sample has 1"):
        split(find_backend("openvino:int8", sample=SAMPLE[:1], budget=LIKE))


def test_a_folder_of_images_is_a_sample(net: nn.Module, tmp_path: Path) -> None:
    from PIL import Image

    for k, image in enumerate(SAMPLE[:6]):
        Image.fromarray((image[0] * 255).byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{k}.png")
    backend = find_backend("onnxruntime:int8", sample=tmp_path, budget=LIKE)
    with ts.SplitModule(net, SAMPLE[0], partition="device", backend=backend) as split:
        assert cosine([split(SAMPLE[0])], [net(SAMPLE[0])]) > 0.9
        assert split.last is not None
        assert split.last.inexact_because == ("backend onnxruntime:int8 computes heads and tails in another way",)


def test_head_tail_and_fallback_run_in_whole_numbers(net: nn.Module) -> None:
    backend = find_backend("onnxruntime:int8", sample=SAMPLE, budget=LIKE)
    with (
        warnings.catch_warnings(),
        serving(net, SAMPLE[0]) as server,
        ts.SplitModule(net, SAMPLE[0], server=server.url, name="net", partition="norm", backend=backend) as split,
    ):
        warnings.simplefilter("error", ts.BackendWarning)
        for x in (SAMPLE[0], torch.cat(SAMPLE[:3])):
            assert cosine([split(x)], [net(x)]) > 0.95
        server.stop()
        answer = split(SAMPLE[0])
        assert split.last is not None
        assert split.last.degraded
        assert cosine([answer], [net(SAMPLE[0])]) > 0.95
        assert not torch.equal(answer, net(SAMPLE[0]))


def test_what_others_log_while_a_part_is_quantized_is_not_lost(caplog: pytest.LogCaptureFixture) -> None:
    from torchsurgeon.backends.quantizing import _quiet

    with _quiet(), _quiet():
        logging.getLogger().warning("mine")
        logging.getLogger("another").warning("and mine")
        advice = logging.LogRecord("root", logging.WARNING, "/lib/onnxruntime/quantization/x.py", 1, "advice", (), None)
        logging.getLogger().handle(advice)
    logging.getLogger().warning("afterwards")
    assert [record.getMessage() for record in caplog.records] == ["mine", "and mine", "afterwards"]
