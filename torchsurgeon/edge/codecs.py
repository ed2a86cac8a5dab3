"""The codecs of one bundle: those that every device has, and those of its files."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torchsurgeon.codec.names import FITTED
from torchsurgeon.edge.bundle import Bundle, BundlePoint, OnnxPart
from torchsurgeon.edge.codec import ArrayCodec, find_codec
from torchsurgeon.errors import BundleError, CodecError, short

if TYPE_CHECKING:
    from torchsurgeon.edge.fitted import ArrayFitted


class BundleCodecs:
    """The codecs of a bundle by name. The file of a fitted codec is read when it is first asked for.

    Args:
        bundle: the bundle, whose files have been checked.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._bundle = bundle
        self._files = {one.name: one for one in bundle.codecs}
        self._fitted: dict[str, ArrayFitted] = {}
        self._rated: dict[str, ArrayCodec] = {}

    def find(self, name: str) -> ArrayCodec:
        """Return the codec of this name.

        Raises:
            CodecError: a device without PyTorch has no such codec, the bundle no such fitted codec, or this no such
                rate.
            BundleError: the file of the fitted codec holds none, or one that was fitted to another model.
        """
        if not name.startswith(FITTED):
            return find_codec(name)
        found = self._rated.get(name)
        if found is None:
            whole, _, rate = name.partition("@")
            found = self._rated[name] = self._loaded(whole).at(rate)
        return found

    def student(self, codec: ArrayCodec, point: BundlePoint) -> OnnxPart | None:
        """Return the student that computes what crosses at a point under a codec; None where the own layers do."""
        if codec.fitted is None or point.layers is not None:
            return None
        own = codec.fitted.point == (point.index, point.name)
        return self._files[codec.fitted.name].student if own else None

    def _loaded(self, name: str) -> ArrayFitted:
        listed = self._files.get(name)
        if listed is None:
            raise CodecError(
                f"the bundle holds the fitted codecs {', '.join(self._files) or 'none'}; got {short(name, 80)}; export "
                "it again with torchsurgeon export --fitted FILE"
            )
        found = self._fitted.get(name)
        if found is None:
            # Only here, since most bundles hold none, and importing it takes a while on a small device.
            from torchsurgeon.edge.fitted import ArrayFitted

            try:
                found = ArrayFitted.load(self._bundle.folder / listed.file)
            except CodecError as error:
                raise BundleError(f"the bundle's codec cannot be read: {error}") from None
            if (found.name, found.graph, found.weights) != (name, self._bundle.graph, self._bundle.weights):
                raise BundleError(
                    f"{listed.file} of the bundle must be {name}, fitted to the bundle's model; it is "
                    f"{short(found.name, 80)}; export the bundle again"
                )
            self._fitted[name] = found
        return found
