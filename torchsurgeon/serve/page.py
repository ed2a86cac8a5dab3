"""The page at ``/`` that shows how busy the server is: one file, which asks ``/v2/load`` again and again.

The page itself holds nothing about the server, so it is answered without a token. Where the server has tokens, the page
asks its reader for one, and sends it with each request. It keeps it in the memory of the tab only.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources

PATH = "/"


@lru_cache(maxsize=1)
def page() -> tuple[bytes, Mapping[str, str]]:
    """Return the page, and its headers. They let nothing in but the page's own style and script, and its requests."""
    text = resources.files("torchsurgeon.serve").joinpath("page.html").read_text(encoding="utf-8")
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    rules.append("frame-ancestors 'none'")
    for name in ("style", "script"):
        (inside,) = re.findall(f"<{name}>(.*?)</{name}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        rules.append(f"{name}-src 'sha256-{digest}'")
    headers = {
        "content-type": "text/html; charset=utf-8",
        "content-security-policy": "; ".join(rules),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }
    return text.encode(), headers
