"""``python -m torchsurgeon`` runs the ``torchsurgeon`` command."""

from __future__ import annotations

import sys

from torchsurgeon.cli import main

sys.exit(main())
