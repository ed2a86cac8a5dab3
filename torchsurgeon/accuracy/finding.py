"""What a sample showed of one limit of an accuracy budget."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torchsurgeon._json_file import FLAG, NUMBER, TEXT, WHOLE, check_fields

# What these measures are at most, and where nothing changes; what a user's own score is then is not known.
_BEST = {"cosine": 1.0, "accepted": 1.0, "boxes_matched": 1.0, "pixels_kept": 1.0, "top-1 changed": 0.0}
_TEXTS = {"top-1 changed": "{:.1%}", "accepted": "{:.1%}", "cosine": "{:.5f}"}
_FIELDS = {"measure": TEXT, "estimate": NUMBER, "bound": NUMBER, "limit": NUMBER, "count": WHOLE, "kept": FLAG}


@dataclasses.dataclass(frozen=True)
class Finding:
    """What a sample showed of one limit of a budget.

    Attributes:
        measure: what is limited: ``"top-1 changed"``, ``"cosine"``, ``"accepted"``, or the name of the budget's score.
        estimate: its value over the sample.
        bound: what its value over all calls is at most, or at least, with the budget's confidence.
        limit: the budget's limit.
        count: how many predictions or calls the estimate rests on.
        kept: whether the limit is met.
    """

    measure: str
    estimate: float
    bound: float
    limit: float
    count: int
    kept: bool

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Finding:
        """Return the finding in ``data``, the plain data of its fields.

        Raises:
            ValueError: a field holds what it cannot.
            KeyError: a field is missing.
            TypeError: there is a field too many.
        """
        check_fields(data, _FIELDS)
        return Finding(**data)

    @property
    def used(self) -> float | None:
        """How much of what the limit allows is used: 0 where surely nothing changes, 1 at the limit.

        It is that of the bound, or of the estimate where the estimate decides. It is None for a score of the user's
        own, of which nobody knows what it is where nothing changes.
        """
        best = _BEST.get(self.measure)
        if best is None:
            return None
        room = abs(self.limit - best)

        def share(value: float) -> float:
            changed = abs(value - best)
            return changed / room if room else math.inf if changed else 0.0

        by_bound = share(self.bound)
        return share(self.estimate) if self.kept and by_bound > 1 + 1e-9 else by_bound

    def text(self, value: float) -> str:
        """Return a value of the measure as text, shares in percent."""
        return _TEXTS.get(self.measure, "{:.4f}").format(value)

    @property
    def sign(self) -> str:
        """``≤`` where a bound is what the measure is at most, ``≥`` where it is what it is at least."""
        return "≤" if self.measure == "top-1 changed" else "≥"

    def __str__(self) -> str:
        return f"{self.text(self.estimate)} ({self.sign} {self.text(self.bound)})"
