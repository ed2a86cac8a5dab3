"""AVIF pictures without their container: only the AV1 stream crosses, and the container is written again around it.

A container and the stream in it may give different sizes, and a decoder allocates what the stream says: a file of 1 KB
that claims 32×32 makes it take hundreds of megabytes. So the size is read from the stream itself, and a container that
somebody else wrote is never opened. It also saves about 280 bytes a picture.

Only still pictures of 8 bits with the reduced header are read, the kind that Pillow writes. In these, no frame has
another size than the header says.
"""

from __future__ import annotations

import struct

from torchsurgeon.errors import CodecError

# How colours are described: BT.709 primaries, sRGB transfer, BT.601 matrix, full range. Pillow writes these.
_COLOURS = b"nclx" + struct.pack(">HHHB", 1, 13, 6, 0x80)
# Kinds of OBU, the units of an AV1 stream: those that may occur, beside one sequence header.
_SEQUENCE_HEADER, _DELIMITER = 1, 2
_PARTS_OF_A_PICTURE = {3, 4, 5, 6, 15}


def unwrap(file: bytes) -> bytes:
    """Return the AV1 stream of an AVIF file that Pillow has just written.

    Raises:
        CodecError: the file is built in another way than this module rebuilds.
    """
    offset, boxes = 0, {}
    while offset + 8 <= len(file):
        size, kind = struct.unpack_from(">I4s", file, offset)
        if size < 8:
            break
        boxes[kind] = file[offset + 8 : offset + size]
        offset += size
    if set(boxes) != {b"ftyp", b"meta", b"mdat"} or _COLOURS not in boxes[b"meta"]:
        raise CodecError(
            "this Pillow writes AVIF files in a way that torchsurgeon does not know; use webp in its place"
        )
    return boxes[b"mdat"]


def wrap(stream: bytes, channels: int, height: int, width: int) -> bytes:
    """Return an AVIF file of an AV1 stream, whose size was compared with the one that is expected.

    Args:
        stream: the stream.
        channels: 1 for a grey picture, 3 for one in colours.
        height: the expected height.
        width: the expected width.

    Raises:
        CodecError: the stream is damaged, or is a picture of another size or kind.
    """
    configuration = _configuration(stream, channels, height, width)
    properties = b"".join(
        [
            _box(b"ispe", struct.pack(">III", 0, width, height)),
            _box(b"pixi", struct.pack(">IB", 0, channels) + bytes([8] * channels)),
            _box(b"av1C", configuration),
            _box(b"colr", _COLOURS),
        ]
    )
    associations = struct.pack(">IIHB", 0, 1, 1, 4) + bytes([1, 2, 0x83, 4])
    item = _box(b"infe", struct.pack(">IHH", 2 << 24, 1, 0) + b"av01Color\0")
    before = [
        _box(b"hdlr", struct.pack(">II4s13x", 0, 0, b"pict")),
        _box(b"pitm", struct.pack(">IH", 0, 1)),
    ]
    behind = [
        _box(b"iinf", struct.pack(">IH", 0, 1) + item),
        _box(b"iprp", _box(b"ipco", properties) + _box(b"ipma", associations)),
    ]
    kind = _box(b"ftyp", b"avif" + struct.pack(">I", 0) + b"avifmif1miafMA1B")

    def meta(offset: int) -> bytes:
        location = struct.pack(">IBBHHHHII", 0, 0x44, 0, 1, 1, 0, 1, offset, len(stream))
        return _box(b"meta", bytes(4) + b"".join([*before, _box(b"iloc", location), *behind]))

    start = len(kind) + len(meta(0)) + 8
    return kind + meta(start) + _box(b"mdat", stream)


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content


def _configuration(stream: bytes, channels: int, height: int, width: int) -> bytes:
    """Return the stream's codec configuration, after comparing its size; raise for what is no such picture."""
    found = None
    offset = 0
    while offset < len(stream):
        kind, offset, end = _unit(stream, offset)
        if kind == _SEQUENCE_HEADER and found is None:
            found = _read_header(_Bits(stream[offset:end]), channels, height, width)
        elif kind != _DELIMITER and (found is None or kind not in _PARTS_OF_A_PICTURE):
            raise CodecError(f"its avif picture has a part of kind {kind} where none belongs; it is damaged")
        offset = end
    if found is None:
        raise CodecError("its avif picture has no header; it is damaged")
    return found


def _unit(stream: bytes, offset: int) -> tuple[int, int, int]:
    """Return kind, begin and end of the content of the unit at ``offset``."""
    first = stream[offset]
    # A unit must give its size and have no extension.
    size = shift = 0
    for byte in stream[offset + 1 : offset + 6] if first & 0x87 == 0x02 else b"":
        offset, size, shift = offset + 1, size | (byte & 0x7F) << shift, shift + 7
        if byte < 0x80:
            begin = offset + 1
            if begin + size > len(stream):
                break
            return first >> 3, begin, begin + size
    raise CodecError("its avif picture is cut short or damaged")


class _Bits:
    """Reads numbers of any number of bits."""

    def __init__(self, data: bytes) -> None:
        # What is behind the end reads as 0: such a header is of another size, or is refused by the decoder.
        self._bits = "".join(f"{byte:08b}" for byte in data[:64]) + "0" * 128
        self._at = 0

    def __call__(self, count: int) -> int:
        self._at += count
        return int(self._bits[self._at - count : self._at] or "0", 2)


def _read_header(bits: _Bits, channels: int, height: int, width: int) -> bytes:
    profile, still, reduced, level = bits(3), bits(1), bits(1), bits(5)
    if profile or not (still and reduced):
        raise CodecError(f"its avif picture must be a still picture of profile 0; got profile {profile}")
    width_bits, height_bits = bits(4) + 1, bits(4) + 1
    size = bits(width_bits) + 1, bits(height_bits) + 1
    bits(6)  # tools that change no size
    deep, mono = bits(1), bits(1)
    if size != (width, height) or deep or bool(mono) != (channels == 1):
        wanted, kind = "grey" if channels == 1 else "colour", f"{'grey' if mono else 'colour'}{' of 10 bits' * deep}"
        raise CodecError(
            f"its shape needs an avif picture in {wanted} of {width}×{height}; got {kind} of {size[0]}×{size[1]}"
        )
    if bits(1):
        bits(24)
    bits(1)  # the range of its values
    position = 0 if mono else bits(2)
    return bytes([0x81, level, mono << 4 | 0x0C | position, 0])
