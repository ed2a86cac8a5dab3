"""A traced model: its layers, tensors, points, flops, fingerprint, and what it refuses."""

from __future__ import annotations

import copy
import dataclasses
import json
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision.models as zoo
from partitions import assert_same, check
from paths import environment
from small_models import Detection, conv, image, model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from torchsurgeon.cutting.partition import cut
from torchsurgeon.errors import PartitionError, TraceError
from torchsurgeon.tracing.tracer import trace

X = torch.randn(1, 3, 64, 64)
VERIFIED = ("the example", "other values", "one more sample")


# --- what is in it ---


def test_layers_are_named_by_module_path_and_functions_by_the_module_that_calls_them() -> None:
    layers = trace(zoo.resnet18().eval(), X).layers
    assert [layer.name for layer in layers[:11]] == [
        "conv1",
        "bn1",
        "relu",
        "maxpool",
        "layer1.0.conv1",
        "layer1.0.bn1",
        "layer1.0.relu",
        "layer1.0.conv2",
        "layer1.0.bn2",
        "layer1.0.add",
        "layer1.0.relu_1",
    ]
    assert [layer.type for layer in layers[:4]] == ["Conv2d", "BatchNorm2d", "ReLU", "MaxPool2d"]
    assert layers[9].type == "add"
    assert [layer.index for layer in layers] == list(range(len(layers)))
    assert [spec.name for spec in layers[9].inputs] == ["layer1.0.bn2", "maxpool"]
    assert layers[0].parameter_bytes == 64 * 3 * 49 * 4


def test_tensor_specs_follow_the_batch() -> None:
    def forward(self, x):
        windows = self.conv(x).unfold(2, 3, 3).reshape(-1, 3)
        return windows.sum(0), windows

    graph = trace(model(forward, conv=conv()), image(2))
    assert graph.batch_free
    assert graph.batch == 2
    crossing = graph.values["reshape"]
    assert crossing.shape == (2 * 48, 3)
    assert crossing.batch_step == (48, 0)
    assert crossing.at_batch(5) == (5 * 48, 3)
    assert crossing.wire_shape == (-1, 3)
    assert crossing.size_bytes == 96 * 12
    assert graph.outputs[0].batch_step == (0,)


def test_a_model_made_for_one_batch_size_says_so() -> None:
    graph = trace(model(lambda self, x: self.conv(x).view(2, 4, 36).relu(), conv=conv()), image(2))
    assert not graph.batch_free
    assert all(spec.wire_shape == spec.shape for spec in graph.values.values())


def test_inputs_of_several_batch_sizes_fix_the_batch() -> None:
    graph = trace(model(lambda self, x, y: self.conv(x).sum() + y, conv=conv()), image(2), torch.randn(3))
    assert not graph.batch_free


def test_outputs_are_named_by_their_place() -> None:
    assert [s.name for s in trace(zoo.alexnet().eval(), X).outputs] == ["output"]
    made = zoo.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True).eval()
    assert [s.name for s in trace(made, X).outputs] == ["out", "aux"]
    pair = trace(model(lambda self, x: (self.conv(x), [x]), conv=conv()), image())
    assert [s.name for s in pair.outputs] == ["output.0", "output.1.0"]
    made = model(lambda self, x: Detection(self.conv(x), label="cat"), conv=conv())
    assert [s.name for s in trace(made, image()).outputs] == ["scores"]


def test_results_are_put_together_by_name() -> None:
    made = model(lambda self, x: OrderedDict(b=self.conv(x), a=(x.shape[0], None, x)), conv=conv())
    with torch.no_grad():
        result, graph = made(image()), trace(made, image())
    assert [spec.name for spec in graph.outputs] == ["b", "a.0", "a.2"]
    tensors = {"b": result["b"], "a.0": torch.tensor(result["a"][0]), "a.2": result["a"][2]}
    assert_same(graph.unflatten_output(tensors), result, "the result")


def test_calls_are_bound_to_input_names() -> None:
    def forward(self, images, y=None, *, scale=None):
        return self.conv(images[0]) + images[1] * y * scale

    a, b, y, scale = image(), image() + 1, image() + 2, torch.tensor(3.0)
    graph = trace(model(forward, conv=conv()), [a, b], scale=scale, y=y)
    bound = graph.bind([a, b], y, scale=scale)
    assert list(bound) == ["images.0", "images.1", "y", "scale"] == [spec.name for spec in graph.inputs]
    assert all(bound[name] is tensor for name, tensor in zip(bound, (a, b, y, scale), strict=True))


