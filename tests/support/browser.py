"""Debian's Chromium, without a window, driven over W3C WebDriver."""

from __future__ import annotations

import base64
import re
import shutil
import subprocess
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import requests

_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"


def _started(driver: str) -> tuple[subprocess.Popen[str], str]:
    """Start the driver, and return it with its port.

    It takes a free port of IPv6 and then wants the same of IPv4, which another test may have: then it ends.
    """
    for _ in range(10):
        process = subprocess.Popen([driver, "--port=0"], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if "successfully" in line:
                (port,) = re.findall(r"on port (\d+)", line)
                return process, port
        with process:
            process.kill()
    raise RuntimeError(f"{driver} found no free port in ten tries")


class Browser:
    """A browser with one page. Skips the test where chromium or its driver is not installed."""

    def __init__(self, width: int = 1400, height: int = 1500) -> None:
        chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
        if chromium is None or driver is None:
            pytest.skip("no browser: apt-get install chromium chromium-driver")
        self._driver, port = _started(driver)
        try:
            self._url = f"http://127.0.0.1:{port}/session"
            # A sandbox inside a container, and as root, is refused.
            arguments = ["--headless", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"]
            chrome = {"binary": chromium, "args": arguments}
            wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
            self._url += "/" + self._ask("", {"capabilities": {"alwaysMatch": wanted}})["sessionId"]
        except BaseException:
            with self._driver:
                self._driver.kill()
            raise

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        requests.delete(self._url, timeout=30)
        with self._driver:
            self._driver.terminate()

    def _ask(self, what: str, body: dict[str, Any] | None = None) -> Any:
        answer = requests.request("GET" if body is None else "POST", self._url + what, json=body, timeout=60)
        value = answer.json()["value"]
        assert answer.ok, value
        return value

    def open(self, page: Path) -> None:
        """Open a file and wait until it is loaded."""
        self.visit(page.resolve().as_uri())

    def visit(self, url: str) -> None:
        """Open an address and wait until its page is loaded."""
        self._ask("/url", {"url": url})

    def prefer(self, scheme: str) -> None:
        """Show pages in this colour scheme, which is "light" or "dark"."""
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self._ask("/goog/cdp/execute", {"cmd": "Emulation.setEmulatedMedia", "params": media})

    def resize(self, width: int, height: int) -> None:
        """Lay the page out for a screen of this size in pixels: a phone's too, narrower than any window."""
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._ask("/goog/cdp/execute", {"cmd": "Emulation.setDeviceMetricsOverride", "params": screen})

    def run(self, script: str, *arguments: Any) -> Any:
        """Return what the body of a JavaScript function returns, or the promise that it returns comes to."""
        return self._ask("/execute/sync", {"script": script, "args": list(arguments)})

    def press(self, selector: str, keys: str) -> None:
        """Press keys while an element has the focus."""
        element = self._ask("/element", {"using": "css selector", "value": selector})[_ELEMENT]
        self._ask(f"/element/{element}/value", {"text": keys})

    def messages(self) -> list[str]:
        """Return what was written to the console since the last call, refused connections and errors with it."""
        return [entry["message"] for entry in self._ask("/se/log", {"type": "browser"})]

    def screenshot(self) -> bytes:
        """Return the window's content as PNG."""
        return base64.b64decode(self._ask("/screenshot"))
