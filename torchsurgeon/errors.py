"""The errors that torchsurgeon raises on purpose, and the warnings that it gives.

    TorchSurgeonError
    ├── TraceError                 the model does not turn into a LayerGraph, or a tracer called a SplitModule
    ├── SplitAttributeError        what only the model itself can do (also an AttributeError)
    ├── PartitionError             the graph has no such partition point, layer or tensor (also a ValueError)
    ├── SpecError                  a model SPEC, weights file or example input does not load (also a ValueError)
    ├── LinkError                  a link profile, rate, delay or bandwidth trace is not valid (also a ValueError)
    ├── CodecError                 an unknown codec, bytes it did not make, or a damaged table (also a ValueError)
    │   └── SampleSizeError        a sample that is too small for its budget; ``needed`` is how many calls suffice
    ├── DeviceError                an unknown device, or a factor of its speed that is not valid (also a ValueError)
    ├── BackendError               a backend or compiler is not here, or does not take a layer (also a ValueError)
    ├── BundleError                a bundle of an edge device is damaged or of another version (also a ValueError)
    ├── AdaptError                 a budget, row or list of servers that is not valid (also a ValueError)
    │   └── DeadlineError          a deadline that no answer can meet; ``best_s`` is the shortest possible time
    ├── ProfileError               a damaged profile, or one of another version or graph (also a ValueError)
    ├── CalibrationError           a damaged calibration, or samples that no model fits (also a ValueError)
    ├── PlanError                  an objective, limit, load or stage that is not valid (also a ValueError)
    │   └── InfeasibleError        no cut meets all constraints; ``least`` says how near one comes
    ├── SimulationError            a rate, shape, number of servers or price that is not valid (also a ValueError)
    ├── LoadTestError              a rate, cut or recording of a load test that is not valid (also a ValueError)
    ├── NativeUnavailableError     the compiled extension, CUDA or CUPTI is needed and is missing
    ├── MeterError                 a clock or energy meter is missing, or reads something impossible
    ├── ProtocolError              bytes that are not a valid Open Inference Protocol v2 message
    │   ├── BodyTooLargeError      a message that is larger than the tensors it announces
    │   └── EncodingError          tensors that cannot be made a message here; no server is at fault
    └── ServerError                the server gave no answer to an inference
        ├── ServerUnavailableError nothing answered in time (also a ConnectionError)
        ├── RequestRefusedError    the server answered with an HTTP error; ``status`` is its code
        ├── ModelMismatchError     device and server hold different graphs or weights
        │   └── ArithmeticMismatchError    they hold the same model, but need not give the same bits
        └── ModelServingError      raised inside a server; its clients see RequestRefusedError
            ├── ModelNotServedError    the server does not have this model or version
            ├── ModelNotReadyError     the model is still loading, or failed to load
            └── ModelFailedError       the model itself raised while it ran

    UserWarning
    ├── UnrepeatableWarning        the model draws random numbers, so its answers differ from run to run
    ├── NoisyProfileWarning        the measured times spread or drift too much to be relied on
    ├── ThrottledWarning           the device became slower while it was calibrated
    ├── PredictionWarning          layers are unlike those of the calibration, so their times may be off
    ├── MismatchWarning            a server holds another model, so its answers are not used
    ├── NoServerWarning            no server could be used at the first call, so the device answers alone
    ├── MissingCodecWarning        a server lacks a fitted codec, so another is used in its place
    ├── BackendWarning             a backend does not take a part of the model, so that part runs in eager PyTorch
    ├── ChangedModelWarning        the model is no longer as it was traced, so it answers as a whole on the device
    ├── UnknownEnergyWarning       energy was to be saved but is unknown, so latency is saved instead
    └── UnfinishedWarning          a measurement was interrupted; it holds what was measured until then

The message of an error names the value that is wrong, the rule that it breaks, and what to do. A value that the user
gave is quoted with ``short()``.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import sys
import warnings

# Which warnings of this package's own threads have been given.
_given: dict[object, object] = {}
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def short(value: object, limit: int = 300, *, quote: bool = True) -> str:
    """Return ``value`` as the message of an error quotes it, in at most ``limit`` characters.

    A text stands in quotation marks; a path, and the message of an exception, stand without. A class or function is
    its name. Everything else is its ``repr``. Addresses of objects are left out. Where the result is longer than
    ``limit``, its middle is replaced by "…".

    Args:
        value: what the user gave, or the exception that it caused.
        limit: the most characters to return. Give less than the default where a message quotes several values.
        quote: False leaves a text without its quotation marks, such as a sentence of another library.
    """
    if isinstance(value, os.PathLike | BaseException) or (isinstance(value, str) and not quote):
        text = _ADDRESS.sub("", str(value))
    elif hasattr(value, "__qualname__"):
        text = f"{getattr(value, '__module__', None) or 'builtins'}.{value.__qualname__}".removeprefix("builtins.")
    else:
        text = _ADDRESS.sub("", repr(value))
    if len(text) <= limit:
        return text
    tail = (limit - 1) // 3
    return f"{text[: limit - 1 - tail]}…{text[len(text) - tail :]}"


def is_finite(value: object) -> bool:
    """Return whether ``value`` is a finite number.

    Checks of arguments ask this instead of ``math.isfinite``, which raises for a text or None.
    """
    try:
        return math.isfinite(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return False


def is_whole(value: object) -> bool:
    """Return whether ``value`` is a whole number and no truth value."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def warn_caller(text: str | Warning, category: type[Warning] | None = None) -> None:
    """Warn at the line of the program that called: the first up the stack that is neither this package's nor PyTorch's.

    In a thread of this package no line of the program has called, and the warning names the package alone.

    Args:
        text: the message, or the warning itself.
        category: the warning's class, for a message.
    """
    torch = sys.modules.get("torch")
    files = [__file__, *([] if torch is None else [str(torch.__file__)])]
    between = tuple(os.path.dirname(file) + os.sep for file in files)
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(between):
        frame, level = frame.f_back, level + 1
    if frame.f_globals.get("__name__") == "threading":
        kind = category or type(text)
        warnings.warn_explicit(text, kind, "torchsurgeon", 1, "torchsurgeon", _given)  # type: ignore[arg-type]
    else:
        warnings.warn(text, category, stacklevel=level)


