"""A page on which a plan can be explored: the browser decides anew when link, load, objective or codec are changed."""

from __future__ import annotations

import dataclasses
import html
import importlib.resources
import json
import re
from pathlib import Path
from typing import Any

from torchsurgeon.errors import TorchSurgeonError
from torchsurgeon.link import PRESETS, Link
from torchsurgeon.planning import Frontier, Objective, Plan, Row
from torchsurgeon.planning.plans import place
from torchsurgeon.report.plan_pictures import PARTS
from torchsurgeon.report.plans import constraint_texts
from torchsurgeon.report.runs import brief_label, cut_runs
from torchsurgeon.tracing.graph import LayerGraph

ANY_CODEC = "any, whichever is best"
# How long a bar's name may be below it, and beside it on a phone.
_MOST_CHARACTERS = 32, 20
_NUMBERS = ("head_s", "encode_s", "size_bytes", "tail_s", "decode_s", "device_j")


def explorer(graph: LayerGraph, plan: Plan, path: str | Path) -> None:
    """Write an HTML page on which the settings that a plan was made for can be changed.

    The page loads nothing else. It decides as ``Frontier.best()`` does, among the cuts that keep to the plan's
    constraints; with one codec chosen, among the cuts with that codec and all on the device. It takes about 5 MB, most
    of which is plotly.js.

    Args:
        graph: the model's layers.
        plan: a plan for the model.
        path: the page's file.

    Raises:
        TorchSurgeonError: plotly is not installed, or the file cannot be written.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise TorchSurgeonError(f"the page needs plotly ({error}): pip install 'torchsurgeon[explore]'") from None
    parts = {
        "title": html.escape(plan.frontier.model),
        "plan": _for_script(page_data(graph, plan)),
        "plotly": get_plotlyjs(),
        "program": _packaged("explorer.js"),
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _packaged("explorer.html"))
    try:
        Path(path).write_text(page, encoding="utf-8")
    except OSError as error:
        raise TorchSurgeonError(
            f"{path} cannot be written ({error.strerror}); name a file in a folder that exists and may be written to"
        ) from None


def page_data(graph: LayerGraph, plan: Plan) -> dict[str, Any]:
    """Return what the page decides from and draws, as plain data.

    Rows are named by their position in ``rows``. ``frontiers`` holds for each codec that can be chosen the rows to
    decide among, and ``runs`` for each bar its names and the rows that it can show.

    Args:
        graph: the model's layers.
        plan: a plan for the model.
    """
    codecs = sorted({row.codec for row in plan.rows if not row.on_device})
    positions: dict[Row, int] = {}

    def kept(rows: tuple[Row, ...]) -> list[int]:
        return [positions.setdefault(row, len(positions)) for row in Frontier.of(graph, list(rows)).rows]

    frontiers = {ANY_CODEC: kept(plan.rows)}
    frontiers |= {codec: kept(with_codec(plan.rows, codec)) for codec in codecs}
    runs = []
    for run in cut_runs(graph, plan.rows):
        groups = [[row for row in run.rows if row.codec == codec] for codec in sorted({row.codec for row in run.rows})]
        label, brief = (brief_label(run.label, most) for most in _MOST_CHARACTERS)
        runs.append(
            {"label": label, "brief": brief, "rows": sorted({i for group in groups for i in kept(tuple(group))})}
        )
    given = plan.link.name
    if plan.link != PRESETS.get(given, plan.link):
        given += ", as planned for"
    named = [Objective.of(name) for name in ("latency", "energy", "throughput", "server_time")]
    objectives = named if plan.objective in named else [plan.objective, *named]
    return {
        "answer_bytes": plan.frontier.answer_bytes,
        "rows": [_row(row) for row in positions],
        "frontiers": frontiers,
        "runs": runs,
        "parts": [list(part) for part in PARTS],
        "links": [_link(given, plan.link), *(_link(*item) for item in PRESETS.items() if item[0] != given)],
        "objectives": [{"name": str(o), "unit": o.unit, **dataclasses.asdict(o)} for o in objectives],
        "has_energy": all(row.device_j is not None for row in plan.rows),
        "limits": {"latency_s": plan.constraints.latency_s, "energy_j": plan.constraints.energy_j},
        "constraints": constraint_texts(plan.constraints),
        "start": {
            "link": given,
            "objective": str(plan.objective),
            "codec": ANY_CODEC,
            "load": plan.load,
            "slowdown": plan.slowdown,
        },
    }


def with_codec(rows: tuple[Row, ...], codec: str) -> tuple[Row, ...]:
    """Return the rows that send everything with one codec, and those that send nothing."""
    return tuple(row for row in rows if row.codec == codec or row.on_device)


def _row(row: Row) -> dict[str, Any]:
    numbers = {name: getattr(row, name) for name in _NUMBERS}
    return {"place": place(row), "codec": row.codec, "on_device": row.on_device, "index": row.index, **numbers}


def _link(name: str, link: Link) -> dict[str, Any]:
    radio = None
    if link.radio is not None:
        radio = {name: getattr(link.radio, name) for name in ("up_w_per_bit_s", "down_w_per_bit_s", "base_w", "tail_j")}
    rates = {name: getattr(link, name) for name in ("uplink_bit_s", "downlink_bit_s", "round_trip_s")}
    return {"name": name, **rates, "radio": radio}


def _for_script(data: dict[str, Any]) -> str:
    """Return ``data`` as JSON in which no text, such as a layer's name, can end the script element it stands in."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _packaged(name: str) -> str:
    return (importlib.resources.files("torchsurgeon.report") / name).read_text(encoding="utf-8")
