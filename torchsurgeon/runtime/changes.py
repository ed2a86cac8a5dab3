"""What becomes of calls once the model is no longer as it was traced: hooks, code, attributes or submodules changed.

The model itself answers such a call, as a whole. Meanwhile it is watched. Once it has stayed the same for a moment, the
next call traces it anew, in its own thread: tracing puts the model's attributes back as they were, which would undo
what the caller's program changes at that moment, if it went on in another thread.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
import time
from collections.abc import Iterator

from torch import nn

from torchsurgeon._interrupts import Condition
from torchsurgeon.errors import ChangedModelWarning, short, warn_caller
from torchsurgeon.models.onlookers import KeptByHooks
from torchsurgeon.models.premises import Premises
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.handshake import LocalModel, autocast_mismatch

# A model is traced anew only after it has stayed the same for this long.
_QUIET_S = 1.0
# After each change the model is left alone for a time, which doubles. So a program that goes on changing it, as by a
# hook around every call, does not trace it for ever.
_LEAST_PAUSE_S, _MOST_PAUSE_S = 1.0, 300.0
# After so long without a change the pause is the least one again.
_FORGET_S = 60.0
# Two modules may share a model, so only one traces at a time. What one of them found in the model while the other was
# tracing it, it would put back for good.
_tracing = threading.Lock()


def _reset_after_fork() -> None:
    global _tracing
    _tracing = threading.Lock()


os.register_at_fork(after_in_child=_reset_after_fork)


class Changes:
    """The changes of one model since it was traced. Thread-safe.

    Attributes:
        noticed: whether the latest call that looked found the model changed.
    """

    def __init__(self) -> None:
        self.noticed = False
        self._pause_s = _LEAST_PAUSE_S
        self._paused_s = self._look_s = -math.inf
        self._seen: Premises | None = None
        self._since_s = math.inf
        self._refused: str | None = None
        self._warned = False
        self.reset_after_fork()

    def reset_after_fork(self) -> None:
        """Replace the lock, which a thread of the parent may hold."""
        self._turn = Condition()
        self._running, self._tracing = 0, False

    # --- calls that the model itself answers ---

    @contextlib.contextmanager
    def answering(self, model: nn.Module, changed: str, *, look: bool) -> Iterator[Failure]:
        """Return why a call is answered by the model itself, which runs within the block.

        Args:
            model: the model.
            changed: what has changed, in words.
            look: whether to watch if the model stays as it is now. That takes longer than the call may take where it
                has a deadline.
        """
        self.noticed = True
        if not self._warned:
            self._warned = True
            warn_caller(
                f"the model itself answers on this device, without a server, until it has been traced anew: {changed}",
                ChangedModelWarning,
            )
        with self._turn:
            # What the model leaves in its attributes while it is traced must not reach this call.
            self._turn.wait_for(lambda: not self._tracing)
            self._running += 1
        try:
            kept = self._watch(model) if look else None
            why = "" if self._refused is None else f". It is not traced anew by itself, because {self._refused}"
            yield Failure("changed", f"{changed}{why}")
            names = [] if kept is None else KeptByHooks(model).since(kept)
            if names:
                self._refused = (
                    f"a call that is split would not run hooks that keep what they see ({', '.join(names[:5])}); "
                    "prepare() traces it all the same"
                )
        finally:
            with self._turn:
                self._running -= 1
                self._turn.notify_all()

    def _watch(self, model: nn.Module) -> KeptByHooks | None:
        """Keep how the model is now, and return what its hooks hold; None where that is done, or not to be done now."""
        with self._turn:
            now_s = time.monotonic()
            if self._seen is not None:
                if self._seen.broken() is None:
                    self._since_s = min(self._since_s, now_s)
                    return None
                self._pause(now_s)
            if now_s < self._look_s:
                return None
            self._seen, self._since_s, self._refused = Premises(model), now_s, None
            return KeptByHooks(model)

    def _pause(self, now_s: float) -> None:
        """Leave the model alone for a while, since it has changed."""
        if now_s - self._paused_s > max(_FORGET_S, 4 * self._pause_s):
            self._pause_s = _LEAST_PAUSE_S
        self._paused_s, self._look_s = now_s, now_s + self._pause_s
        self._pause_s = min(2 * self._pause_s, _MOST_PAUSE_S)
        self._seen, self._since_s = None, math.inf

    # --- tracing anew ---

    def due(self, local: LocalModel) -> bool:
        """Return whether the model is worth tracing anew now: it has changed, and stayed the same since."""
        with self._turn:
            if local.departed() is None:
                # The change has been taken back, and what was traced holds again.
                self.noticed, self._since_s = False, math.inf
                return False
            quiet = self._seen is not None and time.monotonic() - self._since_s >= _QUIET_S
            if not quiet or self._refused is not None or autocast_mismatch() is not None:
                return False
            return self._seen is not None and self._seen.broken() is None

    @contextlib.contextmanager
    def tracing(self) -> Iterator[None]:
        """Wait until no call of the split module runs the model as a whole, and keep others from it in the block."""
        with self._turn:
            self._turn.wait_for(lambda: not self._tracing)
            self._tracing = True
        try:
            with self._turn:
                self._turn.wait_for(lambda: not self._running)
            with _tracing:
                yield
        finally:
            with self._turn:
                self._tracing = False
                self._turn.notify_all()

    def traced(self) -> None:
        """Note that the model has been traced anew."""
        with self._turn:
            self._pause(time.monotonic())
            self.noticed, self._refused, self._warned = False, None, False

    def refused(self, error: Exception) -> None:
        """Note that the model could not be traced anew; it is not tried again before it changes."""
        self._refused = f"that failed: {short(error, 600)}"
