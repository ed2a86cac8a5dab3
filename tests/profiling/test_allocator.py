"""Memory that was freed is kept, so that runs do not pay for page faults by chance."""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
import torchsurgeon as ts
from torchsurgeon._allocator import keep_freed_memory

torch.set_num_threads(1)
print(keep_freed_memory() if sys.argv[1] == "kept" else False)
if sys.argv[1] == "profiled":
    graph = ts.trace(torch.nn.Sequential(torch.nn.ReLU()).eval(), torch.zeros(1, 8))
    ts.profile(graph, repeats=1, meter=None)

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.zeros(2_000_000).add_(1)  # 8 MB, 2,000 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

for _ in range(3):
    faults()
# The fewest, since the kernel may take pages away meanwhile; memory that is not kept faults every time.
print(min(faults() for _ in range(5)))
"""


def faults(how: str) -> tuple[bool, int]:
    told = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FAULTS, how], capture_output=True, text=True, check=True
    ).stdout.split()
    return told[0] == "True", int(told[1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_freed_memory_is_kept_once_asked_for_and_by_every_profile() -> None:
    done, kept = faults("kept")
    if not done:
        pytest.skip("this C library has no mallopt")
    assert kept < 200
    assert faults("profiled")[1] < 200
