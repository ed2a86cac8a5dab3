"""Tables for the terminal, pictures, and the page on which a plan can be explored.

Units are converted for people here. Nothing is measured, and nothing but that page decides.
"""

from __future__ import annotations

from torchsurgeon.report.explorer_page import explorer
from torchsurgeon.report.loads import load_findings, load_picture, load_table
from torchsurgeon.report.pictures import layer_picture, profile_picture
from torchsurgeon.report.plan_pictures import plan_picture, sweep_picture
from torchsurgeon.report.plans import plan_explanation, plan_table, sweep_table
from torchsurgeon.report.predictions import calibration_table, prediction_picture, prediction_table
from torchsurgeon.report.simulations import simulation_table
from torchsurgeon.report.tables import (
    codec_table,
    diagnosis_text,
    graph_table,
    profile_table,
)
from torchsurgeon.report.units import bytes_text, flops_text, joules_text, rate_text, seconds_text

__all__ = [
    "bytes_text",
    "calibration_table",
    "codec_table",
    "diagnosis_text",
    "explorer",
    "flops_text",
    "graph_table",
    "joules_text",
    "layer_picture",
    "load_findings",
    "load_picture",
    "load_table",
    "plan_explanation",
    "plan_picture",
    "plan_table",
    "prediction_picture",
    "prediction_table",
    "profile_picture",
    "profile_table",
    "rate_text",
    "seconds_text",
    "simulation_table",
    "sweep_picture",
    "sweep_table",
]
