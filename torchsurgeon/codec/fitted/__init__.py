"""A codec that is fitted to one cut of one model from a sample of its inputs, without training."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon._lazy import names_of

__all__ = ["FittedCodec", "FittedTensor", "RatedCodec", "fit_codec", "load_codec"]

if not TYPE_CHECKING:
    __getattr__ = names_of(
        __name__,
        {
            "codec": ("FittedCodec", "RatedCodec", "load_codec"),
            "fit": ("fit_codec",),
            "tensor": ("FittedTensor",),
        },
    )
else:
    from torchsurgeon.codec.fitted.codec import FittedCodec as FittedCodec
    from torchsurgeon.codec.fitted.codec import RatedCodec as RatedCodec
    from torchsurgeon.codec.fitted.codec import load_codec as load_codec
    from torchsurgeon.codec.fitted.fit import fit_codec as fit_codec
    from torchsurgeon.codec.fitted.tensor import FittedTensor as FittedTensor
