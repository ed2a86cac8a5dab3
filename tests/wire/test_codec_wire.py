"""Encoded tensors between a device and a server: the model's answer from fewer bytes, and hostile ones refused."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import zstandard
from messages import asked, joined
from torch import Tensor, nn

import torchsurgeon as ts
from torchsurgeon import wire
from torchsurgeon.codec import codec_names, find_codec
from torchsurgeon.errors import BodyTooLargeError, CodecError, ProtocolError, RequestRefusedError
from torchsurgeon.serve import ModelRegistry, create_app
from torchsurgeon.transport import InProcessTransport
from torchsurgeon.transport.deadline import Deadline

torch.set_num_threads(1)


def small_net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Conv2d(16, 8, 3), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 13 * 13, 10)).eval()


class Photographic(nn.Module):
    """Takes ``uint8`` images, as a camera gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.net = small_net()

    def forward(self, image: Tensor) -> Tensor:
        return self.net(image.float() / 255)


@pytest.fixture(scope="module")
def registry() -> Iterator[ModelRegistry]:
    registry = ModelRegistry(max_batch=4)
    registry.add("net", small_net(), (torch.zeros(1, 3, 32, 32),))
    registry.add("photo", Photographic().eval(), (torch.zeros(1, 3, 32, 32, dtype=torch.uint8),))
    yield registry
    registry.close()


@pytest.fixture(scope="module")
def transport(registry: ModelRegistry) -> Iterator[InProcessTransport]:
    with InProcessTransport(create_app(registry)) as transport:
        yield transport


def split(transport: InProcessTransport, **options: Any) -> ts.SplitModule:
    return ts.SplitModule(small_net(), torch.zeros(1, 3, 32, 32), server=transport, name="net", **options)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_lossless_codec_gives_the_models_bits_from_fewer_bytes(
    transport: InProcessTransport, channels_last: bool
) -> None:
    x = torch.randn(1, 3, 32, 32)
    if channels_last:
        x = x.to(memory_format=torch.channels_last)
    expected = small_net()(x)
    module = split(transport, codec="zstd", answer_codec="zstd")
    sent = {}
    for point in module.graph.points:
        module.partition = point.index
        assert torch.equal(module(x), expected), point
        sent[point.index] = module.last.sent_bytes
    module.codec, module.partition = "raw", 4
    module(x)
    assert sent[4] < 0.8 * module.last.sent_bytes


@pytest.mark.parametrize("codec", [name for name in codec_names() if not find_codec(name).lossless])
def test_a_lossy_codec_gives_nearly_the_models_answer(transport: InProcessTransport, codec: str) -> None:
    x = torch.randn(2, 3, 32, 32)
    expected = small_net()(x)
    module = split(transport, codec=codec, answer_codec="bfloat16", partition=2)
    likeness = torch.cosine_similarity(module(x), expected)
    assert (likeness > (0.98 if "int4" in codec else 0.999)).all()


@pytest.mark.parametrize("codec", ["png", "jpeg-95", "webp"])
def test_pictures_cross_as_pictures(transport: InProcessTransport, codec: str) -> None:
    y, x = torch.meshgrid(torch.arange(32), torch.arange(32), indexing="ij")
    image = torch.stack([x * 7, y * 7, (x + y) * 3]).to(torch.uint8)[None].repeat(2, 1, 1, 1)
    model = Photographic().eval()
    module = ts.SplitModule(model, image[:1], server=transport, name="photo", partition="server", codec=codec)
    answer = module(image)
    assert module.last.sent_bytes < image.nbytes
    if codec == "png":
        assert torch.equal(answer, model(image))
    else:
        assert torch.cosine_similarity(answer, model(image)).min() > 0.99


def test_a_module_refuses_a_codec_it_does_not_know(transport: InProcessTransport) -> None:
    with pytest.raises(CodecError, match="there is no codec 'zip'; there are raw, zstd"):
        split(transport, codec="zip")
    module = split(transport)
    with pytest.raises(CodecError, match="there is no codec 'int9'"):
        module.codec = "int9"


def test_a_server_lists_its_codecs(transport: InProcessTransport) -> None:
    assert transport.get_json("/v2/models/net")["parameters"]["codecs"] == list(codec_names())
    assert "torchsurgeon_codec" in transport.get_json("/v2")["extensions"]


def ask(transport: InProcessTransport, header: dict[str, Any], payload: bytes) -> dict[str, Any]:
    """The server's answer to a request that no client of ours would make."""
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 64)
    raw = transport._call(
        "POST",
        "/v2/models/net/infer",
        {wire.HEADER_LENGTH: str(len(text))},
        [text + payload],
        1 << 20,
        Deadline(20.0),
    )
    return {"status": raw.status, "error": json.loads(bytes(raw.body)).get("error") if raw.status != 200 else None}


def described(codec: object, size: int, shape: list[int], datatype: str = "FP32", name: str = "0") -> dict[str, Any]:
    parameters = {"binary_data_size": size, "codec": codec}
    return {"inputs": [{"name": name, "datatype": datatype, "shape": shape, "parameters": parameters}]}


INPUT = torch.randn(1, 3, 32, 32)
FRAME = zstandard.ZstdCompressor(write_checksum=True).compress(INPUT.numpy().data)
HUGE = [1, 3, 1 << 16, 1 << 16]


