"""A hook of mkdocs: what pages link in the repository outside docs/ becomes a part of the site, so links work on both.

A linked Markdown file becomes a page, a program a page that shows it, and anything else (results, pictures) is copied.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()(?P<path>[^)#\s:]+)(?P<anchor>#[^)\s]*)?(?=\))")
# On the site, whether or not the navigation has it.
_UNLISTED = InclusionLevel.NOT_IN_NAV
LANGUAGES = {".py": "python", ".sh": "bash", ".toml": "toml"}


def on_files(files: Files, config: Any) -> Files:
    """Add every file outside docs/ that a page links, and those that these link in turn."""
    unread = [(f"docs/{file.src_uri}", file.content_string) for file in files.documentation_pages()]
    while unread:
        path, text = unread.pop()
        for match in LINK.finditer(text):
            linked = _target(path, match["path"])
            uri = _site_uri(linked)
            if linked.startswith("docs/") or not (ROOT / linked).is_file() or uri in files.src_uris:
                continue
            if language := LANGUAGES.get(Path(linked).suffix):
                content = f"# {linked}\n\n````{language}\n{(ROOT / linked).read_text()}````\n"
                files.append(File.generated(config, uri, content=content, inclusion=_UNLISTED))
            else:
                files.append(File.generated(config, uri, abs_src_path=str(ROOT / linked), inclusion=_UNLISTED))
                if linked.endswith(".md"):
                    unread.append((linked, (ROOT / linked).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links at where their files are on the site; mkdocs itself reports those that lead nowhere."""
    here = page.file.src_uri
    path = f"docs/{here}" if (ROOT / "docs" / here).is_file() else here

    def moved(match: re.Match[str]) -> str:
        uri = _site_uri(_target(path, match["path"]))
        if uri not in files.src_uris:
            return match[0]
        return posixpath.relpath(uri, posixpath.dirname(here) or ".") + (match["anchor"] or "")

    return LINK.sub(moved, markdown)


def _target(page: str, link: str) -> str:
    """The path in the repository that a link on a page, itself at a path in the repository, leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), link))


def _site_uri(path: str) -> str:
    """Where a file of the repository is on the site, as mkdocs names sources: docs/ is the site's top."""
    if path == "README.md":
        return "index.md"
    if Path(path).suffix in LANGUAGES:
        return f"{path}.md"
    return path.removeprefix("docs/")
