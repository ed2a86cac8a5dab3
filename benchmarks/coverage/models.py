"""The models of the coverage table by name, family by family. Weights are random, nothing is downloaded."""

from __future__ import annotations

from benchmarks.coverage import habits, language, packages, vision
from benchmarks.coverage.case import Factory


def cases() -> dict[str, Factory]:
    """Return every model of the table by name."""
    return vision.torchvision_cases() | language.cases() | vision.timm_cases() | packages.CASES | habits.CASES
