"""Split a PyTorch model between a device and a server: trace, cut, profile, and run with the model's own answer."""

from __future__ import annotations

from torchsurgeon import hooks as hooks
from torchsurgeon import meters as meters
from torchsurgeon.codec import CodecCost, CodecTable
from torchsurgeon.cutting.partition import Partition, cut, tail_for
from torchsurgeon.errors import (
    AdaptError,
    BackendError,
    BodyTooLargeError,
    CalibrationError,
    CodecError,
    DeadlineError,
    DeviceError,
    InfeasibleError,
    LinkError,
    MeterError,
    ModelFailedError,
    ModelMismatchError,
    ModelNotReadyError,
    ModelNotServedError,
    ModelServingError,
    NativeUnavailableError,
    PartitionError,
    PlanError,
    ProfileError,
    ProtocolError,
    RequestRefusedError,
    ServerError,
    ServerUnavailableError,
    SpecError,
    TorchSurgeonError,
    TraceError,
)
from torchsurgeon.link import BandwidthTrace, Link, Radio
from torchsurgeon.module import SplitModule
from torchsurgeon.planning import (
    ChainPlan,
    Constraints,
    Crossover,
    Frontier,
    Objective,
    Plan,
    Row,
    Terms,
    crossovers,
    plan,
)
from torchsurgeon.prediction import (
    PredictionWarning,
    Predictor,
    ThrottledWarning,
    calibrate,
    reference_device,
    reference_devices,
)
from torchsurgeon.profiling import LayerEnergy, LayerProfile, NoisyProfileWarning, profile
from torchsurgeon.runtime import Inference, MismatchWarning, UnknownEnergyWarning, measure_link
from torchsurgeon.tracing.adapters import Adapter, opaque, register_adapter
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.specs import Layer, PartitionPoint, TensorSpec
from torchsurgeon.tracing.tracer import UnrepeatableWarning, trace

__version__ = "0.1.0"

__all__ = [
    "AdaptError",
    "BackendError",
    "Adapter",
    "BandwidthTrace",
    "BodyTooLargeError",
    "CalibrationError",
    "ChainPlan",
    "CodecCost",
    "CodecError",
    "CodecTable",
    "Constraints",
    "Crossover",
    "DeadlineError",
    "DeviceError",
    "Frontier",
    "InfeasibleError",
    "Inference",
    "Layer",
    "LayerEnergy",
    "LayerGraph",
    "LayerProfile",
    "Link",
    "LinkError",
    "MeterError",
    "MismatchWarning",
    "ModelFailedError",
    "ModelMismatchError",
    "ModelNotReadyError",
    "ModelNotServedError",
    "ModelServingError",
    "NativeUnavailableError",
    "NoisyProfileWarning",
    "Objective",
    "Partition",
    "PartitionError",
    "PartitionPoint",
    "Plan",
    "PlanError",
    "PredictionWarning",
    "Predictor",
    "ProfileError",
    "ProtocolError",
    "Radio",
    "RequestRefusedError",
    "Row",
    "ServerError",
    "ServerUnavailableError",
    "SpecError",
    "SplitModule",
    "TensorSpec",
    "Terms",
    "ThrottledWarning",
    "TorchSurgeonError",
    "TraceError",
    "UnknownEnergyWarning",
    "UnrepeatableWarning",
    "calibrate",
    "crossovers",
    "cut",
    "measure_link",
    "opaque",
    "plan",
    "profile",
    "reference_device",
    "reference_devices",
    "register_adapter",
    "tail_for",
    "trace",
]
