"""Where things lie in the checkout, for tests in any folder."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
SUPPORT = TESTS / "support"


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment for a child that imports torchsurgeon, what tests share, and ``folders``."""
    path = os.pathsep.join(map(str, (*folders, ROOT, SUPPORT)))
    return {**os.environ, "PYTHONPATH": path, **variables}
