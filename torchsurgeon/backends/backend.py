"""What runs a part of a model in place of eager PyTorch."""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from torchsurgeon.accuracy.budget import Budget
from torchsurgeon.backends.judging import Judge, Sample
from torchsurgeon.backends.part import Part
from torchsurgeon.errors import BackendError
from torchsurgeon.tracing.graph import LayerGraph

Run = Callable[..., Sequence[Tensor]]
"""Takes the tensors of a part, without its numbers, and returns the part's results."""


class Backend(abc.ABC):
    """One way to run heads and tails. A subclass defines ``build()`` and these attributes.

    Attributes:
        name: the name under which it is asked for.
        device: where it computes, in words.
        keeps_bits: whether its results are those of eager PyTorch bit for bit.
        tolerance: how far a result may be from that of eager PyTorch, as a share of the largest magnitude in the
            tensor. A part that deviates more on the example runs in eager PyTorch.
        free_batch: whether what it builds may take other batch sizes than the example's.
        copies_weights: whether what it builds holds the weights as they were then, and so must not be used once they
            have changed.
        keeps_nan: whether it passes NaN on as PyTorch does. Others leave it out of a maximum, so calls with NaN run in
            eager PyTorch.
        packages: the modules that it imports.
        extra: the extra of torchsurgeon that installs these, or several with commas between them.
        calibrates: whether what it builds is set up on a sample of the user's, and so needs one.
        judge: decides in place of ``tolerance``, by an accuracy budget and a sample; None where neither was given.

    Args:
        sample: calls of your own, each like the traced example, or a folder of images. They judge what it builds; where
            ``calibrates`` is true, one half sets it up, and the other half judges.
        budget: how much the model's answers may change where this backend runs one of its parts. A part that changes
            them more runs in eager PyTorch.

    Raises:
        BackendError: a package is missing, or one of ``sample`` and ``budget`` is.
        CodecError: the sample is no list of calls, and no folder.
    """

    name: str
    device: str = "cpu"
    keeps_bits: bool = False
    tolerance: float = 1e-4
    free_batch: bool = True
    copies_weights: bool = True
    keeps_nan: bool = False
    packages: tuple[str, ...] = ()
    extra: str = ""
    calibrates: bool = False
    judge: Judge | None = None

    def __init__(self, *, sample: Sample | None = None, budget: Budget | None = None) -> None:
        missing = [package for package in self.packages if importlib.util.find_spec(package) is None]
        if missing:
            raise BackendError(
                f"backend {self.name!r} needs {', '.join(self.packages)}, and not installed are: {', '.join(missing)}; "
                + (f"pip install 'torchsurgeon[{self.extra}]'" if self.extra else f"pip install {' '.join(missing)}")
                + ", or choose another backend"
            )
        if (sample is None or budget is None) and (self.calibrates or sample is not None or budget is not None):
            what = "is calibrated and judged" if self.calibrates else "is judged, where you ask for it,"
            lacking = " and ".join(name for name, one in (("sample", sample), ("budget", budget)) if one is None)
            raise BackendError(
                f"backend {self.name!r} {what} on a sample of your own inputs under an accuracy budget; missing: "
                f"{lacking}. Give find_backend({self.name!r}, sample=[x, …], budget=Budget(max_top1_change=0.01)) as "
                "backend=, with Budget from torchsurgeon.accuracy, or where a command takes them --backend-sample and "
                "--backend-limits (docs/backends.md), or choose another backend"
            )
        self.judge = None if sample is None or budget is None else Judge(sample, budget, self.calibrates)

    @abc.abstractmethod
    def build(self, part: Part, example: Sequence[Tensor], *, free_batch: bool) -> Run:
        """Return what runs a part of a model. This may take seconds to minutes.

        Args:
            part: the head, the tail or the whole model.
            example: the part's tensors, numbers included.
            free_batch: whether the result must take any batch size; if not, it takes the example's shapes only.

        Raises:
            Exception: it does not take this part; a ``BackendError`` names the layer where that is known.
        """

    def load_onnx(self, model: bytes, part: Part) -> Run | None:
        """Return what runs a part that stands in ONNX, as ``build()`` does; None where this backend reads no ONNX.

        Args:
            model: the part, for the example's shapes. Its inputs and outputs have the names of the part's tensors.
            part: the part, which takes no numbers.

        Raises:
            Exception: it does not take this part.
        """
        return None

    def check(self, graph: LayerGraph) -> None:
        """Check that the sample fits a traced model, and is large enough for the budget.

        Raises:
            CodecError: it does not fit, or an image of its folder is not readable.
            SampleSizeError: it is too small for the budget.
            BackendError: there is nothing in it to calibrate or judge with.
        """
        if self.judge is not None:
            self.judge.check(graph)

    def __repr__(self) -> str:
        return f"<backend {self.name} on {self.device}>"


def parse_option(backend: str, option: str, known: dict[str, Any]) -> Any:
    """Return the value of the text behind the colon of a backend's name, such as ``bf16`` in ``openvino:bf16``.

    Args:
        backend: the backend's name.
        option: the text; empty where there is no colon.
        known: the values by text.

    Raises:
        BackendError: the backend has no such option.
    """
    if option not in known:
        names = [f"{backend}:{one}" if one else backend for one in known]
        raise BackendError(f"backend {backend!r} is asked for as {', '.join(names)}; got {backend}:{option}")
    return known[option]
