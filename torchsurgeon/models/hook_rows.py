"""The hooks of modules as they can be compared with those of another moment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import nn
from torch.nn.modules import module as shared


class HookRow(NamedTuple):
    """The forward hooks, or forward pre-hooks, of a module or of all modules.

    Attributes:
        called: whose hooks they are, in words.
        table: the hooks by their keys.
        flags: by the same keys, which of them are called with keyword arguments, or even after an error.
    """

    called: str
    table: Mapping[int, Any]
    flags: tuple[Mapping[int, bool], ...] = ()

    def functions(self) -> list[Any]:
        """Return the hooks in their order, with their flags; their keys differ each time that they are registered."""
        return [(hook, *(flag.get(key, False) for flag in self.flags)) for key, hook in self.table.items()]


def hook_rows(module: nn.Module, called: str) -> list[HookRow]:
    """Return the forward hooks and the forward pre-hooks of a module that is ``called`` so."""
    return [
        HookRow(
            called,
            module._forward_hooks,
            (module._forward_hooks_with_kwargs, module._forward_hooks_always_called),
        ),
        HookRow(called, module._forward_pre_hooks, (module._forward_pre_hooks_with_kwargs,)),
    ]


_EVERYWHERE = "all modules (global hooks)"
GLOBAL_HOOK_ROWS = [
    HookRow(
        _EVERYWHERE,
        shared._global_forward_hooks,
        (shared._global_forward_hooks_with_kwargs, shared._global_forward_hooks_always_called),
    ),
    HookRow(_EVERYWHERE, shared._global_forward_pre_hooks),
]
