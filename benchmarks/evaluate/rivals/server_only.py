"""Everything on an ordinary inference server: Starlette and uvicorn by hand, asked by `requests`.

The picture goes as lists of numbers in JSON, as its plain bytes, as PNG, or as JPEG, which changes it. The server runs
the network in eager PyTorch, or in OpenVINO with bfloat16.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy
import requests
import torch
from PIL import Image
from torch import Tensor

from benchmarks.evaluate.rivals.rival import Rival
from benchmarks.support.servers import by_starlette
from torchsurgeon.emulate import LinkEmulator, SlowDevice
from torchsurgeon.link import PRESETS

Network = Callable[[Tensor], Tensor]
JPEG_QUALITY = 90


def _as_json(picture: Tensor) -> bytes:
    return json.dumps(picture.tolist()).encode()


def _from_json(body: bytes) -> Tensor:
    return torch.tensor(json.loads(body), dtype=torch.uint8)


def _as_raw(picture: Tensor) -> bytes:
    return picture.numpy().tobytes()


def _as_image(kind: str, **options: Any) -> Callable[[Tensor], bytes]:
    def encode(picture: Tensor) -> bytes:
        out = io.BytesIO()
        Image.fromarray(picture[0].permute(1, 2, 0).numpy()).save(out, kind, **options)
        return out.getvalue()

    return encode


def _from_image(body: bytes) -> Tensor:
    pixels = numpy.array(Image.open(io.BytesIO(body)))
    return torch.from_numpy(pixels).permute(2, 0, 1)[None].contiguous()


ENCODERS: dict[str, Callable[[Tensor], bytes]] = {
    "json": _as_json,
    "raw": _as_raw,
    "png": _as_image("png"),
    "jpeg": _as_image("jpeg", quality=JPEG_QUALITY),
}
FORMS = {
    "json": "server, JSON",
    "raw": "server, plain bytes",
    "png": "server, PNG",
    "png, bf16": "server, PNG, OpenVINO bf16",
    "jpeg": "server, JPEG (changes the picture)",
}
"""The forms of request, and what tables call them."""


def serve(eager: Network, bf16: Network, shape: torch.Size) -> dict[str, int]:
    """Serve a network for each form of request, and return the ports."""

    def raw(body: bytes) -> Tensor:
        return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)

    def plain(decode: Callable[[bytes], Tensor], network: Network) -> Callable[[bytes], bytes]:
        @torch.inference_mode()
        def answer(body: bytes) -> bytes:
            return network(decode(body)).numpy().tobytes()

        return answer

    @torch.inference_mode()
    def by_json(body: bytes) -> bytes:
        return json.dumps(eager(_from_json(body)).tolist()).encode()

    return {
        "json": by_starlette(by_json),
        "raw": by_starlette(plain(raw, eager)),
        "png": by_starlette(plain(_from_image, eager)),
        "png, bf16": by_starlette(plain(_from_image, bf16)),
        "jpeg": by_starlette(plain(_from_image, eager)),
    }


class OnServer(Rival):
    """A whole network on a server, asked over HTTP.

    Args:
        form: how the picture goes, of ``FORMS``.
        port: the server's port.
        example: the picture.
        device: the slow device, which encodes it.
        stack: closes the link and the connection.
    """

    def __init__(self, form: str, port: int, example: Tensor, device: SlowDevice, stack: ExitStack) -> None:
        super().__init__(FORMS[form])
        self._form, self._example, self._device = form, example, device
        self.lossless = form != "jpeg"
        self.emulators = [stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS["wifi"]))]
        self._session = stack.enter_context(requests.Session())
        self._session.trust_env = False
        self._url = f"http://127.0.0.1:{self.emulators[0].port}/infer"

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        body = self._device.call(ENCODERS[self._form.partition(",")[0]], self._example)
        answered = self._session.post(self._url, data=body)
        answered.raise_for_status()
        if self._form == "json":
            return torch.tensor(answered.json())
        return torch.frombuffer(bytearray(answered.content), dtype=torch.float32)[None]

    def chosen(self) -> str:
        """Return where it cuts."""
        return "server"
