"""The server on Ray Serve: what an operator may say of it, and answers that survive the loss of a replica."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Iterator
from typing import Any

import factories
import pytest
import torch
from paths import environment
from tcp import reserved_port

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.errors import ServerError
from torchsurgeon.serve.ray_options import RayOptions
from torchsurgeon.transport import HttpTransport

TOKEN = "a-token-0123456789"
MISSING = "no Ray, which is too large to be installed for the tests: pip install 'torchsurgeon[ray]'"


def test_options_are_taken_from_a_file_and_from_a_command_line() -> None:
    options = RayOptions.parse({"models": {"net": "torchvision:alexnet"}, "max_replicas": 4, "gpus": 0.25})
    assert options == RayOptions.parse({"models": "net=torchvision:alexnet", "max_replicas": "4", "gpus": "0.25"})
    two = RayOptions.parse({"models": "a=factories:tiny,b=factories:slow", "weights": "a=default"})
    assert two.models == {"a": "factories:tiny", "b": "factories:slow"}
    assert two.weights == {"a": "default"}


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "which models"),
        ({"models": ""}, "at least one model"),
        ({"models": "alexnet"}, "NAME=VALUE"),
        ({"models": {"a": "x"}, "replica": 2}, "no option 'replica'"),
        ({"models": {"a": "x"}, "replicas": 0}, "replicas .* whole number"),
        ({"models": {"a": "x"}, "replicas": "some"}, "must be a number"),
        ({"models": {"a": "x"}, "replicas": 3, "max_replicas": 2}, "at least the 3"),
        ({"models": {"a": "x"}, "gpus": -1}, "gpus"),
        ({"models": {"a": "x"}, "cpus": 0}, "cpus"),
        ({"models": {"a": "x"}, "weights": {"b": "y"}}, "served models"),
        ({"models": {"a": "x"}, "batching": "always"}, "off, exact or rounded"),
    ],
)
def test_options_that_cannot_be_are_refused_before_ray_starts(given: dict[str, Any], reason: str) -> None:
    with pytest.raises(ServerError, match=reason):
        RayOptions.parse(given)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two replicas of two small models behind Ray Serve, which asks for a token."""
    ray = pytest.importorskip("ray", reason=MISSING)
    pytest.importorskip("ray.serve", reason=MISSING)
    from torchsurgeon.serve import ray as on_ray

    with reserved_port() as port:
        pass
    variables = {name: value for name, value in environment().items() if name == "PYTHONPATH"}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": variables})
    try:
        file = tmp_path_factory.mktemp("ray") / "tokens"
        file.write_text(f"{TOKEN}\n")
        models = {"tiny": "factories:tiny", "nested": "factories:nested"}
        options = RayOptions(models, replicas=2, max_replicas=2, cpus=0.5, token_file=str(file))
        on_ray.run(options, port=port, blocking=False)
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.serve.shutdown()
        ray.shutdown()


def split_of(url: str, name: str = "tiny", **options: Any) -> ts.SplitModule:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, x = getattr(factories, name)()
    return ts.SplitModule(model.eval(), x, server=url, name=name, token=TOKEN, fallback="error", **options)


def replicas() -> set[str]:
    """The names of the actors that hold models."""
    import ray

    named = ray.util.list_named_actors(all_namespaces=True)
    return {actor["name"] for actor in named if "tails" in actor["name"]}


@pytest.mark.parametrize(("name", "shape"), [("tiny", (2, 3, 8, 8)), ("nested", (2, 4))])
def test_every_cut_gives_the_models_own_bits(url: str, name: str, shape: tuple[int, ...]) -> None:
    with split_of(url, name) as split, torch.no_grad():
        x = torch.rand(shape)
        for point in split.graph.points:
            split.partition = point.index
            assert torch.equal(split(x), split.model(x))