def test_points_go_from_all_on_the_server_to_all_on_the_device() -> None:
    graph = trace(zoo.googlenet(init_weights=False).eval(), X)
    assert [p.index for p in graph.points] == list(range(len(graph.layers) + 1))
    assert graph.points[0].tensors == graph.inputs
    assert graph.points[-1].tensors == graph.outputs
    assert graph.points[0].name == "input"
    assert [p.name for p in graph.points[1:]] == [layer.name for layer in graph.layers]
    assert max(len(point.tensors) for point in graph.points) == 4


def test_points_are_found_by_index_name_and_end() -> None:
    graph = trace(zoo.alexnet().eval(), X)
    assert graph.point(5).index == graph.point("features.4").index == 5
    assert graph.point(-1) == graph.points[-1] == graph.point("device")
    assert graph.point("server") == graph.points[0] == graph.point("input")


def test_views_that_share_memory_cross_once() -> None:
    def forward(self, x):
        a, b = self.conv(x).chunk(2, 1)
        return self.relu(a) + self.relu(b)

    graph = trace(model(forward, conv=conv(), relu=nn.ReLU()), image())
    assert [spec.name for spec in graph.point("chunk").tensors] == ["conv"]


def test_sizes_cross_only_where_the_other_side_cannot_read_them() -> None:
    def forward(self, x):
        y = self.pool(self.conv(x))
        return F.interpolate(self.relu(y), size=x.shape[-2:])

    graph = trace(model(forward, conv=conv(), pool=nn.MaxPool2d(2), relu=nn.ReLU()), image())
    assert [spec.name for spec in graph.point(0).tensors] == ["x"]
    crossing = graph.point("relu").tensors
    assert [spec.name for spec in crossing if spec.dtype == torch.float32] == ["relu"]
    assert sum(spec.size_bytes for spec in crossing if spec.dtype == torch.int64) == 16


def test_a_graph_is_plain_data_as_json() -> None:
    graph = trace(zoo.mobilenet_v3_small().eval(), X)
    data = json.loads(json.dumps(graph.to_json()))
    assert data["fingerprint"] == graph.fingerprint
    assert len(data["layers"]) == len(graph.layers)
    assert data["points"][3]["tensors"][0]["shape"] == list(graph.points[3].tensors[0].shape)


# --- tracing changes nothing ---


def test_tracing_leaves_the_model_as_it_was() -> None:
    def forward(self, x):
        self.last_seen = x
        self.calls += 1
        self.table["kept"] = torch.arange(6.0)
        y = self.conv(x) + torch.arange(6.0)
        return y * torch.tensor([1.0, 2, 3, 4]).view(4, 1, 1) + self.steps.cumsum(0)[-1]

    made = model(forward, conv=conv(), steps=torch.ones(3))
    made.calls, made.table = 7, {}
    state, attributes = copy.deepcopy(made.state_dict()), dict(vars(made))
    with torch.no_grad():
        trace(made, image())
    assert_same(dict(made.state_dict()), dict(state), "the state")
    assert vars(made) == attributes
    assert made.calls == 7
    assert torch.zeros(2).sum() == 0


def test_nothing_is_computed_without_verification() -> None:
    class Counting(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.device.type != "meta":
                Counting.calls += 1
            return super().forward(x)

    made = model(lambda self, x: self.a(x).relu(), a=Counting(4, 4))
    graph = trace(made, torch.randn(2, 4), leaf_modules=[Counting], verify=False)
    assert Counting.calls == 0
    assert graph.verified == ()
    assert trace(made, torch.randn(2, 4), leaf_modules=[Counting]).verified == VERIFIED
    # The model and the steps ran once each for each of the three inputs.
    assert Counting.calls == 6


def test_values_decide_shapes_where_they_must() -> None:
    def forward(self, x):
        return self.conv(x)[x > 0].sum(), x.nonzero()

    graph = trace(model(forward, conv=conv()), image())
    assert graph.outputs[1].shape == tuple(image().nonzero().shape)


# --- flops ---


@pytest.mark.parametrize("name", ["alexnet", "resnet18", "mobilenet_v3_small", "swin_t", "convnext_tiny"])
def test_flops_are_what_pytorchs_counter_counts(name: str) -> None:
    made = zoo.get_model(name).eval()
    with FlopCounterMode(display=False) as counter:
        made(X)
    assert sum(layer.flops for layer in trace(made, X).layers) == counter.get_total_flops()


@pytest.mark.parametrize("batch_first", [True, False])
def test_flops_of_attention_are_those_of_its_products_even_where_inference_fuses_them(batch_first: bool) -> None:
    made = nn.Sequential(
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first),
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=batch_first, norm_first=True),
        model(
            lambda self, x: self.attend(x, x[:, :2], x[:, :2])[0], attend=nn.MultiheadAttention(32, 4, batch_first=True)
        ),
    ).eval()
    x = torch.randn(3, 5, 32)
    with FlopCounterMode(display=False) as counter:
        made(x)  # with gradients PyTorch takes the unfused path, all of whose products its counter knows
    assert sum(layer.flops for layer in trace(made, x).layers) == counter.get_total_flops()


