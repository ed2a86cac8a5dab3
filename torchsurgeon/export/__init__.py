"""Parts of a model as files: bundles for devices without PyTorch, and tails for other inference servers."""

from __future__ import annotations

from torchsurgeon.export.bundle import Exported, best_points, export_bundle
from torchsurgeon.export.servers import export_openvino, export_triton

__all__ = ["Exported", "best_points", "export_bundle", "export_openvino", "export_triton"]
