"""docs/architecture.md shows the rooms as they are."""

from __future__ import annotations

import re
import runpy

from paths import ROOT

DRAWING = runpy.run_path(str(ROOT / "docs" / "tools" / "rooms.py"))
IMPORTS: set[tuple[str, str]] = DRAWING["imports"]()


def test_the_picture_shows_the_imports_as_they_are() -> None:
    picture = (ROOT / "docs" / "pictures" / "rooms.svg").read_text()
    arrows = [tuple(name.split("-")) for name in re.findall(r'class="line" id="([^"]*)"', picture)]
    assert arrows == DRAWING["direct"](IMPORTS), "draw it again: python docs/tools/rooms.py"


def test_the_table_lists_every_room_above_those_that_it_imports() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    section = page[page.index("## Rooms") : page.index("### Files of the larger rooms")]
    rooms = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    paths = (ROOT / "torchsurgeon").iterdir()
    there = {path.stem for path in paths if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert sorted(rooms) == sorted(there - {"__init__", "__main__"})
    assert [(room, other) for room, other in IMPORTS if rooms.index(room) > rooms.index(other)] == []
