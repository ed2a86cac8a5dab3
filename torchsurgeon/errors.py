"""Every error torchsurgeon raises on purpose.

::

    TorchSurgeonError
    ├── TraceError                 a model that cannot be turned into a LayerGraph
    ├── PartitionError             a partition point or tensor name the graph does not have (also a ValueError)
    ├── SpecError                  a model SPEC, weights file or example that cannot be loaded (also a ValueError)
    ├── LinkError                  a link profile, rate, delay or trace that cannot be (also a ValueError)
    ├── CodecError                 an unknown codec, bytes it cannot have made, or a damaged table (also a ValueError)
    ├── DeviceError                a device, or a factor of its speed, that cannot be (also a ValueError)
    ├── BackendError               a compiler that torch.compile does not have here (also a ValueError)
    ├── AdaptError                 a breaker, probe budget, row or list of servers that cannot be (also a ValueError)
    │   └── DeadlineError          a deadline before any answer can be; ``best_s`` is the best
    ├── ProfileError               a damaged profile, or one of another version or graph (also a ValueError)
    ├── CalibrationError           a damaged calibration, or samples that no model can be fitted to (also a ValueError)
    ├── PlanError                  a plan that cannot be made: an impossible objective, limit, load (also a ValueError)
    │   └── InfeasibleError        no way to run the model keeps to all constraints; ``least`` says how near one comes
    ├── NativeUnavailableError     something needs the compiled extension (or CUDA, CUPTI) and it is not there
    ├── MeterError                 a clock or energy meter that is missing, unreadable, or read something impossible
    ├── ProtocolError              bytes that are not a valid Open Inference Protocol v2 message
    │   └── BodyTooLargeError      a message larger than the boundary it claims to carry can be
    └── ServerError                the server's side of an inference did not give an answer
        ├── ServerUnavailableError nothing answered in time: down, slow, or gone in mid-answer (also a ConnectionError)
        ├── RequestRefusedError    the server answered with an error status; ``status`` holds it
        ├── ModelMismatchError     the two sides hold different graphs or weights
        └── ModelServingError      raised inside a server; its clients see RequestRefusedError
            ├── ModelNotServedError    a model or version the server does not have
            ├── ModelNotReadyError     a model that still loads, or could not be loaded
            └── ModelFailedError       the model itself raised while it ran

A message names the value that is wrong, says why, and what to do about it.
"""

from __future__ import annotations


class TorchSurgeonError(Exception):
    """Base of all errors raised on purpose by this package."""


class TraceError(TorchSurgeonError):
    """The model cannot be turned into a :class:`~torchsurgeon.tracing.LayerGraph`."""


class PartitionError(TorchSurgeonError, ValueError):
    """A partition point, layer or tensor name the graph does not have, or names that do not determine the output."""


class SpecError(TorchSurgeonError, ValueError):
    """A model SPEC, weights file or example input that cannot be loaded."""


class LinkError(TorchSurgeonError, ValueError):
    """A link profile, rate, delay or bandwidth trace that cannot be."""


class CodecError(TorchSurgeonError, ValueError):
    """A codec that does not exist or cannot be used, bytes that it cannot have made, or a damaged codec table."""


class DeviceError(TorchSurgeonError, ValueError):
    """A device that does not exist, or a factor of its speed that cannot be."""


class BackendError(TorchSurgeonError, ValueError):
    """A compiler that does not exist here, or whose package is missing."""


class AdaptError(TorchSurgeonError, ValueError):
    """A part of the adapting runtime was asked for what cannot be: a budget, a row, a time or an empty list."""


class DeadlineError(AdaptError):
    """A deadline earlier than any answer can be; ``best_s`` is the least latency possible, in seconds."""

    def __init__(self, message: str, best_s: float) -> None:
        super().__init__(message)
        self.best_s = best_s


class ProfileError(TorchSurgeonError, ValueError):
    """A profile that is damaged, of another version, or of another graph."""


class CalibrationError(TorchSurgeonError, ValueError):
    """A calibration that is damaged, unfinished or of another version or device; samples no model can be fitted to."""


class PlanError(TorchSurgeonError, ValueError):
    """A plan cannot be made: an objective, a limit, a load or a stage that cannot be, or energy that nobody metered."""


class InfeasibleError(PlanError):
    """No way to run the model keeps to all constraints.

    ``least`` maps each constraint to the least value of what it limits that can be had while all others are kept; None
    where the others alone cannot be kept.
    """

    def __init__(self, message: str, least: dict[str, float | None]) -> None:
        super().__init__(message)
        self.least = least


class NativeUnavailableError(TorchSurgeonError):
    """The compiled extension, a driver or a library it opens is missing; the message says which."""


class MeterError(TorchSurgeonError):
    """A clock or an energy meter is missing, cannot be read, or read something impossible; the message says which."""


class ProtocolError(TorchSurgeonError):
    """Bytes that are not a valid Open Inference Protocol v2 message."""


class BodyTooLargeError(ProtocolError):
    """A message larger than the boundary tensors it claims to carry can be."""


class ServerError(TorchSurgeonError):
    """The server's side of an inference did not give an answer."""


class ServerUnavailableError(ServerError, ConnectionError):
    """Nothing answered in time: the server is down, slow, or was gone in mid-answer."""


class RequestRefusedError(ServerError):
    """The server answered with an error; ``status`` is its HTTP status code."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelMismatchError(ServerError):
    """The two sides hold different graphs or different weights."""


class ModelServingError(ServerError):
    """Raised inside a server; its clients see :class:`RequestRefusedError`."""


class ModelNotServedError(ModelServingError):
    """A model or version that the server does not have."""


class ModelNotReadyError(ModelServingError):
    """A model that is still loading, or could not be loaded."""


class ModelFailedError(ModelServingError):
    """The model itself raised while it ran."""
