"""Codecs alone: what decoding gives back, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from partitions import bits
from torch import Tensor

from torchsurgeon import _native
from torchsurgeon.codec import Codec, codec_names, find_codec
from torchsurgeon.codec.host import on_host
from torchsurgeon.demo import photo
from torchsurgeon.errors import CodecError

torch.set_num_threads(1)

NUMERIC = [name for name in codec_names() if find_codec(name).image is None]
LOSSY = [name for name in NUMERIC if not find_codec(name).lossless]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
]
MOST = 1 << 30


def there_and_back(codec: Codec, tensor: Tensor) -> Tensor:
    encoded = codec.encode(tensor)
    used = find_codec(encoded.codec)
    return used.decode(bytes(encoded.data), tensor.dtype, tensor.shape, encoded.order, max_bytes=tensor.nbytes)


def same_bits(one: Tensor, other: Tensor) -> bool:
    return torch.equal(bits(one), bits(other))


@st.composite
def tensors(draw: st.DrawFn, dtypes: list[torch.dtype] = DTYPES, least: int = 0) -> Tensor:
    """Any shape, dtype and order of dimensions; sometimes constant, and a slice of a larger tensor."""
    shape = draw(st.lists(st.integers(least, 9), max_size=5))
    dtype = draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1 << 16)))
    values = torch.randn([*shape, 2], generator=generator, dtype=torch.float64)
    values = values * draw(st.sampled_from([0.0, 1e-6, 1.0, 100.0])) + draw(st.sampled_from([0.0, 1.0, -50.0]))
    values = values.relu() if draw(st.booleans()) else values
    tensor = (values > 0 if dtype == torch.bool else values.clamp(*limits(dtype)).to(dtype))[..., 0]
    order = draw(st.permutations(range(len(shape))))
    return (
        tensor
        if draw(st.booleans())
        else tensor.permute(order).contiguous().permute(sorted(range(len(order)), key=order.__getitem__))
    )


def limits(dtype: torch.dtype) -> tuple[float, float]:
    info = torch.finfo(dtype) if dtype.is_floating_point else torch.iinfo(dtype)
    return max(info.min, -1e4), min(info.max, 1e4)


@settings(deadline=None, max_examples=150)
@given(tensors(), st.sampled_from(["raw", "zstd"]))
def test_a_lossless_codec_gives_the_very_bits(tensor: Tensor, name: str) -> None:
    back = there_and_back(find_codec(name), tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert same_bits(back, tensor)


@settings(deadline=None, max_examples=300)
@given(tensors(), st.sampled_from(LOSSY))
def test_a_lossy_codec_keeps_dtype_shape_and_its_bound(tensor: Tensor, name: str) -> None:
    codec = find_codec(name)
    back = there_and_back(codec, tensor)
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    used = find_codec(codec.encode(tensor).codec)
    if used.lossless:
        assert same_bits(back, tensor)
    elif tensor.numel():
        exact, got = tensor.double(), back.double()
        largest = float(exact.abs().max())
        # What float32 and the tensor's own dtype round, beside what the codec does.
        finfo = torch.finfo(tensor.dtype)
        rounding = 2e-6 * largest + finfo.eps * max(largest, finfo.smallest_normal)
        span = float(exact.max() - exact.min())
        bound = {
            "float16": 2**-11 * largest + 2**-25,
            "bfloat16": 2**-8 * largest,
            "int8": span / 255 / 2,
            "int8-channel": span / 255 / 2,
            "int4": span / 15 / 2,
        }[str(used.packing)]
        assert float((exact - got).abs().max()) <= bound * 1.001 + rounding


@pytest.mark.parametrize("name", ["int8", "int8-channel", "int4"])
@pytest.mark.parametrize("spread", [1e-9, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("center", [0.0, 1.0, 1e6, -1e12])
def test_values_of_float64_far_from_zero_keep_the_bound(name: str, center: float, spread: float) -> None:
    tensor = center + spread * torch.rand(2, 3, 8, 8, dtype=torch.float64)
    back = there_and_back(find_codec(name), tensor)
    step = float(tensor.max() - tensor.min()) / (15 if name == "int4" else 255)
    assert float((tensor - back).abs().max()) <= 0.53 * step


@pytest.mark.parametrize("name", NUMERIC)
def test_lazily_conjugated_and_negated_tensors_are_encoded_as_their_values(name: str) -> None:
    values = torch.randn(2, 3, dtype=torch.complex64)
    for lazy in (values.conj(), values.conj().imag, values.t().conj()[1:]):
        plain = lazy.resolve_conj().resolve_neg().clone()
        assert torch.equal(there_and_back(find_codec(name), lazy), there_and_back(find_codec(name), plain))


@pytest.mark.parametrize("name", NUMERIC)
def test_the_order_of_dimensions_in_memory_survives(name: str) -> None:
    tensor = torch.randn(2, 8, 10, 10).to(memory_format=torch.channels_last)
    back = there_and_back(find_codec(name), tensor)
    assert back.stride() == tensor.stride()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_channel_has_its_own_range(memory_format: torch.memory_format) -> None:
    scale = torch.tensor([1e-3, 1.0, 1e3, 0.0]).view(1, 4, 1, 1)
    tensor = (torch.randn(2, 4, 16, 16) * scale).to(memory_format=memory_format)
    encoded = find_codec("int8-channel").encode(tensor)
    assert encoded.codec == "int8-channel"
    back = there_and_back(find_codec("int8-channel"), tensor)
    span = tensor.amax((0, 2, 3)) - tensor.amin((0, 2, 3))
    assert ((tensor - back).abs().amax((0, 2, 3)) <= span / 255 * 0.51).all()
    sequence = torch.randn(2, 64, 4) * scale.view(1, 1, 4)
    error = (sequence - there_and_back(find_codec("int8-channel"), sequence)).abs()
    assert (error.amax((0, 1)) <= (sequence.amax((0, 1)) - sequence.amin((0, 1))) / 255 * 0.51).all()


def test_channels_of_few_values_share_one_range() -> None:
    assert find_codec("int8-channel").encode(torch.randn(2, 512)).codec == "int8"
    assert find_codec("int8-channel+zstd").encode(torch.zeros(2, 512)).codec == "int8+zstd"


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3.4e38])
def test_what_a_lossy_codec_cannot_say_is_sent_without_loss(name: str, value: float) -> None:
    tensor = torch.randn(1, 8, 16, 16)
    tensor[0, 3, 2, 1] = value
    tensor[0, 3, 2, 2] = -tensor[0, 3, 2, 1]
    encoded = find_codec(name).encode(tensor)
    if name.startswith("bfloat16") and value == 3.4e38:
        tensor[0, 3, 2, 1] = 3.399e38
    assert find_codec(encoded.codec).lossless
    assert same_bits(there_and_back(find_codec(name), tensor), tensor)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("value", [0.0, -3.25, 1e-42])
def test_a_constant_tensor_stays_what_it_is(name: str, value: float) -> None:
    tensor = torch.full((2, 4, 8, 8), value)
    assert torch.allclose(there_and_back(find_codec(name), tensor), tensor, atol=1e-7)


@pytest.mark.parametrize("name", ["int8", "int8-channel", "int4"])
def test_zeros_after_a_relu_stay_zero(name: str) -> None:
    tensor = torch.randn(1, 8, 16, 16).relu()
    assert (there_and_back(find_codec(name), tensor)[tensor == 0] == 0).all()


def test_a_codec_never_sends_more_than_the_tensor() -> None:
    noise = torch.randint(0, 256, (3, 50, 50), dtype=torch.uint8)
    for name in codec_names():
        for tensor in (noise, torch.randn(3), torch.randn(()), torch.empty(0, 3), torch.randn(2, 33)):
            assert len(find_codec(name).encode(tensor).data) <= tensor.nbytes, name


@pytest.mark.parametrize("name", codec_names())
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_floats_of_one_byte_are_sent_without_loss(name: str, dtype: torch.dtype) -> None:
    tensor = torch.randn(3, 40).to(dtype)
    encoded = find_codec(name).encode(tensor)
    codec = find_codec(encoded.codec)
    assert codec.lossless
    decoded = codec.decode(encoded.data, dtype, (3, 40), encoded.order, max_bytes=120)
    assert torch.equal(decoded.view(torch.uint8), tensor.view(torch.uint8))


def test_sizes_are_what_the_names_promise() -> None:
    tensor = torch.randn(1, 16, 32, 32)
    sizes = {name: len(find_codec(name).encode(tensor).data) for name in NUMERIC}
    assert sizes["raw"] == 65536
    assert sizes["float16"] == sizes["bfloat16"] == 32768
    assert sizes["int8"] == 16384 + 8
    assert sizes["int8-channel"] == 16384 + 8 * 16
    assert sizes["int4"] == 8192 + 8
    sparse = torch.nn.functional.dropout(tensor.relu(), 0.5)
    for name in (name for name in NUMERIC if f"{name}+zstd" in NUMERIC):
        plain, zipped = (len(find_codec(n).encode(sparse).data) for n in (name, f"{name}+zstd"))
        assert zipped < plain, name


def test_pixels_are_compressed_as_level_3_does_and_floats_as_level_1_does() -> None:
    def by(level: int, tensor: Tensor) -> bytes:
        frame: bytes = zstandard.ZstdCompressor(level=level, write_checksum=True).compress(tensor.numpy().tobytes())
        return frame

    pixels = photo()
    frame = bytes(find_codec("zstd").encode(pixels).data)
    assert frame == by(3, pixels)
    assert len(frame) < len(by(1, pixels))
    values = pixels.float().sub(100).relu()
    assert bytes(find_codec("zstd").encode(values).data) == by(1, values)
    assert by(1, values) != by(3, values)


def test_one_codec_may_be_used_by_many_threads() -> None:
    codec = find_codec("int8+zstd")
    inputs = [torch.randn(8, 40, 40).relu() * k for k in range(1, 17)]
    expected = [there_and_back(codec, x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        assert all(map(torch.equal, pool.map(lambda x: there_and_back(codec, x), inputs * 4), expected * 4))


def test_encoding_leaves_the_tensor_alone() -> None:
    for name in codec_names():
        for tensor in (torch.randn(1, 3, 16, 16), torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8)):
            before = tensor.clone()
            find_codec(name).encode(tensor)
            assert torch.equal(tensor, before)


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The package as it is where its extension was not built."""

    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    with monkeypatch.context() as patched:
        patched.setattr("torchsurgeon._native.importlib.import_module", missing)
        _native._load.cache_clear()
        yield
    _native._load.cache_clear()


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 1001, 4096])
def test_with_and_without_the_extension_a_codec_says_the_same(
    name: str, count: int, request: pytest.FixtureRequest
) -> None:
    if not _native.available():
        pytest.skip("no compiled extension: make setup")
    tensor = torch.randn(count) * 3 + 1
    built = find_codec(name).encode(tensor)
    decoded = there_and_back(find_codec(name), tensor)
    request.getfixturevalue("unbuilt")
    assert not _native.available()
    plain = find_codec(name).encode(tensor)
    assert plain.codec == built.codec
    assert plain.data[:8] == built.data[:8]
    # One may fuse a product and a sum, and then rounds once where the other rounds twice.
    step = float(tensor.max() - tensor.min()) / (255 if name == "int8" else 15)
    assert torch.allclose(there_and_back(find_codec(name), tensor), decoded, atol=step * 1.001)
    opened = find_codec(built.codec).decode(bytes(built.data), tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)
    assert torch.allclose(opened, decoded, atol=1e-5)


