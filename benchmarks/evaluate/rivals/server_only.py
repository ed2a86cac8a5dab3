"""Everything on an ordinary inference server: Starlette and uvicorn by hand, asked by `requests`.

The picture goes as lists of numbers in JSON, as its plain bytes, as these compressed by Zstandard, as PNG, or as JPEG,
which changes it. The server runs the network in eager PyTorch, in ONNX Runtime, or in OpenVINO with bfloat16.
"""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy
import requests
import torch
import zstandard
from PIL import Image
from torch import Tensor

from benchmarks.evaluate.rivals.rival import UNDER_WAY, Rival, steady_rate
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


def _as_zstd(picture: Tensor) -> bytes:
    return zstandard.compress(picture.numpy().tobytes())


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
    "zstd": _as_zstd,
    "png": _as_image("png"),
    "jpeg": _as_image("jpeg", quality=JPEG_QUALITY),
}
FORMS = {
    "json": "server, JSON",
    "raw": "server, plain bytes",
    "raw, ort": "server, plain bytes, ONNX Runtime",
    "zstd, ort": "server, zstd, ONNX Runtime",
    "png": "server, PNG",
    "png, bf16": "server, PNG, OpenVINO bf16",
    "jpeg": "server, JPEG (changes the picture)",
}
"""The forms of request, and what tables call them."""


def serve(eager: Network, ort: Network, bf16: Network, shape: torch.Size) -> dict[str, int]:
    """Serve a network for each form of request, and return the ports.

    Args:
        eager: the network by eager PyTorch.
        ort: the network by ONNX Runtime.
        bf16: the network by OpenVINO in bfloat16.
        shape: the picture's shape.
    """

    def raw(body: bytes) -> Tensor:
        return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)

    def decompressed(body: bytes) -> Tensor:
        return raw(zstandard.decompress(body))

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
        "raw, ort": by_starlette(plain(raw, ort)),
        "zstd, ort": by_starlette(plain(decompressed, ort)),
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
        # JSON would take minutes over 3G, and is far from the quickest.
        self.streams = form != "json"
        self.emulators = [stack.enter_context(LinkEmulator(0, "127.0.0.1", port, PRESETS["wifi"]))]
        # In a stream each request is sent by a thread with a connection of its own.
        self._sessions = [stack.enter_context(requests.Session()) for _ in range(UNDER_WAY)]
        for session in self._sessions:
            session.trust_env = False
        # The device has one core, on which one request after the other is encoded.
        self._encoding = threading.Lock()
        self._url = f"http://127.0.0.1:{self.emulators[0].port}/infer"

    def infer(self) -> Tensor:
        """Return the network's answer for its example."""
        return self._asked(self._sessions[0])

    def before_stream(self, count: int) -> None:
        """Open a connection for each thread."""
        for session in self._sessions:
            self._asked(session)

    def rate(self, count: int) -> float:
        """Return how many answers come in a second of so many, which several threads ask for."""
        came_s: list[float] = []
        left = iter(range(count))

        def ask(session: requests.Session) -> None:
            for _ in left:
                self._asked(session)
                came_s.append(time.perf_counter())

        threads = [threading.Thread(target=ask, args=(session,)) for session in self._sessions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return steady_rate(came_s)

    def _asked(self, session: requests.Session) -> Tensor:
        with self._encoding:
            body = self._device.call(ENCODERS[self._form.partition(",")[0]], self._example)
        answered = session.post(self._url, data=body)
        answered.raise_for_status()
        if self._form == "json":
            return torch.tensor(answered.json())
        return torch.frombuffer(bytearray(answered.content), dtype=torch.float32)[None]

    def chosen(self) -> str:
        """Return where it cuts."""
        return "server"
