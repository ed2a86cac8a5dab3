"""Codecs on an NVIDIA GPU. Apart from the others, so that they can run on a machine without zstandard."""

from __future__ import annotations

import pytest
import torch

import torchsurgeon as ts
from torchsurgeon import _native
from torchsurgeon.codec import codec_names, find_codec
from torchsurgeon.codec.host import on_host

NUMERIC = [name for name in codec_names() if find_codec(name).image is None]


@pytest.mark.cuda
@pytest.mark.parametrize("name", NUMERIC)
def test_values_are_packed_and_unpacked_on_the_gpu(name: str) -> None:
    if "zstd" in name:
        pytest.importorskip("zstandard")
    tensor = torch.randn(2, 16, 33, 33).to(memory_format=torch.channels_last)
    decoded = []
    for source in (tensor.cuda(), tensor):
        encoded = find_codec(name).encode(source)
        decoded.append(
            find_codec(encoded.codec).decode(
                encoded.data,
                tensor.dtype,
                tensor.shape,
                encoded.order,
                max_bytes=tensor.nbytes,
                device=source.device.type,
            )
        )
    on_gpu, on_cpu = decoded
    assert on_gpu.is_cuda
    assert on_gpu.stride() == tensor.stride()
    step = float(tensor.max() - tensor.min()) / (15 if "int4" in name else 255)
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=step * 1.001)


@pytest.mark.cuda
def test_tensors_leave_the_gpu_as_they_are_when_the_callers_stream_has_made_them() -> None:
    for shape, layout in (((1, 64, 512, 512), torch.contiguous_format), ((2, 16, 65, 65), torch.channels_last)):
        source = torch.randn(shape).to(memory_format=layout)
        weight = torch.randn(2048, 2048, device="cuda")
        tensor = torch.empty_like(source, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(50):
                weight = weight @ weight
            tensor.copy_(source, non_blocking=True)
            host = on_host(tensor)
            tensor.zero_()
        assert host.is_pinned()
        assert host.stride() == source.stride()
        assert torch.equal(host, source)
        part = on_host(tensor[:, 1:, ::2])
        assert torch.equal(part, torch.zeros_like(part))


@pytest.mark.cuda
def test_a_codec_is_fitted_and_used_on_the_gpu() -> None:
    if not _native.available():
        pytest.skip("the extension is not built")
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 12, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(12 * 26 * 26, 10)
    model = torch.nn.Sequential(*layers).eval().cuda()
    sample = list(torch.randn(32, 3, 28, 28, device="cuda").split(1))
    graph = ts.trace(model, sample[0])
    codec = ts.fit_codec(graph, "1", sample).at(3)
    with torch.no_grad():
        (tensor,) = ts.cut(graph, "1").head(sample[0])
    encoded = codec.encode(tensor)
    assert encoded.codec == codec.name
    there, here = (
        codec.decode(encoded.data, tensor.dtype, tensor.shape, None, max_bytes=tensor.nbytes, device=device)
        for device in ("cuda", "cpu")
    )
    assert there.is_cuda
    assert torch.allclose(there.cpu(), here, atol=1e-4)
    assert torch.cosine_similarity(there.flatten(), tensor.flatten(), dim=0) > 0.99
