from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("torchsurgeon", deadline=None, max_examples=50)
settings.load_profile("torchsurgeon")

ROOT = Path(__file__).parent.parent
INTEROP_PYTHON = ROOT / ".venv-interop" / "bin" / "python"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing_gpu = pytest.mark.skip(reason="no CUDA device")
    missing_venv = pytest.mark.skip(reason="no second PyTorch: make interop")
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(missing_gpu)
        if item.get_closest_marker("interop") and not INTEROP_PYTHON.exists():
            item.add_marker(missing_venv)


@pytest.fixture(scope="session")
def interop_python() -> Path:
    """The interpreter of the second PyTorch; run it with PYTHONPATH at the checkout."""
    return INTEROP_PYTHON
