"""Image codecs: formats, qualities, chroma and scales, and pictures that lie about their size."""

from __future__ import annotations

import io
import struct

import pytest
import torch
from PIL import Image
from torch import Tensor

from torchsurgeon.codec import avif as avif_streams
from torchsurgeon.codec import codec_names, find_codec, measured_names, pictures
from torchsurgeon.errors import CodecError

SIZES = [(2, 3, 40, 56), (1, 1, 40, 56), (3, 33, 47), (5, 3, 1, 1)]
LOSSLESS, LOSSY = ("png", "webp-lossless"), ("jpeg-90", "jpeg444-90", "webp-80", "avif-75")
pytestmark = pytest.mark.skipif(not pictures.available("avif"), reason="this Pillow has no AVIF")


def picture(*shape: int) -> Tensor:
    *_, channels, height, width = shape
    y, x = torch.meshgrid(torch.linspace(0, 3, height), torch.linspace(0, 5, width), indexing="ij")
    planes = torch.stack([(torch.sin(x * (c + 1)) * torch.cos(y) + 1) * 127 for c in range(channels)])
    return planes.to(torch.uint8).expand(*shape).contiguous()


def there_and_back(name: str, tensor: Tensor) -> Tensor:
    codec = find_codec(name)
    data = pictures.encode(codec.image, codec.quality, codec.percent, tensor.numpy())
    return codec.decode(data, tensor.dtype, tensor.shape, max_bytes=tensor.nbytes)


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "png@0.5", "webp-80@0.5", "avif-90@0.75", "jpeg-90@0.25"])
def test_pictures_come_back(name: str, shape: tuple[int, ...]) -> None:
    tensor = picture(*shape)
    back = there_and_back(name, tensor)
    assert (back.shape, back.dtype) == (tensor.shape, torch.uint8)
    assert find_codec(name).lossless == (name in LOSSLESS)
    error = (back.float() - tensor.float()).abs().mean()
    assert error == 0 if name in LOSSLESS else error < (20 if "0.25" in name else 8)


def test_quality_chroma_and_scale_are_paid_in_bytes() -> None:
    torch.manual_seed(0)
    tensor = torch.nn.functional.interpolate(torch.rand(1, 3, 28, 28) * 255, 224, mode="bilinear").to(torch.uint8)
    sizes = {name: len(find_codec(name).encode(tensor).data) for name in measured_names() if find_codec(name).image}
    for kind, *qualities in (("jpeg", 95, 90, 80, 60), ("webp", 95, 90, 80, 60), ("avif", 95, 90, 80, 65, 50)):
        series = [sizes[f"{kind}-{quality}"] for quality in qualities]
        assert series == sorted(series, reverse=True)
    assert sizes["jpeg444-90"] > sizes["jpeg-90"]
    assert sizes["webp-80"] > sizes["webp-80@0.75"] > sizes["webp-80@0.5"]


def test_full_chroma_keeps_colours_that_change_from_pixel_to_pixel() -> None:
    tensor = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    tensor[:, 0, :, ::2] = 255
    tensor[:, 2, :, 1::2] = 255
    full, half = (there_and_back(name, tensor).float() - tensor.float() for name in ("jpeg444-95", "jpeg-95"))
    assert full.abs().mean() < 5 < half.abs().mean()


@pytest.mark.parametrize(
    ("name", "full"),
    [
        ("jpeg", "jpeg-90"),
        ("webp@0.50", "webp-80@0.5"),
        ("avif-075", "avif-75"),
        ("png@0.25", "png@0.25"),
        ("webp-lossless@0.5", "webp-lossless@0.5"),
    ],
)
def test_each_codec_has_one_name(name: str, full: str) -> None:
    assert find_codec(name).name == full
    assert find_codec(full) == find_codec(name)


WRONG = "webp-80@1 webp-80@0 webp-80@0.0 webp-80@.5 webp-80@0.123 webp@0.5-80 png-5 webp-lossless-5 int8@0.5 gif @0.5"


@pytest.mark.parametrize("name", [*WRONG.split(), "jpeg-80+zstd", "jpeg-٣", "jpeg-1000"])
def test_what_is_no_name_is_refused(name: str) -> None:
    with pytest.raises(CodecError, match="there is no codec"):
        find_codec(name)


def test_what_is_measured_by_default_are_codecs_that_exist_finer_before_coarser() -> None:
    names = measured_names()
    assert len(set(names)) == len(names)
    assert [find_codec(name).name for name in names] == list(names)
    last: dict[str, int] = {}
    for codec in (find_codec(name) for name in names if find_codec(name).image):
        assert codec.coarseness > last.get(codec.kind, -1000)
        last[codec.kind] = codec.coarseness
    assert {"webp-lossless", "jpeg444-90", "avif-75"} <= set(codec_names())


