"""SplitModule gives the model's own answer, wherever it is cut, and says clearly when it cannot."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from serving import serving, split
from tcp import listening, reserved_port
from torch import nn
from tries import least_of

import torchsurgeon as ts
from torchsurgeon.codec import CodecTable
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.transport import HttpTransport, InProcessTransport

_PARTS = ("decide_s", "head_s", "encode_s", "uplink_s", "queue_s", "tail_s", "downlink_s", "decode_s")


class Net(nn.Module):
    """A residual model with two inputs and a dict for an answer."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(width, width, 3, padding=1)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        y = self.relu(self.norm(self.stem(x)))
        y = self.relu(self.body(y) + y)
        if scale is not None:
            y = y * scale
        return {"scores": self.head(y.mean((2, 3))), "map": y.amax(1)}


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


EXAMPLE = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    registry = ModelRegistry(profiler=lambda graph: ts.profile(graph, repeats=2, warmup=1).to_json())
    registry.add("net", make_net(), (EXAMPLE,))
    registry.add("wide", Net(16).eval(), (EXAMPLE,))
    with Server(create_app(registry)) as running:
        yield running
    registry.close()


def same(answer: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> bool:
    return list(answer) == list(truth) and all(torch.equal(answer[k], truth[k]) for k in truth)


def test_every_partition_gives_the_models_bits(server: Server) -> None:
    model = make_net()
    with torch.no_grad(), ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0) as split:
        for x in (EXAMPLE, torch.rand(3, 3, 16, 16)):
            truth = model(x)
            for point in split.graph.points:
                split.partition = point.index
                assert same(split(x), truth), point.name


def test_auto_chooses_a_point_and_answers(server: Server) -> None:
    model = make_net()
    with torch.no_grad(), ts.SplitModule(model, EXAMPLE, server=server.url, name="net") as split:
        assert split.partition is None
        assert same(split(EXAMPLE), model(EXAMPLE))
        assert split.partition in split.graph.points
        assert split.link is not None
        assert split.device_profile is not None
        assert split.server_profile is not None
        planned = ts.plan(split.graph, device=split.device_profile, server=split.server_profile, link=split.link)
        assert split.decisions[0].row.index == planned.row.index


def test_a_noisy_profile_is_warned_of_where_the_program_calls(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchsurgeon.profiling.measure._NOISY_SPREAD", -1.0)
    with pytest.warns(ts.NoisyProfileWarning) as caught, ts.SplitModule(
        make_net(), EXAMPLE, server=server.url, name="net", fallback="error"
    ) as split:  # fmt: skip
        split.prepare()
    (said,) = [one for one in caught if issubclass(one.category, ts.NoisyProfileWarning)]
    assert said.filename == __file__
    assert "10 runs differ widely" in str(said.message)
    assert "device_profile= gives better ones" in str(said.message)
    assert "repeats" not in str(said.message), "SplitModule takes none"


def test_auto_prefers_a_fast_server_to_a_slow_device_and_a_device_to_a_slow_link(server: Server) -> None:
    fast = ts.Link("fast", 1e9, 1e9, 1e-4)
    slow = ts.Link("slow", 1e4, 1e4, 1.0)
    model = make_net()
    profile = ts.profile(ts.trace(model, EXAMPLE), repeats=2, warmup=1)
    choices = []
    for link, factor in ((fast, 1e5), (slow, 1.0)):
        with ts.SplitModule(
            model,
            EXAMPLE,
            server=server.url,
            name="net",
            link=link,
            device_profile=profile.scaled(factor),
            server_profile=profile,
        ) as split:
            split(EXAMPLE)
            choices.append(split.partition.index if split.partition else None)
    assert choices == [0, len(split.graph.layers)]


def test_a_link_may_be_given_by_its_name(server: Server) -> None:
    options: dict[str, Any] = {"server": server.url, "name": "net", "partition": "server"}
    with ts.SplitModule(make_net(), EXAMPLE, link="wifi", **options) as split:
        assert split.link == ts.Link.parse("wifi")
    for wrong, said in (("wify", "no link 'wify'"), (3, 'a Link, or a text such as "lte"; got 3')):
        with pytest.raises(ts.LinkError, match=said):
            ts.SplitModule(make_net(), EXAMPLE, link=wrong, **options)


@pytest.mark.parametrize(("partition", "index"), [("server", 0), ("stem", 1), (2, 2), ("device", -1)])
def test_partition_is_given_by_word_name_or_index(server: Server, partition: str | int, index: int) -> None:
    with ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition=partition) as split:
        assert split.partition == split.graph.points[index]


