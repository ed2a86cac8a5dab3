"""A backend of an emulated device: it computes what another backend computes, as slowly as that device."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchsurgeon.backends import Backend, Part
from torchsurgeon.backends.backend import Run
from torchsurgeon.backends.eager import Eager
from torchsurgeon.backends.leading import Leading
from torchsurgeon.emulate import SlowDevice
from torchsurgeon.errors import BackendError


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
        """Return what the other backend builds, with what eager PyTorch runs behind a refused layer, slowed down.

        It takes the whole part for that: what runs behind a backend is not called through it.
        """
        run = self._whole(part, example, free_batch)

        def slowly(*tensors: Tensor) -> Sequence[Tensor]:
            return self._device.call(run, *tensors)

        return slowly

    def _whole(self, part: Part, example: Sequence[Tensor], free_batch: bool) -> Run:
        leading = Leading.of(part)
        while leading is not None:
            try:
                return leading.build(self._backend, example, free_batch=free_batch)
            except BackendError as error:
                leading = leading.before(error.layer)
        return Eager().build(part, example, free_batch=free_batch)
