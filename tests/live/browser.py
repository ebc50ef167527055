"""A headless Chromium, told by its DevTools protocol what to open, and asked what came of it."""

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

ANSWER_S_MAX = 60.0
"""A busy machine with two cores starts a browser in 5 s."""
MESSAGE_BYTES_MAX = 64 << 20
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
    "--no-first-run", "--disable-extensions", "--disable-background-networking", "--remote-debugging-port=0",
)  # fmt: skip


class Page:
    """One tab. `complaints` are errors and warnings of the page itself, whatever their source."""

    def __init__(self, socket: ClientConnection) -> None:
        """Open an empty tab."""
        self._socket = socket
        self._next = 0
        self._session = ""
        self.complaints: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Return the answer; what comes meanwhile is kept if it is a complaint."""
        self._next += 1
        message = {"id": self._next, "method": method, "params": params}
        self._socket.send(json.dumps(message | ({"sessionId": self._session} if self._session else {})))
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while True:
            answer = json.loads(self._socket.recv(timeout=deadline_s - time.monotonic()))
            if answer.get("id") == self._next:
                assert "error" not in answer, answer
                return answer["result"]  # type: ignore[no-any-return]
            self._listen(answer.get("method", ""), answer.get("params", {}))

    def _listen(self, event: str, told: dict[str, Any]) -> None:
        if event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(told["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
            self.complaints.append(json.dumps(told["args"])[:500])
        elif event == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
            self.complaints.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")

    def open(self, url: str, width: int = 1440, height: int = 1000) -> None:
        """Load `url` in a window of this size."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width, height=height, deviceScaleFactor=1, mobile=width < 600,
        )  # fmt: skip
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=url)
        self.wait("location.protocol === 'http:' && document.readyState !== 'loading'")

    def ask(self, script: str) -> Any:
        """Return the value of a JavaScript expression; a promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, script: str) -> Any:
        """Return the value of an expression as soon as it is true."""
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while not (value := self.ask(script)):
            assert time.monotonic() < deadline_s, (
                script,
                self.complaints,
                self.ask("document.body.innerText"),
            )
            time.sleep(0.05)
        return value


@contextmanager
def browser(folder: Path) -> Iterator[ClientConnection]:
    """Start a browser with its profile in `folder`; end it and its children."""
    with (folder / "log").open("w+b") as log:
        process = subprocess.Popen(
            ["chromium", *_FLAGS, f"--user-data-dir={folder / 'profile'}", "about:blank"],
            stdout=log, stderr=log,
        )  # fmt: skip
        try:
            with connect(_address(folder / "log", process), max_size=MESSAGE_BYTES_MAX) as socket:
                yield socket
                socket.send(json.dumps({"id": 0, "method": "Browser.close"}))
            process.wait(ANSWER_S_MAX)
        finally:
            process.kill()
            process.wait(ANSWER_S_MAX)


def _address(log: Path, process: "subprocess.Popen[bytes]") -> str:
    deadline_s = time.monotonic() + ANSWER_S_MAX
    while True:
        text = log.read_text(errors="replace")
        if found := re.search(r"DevTools listening on (ws://\S+)", text):
            return found[1]
        assert process.poll() is None, text
        assert time.monotonic() < deadline_s, text
        time.sleep(0.05)
