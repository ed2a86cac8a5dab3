"""Makes a server ready to be asked: shakes hands with it, and measures what choosing a cut rests on."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
from torch import Tensor

from torchsurgeon.cutting import cut
from torchsurgeon.errors import NoisyProfileWarning, ServerUnavailableError, warn_caller
from torchsurgeon.planning import Frontier
from torchsurgeon.planning.rows import LayerCosts
from torchsurgeon.planning.sides import with_joules
from torchsurgeon.profiling import LayerProfile, profile
from torchsurgeon.runtime.choice import COMPILED_GAIN, Adaptive
from torchsurgeon.runtime.device import DeviceTimes
from torchsurgeon.runtime.handshake import LocalModel
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.parts import Parts
from torchsurgeon.runtime.peer import Peer
from torchsurgeon.runtime.servers import Servers
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.transport.deadline import Deadline
from torchsurgeon.transport.link_probe import measure_link


def _left_s(deadline: Deadline) -> float:
    try:
        return deadline.left_s()
    except TimeoutError:
        raise ServerUnavailableError(f"the server was not made ready within {deadline.timeout_s:g} s") from None


def _tell(noise: NoisyProfileWarning) -> None:
    """Warn of layer times that were measured while this device was busy, with what its user can do."""
    advice = "the cut is chosen by rough layer times until calls have corrected them; device_profile= gives better ones"
    warn_caller(NoisyProfileWarning(noise.finding, advice))


class Connector:
    """Connects to the servers of one model. Thread-safe.

    Attributes:
        ping_tensors: the boundary tensors of the ping, which is the smallest inference there is; empty until
            ``prepare_ping()``.
        ping_index: the index of the partition point that the ping cuts at.
    """

    def __init__(self, options: Options, local: LocalModel, parts: Parts, times: DeviceTimes, servers: Servers) -> None:
        self._options, self._local, self._parts, self._times, self._servers = options, local, parts, times, servers
        self.ping_tensors: dict[str, Tensor] = {}
        self.ping_index = 0
        self._boundary: tuple[PartitionPoint, dict[str, Tensor]] | None = None
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold."""
        self._measuring = threading.Lock()

    def connect(self, peer: Peer, timeout_s: float | None = None) -> None:
        """Make a server ready to be asked.

        Raises:
            ServerError: it does not answer, or holds another model.
            ProtocolError: it answers something else than the protocol says.
        """
        deadline = Deadline(math.inf if timeout_s is None else timeout_s)
        epoch = peer.shake(timeout_s)
        if self._servers.chooses and not peer.plans(self._servers.planned_for):
            self._plan(peer, None if timeout_s is None else deadline)
        peer.answered()
        peer.ready_in = epoch

    def plan_again(self, peer: Peer) -> None:
        """Choose among the cuts by what is known now of backends, if there is a choice with this server already."""
        if self._servers.chooses and peer.plans(self._servers.planned_for):
            self._plan(peer)

    def _plan(self, peer: Peer, deadline: Deadline | None = None) -> None:
        only = self._servers.planned_for
        frontier = self.frontier(peer, only, deadline)
        goal = self._servers.goal
        plan = Adaptive(
            self._local.graph,
            frontier,
            peer.profiles.usable[0],
            goal,
            own_codec=self._options.codecs is not None,
            least_gain=0.0 if self._options.backend is None else COMPILED_GAIN,
            on_change=self._options.on_replan,
        )
        peer.plan, peer.planned_for = plan, only

    def frontier(self, peer: Peer, only: PartitionPoint | None = None, deadline: Deadline | None = None) -> Frontier:
        """Measure what is not known yet of device, server and link, and return the rows to choose from.

        Args:
            peer: the server.
            only: the cut whose codecs are to be chosen among; None for all cuts.
            deadline: when the server's profile has to be there; None for as long as its transport waits.
        """
        with self._measuring:
            # Of a server whose backend's profile is not known yet, the one in eager PyTorch does at first.
            timeout_s = None if deadline is None else min(_left_s(deadline), peer.transport.timeout_s)
            fetched = None if peer.profiles.by_backend else peer.profiles.fetch(timeout_s=timeout_s)
            servers = peer.profiles.usable if fetched is None else (fetched,)
            self.profile_device()
            devices: Sequence[LayerProfile] = self._times.usable
            if self._servers.goal.needs_joules:
                devices = with_joules(devices)
            if peer.link is None:
                # A call stops waiting for it at its deadline, but does not end it: every call would begin it anew, and
                # over a slow link none would ever be done with it.
                peer.adopt(measure_link(peer.transport, spend=peer.allowance.spend))
            graph, codecs = self._local.graph, peer.decodable(self._options.codecs)
            if only is None:
                frontier = Frontier.build(graph, devices, servers, codecs)
            else:
                frontier = Frontier.of(graph, LayerCosts(graph, devices, servers).rows_at(only, codecs))
            # Kept only now that it has been found to fit: the profile of another model would spoil every later try.
            if fetched is not None:
                peer.profiles.keep(fetched)
            return frontier

    def profile_device(self) -> LayerProfile:
        """Return the layer times of this device in eager PyTorch, or as given; they are measured first if unknown."""
        times, graph = self._times, self._local.graph
        if times.profile is None:
            meter = "auto" if self._servers.goal.needs_joules else None
            times.profiles = (
                profile(graph, inputs=graph.tensors_of_call(*times.example), meter=meter, on_noise=_tell),
            )
        return next((known for known in times.profiles if known.backend == "eager"), times.profiles[0])

    def prepare_ping(self) -> None:
        """Choose the point in the second half of the model that sends least, and compute its boundary tensors once.

        A ping there is light on the link and on the server, and waits in the server's queue as every inference does.
        """
        if self.ping_tensors:
            return
        graph = self._local.graph
        late = [point for point in graph.points[:-1] if 2 * point.index >= len(graph.layers)]
        point = min(late or graph.points[:1], key=lambda point: point.size_bytes)
        self.ping_index = point.index
        self.ping_tensors = self._computed(point)

    def boundary(self, point: PartitionPoint) -> dict[str, Tensor]:
        """Return the boundary tensors of the example at a point; those of the last such point are kept."""
        # Read once, since another thread may forget it meanwhile.
        known = self._boundary
        if known is None or known[0] != point:
            with torch.inference_mode(False), torch.no_grad():
                known = self._boundary = point, self._computed(point)
        return known[1]

    def _computed(self, point: PartitionPoint) -> dict[str, Tensor]:
        # In eager PyTorch: compiling a head for pings alone would not pay.
        head, (args, kwargs) = cut(self._local.graph, point).head, self._times.example
        return dict(zip((spec.name for spec in point.tensors), head(*args, **kwargs), strict=True))

    def forget_parts(self) -> None:
        """Forget the cut parts and the ping, since the model's tensors have been replaced."""
        self._parts.clear()
        self._local.arithmetic.forget()
        self.ping_tensors = {}
        self._boundary = None

    def renew(self, *, in_full: bool = False) -> None:
        """Notice weights that have changed: hands are then shaken again, and the parts cut again.

        Args:
            in_full: True to read all weights, which takes a while for a large model.
        """
        if self._local.renew(in_full=in_full):
            self.forget_parts()
