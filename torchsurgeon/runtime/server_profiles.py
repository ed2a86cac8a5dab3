"""By which backends a server may be asked to run tails, and what it takes by each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from urllib.parse import quote

from torchsurgeon.errors import BackendError
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.transport import Transport


class ServerProfiles:
    """The backends of one server for one model, and their layer times.

    Args:
        transport: how to reach the server.
        name: the model's name there.
        given: the layer times, if they are known already. The server is not asked for others then.
        backend: the backend that is to run tails; ``"auto"`` to choose; None for the server's own choice.
        tolerance: how far the answers of a backend that is chosen may be from eager PyTorch's.

    Attributes:
        by_backend: the layer times, by backend.
        told: the backends, as the server told at the last handshake, its own choice first, each with how far its
            answers may be from eager PyTorch's; empty where it does not say.
    """

    def __init__(
        self, transport: Transport, name: str, given: Sequence[LayerProfile], backend: str | None, tolerance: float
    ) -> None:
        self._transport, self._name, self._backend, self._tolerance = transport, name, backend, tolerance
        self.by_backend = {profile.backend: profile for profile in given}
        self.told: Mapping[str, float] = {}
        self.lacking: list[str] = []
        """The wanted backends of which it is not known yet what they take."""
        self._asks = not given

    def agree(self, told: Mapping[str, float], label: str) -> None:
        """Take what a server told at a handshake.

        Raises:
            BackendError: it does not have the backend that is to run tails.
        """
        self.told = told
        self._look()
        if self._backend not in (None, "auto", *(told or ["eager"])):
            raise BackendError(
                f"{label} does not run model {self._name!r} by backend {self._backend!r}, but by "
                f"{', '.join(told) or 'eager'}; start it with --backend {self._name}={self._backend}, or leave out "
                "server_backend"
            )

    @property
    def wanted(self) -> list[str]:
        """The backends by which the server may be asked to run tails, its own choice first."""
        names = list(self.told) or ["eager"]
        if self._backend is None:
            return names[:1]
        if self._backend != "auto":
            return [self._backend]
        return [name for name in names if self.told.get(name, 0.0) <= self._tolerance]

    @property
    def usable(self) -> tuple[LayerProfile, ...]:
        """The layer times of the wanted backends; all that are known, until one of these is."""
        known = [self.by_backend[name] for name in self.wanted if name in self.by_backend]
        return tuple(known) or tuple(self.by_backend.values())

    def fetch(self, backend: str | None = None, *, timeout_s: float | None = None) -> LayerProfile:
        """Ask the server for its layer times.

        Args:
            backend: by which backend; None for eager PyTorch.
            timeout_s: seconds that it may take; the transport's by default.

        Raises:
            ServerError: it does not answer, refuses, or still measures.
            ProfileError: it answers something else.
        """
        query = "" if backend is None else f"?backend={quote(backend, safe='')}"
        path = f"/v2/models/{self._name}/profile{query}"
        return LayerProfile.from_json(self._transport.get_json(path, timeout_s=timeout_s))

    def keep(self, eager: LayerProfile) -> None:
        """Keep the layer times in eager PyTorch, which ``fetch()`` returned."""
        self.by_backend["eager"] = eager
        self._look()

    def complete(self) -> bool:
        """Ask for the layer times of the wanted backends that are not known yet, and return whether any is now.

        Raises:
            ServerError, ProfileError: as ``fetch()`` raises them.
        """
        before = len(self.by_backend)
        try:
            for name in self.lacking:
                self.by_backend[name] = self.fetch(name)
        finally:
            self._look()
        return len(self.by_backend) > before

    def _look(self) -> None:
        # Only a server that tells of backends can be asked what it takes by them.
        known = self.by_backend if self._asks and self.told else self.wanted
        self.lacking = [name for name in self.wanted if name not in known]

    def to_name(self, chosen: str | None) -> str | None:
        """Return the backend to name in a request; None for the server's own.

        Args:
            chosen: the one that the choice of the cut rests on; None where nothing was chosen.
        """
        name = chosen if self._backend == "auto" else self._backend
        return name if name in self.told else None
