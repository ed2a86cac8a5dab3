"""A model of a bundle, split against a server, without PyTorch on the device's side."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import WITHOUT_TORCH, flat_profile
from classifier import EXAMPLE, GRAPH, LAYERS, MODEL, PATIENCE_S, net, profile, serve, truth
from paths import environment
from serving import serving
from tcp import reserved_port

import torchsurgeon as ts
from torchsurgeon import edge
from torchsurgeon.edge.bundle import digest_of
from torchsurgeon.edge.codec import NAMES, find_codec
from torchsurgeon.edge.model import EdgeModel
from torchsurgeon.export import export_bundle
from torchsurgeon.planning import Frontier
from torchsurgeon.serve import Server

X = EXAMPLE.numpy()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No answer is late before two seconds more than was predicted, on a machine that does other things as well."""
    monkeypatch.setattr("torchsurgeon.adapting.deadline._LEAST_PATIENCE_S", 2.0)


def near(found: Any, x: np.ndarray[Any, Any] = X, model: torch.nn.Module = MODEL) -> bool:
    expected = truth(torch.from_numpy(np.ascontiguousarray(x)), model).numpy()
    return isinstance(found, np.ndarray) and found.dtype == expected.dtype and np.allclose(found, expected, atol=1e-4)


def last(model: EdgeModel) -> edge.EdgeInference:
    assert model.last is not None
    return model.last


def degraded(model: EdgeModel) -> str:
    return last(model).degraded or ""


# --- answers ---


@pytest.mark.parametrize(
    ("partition", "where"), [("server", "input"), ("stem", "stem"), (3, "act"), ("device", "device"), ("auto", None)]
)
def test_the_answer_is_the_models_at_every_cut(
    partition: int | str, where: str | None, bundle: Path, server: Server
) -> None:
    with edge.open(bundle, server.url, partition=partition) as model:
        assert near(model(X))
        assert near(model(x=X))
    account = last(model)
    parts = ("decide", "head", "encode", "uplink", "queue", "tail", "downlink", "decode", "wait", "local")
    assert account.total_s == pytest.approx(sum(getattr(account, f"{part}_s") for part in parts), abs=1e-3)
    assert account.degraded is None
    assert where in (None, account.partition)
    crossed = account.partition != "device"
    assert (account.server, account.sent_bytes > 0, account.codec) == (
        (server.url, True, "raw") if crossed else (None, False, None)
    )
    place = {"input": "all on the server", "device": "all on the device"}
    assert account.where == place.get(account.partition, f"cut after {account.partition}")
    assert f"({account.where}; " in str(account)


def test_without_a_server_everything_runs_on_the_device(bundle: Path) -> None:
    with edge.open(bundle) as model:
        assert near(model(X))
    assert (last(model).partition, last(model).degraded) == ("device", None)


def test_a_batch_of_any_size_is_answered(bundle: Path, server: Server) -> None:
    x = np.concatenate([X, X[:, :, ::-1], X + 1])
    for partition in ("server", "act", "device"):
        with edge.open(bundle, server.url, partition=partition) as model:
            assert near(model(x), x)


@pytest.mark.parametrize("codec", NAMES)
def test_every_codec_of_the_device_is_one_of_the_server(codec: str, bundle: Path, server: Server) -> None:
    with edge.open(bundle, server.url, partition="act", codec=codec) as model:
        found = model(X)
    assert (degraded(model), last(model).codec, last(model).server) == ("", codec, server.url)
    expected = truth(EXAMPLE).numpy()
    coarse = 0.2 if "int4" in codec else 0.02 if "int8" in codec or "float16" in codec else 1e-4
    assert np.allclose(found, expected, atol=coarse * np.abs(expected).max())


class Pixels(torch.nn.Module):
    """Takes a picture as a camera gives it, and tells how bright each channel is."""

    def __init__(self) -> None:
        super().__init__()
        self.last = torch.nn.Linear(3, 3, bias=False)

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.last((picture.float() / 255).mean((2, 3)))
        return found


