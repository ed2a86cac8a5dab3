"""Whether an answer has the bits that the model would give on this device, and if not, why."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torchsurgeon.codec import Codec
from torchsurgeon.errors import ArithmeticMismatchError
from torchsurgeon.models.arithmetic import Difference
from torchsurgeon.tracing.graph import LayerGraph
from torchsurgeon.tracing.layout import dense, restores
from torchsurgeon.tracing.specs import TensorSpec
from torchsurgeon.wire.fields import ALIGNMENT_BYTES

SAME, ROUNDED, LOSSY = "same bits", "same to rounding", "changed by a lossy codec"


def verdict(differences: Sequence[str], codecs: Sequence[Codec] = ()) -> tuple[str, tuple[str, ...]]:
    """Return whether an answer has the model's own bits, as one of the three texts above, and why if not.

    Args:
        differences: reasons for which it is the same to rounding only.
        codecs: the codecs of what crossed.
    """
    lossy = tuple([f"codec {codec.name}" for codec in codecs if not codec.lossless])
    return (LOSSY if lossy else ROUNDED if differences else SAME), (*lossy, *differences)


def displaced(graph: LayerGraph, specs: Sequence[TensorSpec], boundary: Sequence[Tensor]) -> tuple[str, ...]:
    """Return which boundary tensors lie in memory in a way that their copies on the server do not, in words.

    A kernel may begin elsewhere, and so add up in another order, where a tensor does not begin at a multiple of 64
    bytes or has gaps between its elements. The server restores only those gaps that were traced.
    """
    found = []
    for spec, tensor in zip(specs, boundary, strict=True):
        past = tensor.data_ptr() % ALIGNMENT_BYTES if tensor.numel() else 0
        if past:
            found.append(
                f"tensor {spec.name} begins {past} bytes past a multiple of {ALIGNMENT_BYTES} in memory here, and at a "
                "multiple on the server (slices of tensors do that, and x.clone() undoes it)"
            )
        elif not (
            restores(graph.layouts[spec.name], tensor)
            if spec.name in graph.layouts
            else tensor.is_contiguous() or dense(tensor, tuple(tensor.shape))[0]
        ):
            found.append(
                f"tensor {spec.name} has other gaps between its elements in memory here than on the server (slices of "
                "tensors do that, and x.contiguous() undoes it)"
            )
    return tuple(found)


def refusal(name: str, differences: Sequence[Difference]) -> ArithmeticMismatchError:
    """Return the error of a server that cannot give the same bits, which names what differs and what to do.

    Args:
        name: the model's name.
        differences: what differs.
    """
    remedies = list(dict.fromkeys(one.remedy for one in differences if one.remedy is not None))
    # Where the machines differ, nothing that is set on them helps.
    remedies = remedies if all(one.remedy is not None for one in differences) else []
    advice = "; ".join([*remedies, "or leave out exact=True for answers that are the same to rounding"])
    return ArithmeticMismatchError(
        f"model {name!r} is the same on the server, but exact=True asks for the same bits, and they rest on what "
        f"differs: {', '.join(map(str, differences))}. {advice[0].upper()}{advice[1:]}"
    )