def test_operators_whose_flops_nobody_counts_are_named() -> None:
    graph = trace(model(lambda self, x: self.lstm(x)[0], lstm=nn.LSTM(4, 8)), torch.randn(3, 2, 4))
    assert graph.layers[0].flops == 2 * 3 * 2 * 4 * 8 * (4 + 8) or graph.layers[0].uncounted


# --- fingerprint ---


def net(**settings: Any) -> nn.Module:
    chosen = {"stride": 1, "padding": 1, "eps": 1e-5, "factor": 2.0, "swapped": False, "inplace": False} | settings

    def forward(self, x):
        y = self.relu(self.norm(self.conv(x)))
        z = F.relu(y * chosen["factor"], inplace=chosen["inplace"])
        a, b = (z, y) if chosen["swapped"] else (y, z)
        c = a - b
        if chosen["inplace"]:
            c += a
        else:
            c = c + a
        return self.conv2(c) + self.scale * (x.shape[1] + chosen.get("more", 1)) + torch.arange(chosen.get("count", 1))

    return model(
        forward,
        conv=nn.Conv2d(4, 4, 3, stride=chosen["stride"], padding=chosen["padding"]),
        norm=nn.BatchNorm2d(4, eps=chosen["eps"]),
        relu=nn.ReLU(inplace=chosen["inplace"]),
        conv2=conv(),
        scale=nn.Parameter(torch.randn(1)),
    )


@pytest.mark.parametrize(
    "settings",
    [{"stride": 2}, {"padding": 0}, {"eps": 1e-3}, {"factor": 2.5}, {"swapped": True}, {"more": 2}, {"count": 6}],
    ids=str,
)
def test_fingerprints_differ_where_graphs_do(settings: dict[str, Any]) -> None:
    assert trace(net(**settings), image()).fingerprint != trace(net(), image()).fingerprint


def test_fingerprints_do_not_depend_on_weights_memory_reuse_or_batch() -> None:
    wanted = trace(net(), image()).fingerprint
    assert trace(net(), image(5)).fingerprint == wanted
    assert trace(net(inplace=True), image()).fingerprint == wanted
    assert trace(copy.deepcopy(net()), image(1)).fingerprint == wanted


def test_fingerprints_tell_parameters_apart() -> None:
    def crossed(first: str, second: str) -> str:
        def forward(self, x):
            return F.linear(F.linear(x, getattr(self, first)), getattr(self, second))

        made = model(forward, a=nn.Parameter(torch.randn(4, 4)), b=nn.Parameter(torch.randn(4, 4)))
        return trace(made, torch.randn(2, 4)).fingerprint

    assert crossed("a", "b") != crossed("b", "a")


def test_fingerprints_tell_the_insides_of_whole_layers_apart() -> None:
    def whole(**settings: Any) -> str:
        made = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, **settings).eval()
        return trace(model(lambda self, x: self.layer(x), layer=made), torch.randn(2, 3, 8)).fingerprint

    assert whole() == whole()
    assert len({whole(), whole(layer_norm_eps=1e-3), whole(norm_first=True), whole(activation="gelu")}) == 4


def test_fingerprints_are_the_same_in_every_process() -> None:
    program = (
        "import torch, torchvision.models as zoo\n"
        "from torchsurgeon.tracing.tracer import trace\n"
        "for name in ('resnet18', 'swin_t'):\n"
        "    print(trace(zoo.get_model(name).eval(), torch.zeros(2, 3, 64, 64)).fingerprint)\n"
    )
    here = [trace(zoo.get_model(name).eval(), X).fingerprint for name in ("resnet18", "swin_t")]
    for seed in ("1", "2"):
        result = subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env=environment(PYTHONHASHSEED=seed),
        )
        assert result.stdout.split() == here


# --- bad input ---


def test_a_model_in_training_mode_is_refused() -> None:
    made = zoo.alexnet().eval()
    made.classifier[3].train()
    with pytest.raises(
        TraceError, match=r"submodule 'classifier.3' of AlexNet is in training mode.*call model.eval\(\)"
    ):
        trace(made, X)
    with pytest.raises(TraceError, match="AlexNet is in training mode"):
        trace(made.train(), X)