def test_without_avif_it_is_no_codec(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchsurgeon.codec import codec as codecs

    monkeypatch.setattr(pictures, "available", lambda kind: kind != "avif")
    codecs._find_codec.cache_clear()
    try:
        with pytest.raises(CodecError, match="there is no codec 'avif-75'"):
            find_codec("avif-75")
        assert not any("avif" in name for name in (*codec_names(), *measured_names()))
    finally:
        codecs._find_codec.cache_clear()


# --- pictures that nobody encoded ---


def refused(name: str, picture_bytes: bytes, shape: tuple[int, ...], match: str) -> None:
    data = len(picture_bytes).to_bytes(4, "little") + picture_bytes
    with pytest.raises(CodecError, match=match):
        find_codec(name).decode(data, torch.uint8, shape, max_bytes=1 << 20)


def encoded(name: str, tensor: Tensor) -> bytes:
    codec = find_codec(name)
    return pictures.encode(codec.image, codec.quality, codec.percent, tensor.numpy())[4:]


@pytest.mark.parametrize("name", [*LOSSLESS, *LOSSY, "webp-80@0.5", "avif-75@0.5"])
def test_a_picture_of_another_size_or_kind_is_refused(name: str) -> None:
    data = encoded(name, picture(1, 3, 40, 56))
    refused(name, data, (1, 3, 40, 64), "its shape needs")
    refused(name, data, (1, 3, 56, 40), "its shape needs")
    if "webp" not in name:
        refused(name, data, (1, 1, 40, 56), "its shape needs")
    other = "png" if name != "png" else "jpeg-90"
    refused(name, encoded(other, picture(1, 3, 40, 56)), (1, 3, 40, 56), "damaged|of kind|its shape needs")


def test_a_picture_that_was_not_scaled_is_refused_where_a_scaled_one_is_meant() -> None:
    refused("webp-80@0.5", encoded("webp-80", picture(1, 3, 40, 56)), (1, 3, 40, 56), "of 28×20; got RGB of 56×40")


@pytest.mark.parametrize("name", [*LOSSY, *LOSSLESS])
def test_damaged_pictures_are_refused_or_decoded_to_the_right_shape(name: str) -> None:
    shape = (1, 3, 40, 56)
    data = encoded(name, picture(*shape))
    for cut in range(0, len(data), max(1, len(data) // 40)):
        refused(name, data[:cut], shape, "its .* picture|its shape needs") if cut < len(data) // 4 else None
    codec = find_codec(name)
    for at in range(0, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[at] ^= 0x55
        try:
            back = codec.decode(len(data).to_bytes(4, "little") + bytes(damaged), torch.uint8, shape, max_bytes=1 << 20)
        except CodecError:
            continue
        assert back.shape == shape


def test_an_avif_picture_that_is_larger_inside_is_never_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    Image.new("RGB", (4096, 4096)).save(written, "avif", speed=10)
    stream = avif_streams.unwrap(written.getvalue())
    # The container, which does not cross, is larger than that of many other formats.
    assert 260 < len(avif_streams.wrap(stream, 3, 4096, 4096)) - len(stream) < 300
    # A decoder would allocate 25 MB for these, whatever a container around them says.
    assert len(stream) < 2000
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("the picture was opened"))
    refused("avif-75", stream, (1, 3, 32, 32), "of 32×32; got colour of 4096×4096")


def obu(kind: int, content: bytes) -> bytes:
    return bytes([kind << 3 | 2, len(content)]) + content


def test_streams_that_pillow_does_not_write_are_refused() -> None:
    shape = (1, 3, 40, 56)
    stream = encoded("avif-75", picture(*shape))
    assert stream.startswith(obu(2, b"") + b"\x0a")
    length = stream[3]
    header, rest = stream[2 : 4 + length], stream[4 + length :]
    refused("avif-75", header + header + rest, shape, "a part of kind 1 where none belongs")
    refused("avif-75", rest, shape, "a part of kind 6 where none belongs")
    refused("avif-75", header + obu(8, b"tiles") + rest, shape, "a part of kind 8")
    refused("avif-75", obu(2, b""), shape, "has no header")
    refused("avif-75", b"\x0a" + b"\xff" * 9, shape, "cut short or damaged")
    refused("avif-75", b"\x8a" + header[1:] + rest, shape, "cut short or damaged")
    refused("avif-75", bytes([header[0], header[1], header[2] | 0x20, *header[3:]]) + rest, shape, "got profile 1")
    refused("avif-75", bytes([header[0], header[1], header[2] & ~0x08, *header[3:]]) + rest, shape, "a still picture")
    # The container alone is refused, too: no stream begins with it.
    written = io.BytesIO()
    Image.new("RGB", (56, 40)).save(written, "avif")
    refused("avif-75", written.getvalue(), shape, "damaged|of kind")


def test_a_container_of_another_build_is_not_sent() -> None:
    with pytest.raises(CodecError, match="use webp in its place"):
        avif_streams.unwrap(struct.pack(">I4s", 8, b"ftyp"))
