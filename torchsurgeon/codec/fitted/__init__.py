"""A codec that is fitted to one cut of one model from a sample of its inputs, without training."""

from __future__ import annotations

from torchsurgeon.codec.fitted.codec import FittedCodec, RatedCodec, load_codec
from torchsurgeon.codec.fitted.fit import fit_codec
from torchsurgeon.codec.fitted.tensor import FittedTensor

__all__ = ["FittedCodec", "FittedTensor", "RatedCodec", "fit_codec", "load_codec"]
