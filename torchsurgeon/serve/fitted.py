"""The fitted codecs of one served model: which it tells of, and which of them a request may name."""

from __future__ import annotations

from pathlib import Path

from torchsurgeon.codec import Codec, FittedCodec, RatedCodec, load_codec
from torchsurgeon.errors import ProtocolError
from torchsurgeon.tracing.graph import LayerGraph


class FittedCodecs:
    """The codecs that were fitted to one served model.

    Args:
        model: the name that the model is served under.
        graph: the traced model.
    """

    def __init__(self, model: str, graph: LayerGraph) -> None:
        self._model, self._graph = model, graph
        self._codecs: dict[str, FittedCodec] = {}

    def __bool__(self) -> bool:
        return bool(self._codecs)

    def add(self, path: str | Path) -> FittedCodec:
        """Load the file of a codec.

        Args:
            path: the file.

        Raises:
            CodecError: the file cannot be read, is damaged, or is of another version, graph, cut or weights.
            NativeUnavailableError: the compiled extension is missing.
        """
        fitted = load_codec(path, self._graph)
        self._codecs[fitted.name] = fitted
        return fitted

    def digests(self, weights: str | None) -> dict[str, str]:
        """Return the digests of the files by the codecs' names, of those that were fitted to the present weights.

        Args:
            weights: the digest of the present weights; None where it is not known.
        """
        fitting = [one for one in list(self._codecs.values()) if weights in (None, one.weights)]
        return {one.name: one.digest for one in fitting}

    def check(self, weights: str | None, codec: Codec) -> None:
        """Check that a request to this model may name a codec: another model of this process may have a fitted one.

        Args:
            weights: as for ``digests()``.
            codec: any codec.

        Raises:
            ProtocolError: it is a fitted codec, and this model does not have it, or has other weights now.
        """
        if not isinstance(codec, RatedCodec):
            return
        name = codec.fitted.name
        known = self._codecs.get(name)
        if known is None or known.digest != codec.fitted.digest:
            raise ProtocolError(
                f"model {self._model!r} does not have the fitted codec {name}; it has "
                f"{', '.join(self._codecs)[:300] or 'none'}. Start the server with --codec {self._model}=FILE"
            )
        if weights not in (None, known.weights):
            raise ProtocolError(
                f"the fitted codec {name} was fitted to other weights than model {self._model!r} has now; fit a codec "
                "to the model as it is"
            )
