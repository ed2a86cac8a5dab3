"""The demo's other side: torchsurgeon's own commands as processes, and a slow device's way to them."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from queue import Empty, SimpleQueue
from typing import Any, cast

from torch import Tensor

from torchsurgeon.codec import Codec, EncodedTensor
from torchsurgeon.emulate import SlowDevice
from torchsurgeon.errors import ServerUnavailableError
from torchsurgeon.transport import Answer, HttpTransport

_START_S = 120.0


@contextlib.contextmanager
def command(*arguments: str) -> Iterator[Callable[[str], str]]:
    """Run a torchsurgeon command within the context.

    Yields:
        A function that waits for an output line in which a pattern is found, and returns the pattern's first group.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "torchsurgeon", *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    lines: SimpleQueue[str | None] = SimpleQueue()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line)
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    seen: list[str] = []

    def wait(pattern: str) -> str:
        while True:
            try:
                line = lines.get(timeout=_START_S)
            except Empty:
                line = None
            if line is None:
                said = "".join(seen[-20:]) or "(nothing)"
                raise ServerUnavailableError(
                    f"torchsurgeon {' '.join(arguments)} is not ready: it ended, or said nothing for {_START_S:g} s. "
                    f"Its last lines were:\n{said}"
                )
            seen.append(line)
            found = re.search(pattern, line)
            if found:
                return found[1]

    try:
        yield wait
    finally:
        process.terminate()
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        reader.join()
        process.stdout.close()  # type: ignore[union-attr]


class SlowTransport(HttpTransport):
    """The way of a slow device to a server: encoding takes as much longer as everything else on the device.

    Args:
        url: the server's URL.
        timeout_s: seconds that each call as a whole may take.
        device: the slow device.
    """

    def __init__(self, url: str, timeout_s: float, device: SlowDevice) -> None:
        super().__init__(url, timeout_s)
        self._device = device

    def infer(
        self, model: str, tensors: Mapping[str, Tensor], *, codecs: Mapping[str, Codec] | None = None, **options: Any
    ) -> Answer:
        """Do what ``Transport.infer()`` does, with slower codecs."""
        slowed = {name: cast(Codec, _SlowCodec(codec, self._device)) for name, codec in (codecs or {}).items()}
        return super().infer(model, tensors, codecs=slowed, **options)


class _SlowCodec:
    """A codec that encodes as slowly as a device computes."""

    def __init__(self, codec: Codec, device: SlowDevice) -> None:
        self._codec, self._device = codec, device

    def encode(self, *arguments: Any) -> EncodedTensor:
        return self._device.call(self._codec.encode, *arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)
