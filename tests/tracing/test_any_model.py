"""Models as users have them: recurrent, compiled, partly untraceable, badly behaved. Cut, or refused with why."""

from __future__ import annotations

import itertools
import operator
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from partitions import check
from serving import check_split, split
from small_models import model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import torchsurgeon as ts
from torchsurgeon.tracing import adapters
from torchsurgeon.tracing.shape_rules import rule_for


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


# --- what is followed ---


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
@pytest.mark.parametrize("batch_first", [False, True])
def test_recurrent_layers_and_their_states_cross(kind: type[nn.RNNBase], batch_first: bool) -> None:
    def forward(self: Any, x: torch.Tensor) -> Any:
        y, state = self.rnn(x)
        return self.head(y.tanh()), state

    rnn = kind(6, 8, num_layers=2, batch_first=batch_first, bidirectional=True)
    made = model(forward, rnn=rnn, head=nn.Linear(16, 3))
    shape = (1, 5, 6) if batch_first else (5, 1, 6)
    other = (3, 5, 6) if batch_first else (5, 3, 6)
    graph = check(made, torch.rand(shape), batches=[(torch.rand(other),)] if batch_first else [])
    assert graph.layers[0].name == "rnn"


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU])
def test_what_is_said_of_recurrent_layers_is_what_they_give(kind: type[nn.RNNBase]) -> None:
    for x, batch_first in itertools.product((torch.rand(3, 5, 6), torch.rand(5, 6, 3).permute(2, 0, 1)), (False, True)):
        made = kind(6, 8, 2, batch_first=batch_first, bidirectional=True).eval()
        rule = rule_for(made)
        assert rule is not None
        told = rule(made, x.to("meta"))
        assert told is not None
        with torch.no_grad():
            for mine, real in zip(adapters.flatten(told.value)[0], adapters.flatten(made(x))[0], strict=True):
                assert (mine[1].shape, mine[1].stride()) == (real[1].shape, real[1].stride())
        with FlopCounterMode(display=False) as counter:
            made.to("meta")(x.to("meta"))
        assert told.flops == counter.get_total_flops()
        # The same as the call that is recorded where the module is the model itself.
        graph = ts.trace(made, x, verify=False)
        (layer,) = (layer for layer in graph.layers if layer.flops)
        assert layer.flops == told.flops
        assert next(spec.shape for spec in layer.outputs) == tuple(told.value[0].shape)


def test_a_recurrent_model_over_a_thousand_steps_is_not_followed_step_by_step() -> None:
    for made in (nn.GRU(4, 4), nn.LSTM(4, 4, batch_first=True)):
        assert len(ts.trace(made.eval(), torch.rand(1, 1000, 4)).layers) < 4