def test_what_is_wrong_is_answered_as_by_one_server(url: str) -> None:
    x = {"input": torch.rand(1, 3, 8, 8)}

    def status(name: str, tensors: dict[str, torch.Tensor], reason: str, **options: Any) -> int:
        with (
            HttpTransport(url, **{"token": TOKEN, **options}) as transport,
            pytest.raises(ts.RequestRefusedError, match=reason) as refused,
        ):
            transport.infer(name, tensors, max_answer_bytes=1000)
        return refused.value.status

    assert status("other", x, "not served; served are tiny, nested") == 404
    assert status("tiny", {"nothing": x["input"]}, "nothing") == 400
    assert status("tiny", {"input": torch.rand(65, 3, 8, 8)}, "at most") == 400
    assert status("tiny", x, "token", token=None) == 401
    assert status("tiny", x, "deadline", headers={"Torchsurgeon-Deadline-S": "0.0001"}) == 503
    with HttpTransport(url) as stranger:
        assert stranger.get_json("/v2/health/live") == {"live": True}
    with HttpTransport(url, token=TOKEN) as transport:
        assert transport.get_json("/v2/models/tiny/versions/1")["name"] == "tiny"


def test_a_running_ray_serve_is_not_told_to_listen_elsewhere_in_vain(url: str) -> None:
    from torchsurgeon.serve import ray as on_ray

    port = int(url.rpartition(":")[2])
    options = RayOptions({"other": "factories:tiny"})
    with reserved_port() as other, pytest.raises(ServerError, match=f"listens on 127.0.0.1:{port}"):
        on_ray.run(options, port=other, blocking=False)
    # And nothing was deployed in place of what is served.
    with HttpTransport(url, token=TOKEN) as transport:
        assert transport.get_json("/v2/models/tiny")["name"] == "tiny"


def test_a_model_that_makes_room_for_another_answers_those_that_have_found_it() -> None:
    pytest.importorskip("ray", reason=MISSING)
    pytest.importorskip("ray.serve", reason=MISSING)
    from torchsurgeon.serve import ray as on_ray

    def threads() -> set[threading.Thread]:
        return {one for one in threading.enumerate() if one.name.startswith("torchsurgeon-tiny")}

    before = threads()
    held = on_ray._Held(RayOptions({"tiny": "factories:tiny"}), "tiny")
    own = threads() - before
    assert own
    # What Ray Serve does where a model makes room.
    if hasattr(held, "__del__"):
        held.__del__()
    message = wire.encode_request({"input": torch.rand(1, 3, 8, 8)})
    headers = [(wire.HEADER_LENGTH.lower().encode(), b"%d" % message.header_bytes)]
    asked = on_ray.Asked("POST", "/v2/models/tiny/infer", b"", headers, b"".join(map(bytes, message.buffers)), None)
    assert asyncio.run(on_ray.call(held.app, asked)).status == 200
    del held
    _until(lambda: gc.collect() >= 0 and not any(one.is_alive() for one in own))


def test_no_answer_is_lost_when_a_replica_is_killed_under_load(url: str) -> None:
    import ray

    before = replicas()
    assert len(before) == 2
    end = threading.Event()
    answers: list[int] = [0] * 4
    failures: list[BaseException] = []

    splits = [split_of(url, partition=1, timeout_s=60) for _ in answers]

    def ask(number: int) -> None:
        try:
            with splits[number] as split, torch.no_grad():
                x = torch.rand(1, 3, 8, 8)
                right = split.model(x)
                while not end.is_set():
                    assert torch.equal(split(x), right)
                    answers[number] += 1
        except BaseException as error:
            failures.append(error)

    devices = [threading.Thread(target=ask, args=(number,)) for number in range(len(answers))]
    for device in devices:
        device.start()
    try:
        _until(lambda: min(answers) >= 5 or bool(failures))
        ray.kill(ray.get_actor(min(before), namespace="serve"))
        at_death = list(answers)
        # The other replica goes on alone, and a new one takes the lost one's place.
        _until(lambda: bool(failures) or min(now - then for now, then in zip(answers, at_death, strict=True)) >= 20)
        _until(lambda: bool(failures) or len(replicas() - before) == 1)
    finally:
        end.set()
        for device in devices:
            device.join()
    assert failures == []
    assert len(replicas() & before) == 1


def _until(what: Any, patience_s: float = 120.0) -> None:
    end_s = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < end_s
        time.sleep(0.05)
