"""The backends by which one model's tails may be run on this server."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchsurgeon.backends import Backend
from torchsurgeon.backends.eager import Eager
from torchsurgeon.cutting.segment import Segment
from torchsurgeon.errors import ModelNotReadyError, ProtocolError, short
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.serve.builder import TailBuilder
from torchsurgeon.tracing.graph import LayerGraph


class TailBackends:
    """Runs tails by one of several backends: eager PyTorch, which every model has, and those that were asked for.

    Args:
        name: the model's name.
        graph: the traced model.
        backends: the backends, this server's own choice first; none for eager PyTorch alone.
        capacity: how many built tails of each backend to keep.

    Attributes:
        own: the name of this server's own choice.
        builders: what builds tails, by the names of the backends that build any.
    """

    def __init__(self, name: str, graph: LayerGraph, backends: Sequence[Backend], capacity: int) -> None:
        self._name = name
        self._known = {backend.name: backend for backend in (*backends, Eager())}
        self.own = next(iter(self._known))
        self.builders = {
            each.name: TailBuilder(name, graph, each, capacity) for each in backends if not isinstance(each, Eager)
        }

    def __str__(self) -> str:
        """Return what runs the tails of devices that do not ask for another backend, in words."""
        judge = self._known[self.own].judge
        return self.own if judge is None else f"{self.own} where it keeps the budget ({judge.budget})"

    def told(self) -> list[dict[str, Any]]:
        """Return the backends as the fingerprint names them, with how far their answers may be from eager PyTorch's."""
        return [{"name": name, "tolerance": backend.tolerance} for name, backend in self._known.items()]

    def changing(self) -> dict[str, bool]:
        """Return by the name of each backend whether it changes the bits of eager PyTorch."""
        return {name: not backend.keeps_bits for name, backend in self._known.items()}

    def run(self, wanted: object, names: tuple[str, ...], tail: Segment) -> Callable[..., Sequence[Tensor]]:
        """Return what runs a tail.

        Args:
            wanted: the backend that a request names; None for this server's own choice.
            names: the names of the tensors that the tail takes.
            tail: the tail.

        Raises:
            ProtocolError: the model is not served by this backend.
        """
        builder = self.builders.get(self.chosen(wanted))
        return tail.forward if builder is None else builder.run(names, tail)

    def profile(self, wanted: str | None, eager: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the JSON of what heads and tails take by a backend.

        Args:
            wanted: the backend; None for eager PyTorch.
            eager: returns that of eager PyTorch.

        Raises:
            ProtocolError: the model is not served by this backend.
            ModelNotReadyError: it is being measured, in the background.
        """
        builder = None if wanted is None else self.builders.get(self.chosen(wanted))
        if builder is None:
            return eager()
        if builder.profile is None:
            if not builder.measuring:
                builder.measure(LayerProfile.from_json(eager()))
            raise ModelNotReadyError(
                f"what model {self._name!r} takes by backend {wanted!r} is being measured; ask again in some seconds"
            )
        return builder.profile

    def close(self) -> None:
        """End the threads that build, after what they build now."""
        for builder in self.builders.values():
            builder.close()

    def chosen(self, wanted: object) -> str:
        """Return the name of the backend that runs a tail.

        Args:
            wanted: the backend that a request names; None for this server's own choice.

        Raises:
            ProtocolError: the model is not served by this backend.
        """
        if wanted is None:
            return self.own
        if not isinstance(wanted, str) or wanted not in self._known:
            raise ProtocolError(
                f"model {self._name!r} is served by {', '.join(self._known)}; got backend {short(wanted, 100)}"
            )
        return wanted