class TorchSurgeonError(Exception):
    """Base of all errors that this package raises on purpose."""


class TraceError(TorchSurgeonError):
    """The model does not turn into a ``LayerGraph``, or a tracer called a SplitModule."""


class SplitAttributeError(TorchSurgeonError, AttributeError):
    """A SplitModule was asked for what only its model can do: to set the model's attributes, or to ``generate()``."""


class PartitionError(TorchSurgeonError, ValueError):
    """The graph has no such partition point, layer or tensor, or the named tensors do not determine its output."""


class SpecError(TorchSurgeonError, ValueError):
    """A model SPEC, weights file or example input does not load."""


class LinkError(TorchSurgeonError, ValueError):
    """A link profile, rate, delay or bandwidth trace is not valid."""


class CodecError(TorchSurgeonError, ValueError):
    """A codec does not exist or does not apply, bytes were not made by it, or a codec table is damaged."""


class SampleSizeError(CodecError):
    """A sample is too small to show that a codec keeps an accuracy budget.

    Args:
        message: the budget, the sample's size, and what to do.
        needed: how many calls suffice where no answer changes; None where no number does.
    """

    def __init__(self, message: str, needed: int | None) -> None:
        super().__init__(message)
        self.needed = needed


class DeviceError(TorchSurgeonError, ValueError):
    """A device does not exist, or a factor of its speed is not valid."""


class BackendError(TorchSurgeonError, ValueError):
    """A backend or a compiler does not exist here, lacks a package or a provider, or does not take a layer.

    Args:
        message: what is the matter, and what to do.
        layer: the name of the layer that it does not take; None where that is not known, or not the matter.
    """

    def __init__(self, message: str, layer: str | None = None) -> None:
        super().__init__(message)
        self.layer = layer


class BundleError(TorchSurgeonError, ValueError):
    """A bundle for a device without PyTorch is missing, damaged, of another version, or lacks what is asked for."""


class AdaptError(TorchSurgeonError, ValueError):
    """A part of the adapting runtime was given a budget, a row, a time or a list of servers that is not valid."""


class DeadlineError(AdaptError):
    """No answer can meet the deadline.

    Args:
        message: the deadline, the shortest possible time, and what to do.
        best_s: the shortest time in which an answer is possible, in seconds.
    """

    def __init__(self, message: str, best_s: float) -> None:
        super().__init__(message)
        self.best_s = best_s


class ProfileError(TorchSurgeonError, ValueError):
    """A profile is damaged, of another version, or of another graph."""


