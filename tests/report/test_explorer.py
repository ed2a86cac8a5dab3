"""The page decides as the planner does, shows it, loads nothing, and takes layers' names for text."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from browser import Browser
from torch import nn

import torchsurgeon as ts
from torchsurgeon import cli, report
from torchsurgeon.codec import CodecCost, CodecRow, CodecTable
from torchsurgeon.planning import Frontier, Objective, Row
from torchsurgeon.planning.decide import choose
from torchsurgeon.planning.plans import place
from torchsurgeon.profiling import LayerEnergy, LayerProfile
from torchsurgeon.report.explorer_page import ANY_CODEC, page_data, with_codec

# Names of layers that would be more than text in a page, in Plotly's texts or in a template. Names hold no dots.
EVIL = {
    2: "</script><script>hacked=1</script>",
    9: "<img src=x onerror=hacked=1>",
    16: "<b>bold&amp;</b> $x_1$ {{plotly}}",
}
ARROW_RIGHT = "\ue014"


def model() -> nn.Sequential:
    made = nn.Sequential()
    for i in range(33):
        layer = (nn.ReLU(), nn.Sigmoid(), nn.MaxPool1d(2))[i % 3]
        made.add_module(EVIL.get(i, f"{type(layer).__name__}{i}"), layer)
    return made.eval()


def factory() -> tuple[nn.Module, torch.Tensor]:
    """A factory for SPECs in these tests."""
    return model(), torch.rand(1, 16, 4096)


GRAPH = ts.trace(*factory())
COUNT = len(GRAPH.layers)


def profile_of(whole_s: float, whole_j: float | None) -> LayerProfile:
    shares = np.array([1 + 0.3 * np.sin(i) for i in range(COUNT)])
    shares /= shares.sum()
    names = tuple(layer.name for layer in GRAPH.layers)
    energy = None
    if whole_j is not None:
        energy = LayerEnergy("recorded", 0.0, shares * whole_j, np.zeros((COUNT, 2)), (whole_j,) * 3)
    samples = (shares * whole_s)[None]
    return LayerProfile("Sequential", GRAPH.fingerprint, 1, names, samples, samples.sum(axis=1), {}, energy=energy)


DEVICE, SERVER = profile_of(0.5, 1.0), profile_of(0.02, None)
LINK = ts.Link("office <i>", 5.85e6, 13.76e6, 0.04, radio=ts.Radio(4e-7, 5e-8, 0.6, 0.2, 0.5))
CODECS = CodecTable(
    "Sequential",
    GRAPH.fingerprint,
    1,
    1,
    "",
    tuple(
        CodecRow(p.index, p.name, p.size_bytes, CodecCost(codec, p.size_bytes * ratio, encode_s, decode_s, True, True))
        for p in GRAPH.points[:-1]
        for codec, ratio, encode_s, decode_s in (("zstd", 0.6, 1e-3, 5e-4), ("int8", 0.26, 3e-3, 2e-3))
    ),
)


def planned(**options: Any) -> ts.Plan:
    return ts.plan(GRAPH, **{"device": DEVICE, "server": SERVER, "link": LINK, "codecs": CODECS, **options})


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.fixture(scope="module")
def page(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    path = tmp_path_factory.mktemp("page") / "report.html"
    report.explorer(GRAPH, planned(), path)
    browser.open(path)
    yield browser
    assert browser.messages() == []


def move(page: Browser, settings: dict[str, str | float]) -> dict[str, float]:
    """Set selects to values and sliders to positions as a hand does; return where the sliders then are."""
    at: dict[str, float] = page.run(
        """
        for (const [id, value] of Object.entries(arguments[0])) {
          const control = document.getElementById(id);
          control.value = value;
          control.dispatchEvent(new Event(control.type === "range" ? "input" : "change", { bubbles: true }));
        }
        const sliders = [...document.querySelectorAll("input[type=range]")];
        const at = Object.fromEntries(sliders.map((slider) => [slider.id, slider.valueAsNumber]));
        const frame = () => new Promise(requestAnimationFrame);
        return frame().then(frame).then(() => at);
        """,
        settings,
    )
    return at


def situation(at: dict[str, float], link: ts.Link = LINK) -> tuple[ts.Link, float, float]:
    rates = {name: 1e6 * 10 ** at[name] for name in ("uplink_bit_s", "downlink_bit_s")}
    moved = dataclasses.replace(link, **rates, round_trip_s=at["round_trip_s"] / 1e3)
    return moved, 10 ** at["load"], 10 ** at["slowdown"]


def chosen(page: Browser) -> dict[str, Any]:
    data = page_data(GRAPH, planned())
    position = int(page.run("return document.getElementById('choice').dataset.row"))
    row: dict[str, Any] = data["rows"][position]
    star, bars, pixel, left, width = page.run(
        """
        const traces = document.getElementById("latency").data, bars = traces[0].x.length;
        const box = (selector) => document.querySelector(`#latency ${selector}`).getBoundingClientRect();
        const star = box(".scatterlayer .trace:last-child .textpoint"), plot = box(".nsewdrag");
        return [traces.at(-1).x[0], bars, star.x + star.width / 2, plot.x, plot.width];
        """
    )
    assert position in data["runs"][star]["rows"], "the star is on another bar"
    assert pixel == pytest.approx(left + width * (star + 0.6) / (bars + 0.2), abs=3), "the star is drawn elsewhere"
    assert row["place"] in page.run("return document.getElementById('choice').textContent")
    return row


def is_row(shown: dict[str, Any], row: Row) -> bool:
    return all(shown[name] == getattr(row, name) for name in ("index", "codec", "head_s", "size_bytes", "on_device"))


SETTINGS = [
    {"uplink_bit_s": up, "downlink_bit_s": down, "round_trip_s": trip, "load": load, "slowdown": slow}
    for up, down, trip, load, slow in (
        (0.77, 1.14, 40, 0.0, 0.0), (-1.5, 1.0, 40, 0.0, 0.0), (-0.6, 1.0, 40, 0.0, 0.3), (0.1, 0.5, 100, 0.5, 0.6),
        (0.5, 1.0, 20, 0.7, 0.0), (0.9, 1.0, 10, 1.2, 0.2), (1.5, 2.0, 5, 0.0, 1.0), (2.5, 3.0, 1, 1.5, 0.5),
        (3.5, 3.5, 0, -0.5, 1.5), (0.2, 1.0, 300, 0.0, 1.2), (1.1, 0.2, 30, 1.9, 1.9),
    )
]  # fmt: skip


def test_the_star_moves_to_what_the_planner_says(page: Browser) -> None:
    rows = planned().rows
    seen = set()
    for objective, codec in itertools.product(["latency", "energy", "throughput"], [ANY_CODEC, "int8", "raw"]):
        frontier = Frontier.of(GRAPH, list(rows if codec == ANY_CODEC else with_codec(rows, codec)))
        for settings in SETTINGS:
            at = move(page, {"objective": objective, "codec": codec, **settings})
            best = frontier.best(*situation(at), objective)
            shown = chosen(page)
            assert is_row(shown, best), f"{objective}, {codec}, {at}: {shown['place']} and not {place(best)}"
            seen.add(best)
    assert len(seen) > 12, "these settings tell little apart"


def test_a_key_on_a_slider_moves_it(page: Browser) -> None:
    move(page, {"objective": "latency", "codec": ANY_CODEC, **SETTINGS[1]})
    before = chosen(page)
    page.press("#uplink_bit_s", ARROW_RIGHT * 120)
    at = move(page, {})
    assert at["uplink_bit_s"] == pytest.approx(SETTINGS[1]["uplink_bit_s"] + 1.2)
    best = Frontier.of(GRAPH, list(planned().rows)).best(*situation(at))
    assert is_row(chosen(page), best)
    assert chosen(page) != before


@pytest.mark.parametrize("upwards", ["slowdown", "load"])
def test_the_map_shows_the_choice_at_each_uplink_and_load_or_slowdown(page: Browser, upwards: str) -> None:
    at = move(page, {"objective": "latency", "codec": ANY_CODEC, **SETTINGS[0], "upwards": upwards})
    link, load, slowdown = situation(at)
    x, y, z, star, names = page.run(
        """
        const [map, star] = document.getElementById("map").data;
        const names = [...document.querySelectorAll("#legend li")].map((item) => item.textContent);
        return [map.x, map.y, map.z, [star.x[0], star.y[0]], names];
        """
    )
    assert star == pytest.approx([at["uplink_bit_s"], at[upwards]])
    frontier = Frontier.of(GRAPH, list(planned().rows))
    for i, j in itertools.product(range(0, len(y), 5), range(0, len(x), 5)):
        there = dataclasses.replace(link, uplink_bit_s=1e6 * 10 ** x[j])
        factors = (load, 10 ** y[i]) if upwards == "slowdown" else (10 ** y[i], slowdown)
        assert names[z[i][j]] == place(frontier.best(there, *factors))


def test_a_link_brings_its_rates_and_its_radio(page: Browser) -> None:
    move(page, {"objective": "energy", "codec": ANY_CODEC, **SETTINGS[0]})
    at = move(page, {"link": "wifi"})
    wifi = ts.Link.parse("wifi")
    assert page.run("return document.getElementById('uplink_bit_s-number').value") == "18.88"
    assert 10 ** at["uplink_bit_s"] == pytest.approx(18.88, rel=0.02)
    situated = (wifi, 10 ** at["load"], 10 ** at["slowdown"])
    assert is_row(chosen(page), Frontier.of(GRAPH, list(planned().rows)).best(*situated, "energy"))
    move(page, {"link": LINK.name})


# Boxes of everything that is read: lines of text, texts of charts that are not turned, and controls.
TEXTS = """
const boxes = [];
const add = (text, { x, y, width, height }) => {
  if (width > 0 && height > 0) boxes.push({ text: text.trim(), x, y, right: x + width, bottom: y + height });
};
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, parent = node.parentElement;
  if (!node.data.trim() || parent.closest("script, style, svg, select")) continue;
  const range = document.createRange();
  range.selectNodeContents(node);
  for (const box of range.getClientRects()) add(node.data, box);
}
for (const text of document.querySelectorAll("svg text")) {
  const turned = /rotate\\((?!0|-90)/.test(text.getAttribute("transform") ?? "");
  if (text.textContent.trim() && !turned) add(text.textContent, text.getBoundingClientRect());
}
for (const control of document.querySelectorAll("input, select")) add(control.id, control.getBoundingClientRect());
return boxes;
"""
# What marks the chosen bar of a chart: the frame around it, the band behind it, the star, and all that is drawn.
CHOSEN = """
const box = (selector) => {
  const found = [...document.querySelectorAll(`#${arguments[0]} ${selector}`)].at(-1);
  const { x, y, width, height } = found.getBoundingClientRect();
  return [x, y, x + width, y + height];
};
return [
  box(".layer-above .shapelayer path"), box(".layer-below .shapelayer path"),
  box(".scatterlayer .trace:last-child .textpoint text"), box(".nsewdrag"),
];
"""


@pytest.fixture
def resized(page: Browser) -> Iterator[Browser]:
    """The page, which a test may resize."""
    yield page
    page.resize(1400, 1500)


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_on_a_screen_of_any_width_no_texts_overlap_and_the_chosen_bar_is_seen(resized: Browser, width: int) -> None:
    resized.resize(width, 800)
    for objective, settings in zip(["latency", "energy", "throughput", "latency"], SETTINGS[::3], strict=True):
        move(resized, {"objective": objective, "codec": ANY_CODEC, **settings})
        laid_out, shown = resized.run(
            "const page = document.documentElement; return [page.scrollWidth, page.clientWidth]"
        )
        assert laid_out <= shown, "the page scrolls sideways"
        boxes = resized.run(TEXTS)
        assert len(boxes) > 50
        for one, other in itertools.combinations(boxes, 2):
            across = min(one["right"], other["right"]) - max(one["x"], other["x"])
            down = min(one["bottom"], other["bottom"]) - max(one["y"], other["y"])
            assert min(across, down) < 2, f"{one} and {other} overlap"
        for chart in ("latency", "energy"):
            frame, band, star, plot = resized.run(CHOSEN, chart)
            assert min(band[2] - band[0], band[3] - band[1]) > 8, (
                "the band behind the chosen bar is too thin to be seen"
            )
            assert inside(frame, band)
            assert inside(band, plot)
            assert inside(star, plot)
            covered = frame[2] - star[0] if width < 600 else star[3] - frame[1]
            assert covered < 8, f"the star covers {covered} pixels of the chosen bar"


def inside(box: list[float], outer: list[float]) -> bool:
    """Whether a box (left, top, right, bottom) lies in another, but for a pixel."""
    return all(box[i] >= outer[i] - 1 for i in (0, 1)) and all(box[i] <= outer[i] + 1 for i in (2, 3))


def test_names_are_text_and_nothing_is_loaded(page: Browser) -> None:
    assert page.run("return window.hacked ?? null") is None
    assert page.run("return document.querySelectorAll('img, b, section i:not(#legend i)').length") == 0
    assert page.run("return performance.getEntriesByType('resource').map((entry) => entry.name)") == []
    labels = " ".join(page.run("return [...document.querySelectorAll('#latency .xtick')].map((t) => t.textContent)"))
    assert "</script>" in labels or "<img" in labels
    assert page.run("return document.querySelector('#link').value") == LINK.name


def test_limits_are_kept_and_said_where_nothing_keeps_to_them(browser: Browser, tmp_path: Path) -> None:
    plan = planned(objective="energy", latency_s=0.25, raw_input=False)
    report.explorer(GRAPH, plan, tmp_path / "limits.html")
    browser.open(tmp_path / "limits.html")
    data = page_data(GRAPH, plan)
    told = 0
    for settings in SETTINGS:
        link, load, slowdown = situation(move(browser, settings))
        terms = choose(plan.frontier, link, load, slowdown, "energy", plan.constraints)
        position = int(browser.run("return document.getElementById('choice').dataset.row"))
        if terms is None:
            assert position == -1
            assert "Nothing" in browser.run("return document.getElementById('choice').textContent")
            told += 1
        else:
            assert is_row(data["rows"][position], terms.row)
    assert 0 < told < len(SETTINGS)
    assert browser.messages() == []


def test_a_bound_on_what_is_in_flight_counts_on_the_page_too(browser: Browser, tmp_path: Path) -> None:
    bounded = Objective(throughput=1.0, in_flight=2)
    plan = planned(objective=bounded)
    report.explorer(GRAPH, plan, tmp_path / "stream.html")
    browser.open(tmp_path / "stream.html")
    data = page_data(GRAPH, plan)
    told_apart = 0
    for settings in SETTINGS:
        there = situation(move(browser, {"codec": ANY_CODEC, **settings}))
        best = plan.frontier.best(*there, bounded)
        assert is_row(data["rows"][int(browser.run("return document.getElementById('choice').dataset.row"))], best)
        assert "an answer every" in browser.run("return document.getElementById('choice').textContent")
        told_apart += best != plan.frontier.best(*there, "throughput")
    assert told_apart, "these settings do not tell the bound from none"
    assert browser.messages() == []


def test_without_joules_energy_cannot_be_chosen(browser: Browser, tmp_path: Path) -> None:
    report.explorer(GRAPH, planned(device=profile_of(0.5, None)), tmp_path / "plain.html")
    browser.open(tmp_path / "plain.html")
    assert browser.run("return document.querySelector('#objective option[value=energy]').disabled")
    assert browser.run("return document.getElementById('energy').hidden")
    assert "no joules" in browser.run("return document.getElementById('note').textContent")
    assert browser.messages() == []


def test_the_command_writes_page_and_picture(tmp_path: Path) -> None:
    DEVICE.save(tmp_path / "device.json")
    SERVER.save(tmp_path / "server.json")
    sides = ["--device", str(tmp_path / "device.json"), "--server", str(tmp_path / "server.json")]
    page, picture = tmp_path / "report.html", tmp_path / "plan.png"
    options = ["--link", "lte", "--uplink", "2.5", "--html", str(page), "--plot", str(picture)]
    assert cli.main(["plan", f"{__name__}:factory", *sides, *options]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text()
    # The preset's own rate stays to be had beside the one planned for.
    start = json.loads(text.partition('id="plan">')[2].partition("</script>")[0])
    rates = {link["name"]: link["uplink_bit_s"] for link in start["links"]}
    assert rates[start["start"]["link"]] == 2.5e6
    assert rates["lte"] == 5.85e6


def test_a_page_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ts.TorchSurgeonError, match="cannot be written"):
        report.explorer(GRAPH, planned(), tmp_path / "no" / "such" / "folder.html")
