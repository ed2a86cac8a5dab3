"""Signals after a backend has been used."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

CODE = """
    import gc, signal, time
    import torch
    import torchsurgeon as ts

    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    x = torch.rand(1, 3, 8, 8)

    def used():
        split = ts.SplitModule(model, x, partition="device", backend="openvino")
        split(x)
        return split

    with torch.no_grad():
        splits = [used(), used()]
        while splits:  # the first one first
            splits.pop(0).close()
            gc.collect()
    # A shell has its background jobs ignore this signal.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        signal.raise_signal(signal.SIGINT)  # to this thread
        time.sleep(60)
    except KeyboardInterrupt:
        print("interrupted")
"""


def test_ctrl_c_after_openvino_has_been_used_and_dropped_is_an_interrupt() -> None:
    pytest.importorskip("openvino")
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(CODE)], capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (0, "interrupted\n"), ran.stderr[-2000:]
