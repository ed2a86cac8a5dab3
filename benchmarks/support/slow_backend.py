"""A backend of an emulated device: it computes what another backend computes, as slowly as that device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchsurgeon.backends import Backend, Part
from torchsurgeon.backends.backend import Run
from torchsurgeon.emulate import SlowDevice


class SlowBackend(Backend):
    """Another backend, with every call made as long as on a slow device.

    Args:
        backend: the other backend, whose name and tolerance it has.
        device: the slow device.
    """

    def __init__(self, backend: Backend, device: SlowDevice) -> None:
        self._backend, self._device = backend, device
        self.name, self.device, self.tolerance = backend.name, backend.device, backend.tolerance
        self.keeps_bits, self.free_batch = backend.keeps_bits, backend.free_batch
        self.copies_weights, self.packages = backend.copies_weights, backend.packages
        super().__init__()

    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Return what the other backend builds, slowed down."""
        run = self._backend.build(part, example, free_batch=free_batch)

        def slowly(*tensors: Tensor) -> Sequence[Tensor]:
            return self._device.call(run, *tensors)

        return slowly
