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
        self._digests: dict[str, str] = {}

    def add(self, path: str | Path) -> FittedCodec:
        """Load the file of a codec.

        Args:
            path: the file.

        Raises:
            CodecError: the file cannot be read, is damaged, or is of another version, graph, cut or weights.
            NativeUnavailableError: the compiled extension is missing.
        """
        fitted = load_codec(path, self._graph)
        self._digests[fitted.name] = fitted.digest
        return fitted

    def digests(self) -> dict[str, str]:
        """Return the digests of the files by the codecs' names."""
        return dict(self._digests)

    def check(self, codec: Codec) -> None:
        """Check that a request to this model may name a codec: another model of this process may have a fitted one.

        Raises:
            ProtocolError: it is a fitted codec, and this model does not have it.
        """
        if not isinstance(codec, RatedCodec):
            return
        name = codec.fitted.name
        if self._digests.get(name) != codec.fitted.digest:
            raise ProtocolError(
                f"model {self._model!r} does not have the fitted codec {name}; it has "
                f"{', '.join(self._digests)[:300] or 'none'}. Start the server with --codec {self._model}=FILE"
            )
