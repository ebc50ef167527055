"""HTTP as our tests speak it: completions over token ids, blocking or as a stream that can be watched."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

ANSWER_S = 120.0
GREEDY: dict[str, Any] = {"temperature": 0.0, "ignore_eos": True}


@dataclass
class Answer:
    """What one choice of a completion came to."""

    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str | None = None
    logprobs: list[float] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    error: str = ""
    arrivals_s: list[float] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Prompt tokens that were not computed."""
        return (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0

    @property
    def gap_s(self) -> float:
        """The longest silence between two tokens."""
        pairs = zip(self.arrivals_s, self.arrivals_s[1:], strict=False)
        return max((after - before for before, after in pairs), default=0.0)

    def take(self, choice: dict[str, Any]) -> None:
        """Add one choice object, whole or delta."""
        self.tokens += choice.get("token_ids") or []
        self.text += choice["text"]
        self.finish = choice["finish_reason"] or self.finish
        if choice.get("logprobs"):
            self.logprobs += choice["logprobs"]["token_logprobs"]

    @property
    def outcome(self) -> tuple[list[int], str, str | None]:
        """What must be equal between two runs of one request."""
        return self.tokens, self.text, self.finish


class Stream:
    """A streaming completion in its own thread; `answer` grows while it runs."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self.answer = Answer()
        self._client = client
        self._body = {**body, "stream": True, "stream_options": {"include_usage": True}}
        self._closing = threading.Event()
        self._changed = threading.Condition()
        self.status = 0
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_tokens(self, count: int, deadline_s: float = 60.0) -> None:
        """Return when `count` tokens have arrived."""
        with self._changed:
            enough = self._changed.wait_for(
                lambda: len(self.answer.tokens) >= count or not self._thread.is_alive(), deadline_s
            )
        assert enough, f"no {count} tokens within {deadline_s:g} s: {self.answer}"
        assert len(self.answer.tokens) >= count, f"ended before {count} tokens: {self.answer}"

    def hang_up(self) -> None:
        """Close the connection as a client that lost interest."""
        self._closing.set()
        self._thread.join(10.0)

    def result(self, deadline_s: float = ANSWER_S) -> Answer:
        """Return the whole answer."""
        self._thread.join(deadline_s)
        assert not self._thread.is_alive(), f"no end after {deadline_s:g} s: {self.answer}"
        assert not self.answer.error, self.answer.error
        return self.answer

    def _run(self) -> None:
        try:
            with self._client.stream("POST", "/v1/completions", json=self._body) as response:
                self.status = response.status_code
                if self.status != 200:
                    self.answer.error = response.read().decode()
                    return
                rest = b""
                for chunk in response.iter_bytes():  # iter_lines ends lines at U+0085 and others too
                    *lines, rest = (rest + chunk).split(b"\n")
                    for line in lines:
                        self._take(line)
                    if self._closing.is_set():
                        return
        except httpx.HTTPError as error:
            self.answer.error = repr(error)
        finally:
            with self._changed:
                self._changed.notify_all()

    def _take(self, line: bytes) -> None:
        if not line.startswith(b"data: ") or line == b"data: [DONE]":
            return
        event = json.loads(line.removeprefix(b"data: "))
        with self._changed:
            if "error" in event:
                self.answer.error = str(event["error"])
            for choice in event.get("choices", []):
                self.answer.take(choice)
                if choice.get("token_ids"):
                    self.answer.arrivals_s.append(time.monotonic())
            if event.get("usage"):
                self.answer.usage = event["usage"]
            self._changed.notify_all()


class Client:
    """Completions of one cluster."""

    def __init__(self, url: str, model: str) -> None:
        self.model = model
        self.http = httpx.Client(base_url=url, timeout=ANSWER_S, limits=httpx.Limits(max_connections=64))

    def body(self, prompt: list[int] | str, params: dict[str, Any]) -> dict[str, Any]:
        """Return the JSON body of a completion."""
        return {"model": self.model, "prompt": prompt, "return_token_ids": True, **params}

    def complete(self, prompt: list[int] | str, **params: Any) -> Answer:
        """Return a completion."""
        response = self.http.post("/v1/completions", json=self.body(prompt, params))
        assert response.status_code == 200, f"{response.status_code}: {response.text}"
        body = response.json()
        answer = Answer(usage=body["usage"])
        answer.take(body["choices"][0])
        return answer

    def complete_all(self, jobs: list[dict[str, Any]]) -> list[Answer]:
        """Return the completions of `jobs` ({prompt, params}), sent at once."""
        with ThreadPoolExecutor(len(jobs)) as pool:
            return list(pool.map(lambda job: self.complete(job["prompt"], **job["params"]), jobs))

    def stream(self, prompt: list[int] | str, **params: Any) -> Stream:
        """Begin a streaming completion."""
        return Stream(self.http, self.body(prompt, params))

    def close(self) -> None:
        """Close all connections."""
        self.http.close()