@pytest.mark.parametrize("codec", ["png", "jpeg-95", "webp-90@0.5"])
def test_a_picture_is_sent_as_one_and_the_server_decodes_it(
    codec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, y, x = Pixels().eval(), torch.arange(32)[:, None] * 4, torch.arange(40) * 3
    picture = torch.stack([y + x, y + 2 * x // 3, 255 - x - y]).to(torch.uint8)[None]
    graph = ts.trace(model, picture)
    costs = {"device": flat_profile(graph, 2e-3), "server": flat_profile(graph, 1e-5)}
    export_bundle(graph, tmp_path / "pixels", points=["server"], whole=False, inputs=[picture], **costs)
    ways: dict[str, Any] = {"partition": "server", "fallback": "error", "codec": codec}
    with serving(model, picture) as server, edge.open(tmp_path / "pixels", server.url, **ways) as device:
        answer = device(picture.numpy())
        assert last(device).codec == codec
        assert last(device).sent_bytes < picture.nbytes
        with torch.no_grad():
            assert np.allclose(answer, model(picture).numpy(), atol=1e-6 if codec == "png" else 0.01)
        monkeypatch.setattr("torchsurgeon.codec.pictures.available", lambda kind: False)
        find_codec.cache_clear()
        with pytest.raises(ts.CodecError, match=f"the codec {codec} needs Pillow: pip install pillow"):
            edge.open(tmp_path / "pixels", server.url, **ways)
    find_codec.cache_clear()


class Two(torch.nn.Module):
    """Two inputs, two outputs by name, and a boundary of two tensors, one of which is an input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        z = self.a(x).relu() + y
        return {"wide": z, "narrow": self.b(z)}


def test_several_inputs_and_outputs_have_their_names(tmp_path: Path) -> None:
    two, x, y = Two().eval(), torch.rand(2, 4), torch.rand(2, 4)
    graph = ts.trace(two, x, y)
    costs = flat_profile(graph, 1e-4)
    export_bundle(graph, tmp_path / "two", points=["a"], device=costs, server=costs, inputs=[x, y])
    with torch.no_grad():
        expected = two(x, y)
    with serving(two, (x, y)) as server, edge.open(tmp_path / "two", server.url, partition="a") as model:
        found = [model(x.numpy(), y=y.numpy())]
        assert last(model).server == server.url
    with edge.open(tmp_path / "two") as model:
        found.append(model(x.numpy(), y.numpy()))
    for one in found:
        assert list(one) == ["wide", "narrow"]
        assert all(np.allclose(one[name], expected[name].numpy(), atol=1e-5) for name in expected)


def test_it_decides_as_a_frontier_does(bundle: Path) -> None:
    costs = edge.read(bundle).costs
    whole = Frontier.of(GRAPH, list(costs.rows))
    chosen = set()
    for bit_s in np.geomspace(1e4, 1e9, 30):
        link = ts.Link("one of many", float(bit_s), 1e9, 1e-3)
        for load in (0.5, 1.0, 40.0):
            row = costs.rows[int(costs.costs(link, load).argmin())]
            assert (row.index, row.codec) == (whole.best(link, load).index, whole.best(link, load).codec)
            chosen.add(row.name)
    assert len(chosen) > 1


def test_the_cut_follows_the_link(bundle: Path, server: Server) -> None:
    for link, partition in ((ts.Link("fast", 1e9, 1e9, 1e-4), "input"), (ts.Link("slow", 1e4, 1e4, 1.0), "device")):
        with edge.open(bundle, server.url, link=link) as model:
            assert near(model(X))
        assert last(model).partition == partition
        assert last(model).decision is not None
        assert len(model.decisions) == 1


def test_a_batch_is_sent_where_its_joules_on_the_device_are_more_than_the_radios_tail(
    tmp_path: Path, server: Server
) -> None:
    costs = {"device": profile(1e-3, 0.5 / LAYERS), "server": profile(1e-3)}
    export_bundle(GRAPH, tmp_path / "metered", points=["server", "act"], inputs=[EXAMPLE], **costs)
    link = ts.Link("radio", 1e7, 1e7, 1e-3, radio=ts.Radio(1e-8, 1e-8, 0.1, tail_s=2.0, tail_w=0.5))
    with edge.open(tmp_path / "metered", server.url, link=link, objective="energy") as model:
        for count in (1, 8, 1):
            x = np.concatenate([X] * count)
            assert near(model(x), x)
            assert (last(model).partition == "device") is (count == 1)


# --- servers that fail ---


def until(what: Callable[[], bool], model: EdgeModel) -> None:
    end_s = time.monotonic() + PATIENCE_S
    while not what():
        assert time.monotonic() < end_s, model.last
        assert near(model(X))
        time.sleep(0.05)


def test_the_device_answers_while_the_server_does_not_and_the_server_again_when_it_is_back(bundle: Path) -> None:
    with serve() as server:
        port = server.port
        model = edge.open(bundle, server.url, partition="act")
        assert near(model(X))
        assert last(model).server == server.url
    with model:
        assert near(model(X))
        assert degraded(model).startswith("unavailable: ")
        assert last(model).local_s > 0
        until(lambda: degraded(model).startswith("unserved: "), model)
        assert last(model).partition == "device"
        with serve(port=port):
            until(lambda: last(model).server is not None, model)
        assert model.server_failure is None


def test_an_answer_that_is_late_is_not_waited_for(
    bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge.open(bundle, server.url, partition="act", link=ts.Link("fast", 1e9, 1e9, 1e-4)) as model:
        assert near(model(X))
        infer = edge.ArrayTransport.infer

        def slowly(self: edge.ArrayTransport, *args: Any, **kwargs: Any) -> Any:
            time.sleep(0.5)
            return infer(self, *args, **kwargs)

        monkeypatch.setattr("torchsurgeon.adapting.deadline._LEAST_PATIENCE_S", 0.05)
        monkeypatch.setattr(edge.ArrayTransport, "infer", slowly)
        assert near(model(X))
        assert degraded(model).startswith("late: ")
        assert last(model).total_s < 0.45


def test_without_a_fallback_a_failure_is_raised(heads_only: Path) -> None:
    with serve() as server:
        model = edge.open(heads_only, server.url, fallback="error")
        assert near(model(X))
        assert last(model).partition == "act"
    with model, pytest.raises(ts.ServerUnavailableError, match="does not answer"):
        model(X)
    assert model.server_failure is not None


def test_a_bundle_without_the_whole_model_says_that_the_device_cannot_answer_alone(
    heads_only: Path, server: Server
) -> None:
    for options in ({}, {"server": server.url}, {"server": server.url, "partition": "device", "fallback": "error"}):
        with pytest.raises(ts.BundleError, match="holds no whole model"):
            edge.open(heads_only, **options)  # type: ignore[arg-type]


def test_a_server_that_was_never_there_is_warned_of_once(bundle: Path) -> None:
    with reserved_port() as port, edge.open(bundle, f"http://127.0.0.1:{port}", partition="act") as model:
        with pytest.warns(ts.NoServerWarning, match="no server is in use, so the device answers alone") as caught:
            answers = [model(X) for _ in range(2)]
        assert all(map(near, answers))
        assert len(caught) == 1
        assert degraded(model).startswith("unserved: no server is in use: unavailable: ")


def test_other_weights_on_the_server_are_never_used(bundle: Path) -> None:
    with serve(net(1)) as server:
        with edge.open(bundle, server.url, partition="act") as model:
            with pytest.warns(ts.MismatchWarning, match=r"other weights on the server: stem.weight") as caught:
                assert near(model(X))
            assert caught[0].filename == __file__
            assert degraded(model).startswith("unserved: no server is in use: mismatch: ")
        with (
            edge.open(bundle, server.url, partition="act", fallback="error") as model,
            pytest.raises(ts.ModelMismatchError, match=r"other weights on the server: stem.weight"),
        ):
            model(X)


def test_a_server_that_was_started_anew_with_other_weights_is_noticed_at_its_first_answer(bundle: Path) -> None:
    with serve() as server:
        port = server.port
        model = edge.open(bundle, server.url, partition="act")
        assert near(model(X))
    with model, serve(net(1), port=port):
        with pytest.warns(ts.MismatchWarning):
            assert near(model(X))
        assert degraded(model).startswith("mismatch: ")


def test_a_server_without_the_model_is_a_mismatch(bundle: Path, server: Server) -> None:
    with (
        edge.open(bundle, server.url, name="other", fallback="error") as model,
        pytest.raises(ts.ModelMismatchError, match="torchsurgeon serve other=SPEC"),
    ):
        model(X)


# --- deadlines ---


@pytest.mark.parametrize("deadline_s", [1e-9, 0.0, -1.0, math.nan, math.inf])
def test_a_deadline_that_nothing_can_keep_is_refused(deadline_s: float, bundle: Path, server: Server) -> None:
    with edge.open(bundle, server.url) as model:
        assert near(model(X))
        likely = 0 < deadline_s < math.inf
        match = "best possible is .* s, (all on the (device|server)|cut after .*);" if likely else "must be a positive"
        with pytest.raises(ts.DeadlineError, match=match):
            model(X, deadline_s=deadline_s)


@pytest.mark.parametrize("again", [False, True])
def test_without_a_fallback_no_call_waits_for_a_server_beyond_its_deadline(
    again: bool, bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge.open(bundle, server.url, partition="act", fallback="error") as model:
        if again:
            assert near(model(X))
            assert model._server is not None
            model._server.ready = False
        waits: list[float] = []

        def silent(*args: Any) -> Any:
            waits.append(args[-1])
            raise ts.ServerUnavailableError("no answer")

        monkeypatch.setattr("torchsurgeon.edge.server.fetch", silent)
        with pytest.raises(ts.ServerUnavailableError):
            model(X, deadline_s=2.0)
        with pytest.raises(ts.ServerUnavailableError):
            model(X)
    assert 0 < waits[0] <= 2.0
    assert waits[1] > 2.0


def test_a_deadline_that_can_be_kept_is(bundle: Path, server: Server) -> None:
    with edge.open(bundle, server.url) as model:
        assert near(model(X, deadline_s=PATIENCE_S))
        assert last(model).degraded is None


def test_the_device_begins_in_time_for_a_deadline_that_the_server_will_miss(
    bundle: Path, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    with edge.open(bundle, server.url, partition="act", link=ts.Link("fast", 1e9, 1e9, 1e-4)) as model:
        assert near(model(X))
        infer, released = edge.ArrayTransport.infer, threading.Event()

        def late(self: edge.ArrayTransport, *args: Any, **kwargs: Any) -> Any:
            assert released.wait(60)
            return infer(self, *args, **kwargs)

        monkeypatch.setattr(edge.ArrayTransport, "infer", late)
        try:
            # The server does not answer before the device has.
            assert near(model(X, deadline_s=0.5))
        finally:
            released.set()
        planned_ms = re.search(r"deadline: .* had not come ([0-9.]+) ms after the head", degraded(model))
        assert planned_ms is None or float(planned_ms[1]) < 500
        assert "deadline" in degraded(model)


# --- what it is called with ---


@pytest.mark.parametrize(
    ("args", "kwargs", "said"),
    [
        ((), {}, r"the model takes x float32\[N×3×32×32\]; got nothing"),
        ((X, X), {}, r"the model takes x .*; got 2 arrays"),
        ((X,), {"x": X}, r"the model takes x .*; got 1 array, x"),
        ((), {"y": X}, r"the model takes x .*; got y"),
        ((X.astype(np.float64),), {}, r"input 'x' must be a NumPy array of dtype float32; got dtype float64"),
        ((EXAMPLE,), {}, r"input 'x' must be a NumPy array of dtype float32; got Tensor"),
        ((X[:, :2],), {}, r"an array of shape \[1, 2, 32, 32\] as 'x'"),
        ((X[0],), {}, r"an array of shape \[3, 32, 32\] as 'x'"),
        ((X[:0],), {}, r"an array of shape \[0, 3, 32, 32\] as 'x'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(
    args: tuple[Any, ...], kwargs: dict[str, Any], said: str, bundle: Path
) -> None:
    with edge.open(bundle) as model, pytest.raises(TypeError, match=said):
        model(*args, **kwargs)


def test_points_codecs_and_words_that_do_not_exist_are_refused(bundle: Path, server: Server) -> None:
    with pytest.raises(ts.PartitionError, match=r"0 \(input\), 1 \(stem\), 3 \(act\); got 'head'"):
        edge.open(bundle, server.url, partition="head")
    with pytest.raises(ts.CodecError, match=r"for pictures png, jpeg,.*got 'jpeg-900'; fitted codecs are those"):
        edge.open(bundle, server.url, codec="jpeg-900")
    with pytest.raises(ts.CodecError, match="holds the fitted codecs none; got 'fitted:mine-01234567'; export it"):
        edge.open(bundle, server.url, codec="fitted:mine-01234567@1")
    with pytest.raises(ts.BundleError, match="fallback must be 'local' or 'error'; got 'none'"):
        edge.open(bundle, server.url, fallback="none")  # type: ignore[arg-type]
    with pytest.raises(ts.LinkError):
        edge.open(bundle, server.url, link="no such link")


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"timeout_s": math.nan}, ts.AdaptError, "timeout_s must be a positive number of seconds; got nan"),
        ({"timeout_s": "5"}, ts.AdaptError, "timeout_s must be a positive number of seconds; got '5'"),
        ({"timeout_s": 0}, ts.AdaptError, "timeout_s must be a positive number of seconds; got 0"),
        ({"threads": 0}, ts.BackendError, "threads must be a whole number from 1 on; got 0"),
        ({"threads": 2.5}, ts.BackendError, r"threads must be a whole number from 1 on; got 2\.5"),
        ({"codec": 3}, ts.CodecError, "codec must be the name of a codec; got 3"),
        ({"link": 3}, ts.LinkError, 'link must be a Link, or a text such as "lte"; got 3'),
    ],
)
def test_options_that_are_no_such_values_are_refused_at_once(
    options: dict[str, Any], error: type[Exception], said: str, bundle: Path
) -> None:
    with pytest.raises(error, match=said):
        edge.open(bundle, "http://127.0.0.1:9", **options)


# --- without PyTorch ---

_ALONE = (
    WITHOUT_TORCH
    + """
import numpy as np
from torchsurgeon import edge

x = np.load(sys.argv[2])
with edge.open(sys.argv[1], sys.argv[3], partition="act", codec="int8+zstd") as model:
    found = model(x)
    assert model.last.server == sys.argv[3], model.last
with edge.open(sys.argv[1]) as model:
    alone = model(x)
np.save(sys.argv[4], np.concatenate([found, alone]))
"""
)


def test_no_pytorch_is_imported(bundle: Path, server: Server, tmp_path: Path) -> None:
    given, found = tmp_path / "x.npy", tmp_path / "found.npy"
    np.save(given, X)
    command = [sys.executable, "-c", _ALONE, str(bundle), str(given), server.url, str(found)]
    ended = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    split, alone = np.load(found)
    expected = truth(EXAMPLE).numpy()[0]
    assert np.allclose(split, expected, atol=0.05)
    assert np.allclose(alone, expected, atol=1e-4)


def test_a_part_of_a_newer_opset_than_onnx_runtime_has_says_what_to_install(bundle: Path, tmp_path: Path) -> None:
    import onnx

    folder = Path(shutil.copytree(bundle, tmp_path / "copy"))
    whole = onnx.load(str(folder / "whole.onnx"), load_external_data=False)
    whole.opset_import[0].version = 99
    onnx.save(whole, str(folder / "whole.onnx"))
    manifest = json.loads((folder / "manifest.json").read_text())
    size, digest = (folder / "whole.onnx").stat().st_size, digest_of(folder / "whole.onnx")
    manifest["files"]["whole.onnx"] = {"size_bytes": size, "sha256": digest}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ts.BackendError, match=r"(?s)whole\.onnx.*is older than the file: install a newer one"):
        edge.open(folder)


@pytest.mark.parametrize(
    ("version", "said"), [("1.17.3", "needs onnxruntime 1.18 or newer"), (None, "does not import")]
)
def test_a_missing_or_old_onnx_runtime_says_what_to_install(
    version: str | None, said: str, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime

    if version is None:
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
    else:
        monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(ts.BackendError, match=said):
        edge.open(bundle)
