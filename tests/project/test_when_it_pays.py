"""The page on which a reader asks when a split pays computes what the planner does, for everyone, without a network."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
from browser import Browser
from paths import ROOT

from benchmarks import split_plane, when_it_pays
from benchmarks.support import result_file
from torchsurgeon.demo.winners import SLOWDOWNS, UPLINKS_BIT_S
from torchsurgeon.planning import sweep
from torchsurgeon.planning.grid import LEAST_GAIN

TRAINED = next(iter(when_it_pays.TRAINED))
MODELS = result_file.known(when_it_pays.OUT)["models"]
ARROW_RIGHT = "\ue014"
# Moves controls as a hand does. Returns where the sliders then stand and what is said, and at last the map's figures.
MOVE = """
const results = [];
for (const settings of arguments[0]) {
  for (const [key, value] of Object.entries(settings)) {
    const control = document.getElementById(`ways-${key}`);
    control.value = value;
    control.dispatchEvent(new Event(control.type === "range" ? "input" : "change", { bubbles: true }));
  }
  const at = (key) => document.getElementById(`ways-${key}`).valueAsNumber;
  results.push({
    slow: 10 ** at("slow"), uplink: 10 ** at("uplink"), trip: at("trip"),
    shown: { ...document.getElementById("ways-result").dataset },
    text: document.getElementById("ways-result").textContent,
  });
}
const frame = () => new Promise(requestAnimationFrame);
return frame().then(frame).then(() => [results, { ...document.getElementById("ways-plane").dataset }]);
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """The page, as mkdocs builds it, without the site's other pages."""
    config = pytest.importorskip("mkdocs.config")
    from mkdocs.commands.build import build

    site = tmp_path_factory.mktemp("site")
    only = {"nav": [{"page": "when-it-pays.md"}], "exclude_docs": "*.md\n!/when-it-pays.md\n/tools/", "plugins": []}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(site), **only))
    with Browser(1280, 1600) as started:
        started.open(site / "when-it-pays.html")
        yield started
        assert started.messages() == []


def situations() -> list[dict[str, Any]]:
    """Settings of the controls: some of each network, goal and budget."""
    rng = random.Random(29)
    return [
        {
            "model": name,
            "goal": goal,
            "runtime": runtime,
            "budget": budget,
            "slow": 0.05 * slow,
            "uplink": 0.05 * uplink - 1,
            "trip": rng.choice([0, 20, 60, 200]),
        }
        for name, model in MODELS.items()
        for goal in ("latency", "throughput")
        for runtime in model["rows"]
        for budget in (when_it_pays.BUDGETS if model["source"] == "trained" else when_it_pays.BUDGETS[:1])
        for slow, uplink in zip(rng.sample(range(41), 2), rng.sample(range(61), 2), strict=True)
    ]


def test_the_page_says_what_the_planner_computes(browser: Browser) -> None:
    asked = situations()
    found, _ = browser.run(MOVE, asked)
    kinds = set()
    for settings, answer in zip(asked, found, strict=True):
        frontier = when_it_pays.frontier(MODELS[settings["model"]], settings["budget"], settings["runtime"])
        link = when_it_pays.link(1e6 * answer["uplink"], answer["trip"] / 1e3)
        costs = frontier.costs(link, 1.0, answer["slow"], settings["goal"])
        ends = {"device": [row.on_device for row in frontier.rows], "server": [row.index == 0 for row in frontier.rows]}
        ends["cut"] = [not (device or server) for device, server in zip(*ends.values(), strict=True)]
        shown = answer["shown"]
        least = {kind: float(costs[chosen].min()) for kind, chosen in ends.items()}
        assert {kind: float(shown[kind]) for kind in least} == pytest.approx(least, rel=1e-9)
        end_s = min(least["device"], least["server"])
        best = frontier.best(link, 1.0, answer["slow"], settings["goal"])
        assert float(shown["gain"]) == pytest.approx(max(1.0, end_s / least["cut"]), rel=1e-9)
        places = [(row.index, row.codec) for row in frontier.rows]
        own_s = min(costs[i] for i, place in enumerate(places) if place == (int(shown["index"]), shown["codec"]))
        assert own_s == pytest.approx(least[shown["kind"]], rel=1e-9)
        assert float(shown["takes"]) == pytest.approx(own_s, rel=1e-9)
        # Of ways that cost the same, which a stream often has, the page may show another one than the planner.
        if end_s / least["cut"] >= LEAST_GAIN or costs.min() == end_s:
            assert own_s == pytest.approx(costs[frontier.rows.index(best)], rel=1e-9), settings
        assert answer["text"].startswith("Split it" if shown["kind"] == "cut" else "Do not split it")
        kinds.add((settings["model"], shown["kind"]))
    assert {kind for _, kind in kinds} == {"device", "server", "cut"}
    assert len(kinds) > len(MODELS), "these settings tell little apart"