@pytest.mark.parametrize("shape", [(1, 4, 9, 7), (2, 3, 8, 8), (1, 4, 1, 1), (2, 1, 6, 6)], ids=str)
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_what_is_said_of_pooling_resizing_and_broadcasting_is_what_they_give(
    shape: tuple[int, ...], memory: torch.memory_format
) -> None:
    pools = [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.AdaptiveAvgPool2d((None, 3))]
    x = torch.rand(shape).to(memory_format=memory)
    calls: list[tuple[Any, tuple[Any, ...]]] = [(pool, (x,)) for pool in pools]
    calls += [(F.interpolate, (x, size)) for size in ((5, 6), 7)]
    for other in ((1, 4, 1, 1), (2, 4, 3, 3), (1, 1, 3, 3), (2, 1, 1, 1)):
        calls += [(op, (x, torch.rand(other))) for op in (operator.mul, operator.add, operator.imul)]
    known = 0
    for target, args in calls:
        rule = rule_for(target)
        assert rule is not None
        told = rule(target, *(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
        if told is not None:
            real = target(*(a.clone() if isinstance(a, torch.Tensor) else a for a in args))
            assert told.value.shape == real.shape
            if min(real.shape) > 1:
                assert told.value.stride() == real.stride()
            known += 1
    assert known or memory is torch.channels_last


IMAGES = {
    "row-major": torch.rand(2, 4, 3, 4),
    "channels last": torch.rand(2, 4, 3, 4).to(memory_format=torch.channels_last),
    "one, channels last": torch.rand(1, 4, 3, 4).to(memory_format=torch.channels_last),
    "one, from a sequence": torch.rand(1, 12, 4).transpose(1, 2).reshape(1, 4, 3, 4),
    "one, of a slice": torch.rand(1, 8, 3, 4)[:, :4],
    "gaps": torch.rand(2, 8, 3, 4)[:, ::2],
}


@pytest.mark.parametrize(
    "op",
    [operator.add, operator.sub, operator.mul, operator.truediv, torch.div]
    + [kind() for kind in (nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.ELU)]
    + [nn.GroupNorm(2, 4), nn.BatchNorm2d(4), nn.LayerNorm(4), nn.Softmax(1), nn.Softmax(-1)],
    ids=lambda one: str(getattr(one, "__name__", one)),
)
@pytest.mark.parametrize("image", IMAGES)
def test_the_strides_that_are_said_of_simple_layers_are_those_that_they_give(op: Any, image: str) -> None:
    x, more = IMAGES[image], () if isinstance(op, nn.Module) else (2.0,)
    rule = rule_for(op)
    assert rule is not None
    told = rule(op, torch.empty_strided(x.shape, x.stride(), device="meta"), *more)
    assert told is not None
    real = (op.eval() if isinstance(op, nn.Module) else op)(x, *more).stride()
    assert told.value.stride() == real


def test_flops_of_shifted_windows_are_those_of_their_products_padding_included() -> None:
    zoo = pytest.importorskip("torchvision.models.swin_transformer")
    made = zoo.SwinTransformer([4, 4], 16, [1, 2], [2, 4], [7, 7], num_classes=4).eval()
    x = torch.rand(1, 3, 44, 60)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        made(x)
    graph = check(made, x, batches=[(torch.rand(2, 3, 44, 60),)], points=slice(None, None, 5))
    assert sum(layer.flops for layer in graph.layers) == counter.get_total_flops()


def test_attention_with_a_mask_and_its_weights() -> None:
    def forward(self: Any, x: torch.Tensor, mask: torch.Tensor) -> Any:
        y, weights = self.attend(x, x, x, key_padding_mask=mask)
        return self.head(x + y), weights

    made = model(forward, attend=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(8, 3))
    mask = torch.tensor([[False, False, True]])
    check(made, torch.rand(1, 3, 8), mask, batches=[(torch.rand(2, 3, 8), mask.repeat(2, 1))])


def test_an_encoder_decoder_is_cut_between_its_layers() -> None:
    made = nn.Transformer(8, 2, 2, 2, 16, batch_first=True)
    graph = check(made, torch.rand(1, 5, 8), torch.rand(1, 4, 8))
    assert [layer.name for layer in graph.layers][:3] == ["encoder.layers.0", "encoder.layers.1", "encoder.norm"]


def test_tied_weights_are_one_tensor_on_each_side() -> None:
    embed, out = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False)
    out.weight = embed.weight
    made = model(lambda self, t: self.out(torch.tanh(self.embed(t))), embed=embed, out=out)
    graph = check(made, torch.tensor([[1, 2, 3]]), batches=[(torch.tensor([[4, 5, 6], [7, 8, 9]]),)])
    partition = ts.cut(graph, "embed")
    heads, tails = (list(part.parameters()) for part in (partition.head, partition.tail))
    assert heads[0] is tails[0] is embed.weight


def test_stages_inputs_outputs_and_buffers() -> None:
    def forward(self: Any, image: torch.Tensor, words: torch.Tensor, scale: torch.Tensor | None = None) -> Any:
        seen = self.stages(image).mean((2, 3)) + self.offset
        read = self.read(words).mean(1)
        both = seen * read if scale is None else seen * read * scale
        return {"both": both, "parts": [seen, read], "score": (both.sum(1), both.sigmoid())}

    def stage(inside: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inside, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))

    stages = nn.Sequential(stage(3), nn.Sequential(stage(8), stage(8)))
    made = model(forward, stages=stages, read=nn.Embedding(9, 8), offset=torch.rand(8))
    words = torch.tensor([[1, 2]])
    with split(made, torch.rand(1, 3, 16, 16), words) as module:
        other = (torch.rand(2, 3, 24, 16), torch.tensor([[1, 2, 3], [4, 5, 6]]))
        check_split(module, module.graph.points, ((torch.rand(1, 3, 16, 16), words), {}), (other, {}))
    graph = ts.trace(made, torch.rand(1, 3, 16, 16), words, scale=torch.rand(1, 8))
    assert [spec.name for spec in graph.inputs] == ["image", "words", "scale"]


def test_what_torch_compile_wrapped_is_followed_itself() -> None:
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    whole = torch.compile(inner, backend="eager")
    part = nn.Sequential(torch.compile(inner, backend="eager"), nn.Flatten()).eval()
    x = torch.rand(1, 3, 9, 9)
    assert [layer.name for layer in ts.trace(whole, x).layers] == ["0", "1", "2"]
    assert len(ts.trace(part, x).layers) == 4
    with torch.no_grad():
        cut = ts.cut(ts.trace(whole, x), 2)
        assert torch.equal(cut.tail(*cut.head(x)), inner(x))


@pytest.mark.parametrize("way", ["followed", "by sizes", "whole"])
def test_a_cache_that_forward_fills_is_left_as_it_was(way: str) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        if way == "by sizes" and x.shape[1] != 4:
            return x
        key = str(type(x))
        if key not in self.cache:
            self.cache[key] = self.table.cumsum(0)
            self.order.append(key)
        return self.linear(x) + self.cache[key]

    made = model(forward, linear=nn.Linear(4, 4), table=torch.rand(4))
    made.cache, made.order = {}, []
    whole = nn.Sequential(made, nn.ReLU()).eval()
    leaves = ["0"] if way == "whole" else []
    for _ in range(2):
        graph = ts.trace(whole, torch.rand(1, 4), leaf_modules=leaves)
        assert graph.traced_by == "recorded"
        assert not made.cache
        assert not made.order


