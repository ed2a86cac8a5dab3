"""Fitted codecs between a device and a server: who has which, and what is sent when one side lacks it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.codec import Budget, CodecTable, FittedCodec, fit_codec, measure
from torchsurgeon.codec import codec as codecs
from torchsurgeon.errors import CodecError, MissingCodecWarning
from torchsurgeon.serve import ModelRegistry, Server, create_app
from torchsurgeon.serve.received import Received

CUT = "2"


def pictures(count: int, seed: int) -> list[Tensor]:
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(28, 28), mode="bicubic").split(1))


X = pictures(1, 0)[0]


def classifier() -> nn.Module:
    torch.manual_seed(0)
    head = nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
    return nn.Sequential(*head, nn.Conv2d(12, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2304, 10)).eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return classifier()


@pytest.fixture(scope="module")
def fitted(model: nn.Module) -> FittedCodec:
    return fit_codec(ts.trace(model, X), CUT, pictures(40, 1), name="pair")


@pytest.fixture
def path(fitted: FittedCodec, tmp_path: Path) -> Path:
    fitted.save(tmp_path / "pair.fitted")
    return tmp_path / "pair.fitted"


@contextmanager
def serving(model: nn.Module, path: Path | None) -> Iterator[Server]:
    registry = ModelRegistry()
    served = registry.add("net", model, X)
    if path is not None:
        served.add_codec(path)
    with Server(create_app(registry)) as server:
        yield server
    registry.close()


def test_the_rate_is_chosen_for_each_call(model: nn.Module, fitted: FittedCodec, path: Path) -> None:
    with (
        serving(model, path) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@1", fallback="error"
        ) as split,
    ):
        own, sizes, errors = model(X), [], []
        for rate in (0.5, 1.5, 4):
            split.codec = fitted.at(rate)
            errors.append(float((split(X) - own).detach().abs().max()))
            sizes.append(split.last.sent_bytes)
            assert split.last.bits == "changed by a lossy codec"
        assert sizes == sorted(sizes)
        assert errors == sorted(errors, reverse=True)


def test_stats_tell_values_out_of_range(model: nn.Module, fitted: FittedCodec, path: Path) -> None:
    with (
        serving(model, path) as server,
        ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@2") as split,
    ):
        split(X)
        before = split.stats()["fitted_codecs"][fitted.name]
        split(X * 100)
        after = split.stats()["fitted_codecs"][fitted.name]
        assert after["values"] > before["values"]
        assert after["out_of_range"] - before["out_of_range"] > 100


def test_a_codec_is_given_as_itself_or_by_its_name(model: nn.Module, fitted: FittedCodec) -> None:
    rated = fitted.at(2)
    with ts.SplitModule(model, X, partition="device", codec=rated, answer_codec=ts.codec.find_codec("zstd")) as split:
        assert split.codec is rated
        split.codec = "auto"
        chosen = split.codec
        split.codec = chosen
        assert split.codec.name == "auto"
        with pytest.raises(CodecError, match=rf"{fitted.name} must be given at a rate .* take \.at\(rate\)"):
            split.codec = fitted  # type: ignore[assignment]
    for codec in (fitted, fitted.name):
        with pytest.raises(CodecError, match="rate"):
            ts.SplitModule(model, X, partition="device", codec=codec)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="named by a text"):
        ts.SplitModule(model, X, partition="device", codec=8)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match=r"at\(2\)"):
        ts.SplitModule(model, X, partition="device", answer_codec=fitted)  # type: ignore[arg-type]
    with pytest.raises(CodecError, match="exact=True"):
        ts.SplitModule(model, X, partition="device", codec=rated, exact=True)


def test_a_server_without_the_file_gets_another_codec_said_once(model: nn.Module, fitted: FittedCodec) -> None:
    with (
        serving(model, None) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@1", fallback="error"
        ) as split,
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for rate in (1, 2, 2):
            split.codec = fitted.at(rate)
            assert torch.equal(split(X), model(X))
        (warning,) = said
        assert warning.category is MissingCodecWarning
        assert "so zstd is used in its place; start the server with --codec net=FILE" in str(warning.message)


def test_a_file_of_another_sample_counts_as_missing(model: nn.Module, fitted: FittedCodec, tmp_path: Path) -> None:
    other = fit_codec(ts.trace(model, X), CUT, pictures(40, 2), name="pair")
    assert other.name != fitted.name
    other.save(tmp_path / "other.fitted")
    with (
        serving(model, tmp_path / "other.fitted") as server,
        ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@1") as split,
        pytest.warns(MissingCodecWarning),
    ):
        assert torch.equal(split(X), model(X))


def test_a_table_says_what_is_next_best(model: nn.Module, fitted: FittedCodec) -> None:
    graph = ts.trace(model, X)
    names = ["int8+zstd", f"{fitted.name}@2"]
    table = measure(graph, pictures(3, 3), names, points=[CUT], budget=Budget(min_cosine=0.9, decide_by="estimate"))
    with (
        serving(model, None) as server,
        ts.SplitModule(
            model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@2", codecs=table
        ) as split,
        pytest.warns(MissingCodecWarning, match=r"int8\+zstd is used"),
    ):
        split(X)


def test_a_plan_has_only_codecs_that_the_server_has(model: nn.Module, fitted: FittedCodec, path: Path) -> None:
    names = ["int8+zstd", *(fitted.at(rate).name for rate in (1, 2))]
    budget = Budget(min_cosine=-1, decide_by="estimate")
    table = measure(ts.trace(model, X), pictures(3, 3), names, points=[CUT], budget=budget)
    for given, expected in ((path, {"raw", *names}), (None, {"raw", "int8+zstd"})):
        with (
            serving(model, given) as server,
            ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codecs=table) as split,
        ):
            split.prepare()
            (peer,) = split._engine.servers.peers
            left = peer.decodable(table)
            assert left is not None
            assert {row.cost.codec for row in left.rows} == expected


def test_a_server_started_again_without_the_file(model: nn.Module, fitted: FittedCodec, path: Path) -> None:
    with serving(model, path) as server:
        port = int(server.url.rpartition(":")[2])
        split = ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@1")
        split(X)
        assert split.last.degraded is None
    # In this process the codec would still be known by its name, as it would not be in another.
    known = codecs._fitted.pop(fitted.name)
    try:
        registry = ModelRegistry()
        registry.add("net", model, X)
        with Server(create_app(registry), port=port), warnings.catch_warnings():
            warnings.simplefilter("ignore", MissingCodecWarning)
            # Of another size, since a server remembers the headers of requests with what they name.
            other = pictures(1, 7)[0] * 3
            own = model(other)
            for _ in range(400):
                answer = split(other)
                if split.last.degraded is None:
                    break
                torch.testing.assert_close(answer, own)
            assert split.last.degraded is None
            assert torch.equal(answer, own)
        split.close()
        registry.close()
    finally:
        codecs._fitted[fitted.name] = known


def test_the_server_lists_it_with_its_digest(model: nn.Module, fitted: FittedCodec, path: Path) -> None:
    registry = ModelRegistry()
    served = registry.add("net", model, X)
    assert "fitted_codecs" not in served.fingerprint()
    assert served.add_codec(path).name == fitted.name
    assert served.metadata()["parameters"]["codecs"][-1] == fitted.name
    assert served.fingerprint()["fitted_codecs"] == {fitted.name: fitted.digest}
    registry.close()


def test_a_server_refuses_a_file_of_another_model(path: Path) -> None:
    registry = ModelRegistry()
    other = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten()).eval()
    served = registry.add("net", other, X)
    with pytest.raises(ts.CodecError, match="fit a codec to this model"):
        served.add_codec(path)
    registry.close()


def test_a_table_that_names_a_codec_that_is_not_loaded(model: nn.Module, fitted: FittedCodec) -> None:
    table = measure(
        ts.trace(model, X), [X], [f"{fitted.name}@2"], points=[CUT], budget=Budget(min_cosine=-1, decide_by="estimate")
    ).to_json()
    for row in table["rows"]:
        row["cost"]["codec"] = row["cost"]["codec"].replace("pair", "absent")
    with pytest.raises(ts.CodecError, match="Load its file with load_codec"):
        ts.SplitModule(model, X, partition="device", codecs=CodecTable.from_json(table))


def request(model: nn.Module, fitted: FittedCodec, *, encoded: bool = True, output: bool = False) -> Received:
    """Return a request that names a fitted codec."""
    (tensor,) = ts.cut(ts.trace(model, X), CUT).head(X)
    (spec,) = ts.trace(model, X).point(CUT).tensors
    codec = fitted.at(2)
    message = wire.encode_request(
        {spec.name: tensor}, codecs={spec.name: codec} if encoded else None, output_codec=codec if output else None
    )
    assert message.header_bytes is not None
    return Received(memoryview(bytearray(b"".join(message.buffers))), message.header_bytes, 0.0, time.perf_counter())


@pytest.mark.parametrize("output", [False, True])
def test_a_model_without_the_file_refuses_the_codec_of_another(
    model: nn.Module, fitted: FittedCodec, path: Path, output: bool
) -> None:
    registry = ModelRegistry()
    registry.add("other", model, X).add_codec(path)
    asked = request(model, fitted, encoded=not output, output=output)
    registry.get("other").answer(asked)
    with pytest.raises(ts.ProtocolError, match=f"model 'net' does not have the fitted codec {fitted.name}"):
        registry.add("net", model, X).answer(asked)
    registry.close()


def other_weights() -> dict[str, Tensor]:
    return {name: value * 1.5 for name, value in classifier().state_dict().items()}


def test_a_codec_fitted_to_the_weights_before_a_change_counts_as_missing(fitted: FittedCodec, path: Path) -> None:
    model = classifier()
    with (
        serving(model, path) as server,
        ts.SplitModule(model, X, server=server.url, name="net", partition=CUT, codec=f"{fitted.name}@1") as split,
    ):
        split(X)
        lossy_bytes = split.last.sent_bytes
        model.load_state_dict(other_weights())
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(400):
                answer = split(X)
                torch.testing.assert_close(answer, model(X))
                if split.last.degraded is None:
                    break
        assert split.last.degraded is None
        assert split.last.sent_bytes > lossy_bytes
        (warning,) = said
        assert warning.category is MissingCodecWarning
        assert "other weights than the model has now, so zstd is used" in str(warning.message)
        model.load_state_dict(classifier().state_dict())
        split.prepare()
        split(X)
        assert split.last.sent_bytes == lossy_bytes


def test_the_server_drops_a_codec_fitted_to_the_weights_before_a_change(fitted: FittedCodec, path: Path) -> None:
    model = classifier()
    registry = ModelRegistry()
    served = registry.add("net", model, X)
    served.add_codec(path)
    asked = request(model, fitted)
    served.answer(asked)
    assert fitted.name in served.fingerprint()["fitted_codecs"]
    model.load_state_dict(other_weights())
    assert served.fingerprint()["fitted_codecs"] == {}
    assert fitted.name not in served.metadata()["parameters"]["codecs"]
    with pytest.raises(ts.ProtocolError, match="was fitted to other weights than model 'net' has now"):
        served.answer(asked)
    model.load_state_dict(classifier().state_dict())
    assert fitted.name in served.fingerprint()["fitted_codecs"]
    served.answer(asked)
    registry.close()