@pytest.mark.parametrize("budget", ["surely", "as measured"])
@pytest.mark.parametrize(("plane", "goal"), split_plane.OBJECTIVES.items())
def test_the_map_is_the_planners_and_that_of_the_page_on_planning(
    browser: Browser, budget: str, plane: str, goal: str
) -> None:
    settings = {"model": TRAINED, "goal": goal, "budget": budget, "runtime": when_it_pays.EAGER, "trip": 30}
    (found,), drawn = browser.run(MOVE, [settings])
    frontier = when_it_pays.frontier(MODELS[TRAINED], budget, when_it_pays.EAGER)
    link = when_it_pays.link(1e6, found["trip"] / 1e3)
    own = sweep(frontier, link, UPLINKS_BIT_S, SLOWDOWNS, goal, varied="slowdown").summary()
    shown = {"share": float(drawn["share"]), "most_gain": float(drawn["most"])}
    assert shown == pytest.approx({key: own[key] for key in shown}, abs=1e-3)
    planes = result_file.known(split_plane.OUT)["planes"]
    known = planes[f"fitted; 97 % kept {budget}; pictures take what encoding them takes"][plane]
    assert own == pytest.approx({key: known[key] for key in own}, abs=2e-3)


def test_ways_of_the_papers_networks_are_what_its_authors_measured() -> None:
    for name, title in when_it_pays.PAPER.items():
        assert when_it_pays.paper(name) == MODELS[title]


def test_links_have_buttons_and_the_map_can_be_clicked(browser: Browser) -> None:
    browser.run("[...document.querySelectorAll('.ways button')].find((one) => one.textContent === 'LTE').click()")
    assert browser.run("return document.getElementById('ways-uplink-shown').textContent") == "5.85 Mbit/s"
    shown = browser.run(
        """
        const map = document.getElementById("ways-plane"), box = map.getBoundingClientRect();
        const [clientX, clientY] = [box.right - 15, box.y + 12];
        map.dispatchEvent(new MouseEvent("click", { clientX, clientY }));
        return ["uplink", "slow"].map((key) => document.getElementById(`ways-${key}-shown`).textContent);
        """
    )
    assert shown == ["100 Mbit/s", "100×"]


def test_keys_move_what_a_mouse_moves_and_everything_has_a_name(browser: Browser) -> None:
    browser.run(MOVE, [{"model": TRAINED, "goal": "throughput", "slow": 0, "uplink": 0}])
    browser.press("#ways-slow", ARROW_RIGHT * 20)
    assert browser.run("return document.getElementById('ways-slow-shown').textContent") == "10×"
    assert browser.run("return document.getElementById('ways-slow').getAttribute('aria-valuetext')") == "10×"
    nameless = """
    return [...document.querySelectorAll(".ways select, .ways input")].filter((one) => !one.labels.length).length;
    """
    assert browser.run(nameless) == 0
    assert "Splitting is the best" in browser.run("return document.querySelector('#ways-plane').ariaLabel")


def test_nothing_is_loaded_from_elsewhere(browser: Browser) -> None:
    addresses = browser.run("return performance.getEntriesByType('resource').map((entry) => entry.name)")
    assert [address for address in addresses if not address.startswith("file:///")] == []


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_on_a_screen_of_any_width_nothing_is_cut_off(browser: Browser, width: int) -> None:
    browser.resize(width, 900)
    browser.run(MOVE, [{"model": name} for name in MODELS])
    laid_out, seen = browser.run("const page = document.documentElement; return [page.scrollWidth, page.clientWidth]")
    assert laid_out <= seen
    inner, outer = browser.run(
        "const box = document.querySelector('.ways-scroll'); return [box.scrollWidth, box.clientWidth]"
    )
    assert inner <= outer