@pytest.mark.parametrize(
    ("partition", "said"), [("cloud", 'or "device" or "server"'), ("Auto", "near it"), (99, "the nearest")]
)
def test_a_partition_that_is_none_is_told_what_there_is(server: Server, partition: str | int, said: str) -> None:
    with pytest.raises(ts.PartitionError, match=rf'{said}.*; or "auto", which chooses at every call$'):
        ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition=partition)


def test_a_closed_module_says_what_to_do(server: Server) -> None:
    split = ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition=1, fallback="error")
    split.close()
    with pytest.raises(ts.ServerUnavailableError, match="the SplitModule has been closed; make a new one"):
        split(EXAMPLE)


def test_device_only_needs_no_server() -> None:
    model = make_net()
    split = ts.SplitModule(model, EXAMPLE, partition="device")
    with torch.no_grad():
        assert same(split(EXAMPLE), model(EXAMPLE))
    assert split.last is not None
    assert split.last.sent_bytes == 0
    with pytest.raises(ts.ServerUnavailableError, match="needs a server"):
        split.partition = "server"
    with pytest.raises(ts.ServerUnavailableError, match="needs a server"):
        ts.SplitModule(model, EXAMPLE)


def test_last_says_where_the_time_went(server: Server) -> None:
    with ts.SplitModule(
        make_net(), EXAMPLE, server=server.url, name="net", partition="stem", fallback="error"
    ) as split:
        assert split.last is None
        split(EXAMPLE)
        last = split.last
        for cut, where in (("server", "all on the server"), ("device", "all on the device")):
            split.partition = cut
            split(EXAMPLE)
            assert split.last is not None
            assert f"({where}; " in str(split.last)
    assert last is not None
    assert last.partition.name == "stem"
    parts = [getattr(last, part) for part in _PARTS]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(last.total_s, rel=1e-6)
    assert last.head_s > 0
    assert last.tail_s > 0
    assert last.sent_bytes > 8 * 16 * 16 * 4
    assert last.received_bytes > (5 + 16 * 16) * 4
    assert "cut after stem" in str(last)
    assert {f.name for f in dataclasses.fields(last)} >= set(_PARTS)


def test_keyword_and_several_inputs() -> None:
    example = {"x": EXAMPLE, "scale": torch.full((1, 8, 1, 1), 2.0)}
    model = make_net()
    with split(model, **example) as module, torch.no_grad():
        for point in module.graph.points:
            module.partition = point.index
            assert same(module(**example), model(**example))


def test_in_process_transport_serves_tests() -> None:
    registry = ModelRegistry()
    registry.add("net", make_net(), (EXAMPLE,))
    model = make_net()
    with torch.no_grad(), InProcessTransport(create_app(registry)) as transport:
        split = ts.SplitModule(model, EXAMPLE, server=transport, name="net", partition="body")
        assert same(split(EXAMPLE), model(EXAMPLE))
    registry.close()


def test_threads_share_a_module(server: Server) -> None:
    model = make_net()
    inputs = [torch.rand(1 + i % 3, 3, 16, 16) for i in range(24)]
    with torch.no_grad():
        truths = [model(x) for x in inputs]
    split = ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition="relu")
    with split, ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(split, inputs))
    assert all(same(a, t) for a, t in zip(answers, truths, strict=True))