class CalibrationError(TorchSurgeonError, ValueError):
    """A calibration is damaged, unfinished, of another version or device, or has samples that no model fits."""


class PlanError(TorchSurgeonError, ValueError):
    """An objective, limit, load or stage is not valid, or a plan needs an energy that nothing measured."""


class InfeasibleError(PlanError):
    """No cut meets all constraints.

    Args:
        message: the constraints, and how near a cut comes to each.
        least: for each constraint, the lowest value of the limited quantity among the cuts that meet all the others;
            None where no cut meets the others.
    """

    def __init__(self, message: str, least: dict[str, float | None]) -> None:
        super().__init__(message)
        self.least = least


class SimulationError(TorchSurgeonError, ValueError):
    """A simulated datacenter was given a rate, shape, number of servers, limit or price that is not valid."""


class LoadTestError(TorchSurgeonError, ValueError):
    """A load test was given a rate, cut, number of devices or recording that is not valid, or its requests fail."""


class NativeUnavailableError(TorchSurgeonError):
    """The compiled extension, a driver or a library that it opens is missing; the message says which."""


class MeterError(TorchSurgeonError):
    """A clock or an energy meter is missing, is not readable, or reads something impossible; the message says which."""


class ProtocolError(TorchSurgeonError):
    """Bytes are not a valid Open Inference Protocol v2 message."""


class BodyTooLargeError(ProtocolError):
    """A message is larger than the boundary tensors that it announces."""


class EncodingError(ProtocolError):
    """Tensors cannot be encoded as a message on this side, so nothing was sent, and no server is at fault."""


class ServerError(TorchSurgeonError):
    """The server gave no answer to an inference."""


class ServerUnavailableError(ServerError, ConnectionError):
    """Nothing answered in time: the server is down or slow, or it disappeared while it answered."""


class RequestRefusedError(ServerError):
    """The server answered with an HTTP error.

    Args:
        message: what was asked, and what the server said.
        status: the HTTP status code of the answer.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class ModelMismatchError(ServerError):
    """Device and server hold different graphs or different weights."""


class ArithmeticMismatchError(ModelMismatchError):
    """Device and server hold the same model, but would not give the same bits for certain, as ``exact=True`` asks."""


class ModelServingError(ServerError):
    """Raised inside a server; its clients see ``RequestRefusedError``."""


class ModelNotServedError(ModelServingError):
    """The server does not have this model or version."""


class ModelNotReadyError(ModelServingError):
    """The model is still loading, or failed to load."""


class ModelFailedError(ModelServingError):
    """The model itself raised while it ran."""


class UnrepeatableWarning(UserWarning):
    """The model draws random numbers, so its answers, and those of any split of it, differ from run to run."""


class NoisyProfileWarning(UserWarning):
    """The measured times spread or drift so much that the machine was busy, throttling or changing its clocks.

    Args:
        finding: how the times spread or drift, and what that says of the machine.
        advice: what the caller of ``torchsurgeon.profile()`` can do about it. A program that profiles for its own users
            shows ``finding`` with an advice that fits them.
    """

    def __init__(self, finding: str, advice: str) -> None:
        super().__init__(f"{finding}; {advice}")
        self.finding = finding


class ThrottledWarning(UserWarning):
    """The device became slower while it was calibrated: it throttled, or something else ran on it."""


class PredictionWarning(UserWarning):
    """Layers are unlike those that the device was calibrated with, so their predicted times may be off by a factor."""


class MismatchWarning(UserWarning):
    """A server holds another model than the device, so its answers are not used and every layer runs on the device."""


class NoServerWarning(UserWarning):
    """No server could be used when the first call was prepared, so the device answers alone until one can."""


class MissingCodecWarning(UserWarning):
    """A server does not have the file of a fitted codec, so what crosses to it is encoded by another codec."""


class BackendWarning(UserWarning):
    """A backend does not take a part of the model, or computes it otherwise, so that part runs in eager PyTorch."""


class ChangedModelWarning(UserWarning):
    """The model's code, hooks or attributes have changed since it was traced, so the device runs it as a whole."""


class UnknownEnergyWarning(UserWarning):
    """Energy was to be saved, but what a cut takes is unknown, so latency is saved instead."""


class UnfinishedWarning(UserWarning):
    """A measurement was interrupted, so what it gives holds only what was measured until then."""