# --- what cannot be followed ---


class Gate(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.mean() > 0.5 else x - 1


def test_points_around_a_part_that_branches_on_values_stay_and_the_reason_is_said() -> None:
    made = nn.Sequential(nn.Conv2d(3, 4, 3), Gate(), nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))).eval()
    with split(made, torch.zeros(1, 3, 9, 9)) as module:
        graph = module.graph
        assert graph.traced_by == "hierarchical"
        assert [layer.name for layer in graph.layers] == ["0", "1", "2.0", "2.1"]
        assert list(graph.opaque) == ["1"]
        assert "x * 2 if x.mean() > 0.5 else x - 1" in graph.opaque["1"]
        assert "test_any_model.py:" in graph.opaque["1"]
        check_split(module, graph.points, ((torch.zeros(1, 3, 9, 9),), {}), ((100 * torch.ones(2, 3, 9, 9),), {}))


def test_an_attempt_that_fails_says_nothing_on_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    ts.trace(nn.Sequential(nn.Conv2d(3, 4, 3), Gate()).eval(), torch.zeros(1, 3, 9, 9))
    assert capfd.readouterr() == ("", "")


def test_control_flow_at_the_root_is_refused_with_file_and_line() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return y if y.sum() > 0 else -y

    with pytest.raises(ts.TraceError, match=r'test_any_model.py", line \d+.*\n.*y.sum\(\) > 0') as caught:
        ts.trace(model(forward, conv=nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 9, 9))
    assert "leaf_modules=[" in str(caught.value)


def test_an_adapter_makes_a_model_of_ones_own_traceable() -> None:
    class Choosing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.low, self.high = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.stem(x)
            chosen = self.low if y.mean() < 0 else self.high
            return chosen(y).relu()

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        def choose(y: torch.Tensor) -> torch.Tensor:
            return (self.low if y.mean() < 0 else self.high)(y)

        return ts.opaque(choose, self.stem(x)).relu()

    made = Choosing().eval()
    with pytest.raises(ts.TraceError):
        ts.trace(made, torch.rand(1, 4))
    ts.register_adapter(Choosing, ts.Adapter(forward))
    try:
        for example in (torch.rand(1, 4), -torch.rand(1, 4)):
            assert len(check(made, example).points) == 4
        graph = check(nn.Sequential(nn.Linear(3, 4), made, nn.Linear(4, 2)), torch.rand(1, 3))
        assert [layer.name for layer in graph.layers if layer.name.startswith("1")] == ["1.stem", "1.choose", "1.relu"]
    finally:
        del adapters._ADAPTERS[adapters._qualified(Choosing)]


def test_an_attribute_put_on_a_result_is_not_lost() -> None:
    class Result(dict[str, Any]):
        total: Any = None

    class Part(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            if x.mean() > 0:
                return Result(y=x)
            return Result(y=-x)

    def forward(self: Any, x: torch.Tensor) -> Any:
        found = self.part(self.conv(x))
        found.total = found["y"].sum()
        return found["y"], found.total

    graph = check(model(forward, conv=nn.Conv2d(3, 4, 3), part=Part()), torch.rand(1, 3, 9, 9))
    assert list(graph.opaque) == ["part"]


# --- what is warned of and refused ---


def test_random_numbers_are_warned_of_by_the_layer_that_draws_them() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x) + torch.randn_like(x[:, :1, 1:-1, 1:-1])

    with pytest.warns(ts.UnrepeatableWarning, match="'randn_like' draws random numbers"):
        ts.trace(model(forward, conv=nn.Conv2d(3, 4, 3)), torch.rand(1, 3, 9, 9))


def test_attention_without_dropout_draws_nothing() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x, x, x) if x.shape[1] > 1 else x

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(model(forward), torch.rand(1, 2, 4, 8))


def test_dropout_left_on_is_refused() -> None:
    made = model(lambda self, x: F.dropout(self.conv(x), 0.5), conv=nn.Conv2d(3, 4, 3))
    with pytest.raises(ts.TraceError, match="'dropout' drops values at random although the model is in eval mode"):
        ts.trace(made, torch.rand(1, 3, 9, 9))


def test_a_batch_that_the_trace_built_in_is_not_called_free() -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * 2 if x.shape[0] < 4 else self.linear(x)

    graph = ts.trace(model(forward, linear=nn.Linear(4, 4)), torch.rand(2, 4))
    assert graph.traced_by == "recorded"
    graph.bind(torch.rand(3, 4))
    with pytest.raises(TypeError, match="dimension 0 of 'x' must be < 4, and is 4"):
        graph.bind(torch.rand(4, 4))
    assert not graph.batch_free
