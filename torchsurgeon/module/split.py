"""SplitModule: a model whose head runs on this device and whose tail runs on a server."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import nn

from torchsurgeon.adapting import Decision
from torchsurgeon.backends import Backend as NamedBackend
from torchsurgeon.backends.eager import Eager
from torchsurgeon.codec import Codec, CodecTable, find_codec
from torchsurgeon.errors import PartitionError, ServerUnavailableError, short
from torchsurgeon.link import Link
from torchsurgeon.module.arguments import (
    ServerAddress,
    addresses_of,
    backend_of,
    check_codecs,
    check_exact,
    check_options,
    check_priority,
    check_server_backend,
    codec_name,
    codec_of,
    link_of,
)
from torchsurgeon.module.calls import Calls
from torchsurgeon.module.deadlines import Deadlines
from torchsurgeon.planning import Battery, Objective, Row
from torchsurgeon.planning.sides import as_profiles
from torchsurgeon.profiling import LayerProfile
from torchsurgeon.runtime import Backend, Engine, Options
from torchsurgeon.runtime.auto import AutoBackend
from torchsurgeon.runtime.lossless import Lossless
from torchsurgeon.tracing.call import call_of
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import PartitionPoint
from torchsurgeon.tracing.tracer import trace


class SplitModule(Calls):
    """A model of which a part runs on this device and the rest on a server, with the model's own answer.

    The first call, or ``prepare()``, compares the graph and the weights with each server's, so that only a server that
    holds the same model is asked, and measures what ``"auto"`` needs. Later calls choose where to cut the model.

    With ``fallback="local"`` no call fails because of a server: the device runs the rest of the model when no server
    answers well or in time, and ``last.degraded`` says why. With ``fallback="error"`` such a call raises.

    It is for inference only: there are no gradients, and ``train()`` leaves it in evaluation mode. Several threads may
    call it at once. Close it, or use it in a ``with`` statement, to end its threads and connections.

    In a program it stands in the model's place: its parameters, submodules and checkpoints have the model's own names,
    and attributes that it does not have are read from the model.

    Args:
        model: the model, in evaluation mode. It is not changed, and its parameters are shared.
        example: what the model is called with: a tensor, a tuple of positional arguments, or a mapping of keyword ones
            (a dict, or what a tokenizer or an image processor returns).
        server: the URL of a server started with ``torchsurgeon serve``, or a ``Transport``; or several of these, the
            preferred one first. Not needed with ``partition="device"``.
        name: the model's name on the server.
        partition: where to cut. ``"auto"`` chooses at every call, from measured layer times of both sides and the state
            of link, server and device. Or a fixed cut: the name of the last layer that runs on the device, the index of
            a partition point, a ``PartitionPoint`` of this model, or ``"device"`` or ``"server"`` for everything on one
            side.
        objective: what ``"auto"`` minimizes: ``"latency"``, ``"energy"``, …, an ``Objective``, or
            ``Objective.battery(level)``. Energy needs a device profile with joules, given or metered, and a ``link``
            with a radio. If these turn out to be missing, latency is minimized, with one ``UnknownEnergyWarning``.
        codecs: measured codecs, for ``"auto"`` to choose among, at every call. Lossy ones are used only where they kept
            an accuracy budget. Of those that are about as quick as the quickest, it takes the one that changes answers
            least. Without this argument everything is sent under ``codec``.
        fallback: ``"local"`` to let the device answer when no server does, ``"error"`` to raise.
        deadline_s: the seconds after a call within which its answer is due; see ``deadline()``.
        on_replan: a function that is called with the ``Decision`` when ``"auto"`` changes the cut.
        link: the link, if it is known, or what ``Link.parse()`` understands, such as ``"wifi"``. Otherwise ``"auto"``
            measures it.
        device_profile: the layer times of this device, if they are known; several where each is of another backend.
            Otherwise ``"auto"`` measures them.
        server_profile: the layer times of the server, if they are known; likewise. Otherwise ``"auto"`` asks the
            server.
        codec: the codec of the boundary tensors, or its name: ``"raw"``, ``"zstd"``, or a lossy one such as
            ``"int8+zstd"``, with which the answer is no longer the model's own. ``"auto"`` takes whichever of ``raw``
            and ``zstd`` is quicker from end to end; at a fixed cut at which ``codecs`` were measured, it chooses among
            these, and at which rate. May be assigned later.
        answer_codec: the codec in which the server is asked to answer.
        compile: True to compile heads and tails with ``torch.compile``, or the name of one of its backends. Answers
            then equal the model's own to within rounding.
        backend: what runs heads, and tails that run on the device, in place of eager PyTorch: the name of a backend
            (``"onnxruntime"``, ``"openvino"``, ``"openvino:bf16"``, ``"inductor"``, ``"aot"``, …; docs/backends.md), a
            ``torchsurgeon.backends.Backend``, or a function from a module to the callable that runs it. What a backend
            does not take runs in eager PyTorch, with one ``BackendWarning``. ``"auto"`` takes for each part the backend
            installed here that runs it quickest and whose answers deviate by at most ``tolerance``. It finds out in the
            background, and no call waits for it; ``prepare()`` does. Several names or backends: likewise, among these
            and eager PyTorch.
        server_backend: the backend that runs tails on the server, one of those that it was started with, or
            ``"eager"``. ``"auto"`` chooses it together with the cut. Without it, the server's own choice runs them, and
            with ``exact``, eager PyTorch.
        tolerance: how far the answers of backends that ``"auto"`` chooses may be from eager PyTorch's, as a share of
            the largest magnitude in a tensor: 0 for the same bits, 1e-4 for other runtimes in float32, 0.1 for
            bfloat16.
        exact: True to use only answers that have the model's own bits for certain. A server whose processor, number of
            threads, PyTorch or settings differ from this device's is then not asked, as if it held another model.
            docs/runtime.md lists what is compared. By default such answers, which are the same to rounding, are used,
            and ``last.bits`` says so.
        timeout_s: the longest that a server may take for one inference.
        hourly_bytes: the most bytes that are sent to servers in an hour, for a link on which bytes cost money: all that
            requests, pings and probes send, refused and late ones too, and what measures a link that is not given, but
            no other questions when servers are made ready. Calls run on the device then, or raise with
            ``fallback="error"``. Calls that run side by side may pass the bound by what they send at the same time.
        leaf_modules: modules to keep whole, as ``trace()`` takes them.
        verify: whether to run the model and what was traced, and compare, as ``trace()`` does.
        token: sent to servers that are given by their URLs, as ``Authorization: Bearer``.
        ca: how their certificates are checked: True for as the system does, a file with those that are trusted, or
            False for not at all.
        cert: this device's certificate, for servers that ask for one: a file that holds its key too, or both files.
        priority: "high", "normal" or "low": when servers that are given by their URLs run the requests of this module
            while others wait, as far as they allow it. By default normal.

    Attributes:
        model: the model. Another may be assigned: it is traced at once, and answers from then on.
        name: the model's name on the server.
        exact: as given.
        deadline_s: as given; may be assigned.

    Raises:
        TraceError: the model cannot be traced. With ``fallback="error"``, calls raise it, too, when the model has been
            put into training mode or has got other code, submodules, hooks or attributes since it was traced. With
            ``fallback="local"`` the model itself then answers, with one ``ChangedModelWarning``, until it has been
            traced anew (docs/runtime.md says when). It is also raised when the SplitModule is itself traced, exported
            or transformed by ``torch.func``, alone or inside another module.
        SplitAttributeError: an attribute of the model is set through the SplitModule, or ``generate()`` is called.
        TypeError: the SplitModule is copied, pickled or saved, or an example has keys that are no texts.
        PlanError: ``fallback`` is neither ``"local"`` nor ``"error"``, or energy is to be saved with a given profile or
            link that does not tell it.
        BackendError: both ``compile`` and ``backend`` are given, there is no such backend here (a package or a provider
            is missing; the message says which), one of them is given with ``exact`` and changes bits, or ``tolerance``
            is negative, or nothing is chosen by it. With ``fallback="error"``, calls raise it where the server does not
            have ``server_backend``.
        CodecError: there is no such codec, ``codecs`` is no measured table, or a codec is lossy and ``exact`` is given.
        LinkError: ``link`` is no ``Link``, or there is none of this name.
        ProfileError: a profile is no ``LayerProfile``.
        AdaptError: ``timeout_s`` or ``hourly_bytes`` is not a positive number.
        DeadlineError: ``deadline_s`` is not a positive number.
        ServerUnavailableError: no server is given, and ``partition`` needs one. With ``fallback="error"``, calls raise
            it when no server answers.
        ModelMismatchError: raised by calls with ``fallback="error"`` when the server holds another model. With
            ``fallback="local"`` there is one ``MismatchWarning`` instead.
        ArithmeticMismatchError: likewise, when the server holds the same model, but cannot give the same bits, and
            ``exact`` is given. It is a ``ModelMismatchError``.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Any,
        *,
        server: ServerAddress | Sequence[ServerAddress] | None = None,
        name: str = "model",
        partition: str | int | PartitionPoint = "auto",
        objective: str | Mapping[str, float] | Objective | Battery = "latency",
        codecs: CodecTable | None = None,
        fallback: Literal["local", "error"] = "local",
        deadline_s: float | None = None,
        on_replan: Callable[[Decision[Row]], object] | None = None,
        link: Link | str | None = None,
        device_profile: LayerProfile | Sequence[LayerProfile] | None = None,
        server_profile: LayerProfile | Sequence[LayerProfile] | None = None,
        codec: str | Codec | Lossless = "raw",
        answer_codec: str | Codec = "raw",
        compile: bool | str = False,
        backend: str | Backend | Sequence[str | Backend] | None = None,
        server_backend: str | None = None,
        tolerance: float = 0.0,
        exact: bool = False,
        timeout_s: float = 30.0,
        hourly_bytes: float | None = None,
        leaf_modules: Sequence[str | type[nn.Module]] = (),
        verify: bool = True,
        token: str | None = None,
        ca: bool | str = True,
        cert: str | tuple[str, str] | None = None,
        priority: str | None = None,
    ) -> None:
        super().__init__()
        check_options(fallback, deadline_s, timeout_s, compile, backend)
        check_priority(priority)
        check_codecs(codecs)
        known_link = link_of(link)
        check_server_backend(server_backend, tolerance, backend)
        sent_as, answered_as = codec_name(codec), codec_name(answer_codec)
        runs = backend_of(backend, compile, tolerance)
        if exact:
            keeps_bits = runs is None or (isinstance(runs, AutoBackend | NamedBackend) and runs.keeps_bits)
            check_exact((sent_as, answered_as), codecs, compiled=not keeps_bits, server_backend=server_backend)
            server_backend = Eager.name
        self.training = False
        args, kwargs = call_of(example)
        graph = trace(model, *args, leaf_modules=leaf_modules, verify=verify, **kwargs)
        self.name = name
        self.exact = exact
        # Only here, or a request in the background would keep alive what the function belongs to. In a tuple, since a
        # function that is a module would become a submodule of this one.
        self._listeners = () if on_replan is None else (on_replan,)
        self.deadline_s, self._deadlines = deadline_s, Deadlines()
        self._engine = Engine(
            graph,
            list(addresses_of(server)),
            Options(
                name=name,
                example=(args, kwargs),
                falls_back=fallback == "local",
                objective=objective if isinstance(objective, Battery) else Objective.of(objective),
                codec=codec_of(sent_as),
                answer_codec=find_codec(answered_as),
                codecs=codecs,
                backend=runs,
                link=known_link,
                device_profiles=() if device_profile is None else as_profiles(device_profile, "device"),
                server_profiles=() if server_profile is None else as_profiles(server_profile, "server"),
                timeout_s=timeout_s,
                hourly_bytes=hourly_bytes,
                on_replan=None if on_replan is None else functools.partial(_tell, weakref.ref(self)),
                exact=exact,
                server_backend=server_backend,
                tolerance=tolerance,
                leaf_modules=leaf_modules,
                verify=verify,
                token=token,
                ca=ca,
                cert=cert,
                priority=priority,
            ),
        )
        # Ends the threads of a module that is collected without having been closed.
        self._end = weakref.finalize(self, self._engine.ending.drop)
        self._wrap(model)
        self.partition = partition

    # --- where to cut ---

    @property
    def graph(self) -> LayerGraph:
        """The traced model. It is another one once the model has changed and has been traced anew."""
        return self._engine.graph

    @property
    def partition(self) -> PartitionPoint | None:
        """The partition point in use; None before ``"auto"`` has chosen. Assign whatever the constructor takes."""
        return self._engine.servers.point

    @partition.setter
    def partition(self, wanted: str | int | PartitionPoint) -> None:
        try:
            choice = None if wanted == "auto" else self.graph.point(wanted)
        except PartitionError as error:
            raise PartitionError(f'{error}; or "auto", which chooses at every call') from None
        if not self._engine.servers.peers and (choice is None or choice != self.graph.points[-1]):
            raise ServerUnavailableError(
                f'partition {short(wanted)} needs a server: give server="http://host:port", or partition="device"'
            )
        self._engine.fix(choice)

    @property
    def codec(self) -> Codec | Lossless:
        """The codec of the boundary tensors. Assign it or its name.

        Raises:
            CodecError: there is no codec of the assigned name, or it is lossy and the module is exact.
        """
        return self._engine.codec

    @codec.setter
    def codec(self, wanted: str | Codec | Lossless) -> None:
        name = codec_name(wanted)
        if self.exact:
            check_exact((name,), None, compiled=False)
        self._engine.codec = codec_of(name)

    @property
    def link(self) -> Link | None:
        """The link as given, or as first measured; None before that. ``stats()`` tells its present state."""
        return self._engine.servers.link

    @property
    def device_profile(self) -> LayerProfile | None:
        """Layer times of this device, as given or measured; None before that."""
        return self._engine.times.profile

    @property
    def server_profile(self) -> LayerProfile | None:
        """Layer times of the first server, as given or as it sent them; None before that."""
        peers = self._engine.servers.peers
        return next(iter(peers[0].profiles.usable), None) if peers else None

    def extra_repr(self) -> str:
        """Return the model's name and the cut, for ``repr``."""
        where = self.partition.name if self.partition is not None else "auto"
        return f"name={self.name!r}, partition={where!r}, {super().extra_repr()}"


def _tell(split_of: weakref.ref[SplitModule], decision: Decision[Row]) -> None:
    """Call the module's ``on_replan`` with a decision, if the module is still there."""
    split = split_of()
    if split is not None:
        for listener in split._listeners:
            listener(decision)
