"""A SplitModule that chooses the backends of head and tail, together with the cut."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon.backends import Backend, Part, deviation
from torchsurgeon.runtime.parts import Parts, Run
from torchsurgeon.serve import ModelRegistry, Server, create_app

X = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))


class Counting(Backend):
    """Runs parts in eager PyTorch, and counts what it builds and runs."""

    def __init__(self, name: str, tolerance: float = 1e-4) -> None:
        self.name, self.tolerance = name, tolerance
        super().__init__()
        self.built: list[Part] = []
        self.runs = 0

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Callable[..., Sequence[Tensor]]:
        self.built.append(part)

        def run(*tensors: Tensor) -> Sequence[Tensor]:
            self.runs += 1
            return part.segment(*tensors)  # type: ignore[no-any-return]

        return run


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(128, 10)
        ).eval()


def profile_of(net: nn.Module, layer_s: list[float], backend: str = "eager") -> ts.LayerProfile:
    graph, seconds = ts.trace(net, X), np.array([layer_s])
    names = tuple(layer.name for layer in graph.layers)
    return ts.LayerProfile(
        "Sequential", graph.fingerprint, 1, names, seconds, seconds.sum(axis=1), {"backend": backend, "device": "test"}
    )


def until(what: Callable[[], bool], seconds: float = 60.0) -> None:
    end_s = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


def test_the_quickest_backend_is_built_in_the_background_and_then_runs(net: nn.Module) -> None:
    quick, slow = Counting("quick"), Counting("slow")
    profiles = [
        profile_of(net, [seconds] * 5, name) for name, seconds in (("eager", 2e-3), ("quick", 1e-3), ("slow", 3e-3))
    ]
    with ts.SplitModule(net, X, partition="device", backend=[quick, slow], device_profile=profiles) as split:
        assert torch.equal(split(X), net(X))
        until(lambda: bool(quick.built))

        def runs() -> bool:
            assert torch.equal(split(X), net(X))
            return quick.runs > 3

        until(runs)
        assert split.last is not None
        assert split.last.backend == "quick"
        assert "by quick" in str(split.last)
    assert not slow.built
    assert len(quick.built) == 1


def test_what_one_thread_builds_is_what_another_runs_that_asked_for_the_part_at_once(
    net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts, together = Parts(ts.trace(net, X), Counting("spy")), threading.Barrier(2, timeout=60)
    made = parts._made_head

    def made_at_once(point: ts.PartitionPoint, named: Backend | None) -> Run:
        together.wait()
        return made(point, named)

    monkeypatch.setattr(parts, "_made_head", made_at_once)
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(parts.head, parts.graph.points[2]) for _ in range(2)]
    assert asked[0].result() is asked[1].result()


def test_a_chosen_backend_builds_its_part_anew_after_the_weights_have_changed(net: nn.Module) -> None:
    quick = Counting("quick")
    quick.copies_weights = True
    profiles = [profile_of(net, [seconds] * 5, name) for name, seconds in (("eager", 2e-3), ("quick", 1e-3))]
    with ts.SplitModule(net, X, partition="device", backend=[quick], device_profile=profiles) as split:

        def runs_by_it() -> bool:
            assert torch.equal(split(X), net(X))
            assert split.last is not None
            return split.last.backend == "quick"

        until(runs_by_it)
        for built in (2, 3):
            net.get_submodule("0").weight.mul_(2)
            assert not runs_by_it()
            until(runs_by_it)
            assert len(quick.built) == built


def test_what_is_not_known_is_measured_in_the_background(net: nn.Module) -> None:
    spy = Counting("spy")
    with ts.SplitModule(net, X, partition="device", backend=[spy]) as split:
        assert torch.equal(split(X), net(X))

        def known() -> bool:
            split(X)
            return [profile.backend for profile in split._engine.times.profiles] == ["eager", "spy"]

        until(known)
    assert spy.built


def test_prepare_waits_until_all_is_measured_and_built(net: nn.Module) -> None:
    spy = Counting("spy")
    with ts.SplitModule(net, X, partition="device", backend=[spy]) as split:
        split.prepare()
        assert [profile.backend for profile in split._engine.times.profiles] == ["eager", "spy"]
        built = len(spy.built)
        split(X)
        assert len(spy.built) == built


def test_how_slow_the_device_seemed_is_forgotten_once_it_is_predicted_otherwise(net: nn.Module) -> None:
    profile = profile_of(net, [1e-3] * 5)
    with ts.SplitModule(net, X, partition="device", backend=[Counting("spy")], device_profile=profile) as split:
        times = split._engine.times
        for _ in range(20):
            times.record_duration(0.05, 0.005)
        assert times.slowdown().value > 5
        split.prepare()
        assert [one.backend for one in times.profiles] == ["eager", "spy"]
        assert times.slowdown().value < 2


def test_auto_keeps_the_bits_unless_a_tolerance_is_given(net: nn.Module) -> None:
    with ts.SplitModule(net, X, partition="device", backend="auto", exact=True) as split:
        split.prepare()
        assert torch.equal(split(X), net(X))
        assert split.last is not None
        assert split.last.bits == "same bits"
    with pytest.raises(ts.BackendError, match="exact=True"):
        ts.SplitModule(net, X, partition="device", backend="auto", tolerance=1e-3, exact=True)


def test_auto_takes_installed_backends_within_the_tolerance(net: nn.Module) -> None:
    profiles = [profile_of(net, [seconds] * 5, name) for name, seconds in (("eager", 2e-3), ("onnxruntime", 1e-3))]
    with ts.SplitModule(net, X, partition="device", backend="auto", tolerance=1e-4, device_profile=profiles) as split:
        candidates = split._engine.parts.backends
        assert {"onnxruntime", "openvino"} <= {backend.name for backend in candidates}
        assert all(backend.tolerance <= 1e-4 for backend in candidates)
        split.prepare()
        assert deviation(split(X), net(X)) <= 1e-4
        assert split.last is not None
        assert split.last.bits == "same to rounding"


@pytest.fixture
def served(net: nn.Module) -> Iterator[tuple[str, Counting, Counting]]:
    registry, first, second = ModelRegistry(), Counting("first"), Counting("second", 0.1)
    registry.add("net", net, X, backend=[first, second])
    try:
        with Server(create_app(registry)) as server:
            yield server.url, first, second
    finally:
        registry.close()


@pytest.mark.parametrize(("wanted", "which"), [(None, 1), ("first", 1), ("second", 2)])
def test_the_server_runs_the_backend_that_is_asked_for(
    net: nn.Module, served: tuple[str, Counting, Counting], wanted: str | None, which: int
) -> None:
    url, *_ = served
    asked, other = (served[which], served[3 - which])
    assert isinstance(asked, Counting)
    assert isinstance(other, Counting)
    with ts.SplitModule(net, X, server=url, name="net", partition="1", server_backend=wanted) as split:

        def runs() -> bool:
            assert torch.equal(split(X), net(X))
            return asked.runs > 3

        until(runs)
    if wanted is not None:
        assert not other.built


def test_a_device_may_ask_for_eager_pytorch(net: nn.Module, served: tuple[str, Counting, Counting]) -> None:
    url, first, second = served
    with ts.SplitModule(
        net, X, server=url, name="net", partition="1", server_backend="eager", fallback="error"
    ) as split:
        for _ in range(3):
            assert torch.equal(split(X), net(X))
    assert not first.built
    assert not second.built


def test_a_backend_that_the_server_does_not_have_is_refused(
    net: nn.Module, served: tuple[str, Counting, Counting]
) -> None:
    with (
        ts.SplitModule(
            net, X, server=served[0], name="net", partition="1", server_backend="third", fallback="error"
        ) as split,
        pytest.raises(ts.BackendError, match="first, second, eager"),
    ):
        split(X)
    with ts.SplitModule(net, X, server=served[0], name="net", partition="1", server_backend="third") as split:
        assert torch.equal(split(X), net(X))
        assert split.last is not None
        assert "first, second, eager" in str(split.last.degraded)


def test_cut_and_backends_are_chosen_together(net: nn.Module, served: tuple[str, Counting, Counting]) -> None:
    """The server is quick by one backend only, whose answers are within the tolerance."""
    url, _, second = served
    device = [profile_of(net, [0.5e-3, 10e-3, 10e-3, 10e-3, 10e-3])]
    servers = [
        profile_of(net, [seconds] * 5, name) for name, seconds in (("first", 4e-3), ("second", 1e-6), ("eager", 5e-3))
    ]
    with ts.SplitModule(
        net,
        X,
        server=url,
        name="net",
        server_backend="auto",
        tolerance=0.1,
        device_profile=device,
        server_profile=servers,
        link=ts.Link("here", 1e9, 1e9, 1e-4),
    ) as split:

        def runs() -> bool:
            assert torch.equal(split(X), net(X))
            return second.runs > 3

        until(runs)
        plan = split._engine.servers.peers[0].plan
        assert plan is not None
        assert {row.server_backend for row in plan.frontier.rows if not row.on_device} == {"second"}
    with ts.SplitModule(
        net,
        X,
        server=url,
        name="net",
        server_backend="auto",
        tolerance=1e-4,
        device_profile=device,
        server_profile=servers,
        link=ts.Link("here", 1e9, 1e9, 1e-4),
    ) as split:
        split(X)
        plan = split._engine.servers.peers[0].plan
        assert plan is not None
        assert {row.server_backend for row in plan.frontier.rows} == {"first", "eager"}


def test_the_server_measures_its_backend_in_the_background(
    net: nn.Module, served: tuple[str, Counting, Counting]
) -> None:
    with ts.SplitModule(net, X, server=served[0], name="net", fallback="error") as split:
        split(X)

        def known() -> bool:
            split(X)
            plan = split._engine.servers.peers[0].plan
            assert plan is not None
            return {row.server_backend for row in plan.frontier.rows if not row.on_device} == {"first"}

        until(known)
        assert split.server_profile is not None
        assert split.server_profile.backend == "first"


def test_requests_for_an_unknown_backend_get_an_error(served: tuple[str, Counting, Counting]) -> None:
    from torchsurgeon.transport import HttpTransport

    transport = HttpTransport(served[0], 10.0)
    with transport:
        for parameters in ({"backend": "third"}, {"backend": 3}):
            with pytest.raises(ts.RequestRefusedError, match="first, second, eager"):
                transport.infer("net", {"input": X}, max_answer_bytes=1000, parameters=parameters)
        with pytest.raises(ts.RequestRefusedError, match="first, second, eager"):
            transport.get_json("/v2/models/net/profile?backend=third")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"server_backend": 3}, "server_backend"),
        ({"tolerance": -1.0}, "tolerance"),
        ({"tolerance": float("nan")}, "tolerance"),
        ({"tolerance": 1e-3}, "neither backend nor server_backend"),
        ({"tolerance": 1e-3, "backend": "onnxruntime"}, "neither backend nor server_backend"),
        ({"backend": ["no-such"]}, "no-such"),
    ],
)
def test_what_makes_no_sense_is_refused(net: nn.Module, given: dict[str, object], message: str) -> None:
    with pytest.raises(ts.BackendError, match=message):
        ts.SplitModule(net, X, partition="device", **given)  # type: ignore[arg-type]