@pytest.mark.parametrize("name", LOSSY)
def test_codecs_need_no_extension(name: str, unbuilt: None) -> None:
    tensor = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    error = (there_and_back(find_codec(name), tensor) - tensor).abs().max()
    assert error < (0.4 if "int4" in name else 0.03)


def test_the_extension_refuses_memory_it_may_not_touch() -> None:
    if not _native.available():
        pytest.skip("no compiled extension: make setup")
    ops, codes = _native.operators("this test"), torch.empty(8, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="9 values take 9 bytes, not 8"):
        ops.quantize(torch.zeros(9), 0.0, 1.0, 8, codes)
    with pytest.raises(RuntimeError, match="9 values take 5 bytes, not 8"):
        ops.dequantize(codes, 0.0, 1.0, 4, torch.zeros(9))
    with pytest.raises(RuntimeError, match="float32 and codes uint8"):
        ops.quantize(torch.zeros(8, dtype=torch.float64), 0.0, 1.0, 8, codes)
    with pytest.raises(RuntimeError, match="contiguous"):
        ops.quantize(torch.zeros(8, 2)[:, 0], 0.0, 1.0, 8, codes)
    with pytest.raises(RuntimeError, match="8 or 4 bits, not 3"):
        ops.quantize(torch.zeros(8), 0.0, 1.0, 3, codes)


