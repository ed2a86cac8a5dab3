"""Draw the package's rooms as their imports make them: python docs/tools/rooms.py writes docs/pictures/rooms.svg.

A box is a room (a file or folder of torchsurgeon/), an arrow an import; arrows that others imply are left out. Boxes
are placed as in Gansner et al., A Technique for Drawing Directed Graphs (1993): floors by a linear program that keeps
arrows short, the order on each floor by medians, and the places from left to right by a second linear program.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from itertools import combinations, pairwise
from pathlib import Path

import grimp
import networkx as nx
import numpy as np
from scipy.optimize import linprog

PICTURE = Path(__file__).resolve().parents[1] / "pictures" / "rooms.svg"
BOX_WIDTH, BOX_HEIGHT, FLOOR_HEIGHT = 130, 46, 84
BOX_GAP, LINE_GAP, MARGIN = 12, 26, 20
ROUNDS = 40
STYLE = """
    svg { --page: #f7f8fa; --box: #ffffff; --edge: #8a95a5; --line: #6b7788; --text: #1d2430 }
    @media (prefers-color-scheme: dark) {
      svg { --page: #1a1e26; --box: #2b3240; --edge: #66738a; --line: #97a3b6; --text: #eef1f6 }
    }
    .page { fill: var(--page) }
    .box { fill: var(--box); stroke: var(--edge); stroke-width: 1.5 }
    .line { fill: none; stroke: var(--line); stroke-width: 1.8 }
    .tip { fill: var(--line) }
    text { font: 23px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--text); text-anchor: middle }
  """

# A room's name, or where the arrow between two rooms passes a floor: (importing, imported, floor).
Place = str | tuple[str, str, int]


def imports() -> set[tuple[str, str]]:
    """Which room imports which, counting every import: also those in functions and for type checkers."""
    graph = grimp.build_graph("torchsurgeon", cache_dir=None)
    found = set()
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            room, imported = (name.partition(".")[2].partition(".")[0] for name in (module, other))
            if room and imported and room not in (imported, "__main__"):
                found.add((room, imported))
    return found


def direct(edges: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The imports that no others imply, in alphabetical order."""
    return sorted(nx.transitive_reduction(nx.DiGraph(edges)).edges)


def floors(edges: list[tuple[str, str]]) -> dict[str, int]:
    """Each room's floor, 0 the highest: below all rooms that import it, with the arrows as short as possible."""
    rooms = sorted({room for edge in edges for room in edge})
    rows = np.zeros((len(edges), len(rooms)))
    for row, (room, imported) in zip(rows, edges, strict=True):
        row[rooms.index(room)], row[rooms.index(imported)] = 1, -1
    found = linprog(-rows.sum(axis=0), A_ub=rows, b_ub=-np.ones(len(edges)), method="highs-ds")
    return {room: round(floor) for room, floor in zip(rooms, found.x, strict=True)}


def short_arrows(edges: list[tuple[str, str]], floor: dict[str, int]) -> nx.DiGraph:
    """The same arrows in pieces that each lead from one floor to the next."""
    graph = nx.DiGraph()
    for room, imported in edges:
        between: list[Place] = [(room, imported, at) for at in range(floor[room] + 1, floor[imported])]
        graph.add_edges_from(pairwise([room, *between, imported]))
    nx.set_node_attributes(graph, {p: floor[p] if isinstance(p, str) else p[2] for p in graph}, "floor")
    return graph


def ordered(graph: nx.DiGraph) -> list[list[Place]]:
    """The places on each floor from left to right, so that few arrows cross."""
    height = max(floor for _, floor in graph.nodes.data("floor")) + 1
    rows = [[place for place, at in graph.nodes.data("floor") if at == floor] for floor in range(height)]
    best, fewest = rows, crossings(graph, rows)
    for turn in range(ROUNDS):
        near = graph.predecessors if turn % 2 == 0 else graph.successors
        for fixed, row in pairwise(rows if turn % 2 == 0 else rows[::-1]):
            # Medians of both ends' numbers; a tie turns round every other time, so that more orders are tried.
            at = {place: index for index, place in enumerate(fixed)}
            middle = {place: statistics.mean([at[p] for p in near(place)] or [len(fixed) / 2]) for place in row}
            row.sort(key=middle.__getitem__, reverse=turn % 4 > 1)
            row.sort(key=middle.__getitem__)
        if (count := crossings(graph, rows)) < fewest:
            best, fewest = [list(row) for row in rows], count
    return best


def crossings(graph: nx.DiGraph, rows: list[list[Place]]) -> int:
    """How many pairs of arrows cross."""
    at = {place: index for row in rows for index, place in enumerate(row)}
    return sum(
        (at[a] - at[c]) * (at[b] - at[d]) < 0
        for row in rows
        for (a, b), (c, d) in combinations(list(graph.edges(row)), 2)
    )


def places(graph: nx.DiGraph, rows: list[list[Place]]) -> dict[Place, float]:
    """Each place's distance from the left: in order, apart, and with the arrows as upright as possible."""
    names = [place for row in rows for place in row]
    edges = list(graph.edges)
    column = {place: index for index, place in enumerate(names)}
    above, limits = [], []
    for row in rows:
        for left, right in pairwise(row):
            line = np.zeros(len(names) + len(edges))
            line[column[left]], line[column[right]] = 1, -1
            above.append(line)
            limits.append(-(_half(left) + _half(right)))
    for index, edge in enumerate(edges):
        for sign in (1, -1):
            line = np.zeros(len(names) + len(edges))
            line[column[edge[0]]], line[column[edge[1]]], line[len(names) + index] = sign, -sign, -1
            above.append(line)
            limits.append(0.0)
    # Bends in the middle of a long arrow disturb most.
    weights = [8 ** sum(not isinstance(place, str) for place in edge) for edge in edges]
    cost = np.array([0.0] * len(names) + weights)
    found = linprog(cost, A_ub=np.array(above), b_ub=limits, method="highs-ds")
    return dict(zip(names, found.x, strict=False))


def _half(place: Place) -> float:
    return (BOX_WIDTH + BOX_GAP) / 2 if isinstance(place, str) else LINE_GAP / 2


def draw(edges: list[tuple[str, str]]) -> str:
    """Return the picture as SVG."""
    floor = floors(edges)
    graph = short_arrows(edges, floor)
    x = places(graph, ordered(graph))
    left = min(x[place] - _half(place) for place in graph) - MARGIN
    width = max(x[place] + _half(place) for place in graph) + MARGIN - left
    height = max(floor.values()) * FLOOR_HEIGHT + BOX_HEIGHT + 2 * MARGIN

    def point(place: Place, side: int) -> tuple[float, float]:
        at = floor[place] if isinstance(place, str) else place[2]
        return x[place] - left, MARGIN + at * FLOOR_HEIGHT + BOX_HEIGHT / 2 * (1 + side)

    parts = []
    for room, imported in edges:
        way = [room, *sorted((p for p in graph if p[:2] == (room, imported)), key=lambda p: p[2]), imported]
        path = ""
        for begin, end in pairwise(way):
            (x0, y0), (x1, y1) = point(begin, 1), point(end, -1)
            if end == imported:
                y1 -= 8
            path += f"{'' if path else f'M{x0:.0f} {y0:.0f} '}L{x0:.0f} {y0:.0f} "
            path += f"C{x0:.0f} {(y0 + y1) / 2:.0f} {x1:.0f} {(y0 + y1) / 2:.0f} {x1:.0f} {y1:.0f} "
        parts.append(f'<path class="line" id="{room}-{imported}" d="{path.strip()}"/>')
        parts.append(f'<path class="tip" d="M{x1:.0f} {y1 + 8:.0f} l-5 -10 h10 z"/>')
    for room in sorted(floor):
        middle, top = point(room, -1)
        box = f'x="{middle - BOX_WIDTH / 2:.0f}" y="{top:.0f}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="8"'
        parts.append(f'<rect class="box" {box}/><text x="{middle:.0f}" y="{top + 31:.0f}">{room}</text>')
    size = f'viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" height="{height:.0f}"'
    return (
        "\n  ".join(
            [
                f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-labelledby="title">',
                '<title id="title">Rooms of torchsurgeon; an arrow leads from a room to one that it imports</title>',
                f"<style>{STYLE}</style>",
                '<rect class="page" width="100%" height="100%" rx="18"/>',
                *parts,
            ]
        )
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    PICTURE.write_text(draw(direct(imports())))
