"""The server's page in a real browser: Chromium without a window, driven over the WebDriver protocol."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_server import Server, adapter, base, server

__all__ = ["adapter", "base", "server"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shutil.which("chromedriver") is None or shutil.which("chromium") is None,
        reason="needs chromium and chromedriver (Debian: chromium, chromium-driver)",
    ),
]
CONTROL, ENTER, TAB = "\ue009", "\ue007", "\ue004"
KEY = "element-6066-11e4-a52e-4f735466cecf"  # of an element, by the WebDriver standard


class Browser:
    """A session of chromedriver."""

    def __init__(self, port: int) -> None:
        self._address = f"http://127.0.0.1:{port}/session"
        arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=380,800"]
        options = {"goog:chromeOptions": {"args": arguments}, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._send("POST", "", {"capabilities": {"alwaysMatch": options}})
        self._address += f"/{made['sessionId']}"

    def _send(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._address + path, data, method=method)
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["value"]

    def open(self, url: str) -> None:
        self._send("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        return self._send("POST", "/execute/sync", {"script": script, "args": []})

    def press(self, keys: str) -> None:
        """Press keys on what has the focus."""
        element = self._send("GET", "/element/active")[KEY]
        self._send("POST", f"/element/{element}/value", {"text": keys})

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self._send("POST", "/se/log", {"type": "browser"})]

    def wait(self, script: str) -> None:
        end = time.monotonic() + 60
        while not self.run(f"return {script}"):
            assert time.monotonic() < end, script
            time.sleep(0.05)

    def close(self) -> None:
        self._send("DELETE", "")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("chromedriver") / "log"
    process = subprocess.Popen(
        ["chromedriver", f"--port={port}", f"--log-path={log}"], stdout=subprocess.DEVNULL
    )
    end = time.monotonic() + 30
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            break
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.1)
    opened = Browser(port)
    yield opened
    opened.close()
    process.terminate()
    process.wait()


def test_a_text_is_filled_with_the_keyboard_alone(browser: Browser, server: Server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.run(
        "window.said = []; window.masks = 0;"
        "new MutationObserver(() => said.push(document.getElementById('status').textContent))"
        ".observe(document.getElementById('status'), {childList: true});"
        "new MutationObserver(() => { masks = Math.max(masks, document.querySelectorAll('.mask').length) })"
        ".observe(document.getElementById('result'), {childList: true, subtree: true});"
        "document.getElementById('text').value = 'the ___ mill <mask:2>, na\\u00efve';"
    )
    browser.press(TAB)  # from the top of the page to the text
    assert browser.run("return document.activeElement.id") == "text"
    browser.press(CONTROL + ENTER)
    browser.wait("document.getElementById('status').textContent.startsWith('Done')")
    assert browser.run("return said") == ["Filling…", "Done: 2 holes are filled."]
    assert browser.run("return masks") >= 2
    result = browser.run("return document.getElementById('result').textContent")
    assert result.startswith("the ") and " mill " in result and result.endswith(", naïve")
    assert browser.run("return document.getElementById('copy').disabled") is False
    assert browser.errors() == []  # the content security policy among them


def test_a_refusal_is_told(browser: Browser, server: Server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    browser.run("document.getElementById('text').value = 'no hole'; document.getElementById('fill').click()")
    browser.wait("document.getElementById('status').className === 'error'")
    assert "has no hole" in browser.run("return document.getElementById('status').textContent")


def test_every_control_has_a_name_and_nothing_is_wider_than_a_small_screen(
    browser: Browser, server: Server
) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    assert browser.run("return document.documentElement.scrollWidth <= window.innerWidth")
    nameless = (
        "return [...document.querySelectorAll('button, textarea, input')]"
        ".filter(one => !(one.labels && one.labels.length) && !one.textContent.trim()).map(one => one.id)"
    )
    assert browser.run(nameless) == []
    assert browser.run("return document.getElementById('status').getAttribute('aria-live')") == "polite"


def test_nothing_is_loaded_from_elsewhere(browser: Browser, server: Server) -> None:
    browser.open(f"http://127.0.0.1:{server.port}/")
    loaded = browser.run("return performance.getEntriesByType('resource').map(one => one.name)")
    assert loaded and all(name.startswith(f"http://127.0.0.1:{server.port}/") for name in loaded)


def test_the_page_is_shipped_beside_the_code() -> None:
    from ggml_diffusion.app.server import routes

    assert all((Path(routes.__file__).parent / name).is_file() for name, _ in routes._PAGE_FILES.values())
