"""Split a PyTorch model between a device and a server: trace, cut, profile, and run with the model's own answer.

A name is loaded from its room when it is first used (PEP 562), so ``import torchsurgeon`` alone imports no PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name is defined. Type checkers and editors read the imports at the end of this file instead; a test
# compares the two.
_NAMES_BY_ROOM = {
    "codec": ("CodecCost", "CodecTable", "FittedCodec", "distill", "fit_codec", "load_codec"),
    "cutting": ("Partition", "cut", "tail_for"),
    "errors": (
        "AdaptError", "ArithmeticMismatchError", "BackendError", "BackendWarning", "BodyTooLargeError",
        "BundleError",
        "CalibrationError", "ChangedModelWarning", "CodecError",
        "DeadlineError", "DeviceError", "EncodingError", "InfeasibleError", "LinkError", "LoadTestError",
        "MeterError",
        "MismatchWarning", "MissingCodecWarning",
        "ModelFailedError", "ModelMismatchError", "ModelNotReadyError", "ModelNotServedError", "ModelServingError",
        "NativeUnavailableError", "NoServerWarning", "NoisyProfileWarning", "PartitionError", "PlanError",
        "PredictionWarning", "ProfileError", "ProtocolError", "RequestRefusedError", "SampleSizeError", "ServerError",
        "ServerUnavailableError",
        "SimulationError", "SpecError", "SplitAttributeError", "ThrottledWarning", "TorchSurgeonError", "TraceError",
        "UnfinishedWarning", "UnknownEnergyWarning", "UnrepeatableWarning",
    ),
    "link": ("BandwidthTrace", "Link", "Radio"),
    "module": ("SplitModule",),
    "planning": (
        "ChainPlan", "Constraints", "Crossover", "Frontier", "Objective", "Plan", "Row", "Terms", "crossovers", "plan",
    ),
    "prediction": ("Predictor", "calibrate", "reference_device", "reference_devices"),
    "profiling": ("LayerEnergy", "LayerProfile", "profile"),
    "runtime": ("Inference", "measure_link"),
    "tracing": (
        "Adapter", "Layer", "LayerGraph", "PartitionPoint", "TensorSpec", "opaque", "register_adapter", "trace",
    ),
}  # fmt: skip
_ROOM_OF = {name: room for room, names in _NAMES_BY_ROOM.items() for name in names}
# Attributes of the package without being imported by the user. The other rooms need extras.
_ROOMS = (
    "accuracy", "adapting", "backends", "codec", "cutting", "edge", "emulate", "errors", "export", "hooks", "link",
    "meters", "models", "module", "planning", "prediction", "profiling", "runtime", "simulate", "tracing", "transport",
    "wire",
)  # fmt: skip

__all__ = sorted(_ROOM_OF)

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load a public name or a room at its first use, and keep it as an attribute of the package."""
        from importlib import import_module

        if name in _ROOM_OF:
            value = getattr(import_module(f"torchsurgeon.{_ROOM_OF[name]}"), name)
        elif name in _ROOMS:
            value = import_module(f"torchsurgeon.{name}")
        else:
            raise AttributeError(f"module 'torchsurgeon' has no attribute {name!r}")
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *_ROOM_OF, *_ROOMS})