def test_input_and_model_stay_as_they_are(server: Server) -> None:
    model = make_net()
    state = copy.deepcopy(model.state_dict())
    x = EXAMPLE.clone()
    with ts.SplitModule(model, x, server=server.url, name="net", partition="norm") as split:
        split(x)
        assert {n.removeprefix("model.") for n in split.state_dict()} == set(state)
    assert torch.equal(x, EXAMPLE)
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())


def test_other_weights_are_named(server: Server) -> None:
    other = make_net()
    with torch.no_grad():
        other.body.weight[0, 0, 0, 0] += 1e-3
    options: dict[str, Any] = {"name": "net", "partition": "stem", "fallback": "error"}
    with ts.SplitModule(other, EXAMPLE, server=server.url, **options) as split:
        with pytest.raises(ts.ModelMismatchError, match=r"body\.weight") as caught:
            split(EXAMPLE)
        assert "stem.weight" not in str(caught.value)


def test_another_architecture_is_a_mismatch(server: Server) -> None:
    split = ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="wide", partition="stem", fallback="error")
    with pytest.raises(ts.ModelMismatchError, match=r"stem\.weight.*8×3×3×3.*16×3×3×3"):
        split(EXAMPLE)
    split.close()


def test_the_same_weights_in_another_graph_are_a_mismatch(server: Server) -> None:
    model = make_net()
    model.body.padding, model.body.padding_mode = (1, 1), "zeros"
    model.norm.eps = 1e-3
    split = ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition="stem", fallback="error")
    with pytest.raises(ts.ModelMismatchError, match="another graph"):
        split(EXAMPLE)
    split.close()


def test_a_model_the_server_does_not_have(server: Server) -> None:
    split = ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="absent", partition="stem", fallback="error")
    with pytest.raises(ts.ModelMismatchError, match="absent"):
        split(EXAMPLE)
    split.close()


def test_a_server_that_is_down() -> None:
    options: dict[str, Any] = {"name": "net", "partition": "stem", "timeout_s": 2, "fallback": "error"}
    with (
        reserved_port() as port,
        ts.SplitModule(make_net(), EXAMPLE, server=f"http://127.0.0.1:{port}", **options) as split,
        pytest.raises(ts.ServerUnavailableError),
    ):
        split(EXAMPLE)


def test_a_server_that_never_answers_ends_within_the_timeout() -> None:
    options: dict[str, Any] = {"name": "net", "partition": "stem", "timeout_s": 0.5, "fallback": "error"}
    with (
        listening(lambda connection: [*iter(lambda: connection.recv(1 << 16), b"")]) as port,
        ts.SplitModule(make_net(), EXAMPLE, server=f"http://127.0.0.1:{port}", **options) as split,
    ):
        begin = time.monotonic()
        with pytest.raises(ts.ServerUnavailableError):
            split(EXAMPLE)
        assert time.monotonic() - begin < 5


def test_a_server_gone_between_two_inferences() -> None:
    options: dict[str, Any] = {"name": "net", "partition": "stem", "timeout_s": 20, "fallback": "error"}
    with (
        serving(make_net(), EXAMPLE) as running,
        ts.SplitModule(make_net(), EXAMPLE, server=running.url, **options) as split,
    ):
        split(EXAMPLE)
        running.stop()
        with pytest.raises(ts.ServerUnavailableError):
            split(EXAMPLE)
        split.partition = "device"
        assert same(split(EXAMPLE), make_net()(EXAMPLE))


def test_calls_after_close_say_so(server: Server) -> None:
    split = ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition="stem")
    split(EXAMPLE)
    split.close()
    split.close()
    with pytest.raises(ts.ServerUnavailableError, match="closed"):
        split(EXAMPLE)