class Deciding(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line to be named
            return x
        return -x


def test_a_module_with_control_flow_on_values_stays_one_layer() -> None:
    made = nn.Sequential(conv(), nn.Sequential(Deciding())).eval()
    graph = check(made, image())
    assert [layer.name for layer in graph.layers] == ["0", "1.0"]
    assert trace(made, image(), leaf_modules=["1.0"]).fingerprint == graph.fingerprint
    assert trace(made, image(), leaf_modules=[Deciding]).fingerprint == graph.fingerprint


def test_control_flow_in_the_model_itself_names_the_line_and_what_to_try() -> None:
    with pytest.raises(TraceError, match="move the line's control flow into a submodule") as caught:
        trace(Deciding().eval(), image())
    assert "test_graph.py" in str(caught.value)
    assert "if x.sum() > 0:" in str(caught.value)
    assert "leaf_modules" in str(caught.value)


def test_an_unknown_leaf_module_is_refused() -> None:
    with pytest.raises(TraceError, match=r"leaf_modules names 'features\.99', which is not a module of AlexNet"):
        trace(zoo.alexnet().eval(), X, leaf_modules=["features.99"])


def test_an_example_that_does_not_fit_is_refused() -> None:
    made = zoo.alexnet().eval()
    with pytest.raises(TraceError, match=r"the example does not fit AlexNet.forward\(x"):
        trace(made)
    with pytest.raises(TraceError, match="holds no tensor"):
        trace(made, 3)
    with pytest.raises(TraceError, match=r"layer 'features.0' failed on the example.*3 channels"):
        trace(made, torch.randn(1, 5, 64, 64))


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.conv(x) + self.steps.add_(1),
        lambda self, x: self.conv(x) * self.steps.copy_(x.sum()),
        lambda self, x: _assign(self.steps, x),
    ],
    ids=["add", "copy", "item"],
)
def test_a_model_that_overwrites_its_buffer_is_refused_and_keeps_it(forward: Callable[..., Any]) -> None:
    made = model(forward, conv=conv(), steps=torch.zeros(1))
    with pytest.raises(TraceError, match=r"overwrites the model's own 'steps'.*pass it in and return it"):
        trace(made, image())
    assert made.steps == 0


def _assign(buffer: Any, x: Any) -> Any:
    buffer[0] = x.sum()
    return x * buffer


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += 1
        return x * self.seen


def test_a_whole_layer_that_overwrites_its_buffer_is_refused() -> None:
    made = nn.Sequential(conv(), Remembering()).eval()
    with pytest.raises(TraceError, match=r"overwrites the model's own '1.seen'"):
        trace(made, image(), leaf_modules=["1"])


def test_a_model_that_computes_nothing_is_refused() -> None:
    with pytest.raises(TraceError, match="computes nothing"):
        trace(model(lambda self, x: (x, x.shape[0])), image())


def test_points_that_do_not_exist_are_refused_with_the_near_ones() -> None:
    graph = trace(zoo.alexnet().eval(), X)
    with pytest.raises(
        PartitionError, match=r"no partition point 99; the points are 0 … 22, the nearest 20 .*22 \(classifier.6\)"
    ):
        graph.point(99)
    with pytest.raises(PartitionError, match=r"no layer 'feature\.3' to cut after; near it: features\.3"):
        graph.point("feature.3")
    for place in ("Server", "servr", "DEVICE"):
        word = "device" if place == "DEVICE" else "server"
        with pytest.raises(PartitionError, match=rf'no layer \'{place}\' to cut after; did you mean "{word}"\?$'):
            graph.point(place)
    with pytest.raises(PartitionError, match=r'near it: .*; or "device" or "server" for everything on one side$'):
        graph.point("cloud")
    with pytest.raises(PartitionError, match="no partition point -24"):
        graph.point(-24)


def test_specs_and_points_are_frozen() -> None:
    graph = trace(zoo.alexnet().eval(), X)
    for known in (graph.inputs[0], graph.layers[0], graph.points[0]):
        with pytest.raises(dataclasses.FrozenInstanceError):
            known.name = "other"


def test_what_is_no_model_graph_or_point_is_named() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), nn.Linear(2, 2)).eval(), torch.rand(1, 2)
    with pytest.raises(TraceError, match=r"nn\.Module; got str"):
        trace("alexnet", x)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match="traced model; got Sequential"):
        cut(model, 1)  # type: ignore[arg-type]
    graph = trace(model, x)
    with pytest.raises(PartitionError, match=r"index or a layer's name; got 1\.5"):
        graph.point(1.5)  # type: ignore[arg-type]
    with pytest.raises(PartitionError, match=r"'0' is a module with layers inside.*'0\.1'"):
        graph.point("0")


def test_a_point_says_where_it_cuts() -> None:
    graph = trace(nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), nn.ReLU()).eval(), torch.zeros(1, 3))
    assert [point.where for point in graph.points] == [
        "all on the server", "cut after 0.0", "cut after 0.1", "all on the device"
    ]  # fmt: skip
    assert str(graph.point("0.1")) == "point 2 (cut after 0.1): 0.1 float32[N×2]; 8 bytes"
    assert str(graph.point("server")) == "point 0 (all on the server): input float32[N×3]; 12 bytes"
    assert str(graph.point("device")) == "point 3 (all on the device): nothing crosses"