else:
    from torchsurgeon import accuracy as accuracy
    from torchsurgeon import adapting as adapting
    from torchsurgeon import backends as backends
    from torchsurgeon import codec as codec
    from torchsurgeon import cutting as cutting
    from torchsurgeon import edge as edge
    from torchsurgeon import emulate as emulate
    from torchsurgeon import errors as errors
    from torchsurgeon import export as export
    from torchsurgeon import hooks as hooks
    from torchsurgeon import link as link
    from torchsurgeon import meters as meters
    from torchsurgeon import models as models
    from torchsurgeon import module as module
    from torchsurgeon import planning as planning
    from torchsurgeon import prediction as prediction
    from torchsurgeon import profiling as profiling
    from torchsurgeon import runtime as runtime
    from torchsurgeon import simulate as simulate
    from torchsurgeon import tracing as tracing
    from torchsurgeon import transport as transport
    from torchsurgeon import wire as wire
    from torchsurgeon.codec import CodecCost as CodecCost
    from torchsurgeon.codec import CodecTable as CodecTable
    from torchsurgeon.codec import FittedCodec as FittedCodec
    from torchsurgeon.codec import distill as distill
    from torchsurgeon.codec import fit_codec as fit_codec
    from torchsurgeon.codec import load_codec as load_codec
    from torchsurgeon.cutting import Partition as Partition
    from torchsurgeon.cutting import cut as cut
    from torchsurgeon.cutting import tail_for as tail_for
    from torchsurgeon.errors import AdaptError as AdaptError
    from torchsurgeon.errors import ArithmeticMismatchError as ArithmeticMismatchError
    from torchsurgeon.errors import BackendError as BackendError
    from torchsurgeon.errors import BackendWarning as BackendWarning
    from torchsurgeon.errors import BodyTooLargeError as BodyTooLargeError
    from torchsurgeon.errors import BundleError as BundleError
    from torchsurgeon.errors import CalibrationError as CalibrationError
    from torchsurgeon.errors import ChangedModelWarning as ChangedModelWarning
    from torchsurgeon.errors import CodecError as CodecError
    from torchsurgeon.errors import DeadlineError as DeadlineError
    from torchsurgeon.errors import DeviceError as DeviceError
    from torchsurgeon.errors import EncodingError as EncodingError
    from torchsurgeon.errors import InfeasibleError as InfeasibleError
    from torchsurgeon.errors import LinkError as LinkError
    from torchsurgeon.errors import LoadTestError as LoadTestError
    from torchsurgeon.errors import MeterError as MeterError
    from torchsurgeon.errors import MismatchWarning as MismatchWarning
    from torchsurgeon.errors import MissingCodecWarning as MissingCodecWarning
    from torchsurgeon.errors import ModelFailedError as ModelFailedError
    from torchsurgeon.errors import ModelMismatchError as ModelMismatchError
    from torchsurgeon.errors import ModelNotReadyError as ModelNotReadyError
    from torchsurgeon.errors import ModelNotServedError as ModelNotServedError
    from torchsurgeon.errors import ModelServingError as ModelServingError
    from torchsurgeon.errors import NativeUnavailableError as NativeUnavailableError
    from torchsurgeon.errors import NoisyProfileWarning as NoisyProfileWarning
    from torchsurgeon.errors import NoServerWarning as NoServerWarning
    from torchsurgeon.errors import PartitionError as PartitionError
    from torchsurgeon.errors import PlanError as PlanError
    from torchsurgeon.errors import PredictionWarning as PredictionWarning
    from torchsurgeon.errors import ProfileError as ProfileError
    from torchsurgeon.errors import ProtocolError as ProtocolError
    from torchsurgeon.errors import RequestRefusedError as RequestRefusedError
    from torchsurgeon.errors import SampleSizeError as SampleSizeError
    from torchsurgeon.errors import ServerError as ServerError
    from torchsurgeon.errors import ServerUnavailableError as ServerUnavailableError
    from torchsurgeon.errors import SimulationError as SimulationError
    from torchsurgeon.errors import SpecError as SpecError
    from torchsurgeon.errors import SplitAttributeError as SplitAttributeError
    from torchsurgeon.errors import ThrottledWarning as ThrottledWarning
    from torchsurgeon.errors import TorchSurgeonError as TorchSurgeonError
    from torchsurgeon.errors import TraceError as TraceError
    from torchsurgeon.errors import UnfinishedWarning as UnfinishedWarning
    from torchsurgeon.errors import UnknownEnergyWarning as UnknownEnergyWarning
    from torchsurgeon.errors import UnrepeatableWarning as UnrepeatableWarning
    from torchsurgeon.link import BandwidthTrace as BandwidthTrace
    from torchsurgeon.link import Link as Link
    from torchsurgeon.link import Radio as Radio
    from torchsurgeon.module import SplitModule as SplitModule
    from torchsurgeon.planning import ChainPlan as ChainPlan
    from torchsurgeon.planning import Constraints as Constraints
    from torchsurgeon.planning import Crossover as Crossover
    from torchsurgeon.planning import Frontier as Frontier
    from torchsurgeon.planning import Objective as Objective
    from torchsurgeon.planning import Plan as Plan
    from torchsurgeon.planning import Row as Row
    from torchsurgeon.planning import Terms as Terms
    from torchsurgeon.planning import crossovers as crossovers
    from torchsurgeon.planning import plan as plan
    from torchsurgeon.prediction import Predictor as Predictor
    from torchsurgeon.prediction import calibrate as calibrate
    from torchsurgeon.prediction import reference_device as reference_device
    from torchsurgeon.prediction import reference_devices as reference_devices
    from torchsurgeon.profiling import LayerEnergy as LayerEnergy
    from torchsurgeon.profiling import LayerProfile as LayerProfile
    from torchsurgeon.profiling import profile as profile
    from torchsurgeon.runtime import Inference as Inference
    from torchsurgeon.runtime import measure_link as measure_link
    from torchsurgeon.tracing import Adapter as Adapter
    from torchsurgeon.tracing import Layer as Layer
    from torchsurgeon.tracing import LayerGraph as LayerGraph
    from torchsurgeon.tracing import PartitionPoint as PartitionPoint
    from torchsurgeon.tracing import TensorSpec as TensorSpec
    from torchsurgeon.tracing import opaque as opaque
    from torchsurgeon.tracing import register_adapter as register_adapter
    from torchsurgeon.tracing import trace as trace