def test_an_input_unlike_the_example_is_refused_with_a_reason(server: Server) -> None:
    with ts.SplitModule(
        make_net(), EXAMPLE, server=server.url, name="net", partition="stem", fallback="error"
    ) as split:
        split.partition = "server"
        with pytest.raises(TypeError, match=r"'x' must be of the example's dtype torch.float32; got torch.float64"):
            split(EXAMPLE.double())
        with pytest.raises(ts.RequestRefusedError, match=r"x \[1, 4, 16, 16\]"):
            split(torch.rand(1, 4, 16, 16))
        with pytest.raises(TypeError):
            split(EXAMPLE, EXAMPLE, EXAMPLE)
        assert same(split(EXAMPLE), make_net()(EXAMPLE))


def test_an_image_of_another_size_gets_the_models_answer(server: Server) -> None:
    model = make_net()
    with torch.no_grad(), ts.SplitModule(model, EXAMPLE, server=server.url, name="net", partition=0) as split:
        for x in (torch.rand(1, 3, 8, 24), torch.rand(2, 3, 40, 40)):
            for point in split.graph.points:
                split.partition = point.index
                assert same(split(x), model(x)), point.name


def test_a_missing_point_lists_the_near_ones(server: Server) -> None:
    with pytest.raises(ts.PartitionError, match="stem"):
        ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition="stm")
    with pytest.raises(ts.PartitionError, match="999"):
        ts.SplitModule(make_net(), EXAMPLE, server=server.url, name="net", partition=999)


def test_it_stays_in_evaluation_mode_inside_a_module_that_trains() -> None:
    split = ts.SplitModule(make_net(), EXAMPLE, partition="device")
    assert split.eval() is split
    around = nn.Sequential(split, nn.Linear(5, 2)).train()
    assert around.training
    assert around[1].training
    assert not any(module.training for module in split.modules())
    split(EXAMPLE)
    with pytest.raises(ts.TraceError, match="eval"):
        ts.SplitModule(Net(), EXAMPLE, partition="device")


def test_moving_the_module_moves_what_it_runs() -> None:
    model = make_net()
    split = ts.SplitModule(model, EXAMPLE, partition="device")
    split(EXAMPLE)
    split.double()
    assert split(EXAMPLE.double())["scores"].dtype == torch.float64


def test_a_backend_runs_the_head(server: Server) -> None:
    ran = []

    def backend(module: nn.Module) -> nn.Module:
        module.register_forward_hook(lambda *_: ran.append(True))
        return module

    options: dict[str, Any] = {"name": "net", "partition": "relu", "backend": backend, "fallback": "error"}
    with ts.SplitModule(make_net(), EXAMPLE, server=server.url, **options) as split:
        split(EXAMPLE)
    assert ran == [True]


def test_measured_link_is_that_of_the_emulated_one(server: Server) -> None:
    from torchsurgeon.emulate import LinkEmulator

    link = ts.Link("test", 8e6, 16e6, 0.04)
    emulator = LinkEmulator(0, "127.0.0.1", server.port, link)

    def farthest_off() -> float:
        measured = ts.measure_link(transport)
        return max(
            abs(measured.round_trip_s / link.round_trip_s - 1),
            abs(measured.uplink_bit_s / link.uplink_bit_s - 1),
            abs(measured.downlink_bit_s / link.downlink_bit_s - 1),
        )

    # Another process that holds the processor lengthens a round trip or a transfer.
    with emulator, HttpTransport(f"http://127.0.0.1:{emulator.port}") as transport:
        assert least_of(farthest_off, enough=0.15) <= 0.15


def test_a_measured_table_given_as_the_codec_is_told_where_it_belongs() -> None:
    table = CodecTable("Net", "", batch=1, samples=1, budget="", rows=())
    with pytest.raises(ts.CodecError, match="as codecs="):
        ts.SplitModule(make_net(), EXAMPLE, partition="device", codec=table)  # type: ignore[arg-type]
