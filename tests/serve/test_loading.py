"""What loading leaves behind in a server's process."""

from __future__ import annotations

import subprocess
import sys

import pytest

_GIVES_BACK = """
import torch
from torchsurgeon.serve.loading import settle

def resident_mib():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) >> 10

before = resident_mib()
# Too small to be mapped one by one, and the last keeps the heap from shrinking by itself.
tensors = [torch.ones(12_000) for _ in range(4000)]
last = torch.ones(12_000)
del tensors
settle()
print(resident_mib() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="not Linux: memory is read from /proc")
def test_memory_that_loading_took_is_given_back_to_the_system() -> None:
    done = subprocess.run([sys.executable, "-c", _GIVES_BACK], capture_output=True, text=True, timeout=120, check=True)
    assert int(done.stdout) < 40, "of 183 MiB"
