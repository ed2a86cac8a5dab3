"""The tail of a network behind LitServe, run by the Python of an environment that has LitServe and PyTorch.

    PYTHON -m benchmarks.support.litserve_tail NETWORK PORT WORKERS BATCH DEVICE

A request is a form with the tensor's bytes as a file, and its answer are the plain bytes of the result. Requests that
wait are joined, as LitServe does it: those that come within a moment become one batch.
"""

from __future__ import annotations

import sys

import litserve
import torch
from fastapi import Response
from torch import Tensor

from benchmarks.support.load_networks import network

_BATCH_TIMEOUT_S = 0.002


class Tail(litserve.LitAPI):  # type: ignore[misc]
    """The tail of the network of a name."""

    def __init__(self, name: str, batch: int) -> None:
        super().__init__(max_batch_size=batch, batch_timeout=_BATCH_TIMEOUT_S)
        self._name = name

    def setup(self, device: str) -> None:
        torch.set_num_threads(1)
        found = network(self._name, device)
        (sent,) = found.tensors.values()
        self._shape, self._tail, self._device = sent.shape, found.tail, device

    # LitServe reads a request as its annotation says, and only one without an annotation may be a form.
    def decode_request(self, request) -> Tensor:  # type: ignore[no-untyped-def]
        data = bytearray(request["data"].file.read())
        return torch.frombuffer(data, dtype=torch.float32).view(self._shape)

    def batch(self, inputs: list[Tensor]) -> Tensor:
        return torch.cat(inputs)

    def predict(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            (result,) = self._tail(x.to(self._device))
        return result.cpu()  # type: ignore[no-any-return]

    def unbatch(self, output: Tensor) -> list[Tensor]:
        return list(output)

    def encode_response(self, output: Tensor):  # type: ignore[no-untyped-def]
        return Response(output.numpy().tobytes(), media_type="application/octet-stream")


if __name__ == "__main__":
    name, port, workers, batch = sys.argv[1], *map(int, sys.argv[2:5])
    server = litserve.LitServer(Tail(name, batch), accelerator=sys.argv[5], devices=1, workers_per_device=workers)
    server.run(host="127.0.0.1", port=port, num_api_servers=1, log_level="error", generate_client_file=False)
