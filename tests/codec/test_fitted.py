"""Codecs fitted to a cut: what they save and keep, their files, and what they refuse."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torchsurgeon as ts
from torchsurgeon.codec import FittedCodec, find_codec, fit_codec, measure
from torchsurgeon.codec.fitted import file
from torchsurgeon.codec.fitted.transform import SLICE, TensorGrid, Transform, block_side
from torchsurgeon.errors import CodecError

torch.set_num_threads(1)

CUT = "2"


def pictures(count: int, seed: int, side: int = 28) -> list[Tensor]:
    """Smooth pictures, as photographs are."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return list(nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").split(1))


X = pictures(1, 0)[0]


def classifier(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Conv2d(12, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    ).eval()


class Tokens(nn.Module):
    """A head that gives tokens (N, T, C), some channels a hundred times larger than others, and a mask."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Linear(6, 20)
        self.mix = nn.TransformerEncoderLayer(20, 2, 32, batch_first=True)
        self.out = nn.Linear(20, 8)
        self.register_buffer("size", torch.logspace(-1, 1, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(self.embed(x) * self.size))


class Pyramid(nn.Module):
    """Two boundary tensors of different sizes, and outputs that are no classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.fine = nn.Conv2d(3, 8, 3, padding=1, stride=2)
        self.coarse = nn.Conv2d(8, 8, 3, padding=1, stride=2)
        self.box = nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.fine(x).relu()
        coarse = self.coarse(fine).relu()
        return self.box(fine), self.box(coarse)


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    """Most programs that run models run them so, and fitting needs gradients all the same."""
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def graph() -> ts.LayerGraph:
    return ts.trace(classifier(), pictures(1, 0)[0])


@pytest.fixture(scope="module")
def fitted(graph: ts.LayerGraph) -> FittedCodec:
    return fit_codec(graph, CUT, pictures(48, 1), name="small")


def boundary(graph: ts.LayerGraph, x: Tensor, point: str = CUT) -> Tensor:
    (tensor,) = ts.cut(graph, point).head(x)
    return tensor


def there_and_back(name: str, tensor: Tensor) -> tuple[Tensor, int]:
    encoded = find_codec(name).encode(tensor)
    used = find_codec(encoded.codec)
    data = bytes(encoded.data)
    return used.decode(data, tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes), len(data)


# --- what is saved and kept ---


def test_finer_rates_take_more_bytes_and_change_the_answer_less(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    part = ts.cut(graph, CUT)
    sizes, errors = [], []
    for rate in (0.5, 1.0, 2.0, 4.0):
        size, error = 0, 0.0
        for x in pictures(12, 2):
            decoded, taken = there_and_back(f"{fitted.name}@{rate}", boundary(graph, x))
            size += taken
            error += float((part.tail(decoded) - graph.model(x)).square().sum())
        sizes.append(size)
        errors.append(error)
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_a_rate_is_about_the_bits_that_a_value_takes(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    for rate in (1.0, 2.5):
        taken = [there_and_back(f"{fitted.name}@{rate}", boundary(graph, x))[1] for x in pictures(12, 3)]
        values = boundary(graph, pictures(1, 3)[0]).numel()
        assert sum(taken) / len(taken) * 8 / values == pytest.approx(rate, rel=0.25)


def test_it_changes_the_answer_less_than_int4_does_with_more_bytes(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    part = ts.cut(graph, CUT)
    ours, other = [0.0, 0], [0.0, 0]
    for x in pictures(12, 4):
        for name, sums in ((f"{fitted.name}@2", ours), ("int4+zstd", other)):
            decoded, taken = there_and_back(name, boundary(graph, x))
            sums[0] += float((part.tail(decoded) - graph.model(x)).square().sum())
            sums[1] += taken
    assert ours[1] < other[1]
    assert ours[0] < other[0]


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_shape_dtype_and_order_in_memory_are_kept(
    graph: ts.LayerGraph, fitted: FittedCodec, batch: int, memory: torch.memory_format
) -> None:
    tensor = boundary(graph, torch.cat(pictures(batch, 5))).contiguous(memory_format=memory)
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        given = tensor.to(dtype)
        decoded, _ = there_and_back(f"{fitted.name}@3", given)
        assert (decoded.dtype, decoded.shape, decoded.stride()) == (dtype, given.shape, given.stride())
        assert torch.allclose(decoded.float(), given.float(), atol=0.2)


def test_a_batch_decodes_to_what_its_inputs_decode_to(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    tensors = [boundary(graph, x) for x in pictures(3, 6)]
    together, _ = there_and_back(f"{fitted.name}@2", torch.cat(tensors))
    alone = torch.cat([there_and_back(f"{fitted.name}@2", one)[0] for one in tensors])
    assert torch.allclose(together, alone, atol=1e-4)


def test_images_of_other_sizes_are_encoded(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    for side in (30, 45):
        tensor = boundary(graph, pictures(1, 7, side)[0])
        encoded = find_codec(f"{fitted.name}@3").encode(tensor)
        assert encoded.codec == f"{fitted.name}@3"
        decoded, _ = there_and_back(f"{fitted.name}@3", tensor)
        assert torch.allclose(decoded, tensor, atol=0.3)


@pytest.mark.parametrize(("side", "batch"), [(8, 2000), (14, 1000), (500, 1)])
def test_decoding_allocates_little_beside_the_coefficients(fitted: FittedCodec, side: int, batch: int) -> None:
    """A client decides the shape, by which there are up to four times as many coefficients as values."""
    codec, shape = fitted.at(1), (batch, 12, side, side)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    data = bytes(codec.encode(x).data)
    grid = fitted.tensors[0].transform.grid
    coefficients_bytes = 4 * grid.groups * math.prod(grid.blocks(shape))
    large: list[int] = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
            found = func(*args, **(kwargs or {}))
            if isinstance(found, Tensor) and found.untyped_storage().data_ptr() not in given:
                size_bytes = found.untyped_storage().nbytes()
                large.extend([size_bytes] if size_bytes > 4 * SLICE else [])
            return found

    with Noting():
        decoded = codec.decode(data, x.dtype, shape, max_bytes=x.nbytes)
    assert decoded.shape == shape
    assert sum(large) <= coefficients_bytes + x.nbytes


def test_tokens_are_fitted_along_their_channels() -> None:
    def sentence(seed: int) -> Tensor:
        return torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(seed))

    graph = ts.trace(Tokens().eval(), sentence(0))
    fitted = fit_codec(graph, "mul", [sentence(k) for k in range(1, 40)], classes_at=2, answers="classes")
    (one,) = fitted.tensors
    assert one.transform.grid == TensorGrid(3, 2, 20, (1, 1))
    part = ts.cut(graph, "mul")
    x = sentence(99)
    (tensor,) = part.head(x)
    decoded, taken = there_and_back(f"{fitted.name}@3", tensor)
    assert taken < tensor.numel() / 2
    assert torch.cosine_similarity(part.tail(decoded).flatten(), graph.model(x).flatten(), dim=0) > 0.99


class Sink(nn.Module):
    """As large transformers do: one token is 100,000 times larger than the others, and nothing depends on it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.embed = nn.Linear(6, 20)
        self.out = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.embed(x)
        sink = torch.zeros_like(tokens)
        sink[:, :1, 3:4] = 1e5
        return self.out(nn.functional.layer_norm(tokens + sink, (20,)))[:, 1:]


def test_one_token_far_larger_than_the_others_costs_them_nothing() -> None:
    def sentence(seed: int) -> Tensor:
        return torch.randn(1, 9, 6, generator=torch.Generator().manual_seed(seed))

    graph = ts.trace(Sink().eval(), sentence(0))
    fitted = fit_codec(graph, "add", [sentence(k) for k in range(1, 60)], answers="classes", classes_at=2)
    (tensor,) = ts.cut(graph, "add").head(sentence(99))
    decoded, taken = there_and_back(f"{fitted.name}@{min(3.5, fitted.rates[0]):.3g}", tensor)
    assert taken < tensor.numel()
    assert float((decoded - tensor).abs()[:, 0].max()) < 100
    assert torch.cosine_similarity(decoded[:, 1:].flatten(), tensor[:, 1:].flatten(), dim=0) > 0.98


def test_several_tensors_and_outputs_that_are_no_classes() -> None:
    graph = ts.trace(Pyramid().eval(), pictures(1, 0)[0])
    place = next(point for point in graph.points if len(point.tensors) == 2 and point.index < len(graph.layers))
    fitted = fit_codec(graph, place, pictures(40, 1))
    assert {one.name for one in fitted.tensors} == {spec.name for spec in place.tensors}
    part = ts.cut(graph, place)
    x = pictures(1, 50)[0]
    codec = fitted.at(3)
    decoded = []
    for spec, tensor in zip(place.tensors, part.head(x), strict=True):
        encoded = codec.encode(tensor, spec.name)
        assert encoded.codec == codec.name
        decoded.append(codec.decode(encoded.data, tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes))
    for own, changed in zip(graph.model(x), part.tail(*decoded), strict=True):
        assert torch.cosine_similarity(own.flatten(), changed.flatten(), dim=0) > 0.99


def test_a_model_without_gradients_is_fitted_to_the_values_alone() -> None:
    class Rounded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).flatten(1).argmax(1)

    graph = ts.trace(Rounded().eval(), pictures(1, 0)[0])
    fitted = fit_codec(graph, "conv", pictures(20, 1))
    tensor = boundary(graph, pictures(1, 5)[0], "conv")
    decoded, taken = there_and_back(f"{fitted.name}@3", tensor)
    assert taken < tensor.numel()
    assert torch.cosine_similarity(decoded.flatten(), tensor.flatten(), dim=0) > 0.99


def test_measured_beside_other_codecs(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    names = ["int8+zstd", f"{fitted.name}@2"]
    table = measure(graph, pictures(3, 8), names, points=[CUT, "4"])
    at_cut = {row.cost.codec: row for row in table.at(graph.point(CUT).index)}
    assert at_cut[f"{fitted.name}@2"].cost.size_bytes < at_cut["int8+zstd"].cost.size_bytes
    assert not at_cut[f"{fitted.name}@2"].cost.lossless
    assert f"{fitted.name}@2" not in {row.cost.codec for row in table.at(graph.point("4").index)}


# --- what it was not fitted to ---


def test_what_it_was_not_fitted_to_is_sent_without_loss(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    codec = fitted.at(2)
    usual = boundary(graph, pictures(1, 9)[0])
    nan, infinite = usual.clone(), usual.clone()
    nan[0, 3, 2, 2], infinite[0, 0, 0, 0] = float("nan"), float("inf")
    for tensor, name in (
        (nan, None),
        (infinite, None),
        (usual * 1e30, None),
        (torch.randn(1, 5, 14, 14), None),
        (torch.randn(1, 12, 3, 3), None),
        (torch.randn(7), None),
        (torch.arange(2352).reshape(1, 12, 14, 14), None),
        (torch.empty(0, 12, 14, 14), None),
        (usual, "another layer"),
    ):
        encoded = codec.encode(tensor, name)
        other = find_codec(encoded.codec)
        assert other.lossless
        decoded = other.decode(encoded.data, tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes)
        assert torch.equal(decoded.nan_to_num(7.0), tensor.nan_to_num(7.0))


def test_values_out_of_range_are_coded_exactly_and_counted(graph: ts.LayerGraph) -> None:
    fitted = fit_codec(graph, CUT, pictures(48, 11), name="counted")
    usual = boundary(graph, pictures(1, 9)[0])
    before = fitted.stats()
    there_and_back(f"{fitted.name}@2", usual)
    between = fitted.stats()
    assert between["values"] - before["values"] >= usual.numel()
    few = between["out_of_range"] - before["out_of_range"]
    decoded, _ = there_and_back(f"{fitted.name}@2", usual * 50)
    assert fitted.stats()["out_of_range"] - between["out_of_range"] > 10 * (few + 1)
    # Nothing is clipped: relative to its size, what is 50 times larger is as exact as it is large.
    assert torch.cosine_similarity(decoded.flatten(), usual.flatten(), dim=0) > 0.999


def test_threads_share_a_codec(graph: ts.LayerGraph) -> None:
    fitted = fit_codec(graph, CUT, pictures(48, 15), name="shared")
    tensors = [boundary(graph, x) for x in pictures(8, 16)]
    alone = [bytes(fitted.at(2).encode(one).data) for one in tensors]
    before = fitted.stats()["values"]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda one: bytes(fitted.at(2).encode(one).data), tensors * 8))
    assert together == alone * 8
    assert fitted.stats()["values"] == before * 9


@pytest.mark.parametrize(
    "rate",
    [0, -1, 1e9, float("nan"), "", "two", "1e-999", None, True, " 2 ", "+2", "1_0", "\u0662", b"2", "inf", 10**400],
)
def test_a_rate_that_the_file_does_not_have(fitted: FittedCodec, rate: object) -> None:
    with pytest.raises(CodecError, match=r"the rate of fitted:small-.* must be from"):
        fitted.at(rate)  # type: ignore[arg-type]


def test_a_name_without_a_codec_says_how_to_load_it() -> None:
    with pytest.raises(CodecError, match="there is no fitted codec 'fitted:nobody-00000000' in this process"):
        find_codec("fitted:nobody-00000000@2")


def test_the_same_rate_has_one_name(fitted: FittedCodec) -> None:
    assert fitted.at(2) is fitted.at("2.00001") is find_codec(f"{fitted.name}@2.0")
    assert fitted.at(2).name == f"{fitted.name}@2"


def test_a_codec_takes_each_of_its_own_rates(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    for highest, lowest in ((4.00004, 0.100004), (3.99996, 0.0999996), (4.00006, 0.0000123456)):
        steps, tensors = (fitted.steps[0], fitted.steps[-1]), fitted.tensors[0]
        ends = dataclasses.replace(tensors, tables=(tensors.tables[0], tensors.tables[-1]))
        codec = FittedCodec("ends", "", graph.fingerprint, "", (3, CUT), [ends], steps, (highest, lowest)).use()
        for rate in (highest, lowest):
            rated = codec.at(rate)
            assert find_codec(rated.name) is rated
            assert rated.rate == pytest.approx(rate, rel=1e-3)
            assert steps[0] <= rated.step <= steps[1]
    assert [fitted.at(rate).step for rate in fitted.rates] == pytest.approx(list(fitted.steps), rel=1e-3)


@pytest.mark.parametrize(
    ("point", "options", "message"),
    [
        (CUT, {"answers": "boxes"}, 'answers must be "classes" or "values"'),
        (CUT, {"draws": 0}, "draws must be from 1 to 64"),
        (CUT, {"draws": 2.5}, r"draws must be from 1 to 64; got 2\.5"),
        (CUT, {"draws": True}, "draws must be from 1 to 64; got True"),
        (CUT, {"channels_at": {CUT: "1"}}, "channels_at of '2' must be from 1 to 3; got '1'"),
        (CUT, {"channels_at": {"conv": 1}}, "channels_at names tensors of the point, of which there are 2; got 'conv'"),
        (CUT, {"answers": "classes", "classes_at": 5}, "classes_at must be a dimension"),
        (CUT, {"channels_at": {CUT: 4}}, "channels_at of '2' must be from 1 to 3"),
        ("device", {}, "choose another point"),
    ],
)
def test_arguments_that_cannot_be(graph: ts.LayerGraph, point: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(CodecError, match=message):
        fit_codec(graph, point, pictures(2, 0), **options)  # type: ignore[arg-type]


def test_samples_that_cannot_be_fitted_to(graph: ts.LayerGraph) -> None:
    with pytest.raises(CodecError, match="sample is empty"):
        fit_codec(graph, CUT, [])
    with pytest.raises(CodecError, match="Give samples like the example"):
        fit_codec(graph, CUT, [torch.zeros(1, 3, 5, 5)])
    with pytest.raises(CodecError, match="the same for the whole sample"):
        fit_codec(graph, CUT, [torch.zeros(1, 3, 28, 28)] * 2)
    with pytest.raises(CodecError, match="NaN or infinity"):
        fit_codec(graph, CUT, [torch.full((1, 3, 28, 28), float("nan"))])


@pytest.mark.parametrize("sample", [torch.zeros(4, 1, 3, 28, 28), numpy.zeros((4, 3)), {"x": X}, "photos", iter([X])])
def test_a_sample_that_is_no_list_of_calls(graph: ts.LayerGraph, sample: object) -> None:
    for use in (lambda: fit_codec(graph, CUT, sample), lambda: measure(graph, sample, ["int8"])):  # type: ignore[arg-type]
        with pytest.raises(CodecError, match="samples must be a list of calls"):
            use()


def test_more_channels_than_can_be_fitted() -> None:
    wide = ts.trace(nn.Sequential(nn.Linear(4, 4100), nn.Linear(4100, 3)).eval(), torch.zeros(1, 4))
    with pytest.raises(CodecError, match="with at most 4096 channels"):
        fit_codec(wide, 1, [torch.randn(1, 4)] * 4)


class Answering(nn.Module):
    """Gives what a function makes of its linear layer."""

    def __init__(self, answer: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first, self.answer = nn.Linear(8, 6), answer

    def forward(self, x: Tensor) -> Tensor:
        return self.answer(self.first(x))


def test_one_number_is_an_answer_of_values() -> None:
    graph = ts.trace(Answering(lambda x: (x[:, :2] * 9).sum()).eval(), torch.zeros(2, 8))
    fitted = fit_codec(graph, 1, [torch.randn(2, 8) for _ in range(8)])
    # Only the first two channels count.
    weight = numpy.abs(fitted.tensors[0].transform.matrices[0]).sum(0)
    assert weight[:2].min() > 2 * weight[2:].max()
    with pytest.raises(CodecError, match="classes_at must be a dimension"):
        fit_codec(graph, 1, [torch.randn(2, 8)], answers="classes")


@pytest.mark.parametrize("answers", ["classes", "values"])
@pytest.mark.parametrize("worst", [float("nan"), float("inf")])
def test_answers_must_be_finite(answers: Literal["classes", "values"], worst: float) -> None:
    graph = ts.trace(Answering(lambda x: torch.where(x > 0, x, worst * x.abs())).eval(), torch.zeros(2, 8))
    with pytest.raises(CodecError, match="the model must give finite answers for the sample"):
        fit_codec(graph, 1, [torch.randn(2, 8) for _ in range(8)], answers=answers)


def test_single_classes_may_be_ruled_out() -> None:
    ruled_out = torch.tensor([0, 0, -torch.inf, 0, 0, 0])
    graph = ts.trace(Answering(lambda x: x + ruled_out).eval(), torch.zeros(2, 8))
    assert fit_codec(graph, 1, [torch.randn(2, 8) for _ in range(8)]).rates[0] > 3


def test_inference_mode_makes_no_difference(graph: ts.LayerGraph) -> None:
    usual = fit_codec(graph, CUT, pictures(24, 17), name="usual")
    with torch.inference_mode():
        again = fit_codec(graph, CUT, pictures(24, 17), name="usual")
        anew = fit_codec(ts.trace(classifier(), pictures(1, 0)[0]), CUT, pictures(24, 17), name="usual")
        assert torch.is_inference_mode_enabled()
        tensor = boundary(graph, X)
        assert again.at(2).encode(tensor).codec == f"{again.name}@2"
    # To rounding, which differs from run to run.
    assert again.steps == pytest.approx(usual.steps, rel=1e-3)
    assert anew.steps == pytest.approx(usual.steps, rel=1e-3)


def test_progress_counts_up_to_the_end(graph: ts.LayerGraph) -> None:
    seen: list[tuple[int, int]] = []
    fit_codec(graph, CUT, pictures(20, 12), progress=lambda done, total: seen.append((done, total)))
    done = [one for one, _ in seen]
    assert done == sorted(set(done))
    assert seen[-1][0] == seen[-1][1]


def test_the_model_is_left_as_it_was(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    assert all(parameter.grad is None for parameter in graph.model.parameters())
    assert all(parameter.requires_grad for parameter in graph.model.parameters())


# --- the file ---


def test_a_file_gives_the_same_codec(graph: ts.LayerGraph, fitted: FittedCodec, tmp_path: Path) -> None:
    fitted.save(tmp_path / "small.fitted")
    loaded = FittedCodec.load(tmp_path / "small.fitted")
    loaded.check(graph)
    assert (loaded.name, loaded.digest, loaded.rates) == (fitted.name, fitted.digest, fitted.rates)
    tensor = boundary(graph, pictures(1, 13)[0])
    data = fitted.at(2).encode(tensor).data
    assert bytes(loaded.at(2).encode(tensor).data) == bytes(data)
    ours, theirs = (
        one.at(2).decode(data, tensor.dtype, tensor.shape, None, max_bytes=tensor.nbytes) for one in (fitted, loaded)
    )
    assert torch.equal(ours, theirs)
    assert ts.load_codec(tmp_path / "small.fitted", graph) is fitted
    assert [path.name for path in tmp_path.iterdir()] == ["small.fitted"]


def test_a_damaged_file_is_refused(fitted: FittedCodec, tmp_path: Path) -> None:
    path = tmp_path / "small.fitted"
    fitted.save(path)
    whole = path.read_bytes()
    generator = numpy.random.default_rng(0)
    for at in (0, 8, 20, len(whole) // 2, len(whole) - 1, *generator.integers(0, len(whole), 20)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << int(generator.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(CodecError, match=r"small\.fitted: "):
            FittedCodec.load(path)
    for length in (0, 7, 40, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CodecError):
            FittedCodec.load(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(CodecError, match="damaged or was cut short"):
        FittedCodec.load(path)
    with pytest.raises(CodecError, match="cannot be read"):
        FittedCodec.load(tmp_path / "missing")


def resealed(data: bytes, change: object) -> bytes:
    """The same file with another header and a right digest, as an attacker would write it."""
    header, arrays, _ = file.unpack(data)
    header.pop("format")
    header.pop("arrays")
    change(header, arrays)  # type: ignore[operator]
    return file.pack(header, arrays)


LIES = {
    "no tensors": lambda h, a: h.update(tensors=[]),
    "tensors of text": lambda h, a: h.update(tensors="abc"),
    "no label": lambda h, a: h.pop("label"),
    "label with a slash": lambda h, a: h.update(label="../x"),
    "negative step": lambda h, a: h["steps"].__setitem__(0, -1.0),
    "rates that do not fall": lambda h, a: h["rates"].reverse(),
    "fewer rates": lambda h, a: h["rates"].pop(),
    "huge block": lambda h, a: h["tensors"][0].update(block=[1 << 40, 1 << 40]),
    "block of text": lambda h, a: h["tensors"][0].update(block="ab"),
    "many channels": lambda h, a: h["tensors"][0].update(channels=1 << 50),
    "other channels": lambda h, a: h["tensors"][0].update(channels=11),
    "rank 1": lambda h, a: h["tensors"][0].update(rank=1),
    "matrices missing": lambda h, a: a.pop("0.matrices"),
    "matrices of NaN": lambda h, a: a["0.matrices"].__setitem__((0, 0, 0), numpy.nan),
    "matrices of another dtype": lambda h, a: a.update({"0.matrices": a["0.matrices"].astype("int32")}),
    "matrices of infinity": lambda h, a: a["0.matrices"].__setitem__((0, 0, 0), numpy.inf),
    "matrices of 0": lambda h, a: a["0.matrices"].fill(0),
    "a row twice": lambda h, a: a["0.matrices"].__setitem__((-1, 1), a["0.matrices"][-1, 0]),
    "a row that is a sum": lambda h, a: a["0.matrices"].__setitem__((3, 2), a["0.matrices"][3, 4:].sum(0)),
    "matrices whose inverses overflow": lambda h, a: a["0.matrices"].__imul__(1e-38),
    "scales that overflow": lambda h, a: (a["0.matrices"].__imul__(1e9), a["0.scales"].__imul__(1e38)),
    "scales whose inverses overflow": lambda h, a: a["0.scales"].__setitem__((0, 0), 1e-45),
    "scales of NaN": lambda h, a: a["0.scales"].__setitem__((0, 0), numpy.nan),
    "scales of infinity": lambda h, a: a["0.scales"].__setitem__((0, 0), numpy.inf),
    "scales of 0": lambda h, a: a["0.scales"].__setitem__((0, 0), 0),
    "band beyond": lambda h, a: a["0.band_of"].__setitem__(0, 9999),
    "cumulative that falls": lambda h, a: a["0.0.cumulative"].__setitem__((0, 1), 0),
    "tables missing": lambda h, a: a.pop("0.1.weights"),
    "largest negative": lambda h, a: a["0.largest"].__setitem__(0, -1),
    "point of text": lambda h, a: h.update(point="x"),
    "provenance of numbers": lambda h, a: h.update(provenance=3),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_file_is_refused(fitted: FittedCodec, tmp_path: Path, lie: str) -> None:
    path = tmp_path / "lie.fitted"
    fitted.save(path)
    path.write_bytes(resealed(path.read_bytes(), LIES[lie]))
    with pytest.raises(CodecError, match=r"lie\.fitted: "):
        FittedCodec.load(path)


def test_a_header_that_declares_more_than_the_file_holds(fitted: FittedCodec, tmp_path: Path) -> None:
    path = tmp_path / "huge.fitted"
    header = {"format": file.FORMAT, "arrays": [{"name": "x", "dtype": "float32", "shape": [1 << 40, 1 << 20]}]}
    text = json.dumps(header).encode()
    content = b"TSFITTED" + len(text).to_bytes(8, "little") + text
    path.write_bytes(content + hashlib.sha256(content).digest())
    with pytest.raises(CodecError, match="does not lie within the file"):
        FittedCodec.load(path)


def test_a_file_of_another_model_cut_or_weights(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    other = classifier()
    with torch.no_grad():
        other[3].weight[0, 0, 0, 0] += 1
    with pytest.raises(CodecError, match="with other weights"):
        fitted.check(ts.trace(other, pictures(1, 0)[0]))
    with pytest.raises(CodecError, match=r"was fitted to Sequential \(fingerprint .*, not to Pyramid"):
        fitted.check(ts.trace(Pyramid().eval(), pictures(1, 0)[0]))
    moved = FittedCodec(
        "moved", fitted.model, fitted.graph, fitted.weights, (5, "4"), fitted.tensors, fitted.steps, fitted.rates
    )
    with pytest.raises(CodecError, match="another cut"):
        moved.check(graph)


# --- hostile streams ---


def test_a_damaged_stream_is_refused(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    tensor = boundary(graph, pictures(1, 14)[0])
    codec = fitted.at(2)
    data = bytes(codec.encode(tensor).data)
    for at in range(0, len(data), 7):
        damaged = bytearray(data)
        damaged[at] ^= 0x10
        with pytest.raises(CodecError):
            codec.decode(damaged, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)
    for cut_short in (b"", data[:1], data[:5], data[:-1], data + b"\0"):
        with pytest.raises(CodecError):
            codec.decode(cut_short, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)


def test_a_stream_of_another_shape_rate_or_size_is_refused(graph: ts.LayerGraph, fitted: FittedCodec) -> None:
    tensor = boundary(graph, pictures(1, 14)[0])
    data = fitted.at(2).encode(tensor).data
    for shape in ((1, 12, 21, 14), (2, 12, 14, 14), (1, 11, 14, 14), (12, 14, 14), (1, 12, 1, 1), ()):
        with pytest.raises(CodecError):
            fitted.at(2).decode(data, tensor.dtype, shape, max_bytes=1 << 30)
    with pytest.raises(CodecError):
        fitted.at(0.3).decode(data, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)
    with pytest.raises(CodecError, match="at most 100 are accepted"):
        fitted.at(2).decode(data, tensor.dtype, tensor.shape, max_bytes=100)
    with pytest.raises(CodecError, match=r"does not encode torch\.int64"):
        fitted.at(2).decode(data, torch.int64, tensor.shape, max_bytes=1 << 30)


@given(st.binary(max_size=300), st.sampled_from([(1, 12, 14, 14), (3, 12, 14, 14), (1, 12, 70, 7)]))
@settings(max_examples=60)
def test_any_bytes_are_refused(fitted: FittedCodec, data: bytes, shape: tuple[int, ...]) -> None:
    with pytest.raises(CodecError):
        fitted.at(2).decode(b"\0" + data, torch.float32, shape, max_bytes=1 << 20)


# --- the transform ---


@given(st.integers(1, 3), st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), st.integers(0, 1000))
def test_the_transform_leads_back(batch: int, channels: int, height: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grid = TensorGrid(4, 1, channels, (block_side(height), block_side(width)))
    q = grid.frequencies
    transform = Transform(
        grid,
        torch.linalg.qr(torch.randn(q, channels, channels, generator=generator))[0].numpy(),
        numpy.arange(q).astype(numpy.uint16),
        (torch.rand(q, channels, generator=generator) + 0.5).numpy(),
        torch.randn(q, channels, generator=generator).numpy(),
    )
    x = torch.randn(batch, channels, height, width, generator=generator)
    coefficients = transform.forward(x)
    assert coefficients.shape == (grid.groups, *grid.blocks(x.shape))
    assert torch.allclose(transform.inverse(coefficients, x.shape), x, atol=1e-4)


def test_parents_are_earlier_groups() -> None:
    grid = TensorGrid(4, 1, 6, (3, 4))
    parents = grid.parents()
    assert parents.shape == (72, 5)
    assert (parents < numpy.arange(72)[:, None]).all()
    assert (parents >= -1).all()


@pytest.mark.parametrize(
    ("size", "side"), [(1, 1), (7, 7), (8, 8), (14, 7), (28, 7), (56, 8), (13, 7), (9, 5), (25, 5)]
)
def test_block_sides(size: int, side: int) -> None:
    assert block_side(size) == side