@pytest.mark.parametrize(
    ("codec", "payload", "shape", "status", "says"),
    [
        ("lzma", b"", [1], 400, "there is no codec 'lzma'; there are raw, zstd, float16"),
        (7, b"", [1], 400, "must be a codec's name; got 7"),
        (["zstd"], b"", [1], 400, "must be a codec's name"),
        ("zstd", FRAME[:-1], [1, 3, 32, 32], 400, "does not decode as zstd: its zstd frame is damaged"),
        ("zstd", FRAME[:-1] + bytes([FRAME[-1] ^ 1]), [1, 3, 32, 32], 400, "checksum"),
        ("zstd", FRAME, [1, 3, 32, 33], 400, "its shape takes 12672 bytes; got a zstd frame"),
        ("zstd", FRAME, HUGE, 413, "at most"),
        ("int8+zstd", FRAME, [1, 3, 32, 32], 400, "its shape takes 3080 bytes; got a zstd frame"),
        ("int8", bytes(3000), [1, 3, 32, 32], 400, "got 3000 bytes"),
        ("jpeg", bytes(3000), [1, 3, 32, 32], 400, "does not encode torch.float32"),
        ("zstd", bytes(20_000), [1, 3, 32, 32], 400, "declares binary_data_size 20000"),
    ],
)
def test_a_hostile_encoded_tensor_is_refused_with_the_reason(
    transport: InProcessTransport, codec: object, payload: bytes, shape: list[int], status: int, says: str
) -> None:
    name = ts.trace(small_net(), INPUT).inputs[0].name
    answer = ask(transport, described(codec, len(payload), shape, name=name), payload)
    assert answer["status"] == status
    assert says in answer["error"]


def test_a_bomb_costs_the_server_no_memory(transport: InProcessTransport) -> None:
    bomb = zstandard.ZstdCompressor(level=19, write_checksum=True).compress(bytes(256 << 20))
    assert len(bomb) < 32 << 10
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for shape in ([1, 3, 32, 32], [1 << 26], HUGE):
        assert ask(transport, described("zstd", len(bomb), shape), bomb)["status"] in (400, 413)
    grown_bytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown_bytes < 32 << 20


def test_many_small_bombs_in_one_message_are_one_large_one() -> None:
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(bytes(4 << 20))
    entry = described("zstd", len(frame), [1 << 20])["inputs"][0]
    header = json.dumps({"inputs": [{**entry, "name": str(k)} for k in range(8)]}).encode()
    with pytest.raises(BodyTooLargeError, match="input '2' has 4194304 bytes once zstd is decoded; at most 2097152"):
        wire.decode_request(header + frame * 8, len(header), max_decoded_bytes=10 << 20)


def test_numbers_in_json_have_no_codec() -> None:
    header = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1], "parameters": {"codec": "zstd"}}]}
    with pytest.raises(ProtocolError, match="has a codec but no binary_data_size"):
        wire.decode_request(json.dumps(header).encode())


def test_an_unknown_codec_asked_of_the_answer_is_refused(transport: InProcessTransport) -> None:
    with pytest.raises(RequestRefusedError, match=r"output_codec of the request: there is no codec 'lzw'") as refused:
        transport.infer("net", {}, max_answer_bytes=1 << 20, parameters={"output_codec": "lzw"})
    assert refused.value.status == 400


def test_a_client_that_names_no_codec_gets_and_sends_plain_tensors() -> None:
    x = torch.zeros(1, 64, 64)
    message = wire.encode_request({"x": x})
    assert b"codec" not in bytes(message.buffers[0])
    assert message.size_bytes > x.nbytes
    assert wire.decode_request(joined(message), message.header_bytes).output_codec is None


def test_each_tensor_may_have_its_own_codec() -> None:
    sent = {"a": torch.zeros(1, 4, 32, 32), "b": torch.arange(4000), "c": torch.randn(64, 64), "d": torch.tensor(7)}
    codecs = {"a": find_codec("zstd"), "b": find_codec("int8+zstd"), "c": find_codec("int4")}
    received = asked(sent, codecs=codecs).tensors
    assert list(received) == list(sent)
    for name in "abd":
        assert torch.equal(received[name], sent[name])
        assert received[name].dtype == sent[name].dtype
    assert 0 < (received["c"] - sent["c"]).abs().max() < 0.5


@pytest.mark.filterwarnings("ignore:.*quantize.*deprecated.*:UserWarning")
def test_a_quantized_tensor_is_compressed_without_loss() -> None:
    tensor = torch.quantize_per_tensor(torch.randn(2, 8, 16, 16).relu(), 0.1, 3, torch.quint8)
    for name in ("zstd", "int8+zstd", "png"):
        back = asked({"x": tensor}, codecs={"x": find_codec(name)}).tensors["x"]
        assert torch.equal(back.int_repr(), tensor.int_repr())
        assert (back.q_scale(), back.q_zero_point()) == (tensor.q_scale(), tensor.q_zero_point())


def test_an_answer_that_decodes_to_more_than_expected_is_refused() -> None:
    outputs = {"output": torch.zeros(1 << 20)}
    message = wire.encode_response("net", "1", outputs, codec=find_codec("zstd"))
    assert message.size_bytes < 4096
    body = joined(message)
    assert torch.equal(wire.decode_response(body, message.header_bytes).tensors["output"], outputs["output"])
    with pytest.raises(BodyTooLargeError, match="at most 1000 are accepted"):
        wire.decode_response(body, message.header_bytes, max_decoded_bytes=1000)


def test_headers_of_compressed_tensors_push_no_others_out_of_memory() -> None:
    for name, recurs in (("raw", True), ("int8", True), ("zstd", False), ("int8+zstd", False)):
        request = asked({"x": torch.randn(1, 8, 16, 16).relu()}, codecs={"x": find_codec(name)})
        assert (request.recurring is not None) == recurs
