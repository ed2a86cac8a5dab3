"""What a SplitModule was asked to do, as its user gave it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchsurgeon._cached import cached_property
from torchsurgeon.adapting import Decision
from torchsurgeon.backends import Backend as NamedBackend
from torchsurgeon.codec import Codec, CodecTable
from torchsurgeon.link import Link
from torchsurgeon.planning import Battery, Objective, Row
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime.auto import AutoBackend
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.runtime.parts import Backend


@dataclass(frozen=True, eq=False)
class Options:
    """The arguments of ``SplitModule``, checked and resolved; its docstring says what each does.

    Attributes:
        name: the model's name on its servers.
        example: the positional and keyword arguments that the model was traced with.
        falls_back: whether the device answers a call when no server does (``fallback="local"``).
        leaf_modules: the modules that are kept whole, as ``trace()`` takes them.
        verify: whether what is traced is compared with the model.
        server_backend: the backend by which servers are asked to run tails; ``"auto"`` to choose; None for their own.
        tolerance: how far a backend that is chosen may deviate from eager PyTorch, as ``Backend.tolerance`` counts.
        hourly_bytes: the most bytes that are sent in an hour; None for no bound.
        token, ca, cert: how servers that are given by their URLs are reached, as ``HttpTransport`` takes them; ``ca``
            is its ``verify``.
        priority: the priority of requests to them, one of ``wire.PRIORITIES``; None to tell none.
        rounded_because: why even what this device computes has not the model's own bits; empty where it has.
    """

    name: str
    example: tuple[tuple[Any, ...], Mapping[str, Any]]
    falls_back: bool
    objective: Objective | Battery
    codec: Codec | Lossless
    answer_codec: Codec
    codecs: CodecTable | None
    backend: Backend | None
    link: Link | None
    device_profiles: tuple[LayerProfile, ...]
    server_profiles: tuple[LayerProfile, ...]
    timeout_s: float
    on_replan: Callable[[Decision[Row]], object] | None
    exact: bool
    server_backend: str | None = None
    tolerance: float = 0.0
    hourly_bytes: float | None = None
    leaf_modules: Sequence[str | type[nn.Module]] = ()
    verify: bool = True
    token: str | None = None
    ca: bool | str = True
    cert: str | tuple[str, str] | None = None
    priority: str | None = None

    @cached_property
    def rounded_because(self) -> tuple[str, ...]:
        if isinstance(self.backend, AutoBackend):
            changing = [name for name, backend in self.backend.candidates.items() if not backend.keeps_bits]
            return (f"heads and tails may run by {', '.join(changing)}",) if changing else ()
        if isinstance(self.backend, NamedBackend):
            if self.backend.keeps_bits:
                return ()
            return (f"backend {self.backend.name} computes heads and tails in another way",)
        return () if self.backend is None else ("compile= or backend= runs the heads and tails in another way",)