# --- names ---


@pytest.mark.parametrize(
    "name",
    [
        "",
        "gzip",
        "int8+",
        "int8+gzip",
        "int8+zstd+zstd",
        "raw+zstd",
        "jpeg-0",
        "jpeg-101",
        "jpeg-x",
        "png-5",
        "x" * 5000,
    ],
)
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(CodecError, match=r"there is no codec .* there are raw, zstd, float16"):
        find_codec(name)


def test_every_listed_name_is_a_codec() -> None:
    assert [find_codec(name).name for name in codec_names()] == list(codec_names())


# --- images ---


def picture(batch: int = 2, channels: int = 3, height: int = 40, width: int = 56) -> Tensor:
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    planes = torch.stack([(torch.sin(x * (c + 1)) * torch.cos(y) + 1) * 127 for c in range(channels)])
    return planes.to(torch.uint8).expand(batch, -1, -1, -1).contiguous()


@pytest.mark.parametrize(
    "tensor", [picture(), picture(1, 1), picture()[0], picture(5, 3, 1, 1)], ids=lambda t: str(t.shape)
)
@pytest.mark.parametrize("name", ["png", "jpeg-90", "webp-80"])
def test_pictures_come_back(name: str, tensor: Tensor) -> None:
    back = there_and_back(find_codec(name), tensor)
    assert back.shape == tensor.shape
    assert back.dtype == torch.uint8
    error = (back.float() - tensor.float()).abs().mean()
    assert error == 0 if name == "png" else error < 6


