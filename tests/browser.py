"""Headless Chromium over the DevTools protocol (a pipe; nothing to install but chromium): pages at any width, and their errors."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium")
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--remote-debugging-pipe")
LINGERS = 30  # seconds that a browser may take to close
COMPLAINTS = ("error", "warning", "assert")  # types of console messages


def needs_chromium(test):
    """Marks a test as `browser`; it is skipped where there is no chromium, and that alone."""
    skip = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
    return pytest.mark.slow(pytest.mark.browser(skip(test)))


class Browser:
    """One page of a fresh profile. `complaints`: console errors and warnings, uncaught exceptions, what did not load."""

    def __init__(self):
        self.complaints: list[str] = []
        self._number, self._left, self._profile = 0, b"", tempfile.mkdtemp()
        theirs, self._to = os.pipe()
        self._from, answers = os.pipe()
        # Chromium reads 3 and writes 4; bash moves descriptors of any number there.
        command = f'exec "$0" "$@" 3<&{theirs} 4>&{answers}'
        profile = f"--user-data-dir={self._profile}"
        self._process = subprocess.Popen(
            ["bash", "-c", command, str(CHROMIUM), *FLAGS, profile, "about:blank"],
            pass_fds=(theirs, answers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._session: dict[str, str] = {}
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_error) -> None:
        self._session = {}
        self.call("Browser.close")
        self._process.wait(timeout=LINGERS)
        os.close(self._to)
        os.close(self._from)
        shutil.rmtree(self._profile, ignore_errors=True)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """What the browser answers. Raises RuntimeError: it refuses, or it is gone."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while (found := self._receive()).get("id") != self._number:
            self._note(found)
        if "error" in found:
            raise RuntimeError(f"{method}: {found['error']['message']}")
        return found["result"]

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            if not (more := os.read(self._from, 1 << 20)):
                raise RuntimeError("chromium closed the pipe")
            self._left += more
        whole, _, self._left = self._left.partition(b"\0")
        return json.loads(whole)

    def _note(self, event: dict[str, Any]) -> None:
        """Keep what an event complains of."""
        method, said = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            details = said["exceptionDetails"]
            self.complaints.append(details.get("exception", {}).get("description") or details["text"])
        elif method == "Runtime.consoleAPICalled" and said["type"] in COMPLAINTS:
            self.complaints.append(" ".join(str(one.get("value", one.get("description"))) for one in said["args"]))
        elif method == "Log.entryAdded" and said["entry"]["level"] in COMPLAINTS:
            self.complaints.append(said["entry"]["text"])
        elif method == "Page.loadEventFired":
            self._loaded = True

    def open(self, page: Path, width: int, height: int = 900, dark: bool = False, media: str = "") -> None:
        """Load a file into a window whose inside is `width` by `height` pixels; media: `print`, or the screen's."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self._loaded, self.complaints = False, []
        self.call("Page.navigate", url=page.resolve().as_uri())
        while not self._loaded:
            self._note(self._receive())

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page, as JSON. Raises RuntimeError: the script threw."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"]["exception"]["description"])
        return found["result"].get("value")

    def overflow(self) -> list[str]:
        """What reaches beyond the window sideways, unless a box around it scrolls; empty where the page fits."""
        return self.evaluate(
            """(() => {
              if (document.documentElement.scrollWidth <= document.documentElement.clientWidth) return [];
              const wide = [...document.body.querySelectorAll("*")].filter((one) =>
                one.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5 && !one.closest(".scroll"));
              return wide.length ? wide.map((one) => `${one.tagName}.${one.className}`) : ["the page"];
            })()"""
        )

    def pdf(self) -> bytes:
        """The page as printed on A4."""
        return base64.b64decode(
            self.call("Page.printToPDF", printBackground=True, paperWidth=8.27, paperHeight=11.69)["data"]
        )
