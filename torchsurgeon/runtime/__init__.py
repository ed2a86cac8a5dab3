"""What runs a split model: it adapts the cut, asks servers, and answers whatever they do.

A call goes through three stages (``Pending``): the head runs, the request is sent, the call is finished. The request is
in a thread of a small pool, so that the calling thread can run the tail itself when the answer is late. ``Engine``
stands on top of the room: no other file here imports it.
"""

from __future__ import annotations

from torchsurgeon.runtime.engine import Engine
from torchsurgeon.runtime.failure import Failure
from torchsurgeon.runtime.inference import Inference
from torchsurgeon.runtime.options import Options
from torchsurgeon.runtime.parts import Backend
from torchsurgeon.runtime.pending import Done, Pending
from torchsurgeon.runtime.work import ModelCall, TailCall, Work
from torchsurgeon.transport.link_probe import measure_link

__all__ = [
    "Backend",
    "Done",
    "Engine",
    "Failure",
    "Inference",
    "ModelCall",
    "Options",
    "Pending",
    "TailCall",
    "Work",
    "measure_link",
]