def test_pictures_are_smaller_and_quality_costs_bytes() -> None:
    tensor = picture(1, 3, 224, 224)
    png, good, poor, webp = (len(find_codec(n).encode(tensor).data) for n in ("png", "jpeg-95", "jpeg-40", "webp"))
    assert max(png, good, poor, webp) < tensor.nbytes / 4
    assert poor < good


def test_a_picture_in_channels_last_memory_comes_back_so() -> None:
    tensor = picture().to(memory_format=torch.channels_last)
    back = there_and_back(find_codec("png"), tensor)
    assert torch.equal(back, tensor)
    assert back.stride() == tensor.stride()


def test_what_is_no_picture_is_sent_without_loss_under_an_image_codec() -> None:
    for tensor in (
        torch.randn(1, 3, 8, 8),
        torch.zeros(1, 4, 8, 8, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
    ):
        assert find_codec("jpeg").encode(tensor).codec == "raw"


# --- bytes that nobody encoded ---


def refused(name: str, data: bytes, shape: tuple[int, ...], match: str, dtype: torch.dtype = torch.float32) -> None:
    with pytest.raises(CodecError, match=match):
        find_codec(name).decode(data, dtype, shape, max_bytes=MOST)


FRAME = zstandard.ZstdCompressor(write_checksum=True, write_content_size=True).compress(bytes(4000))


@pytest.mark.parametrize(
    ("what", "data", "match"),
    [
        ("another size than declared", FRAME, "takes 8000 bytes; got a zstd frame that declares 4000"),
        ("nothing", b"", "damaged"),
        ("no frame", b"\0" * 100, "damaged"),
        ("a skippable frame", b"\x50\x2a\x4d\x18\x04\0\0\0abcd", "frame that declares"),
    ],
)
def test_a_frame_that_is_not_the_tensors_is_refused(what: str, data: bytes, match: str) -> None:
    refused("zstd", data, (2000,), match)


def test_a_damaged_frame_is_refused() -> None:
    noise = torch.randn(1000).relu()
    frame = bytes(find_codec("zstd").encode(noise).data)
    assert there_and_back(find_codec("zstd"), noise).shape == (1000,)
    for cut in (1, 4, 5, len(frame) // 2):
        refused("zstd", frame[:-cut], (1000,), "damaged")
    for at in (len(frame) // 2, -1):
        damaged = bytearray(frame)
        damaged[at] ^= 1
        refused("zstd", bytes(damaged), (1000,), "damaged")
    refused("zstd", frame + b"\0", (1000,), "damaged")
    refused("zstd", frame + frame, (1000,), "damaged")
    for options in ({"write_checksum": False}, {"write_content_size": False, "write_checksum": True}):
        other = zstandard.ZstdCompressor(**options).compress(noise.numpy().data)
        refused("zstd", other, (1000,), "must have a checksum|frame that declares")


def test_a_frame_that_lies_about_its_size_stops_there() -> None:
    honest = 70_000
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(bytes(100 * honest)))
    at = bytes(frame).index((100 * honest).to_bytes(4, "little"))
    frame[at : at + 4] = honest.to_bytes(4, "little")
    refused("zstd", bytes(frame), (honest // 4,), "damaged|must have a checksum")


def test_a_tensor_above_the_limit_is_refused_before_it_is_made() -> None:
    for name in codec_names():
        with pytest.raises(CodecError, match=r"at most 1000 are accepted|does not encode"):
            find_codec(name).decode(b"", torch.float32, (1 << 20, 1 << 20), max_bytes=1000)


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(codec_names()),
    st.binary(max_size=200),
    st.lists(st.integers(0, 6), max_size=4),
    st.sampled_from(DTYPES),
)
def test_arbitrary_bytes_give_a_tensor_or_a_codec_error(
    name: str, data: bytes, shape: list[int], dtype: torch.dtype
) -> None:
    try:
        tensor = find_codec(name).decode(data, dtype, shape, max_bytes=10_000)
    except CodecError:
        return
    assert tensor.shape == tuple(shape)
    assert tensor.dtype == dtype


def test_sizes_lows_and_scales_that_cannot_be_are_refused() -> None:
    refused("int8", bytes(9), (2,), "int8 of shape .2. takes 10 bytes; got 9 bytes")
    refused("int4", bytes(11), (3,), "takes 10")
    refused("float16", bytes(5), (2,), "takes 4")
    nan = torch.tensor([math.nan, 1.0]).numpy().tobytes()
    negative = torch.tensor([0.0, -1.0]).numpy().tobytes()
    for described in (nan, negative):
        refused("int8", described + bytes(2), (2,), "its low must be finite, and its scale from 0")
    refused("int8", bytes(10), (2,), "does not encode torch.int32", torch.int32)
    refused("int8-channel", bytes(10), (), "does not encode")
    refused("jpeg", bytes(10), (3, 4, 4), "does not encode")
    refused("raw", b"\2", (1,), "BOOL", torch.bool)


def test_damaged_and_foreign_pictures_are_refused() -> None:
    large = picture(1, 3, 200, 200)
    for name in ("png", "jpeg", "webp"):
        data = bytes(find_codec(name).encode(large).data)
        assert there_and_back(find_codec(name), large).shape == large.shape
        refused(name, data, (1, 3, 20, 20), "in RGB of 20×20; got RGB of 200×200", torch.uint8)
        refused(name, data, (2, 3, 200, 200), "damaged", torch.uint8)
        refused(name, data[: len(data) // 2], (1, 3, 200, 200), "damaged|end after", torch.uint8)
        refused(name, data + b"x", (1, 3, 200, 200), "end after", torch.uint8)
        refused(name, b"\4\0\0\0abcd", (1, 3, 200, 200), "damaged", torch.uint8)
    png = bytes(find_codec("png").encode(large).data)
    refused("jpeg", png, (1, 3, 200, 200), "damaged", torch.uint8)
    refused("png", png, (1, 1, 200, 200), "got RGB of", torch.uint8)


def test_tensors_in_cpu_memory_are_not_copied() -> None:
    tensor = torch.rand(3)
    assert on_host(tensor) is tensor


def most_held_bytes(function: Callable[[], Tensor]) -> int:
    """Return the most bytes that PyTorch's allocator holds at once for what ``function`` makes."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = function()
    del kept
    events = profiled.profiler.kineto_results.events()  # type: ignore[union-attr]
    held = itertools.accumulate(event.nbytes() for event in events if event.name() == "[memory]")
    return max(held)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("name", ["int8", "int4", "int8-channel"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_decoding_to_half_precision_holds_little_beside_the_result(
    monkeypatch: pytest.MonkeyPatch, name: str, dtype: torch.dtype, native: bool
) -> None:
    if not native:
        monkeypatch.setattr(_native, "available", lambda: False)
    tensor = torch.rand(1, 64, 512, 256).to(dtype)
    # As it has been received, in writable memory.
    arrived = bytearray(find_codec(name).encode(tensor).data)

    def decode() -> Tensor:
        return find_codec(name).decode(arrived, dtype, tensor.shape, max_bytes=MOST)

    assert tensor.nbytes <= most_held_bytes(decode) <= 1.2 * tensor.nbytes


@pytest.mark.parametrize("shape", [(101, 1_311), (71, 3, 701), (2, 5, 300, 301), (1, 3, 257, 257)])
@pytest.mark.parametrize("name", ["int8", "int4", "int8-channel"])
def test_what_is_decoded_in_pieces_is_what_is_decoded_at_once(name: str, shape: tuple[int, ...]) -> None:
    encoded = find_codec(name).encode(torch.randn(shape))
    at_once = find_codec(name).decode(encoded.data, torch.float32, shape, max_bytes=MOST)
    for dtype in (torch.float16, torch.float64):
        pieces = find_codec(name).decode(encoded.data, dtype, shape, max_bytes=MOST)
        assert torch.equal(pieces, at_once.to(dtype))
