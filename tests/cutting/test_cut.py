"""Head and tail give the whole model's bits at every partition point."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchvision.models as zoo
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import assert_same, check, copied, fresh, in_threads
from random_programs import example, operation, possible
from small_models import CASES, conv, image, model
from torch import nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from torchsurgeon.cutting.partition import cut, tail_for
from torchsurgeon.errors import PartitionError
from torchsurgeon.tracing.tracer import trace


def vit(**kwargs: Any) -> nn.Module:
    made = VisionTransformer(
        image_size=32, patch_size=16, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10, **kwargs
    )
    nn.init.normal_(made.heads.head.weight)
    return made


def swin() -> nn.Module:
    return SwinTransformer([4, 4], embed_dim=24, depths=[2] * 4, num_heads=[1, 2, 4, 8], window_size=[7, 7])


def convnext() -> nn.Module:
    widths = [24, 48, 96, 192, None]
    return ConvNeXt([CNBlockConfig(widths[i] or 0, widths[i + 1], 1 if i == 3 else 2) for i in range(4)])


MODELS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "alexnet": (zoo.alexnet, 64),
    "resnet18": (zoo.resnet18, 32),
    "densenet_of_16_layers": (lambda: zoo.DenseNet(32, (2, 4, 6, 4)), 32),
    "googlenet": (lambda: zoo.googlenet(init_weights=False), 32),
    "mobilenet_v3_small": (zoo.mobilenet_v3_small, 32),
    "mobilenet_v3_large": (zoo.mobilenet_v3_large, 32),
    "efficientnet_b0": (zoo.efficientnet_b0, 32),
    "shufflenet_v2_x1_0": (zoo.shufflenet_v2_x1_0, 32),
    "vit_of_two_layers": (vit, 32),
    "swin_of_eight_blocks": (swin, 32),
    "convnext_of_seven_blocks": (convnext, 32),
    "lraspp_mobilenet_v3_large": (
        lambda: zoo.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None),
        32,
    ),
}


def randomized(made: nn.Module) -> nn.Module:
    """Batch statistics and layer scales that leave a trace in the answer."""
    generator = torch.Generator().manual_seed(0)
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    return made.eval()


@pytest.mark.parametrize("name", MODELS)
def test_every_point_of_a_torchvision_model_gives_its_bits(name: str) -> None:
    torch.manual_seed(0)
    factory, size = MODELS[name]
    made = randomized(factory())
    graph = check(made, torch.randn(1, 3, size, size), batches=[(torch.randn(3, 3, size, size),)])
    assert graph.batch_free
    assert [point.index for point in graph.points] == list(range(len(graph.layers) + 1))


def test_vit_b_16_gives_its_bits_at_a_spread_of_points() -> None:
    torch.manual_seed(0)
    made = zoo.vit_b_16().eval()
    nn.init.normal_(made.heads.head.weight)
    graph = check(made, torch.randn(1, 3, 224, 224), points=slice(None, None, 17))
    assert len(graph.points) == len(graph.layers) + 1


@pytest.mark.parametrize("name", CASES)
def test_every_point_of_a_hard_small_model_gives_its_bits(name: str) -> None:
    torch.manual_seed(0)
    made, *args = CASES[name]()
    kwargs = args.pop() if isinstance(args[-1], dict) else {}
    others = [(other,) for other in args.pop()] if len(args) == 2 and isinstance(args[-1], list) else []
    state = copy.deepcopy(made.state_dict())
    before = copied(args)
    check(made, *args, batches=others, **kwargs)
    assert_same(args, before, "the example")
    assert_same(dict(made.state_dict()), dict(state), "the model's state")


# --- random programs of views, in-place operators and shared memory ---


@settings(max_examples=120)
@given(st.lists(operation, min_size=3, max_size=14), st.lists(st.integers(0, 15), min_size=1, max_size=3), st.randoms())
def test_random_programs_give_their_bits_at_every_point_in_any_order_of_names(operations, outputs, random) -> None:
    program = possible(operations, outputs)
    with torch.no_grad():
        graph = trace(program, *example())
        check(program, *example(), at_least=1)
        expected = program(*example())
        for point in graph.points[:-1]:
            boundary = dict(zip([spec.name for spec in point.tensors], cut(graph, point).head(*example()), strict=True))
            names = list(boundary)
            random.shuffle(names)
            assert_same(tail_for(graph, names)(*(fresh(boundary[name]) for name in names)), expected, f"{names}")


# --- what else a user relies on ---


def test_parts_share_the_models_parameters_under_its_names_and_leave_it_alone() -> None:
    made = randomized(zoo.resnet18())
    x = torch.randn(1, 3, 32, 32)
    names, state = [name for name, _ in made.named_modules()], copy.deepcopy(made.state_dict())
    with torch.no_grad():
        before = made(x)
        graph = trace(made, x)
        partition = cut(graph, "layer2.0.conv1")
        partition.tail(*partition.head(x))
        assert_same(made(x), before, "the model's answer")
    assert [name for name, _ in made.named_modules()] == names
    assert_same(dict(made.state_dict()), dict(state), "the model's state")
    whole = dict(made.named_parameters())
    parts = [dict(part.named_parameters()) for part in (partition.head.segment, partition.tail)]
    assert set(parts[0]) | set(parts[1]) == set(whole)
    assert not set(parts[0]) & set(parts[1])
    for part in parts:
        for name, parameter in part.items():
            assert parameter.data_ptr() == whole[name].data_ptr()
    assert not any(module.training for part in (partition.head, partition.tail) for module in part.modules())


def test_a_weight_loaded_after_the_cut_is_used_by_both_parts() -> None:
    made = model(lambda self, x: self.last(self.conv(x)) * self.scale, conv=conv(), last=conv(), scale=torch.ones(6))
    partition = cut(trace(made, image()), "conv")
    with torch.no_grad():
        made.load_state_dict({name: value + 1 for name, value in made.state_dict().items()})
        assert_same(partition.tail(*partition.head(image())), made(image()), "after loading")


def test_a_deep_copy_of_a_part_stands_on_its_own() -> None:
    made = model(lambda self, x: self.last(self.conv(x)) * self.scale, conv=conv(), last=conv(), scale=torch.ones(6))
    with torch.no_grad():
        expected = made(image())
        partition = cut(trace(made, image()), "conv")
        head, tail = copy.deepcopy(partition.head), copy.deepcopy(partition.tail)
        for parameter in (*made.parameters(), *made.buffers()):
            parameter.zero_()
        assert_same(tail(*head(image())), expected, "the copies")
        assert_same(tail.double()(*(t.double() for t in head(image()))).float().shape, expected.shape, "converted")


def test_two_cuts_of_one_graph_are_independent() -> None:
    made = randomized(zoo.shufflenet_v2_x0_5())
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected, graph = made(x), trace(made, x)
        early, late = cut(graph, 20), cut(graph, 60)
        crossing = late.head(x)
        assert_same(early.tail(*early.head(x)), expected, "the early cut")
        assert_same(late.tail(*crossing), expected, "the late cut")


def test_parts_run_in_several_threads_at_once() -> None:
    made = randomized(zoo.mobilenet_v3_small())
    inputs = [torch.randn(1 + i % 2, 3, 32, 32) for i in range(6)]
    with torch.no_grad():
        expected = [made(x) for x in inputs]
    partition = cut(trace(made, inputs[0]), 50)
    answers = in_threads(6, lambda i: [partition.tail(*partition.head(inputs[i])) for _ in range(3)])
    for answer, wanted in zip(answers, expected, strict=True):
        assert_same(answer, [wanted] * 3, "a thread's answer")


def test_tracing_in_one_thread_does_not_disturb_a_tail_in_another() -> None:
    made, other = randomized(zoo.resnet18()), randomized(zoo.mobilenet_v3_small())
    x = torch.randn(1, 3, 32, 32)
    partition = cut(trace(made, x), 20)
    with torch.no_grad():
        expected = made(x)

    def work(i: int) -> Any:
        if i < 2:
            return [trace(other, x).fingerprint for _ in range(4)]
        return [partition.tail(*partition.head(x)) + torch.zeros(1) for _ in range(10)]

    first, second, *answers = in_threads(4, work)
    assert len({*first, *second}) == 1
    for answer in answers:
        assert_same(answer, [expected] * 10, "while another thread traces")


def test_an_untraced_layout_gives_its_bits_too() -> None:
    made = randomized(zoo.resnet18())
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.no_grad():
        expected, graph = made(x), trace(made, torch.randn(1, 3, 32, 32))
        for point in graph.points[::7]:
            partition = cut(graph, point)
            assert_same(partition.tail(*(fresh(t) for t in partition.head(x))), expected, point.name)


def test_gradients_flow_through_both_parts() -> None:
    made = model(lambda self, x: self.last(self.relu(self.conv(x))), conv=conv(), last=conv(), relu=nn.ReLU())
    partition = cut(trace(made, image()), "relu")
    made(image()).sum().backward()
    wanted = {name: parameter.grad.clone() for name, parameter in made.named_parameters()}
    made.zero_grad()
    partition.tail(*partition.head(image())).sum().backward()
    assert_same({name: parameter.grad for name, parameter in made.named_parameters()}, wanted, "gradients")


def test_a_long_chain_is_cut_anywhere() -> None:
    layers = [layer for _ in range(800) for layer in (nn.Linear(4, 4), nn.ReLU(inplace=True))]
    made, x = nn.Sequential(*layers).eval(), torch.randn(2, 4)
    graph = check(made, x, points=slice(None, None, 200))
    assert len(graph.points) == 1601


# --- bad input ---


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["conv_typo"], "no tensor 'conv_typo'; near it: conv"),
        (["conv", "conv"], "tensor 'conv' is given twice"),
        (["first"], "tensors first do not determine the output: it also depends on the model's inputs y"),
        ([], r"\(none\) do not determine the output"),
    ],
)
def test_names_that_make_no_tail_are_refused(names: list[str], message: str) -> None:
    made = model(lambda self, x, y: self.conv(self.first(x)) + y, conv=conv(), first=conv())
    with pytest.raises(PartitionError, match=message):
        tail_for(trace(made, image(), image()), names)


def test_views_of_memory_that_is_overwritten_are_refused_when_they_come_apart() -> None:
    def forward(self, x):
        y = self.conv(x)
        part = y[:, :2]
        part.add_(1)
        return self.last(y) + part.sum()

    graph = trace(model(forward, conv=conv(), last=conv()), image())
    for names in (["conv", "getitem"], ["x", "getitem"], ["conv", "add"]):
        with pytest.raises(
            PartitionError, match=r"share memory that is overwritten.*Use the tensors of one of the graph's points"
        ):
            tail_for(graph, names)


def test_a_part_called_with_too_few_or_too_many_tensors_says_how_many_it_takes() -> None:
    partition = cut(trace(model(lambda self, x: self.conv(x).relu(), conv=conv()), image()), "conv")
    with pytest.raises(TypeError, match="takes 1 tensors; got 2"):
        partition.tail(image(), image())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda head: head(), "x"),
        (lambda head: head([image()]), "another structure than the example"),
        (lambda head: head(image(), flag=True), "argument 'flag' is True, but the model was traced with False"),
        (lambda head: head("text"), "argument 'x' must be a tensor as in the example; got str"),
    ],
)
def test_a_head_called_unlike_the_example_says_what_differs(call: Callable[[nn.Module], Any], message: str) -> None:
    partition = cut(trace(model(lambda self, x, flag=False: self.conv(x), conv=conv()), image()), 1)
    with pytest.raises(TypeError, match=message):
        call(partition.head)


class _Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        return (x + 1, x * 2), x.shape[0]


class _TakesNestedParts(nn.Module):
    """Reads one part of a whole layer's nested result early and another late."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Pair()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pair = self.inner(x)[0]
        y = self.linear(torch.relu(pair[1]))
        return torch.sigmoid(y) + pair[0]


def test_parts_of_a_nested_result_cross_on_their_own() -> None:
    model, x = _TakesNestedParts().eval(), torch.rand(2, 4)
    graph = trace(model, x, leaf_modules=["inner"])
    with torch.no_grad():
        truth = model(x)
        for point in graph.points:
            part = cut(graph, point)
            assert torch.equal(part.tail(*part.head(x)), truth), point.name
    assert [spec.name for spec in graph.point("linear").tensors] == ["inner.0.0", "linear"]
