"""An endpoint that speaks just enough of OpenAI's API, and does what the prompt's first token says."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest


class Endpoint:
    """`plan` says by request number (in order of arrival) what happens; None = it is answered."""

    def __init__(self) -> None:
        self.plan: dict[int, str] = {}
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = {"data": [{"id": "m", "max_model_len": 4096}]}
        self.models_status = 200
        self.hang = threading.Event()  # ends what hangs
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                self.answer(endpoint.models_status, json.dumps(endpoint.models).encode())

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint._lock:
                    number = len(endpoint.bodies)
                    endpoint.bodies.append(body)
                    endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                endpoint.act(self, endpoint.plan.get(number, ""), body)

            def answer(self, status: int, body: bytes, **headers: str) -> None:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def act(self, handler: Any, what: str, body: dict[str, Any]) -> None:
        if what == "refuse":
            handler.answer(429, b'{"error": {"message": "queue full"}}', Retry_After="7")
            return
        if what == "fail":
            handler.answer(500, b"oh")
            return
        handler.send_response(200)
        handler.send_header("Content-Type", "text/event-stream")
        handler.end_headers()
        chat = "messages" in body
        if what == "hang":
            self.hang.wait(60)
            return
        if what == "garbage":
            handler.wfile.write(b"data: {not json\n\n")
            return
        if what == "error":
            handler.wfile.write(b'data: {"error": {"message": "engine lost"}}\n\n')
            return
        for number in range(body["max_tokens"]):
            last = number == body["max_tokens"] - 1
            choice: dict[str, Any] = {"delta": {"content": "x"}} if chat else {"text": "x"}
            choice["finish_reason"] = "length" if last and what != "unfinished" else None
            handler.wfile.write(f"data: {json.dumps({'choices': [choice]})}\n\n".encode())
        if what == "broken":
            return
        asked = len(body["prompt"]) if isinstance(body.get("prompt"), list) else 10
        usage = {
            "prompt_tokens": asked,
            "completion_tokens": body["max_tokens"],
            "prompt_tokens_details": {"cached_tokens": asked // 2},
        }
        handler.wfile.write(f"data: {json.dumps({'choices': [], 'usage': usage})}\n\n".encode())
        handler.wfile.write(b"data: [DONE]\n\n")

    def close(self) -> None:
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    one = Endpoint()
    yield one
    one.close()
