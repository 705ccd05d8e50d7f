"""An OpenAI endpoint by design: it says what its request determines, unless one named defect is switched on.

For the client's logic only. That `verify` finds the defects of real engines is shown in tests/verify/.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = "sea lamp rope stone wind letter bridge candle harbour winter clock paper".split()


def _number(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")


@dataclass
class Designed:
    """Behaviour of one endpoint; `defect` names what is wrong with it, the rest what it offers."""

    defect: str = ""
    salt: str = ""  # another one is another model
    completions: bool = True
    chat: bool = True
    logprobs: bool = True
    token_ids: bool = True
    strict: bool = False  # refuses fields that OpenAI does not know
    seeds: bool = True
    key: str | None = None
    key_holds_for: int = 1_000_000_000  # requests
    models: tuple[str, ...] = ("designed",)
    parts: dict[str, Any] = field(default_factory=dict)  # of a fingerprint
    busy_every: int = 0  # every so many requests get HTTP 429 first
    dies_after: int = 0  # requests, then connections are closed unanswered
    breaks_streams: bool = False  # the connection ends before the answer does
    seconds: float = 0.002
    seen: int = 0
    refused_busy: int = 0
    in_flight: int = 0
    arrivals: int = 0
    last_end: float = 0.0
    cached: set[str] = field(default_factory=set)
    lock: threading.Lock = field(default_factory=threading.Lock)
    port: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, format: str, *args: object) -> None:
        del format, args

    @property
    def of(self) -> Designed:
        return self.server.designed

    def _send(self, status: int, body: object, **headers: str) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(data)

    def _no(self, status: int, message: str, **headers: str) -> None:
        self._send(status, {"error": {"message": message, "type": "error", "code": status}}, **headers)

    def _allowed(self) -> bool:
        held = self.headers.get("Authorization") == f"Bearer {self.of.key}" and self.of.seen < self.of.key_holds_for
        if self.of.key is not None and not held:
            self._no(401, "Incorrect API key provided")
            return False
        return True

    def do_GET(self) -> None:
        if not self._allowed():
            return
        if self.of.dies_after and self.of.seen > self.of.dies_after:
            self.close_connection = True
            return
        if self.path == "/deterministic" and self.of.parts:
            self._send(200, {"fingerprint": f"vd1-{self.of.parts['numerics_id']}", "parts": self.of.parts})
            return
        if self.path != "/v1/models":
            self._no(404, "Not Found")
            return
        self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in self.of.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        of = self.of
        if not self._allowed():
            return
        with of.lock:
            of.seen += 1
            number = of.seen
            if of.dies_after and number > of.dies_after:
                self.close_connection = True
                return
            if of.busy_every and number % of.busy_every == 0:
                of.refused_busy += 1
                busy = True
            else:
                busy = False
                of.in_flight += 1
                of.arrivals += 1
            self.met, self.number = of.in_flight > 1, number
        if busy:
            self._no(429 if of.refused_busy % 2 else 503, "slow down", Retry_After="0.01")
            return
        try:
            time.sleep(of.seconds)
            self.met = self.met or of.in_flight > 1
            self._answer(body)
        finally:
            with of.lock:
                of.in_flight -= 1
                of.last_end = time.monotonic()

    def _answer(self, body: dict[str, Any]) -> None:
        of, chat = self.of, self.path == "/v1/chat/completions"
        if not (of.chat if chat else of.completions) or self.path not in ("/v1/completions", "/v1/chat/completions"):
            self._no(404, "Not Found")
            return
        if body["model"] not in of.models:
            self._no(404, f"The model `{body['model']}` does not exist.")
            return
        unknown = {"ignore_eos", "top_k", "return_token_ids", "repetition_penalty", "prompt_logprobs"} & set(body)
        if of.strict and unknown:
            self._no(400, f"Unrecognized request argument supplied: {sorted(unknown)[0]}")
            return
        prompt = body["messages"][-1]["content"] if chat else body["prompt"]
        ids = prompt if isinstance(prompt, list) else [_number(word) % 50000 for word in prompt.split()]
        if chat:
            ids = [1, *ids, 2]
        choices = [self._choice(body, ids, chat, index) for index in range(body.get("n") or 1)]
        if body.get("stream"):
            self._stream(choices, chat)
        else:
            self._send(200, {"id": "x", "object": "completion", "created": 0, "model": "m", "choices": choices})

    def _choice(self, body: dict[str, Any], ids: list[int], chat: bool, index: int) -> dict[str, Any]:
        of = self.of
        temperature = body.get("temperature", 1.0)
        state: list[object] = [of.salt, ids, temperature, body.get("top_p")]
        if temperature > 0:
            state += [(body.get("seed") if of.seeds else 0) or 0, index]
        wrong = {
            "neighbours": self.met,
            "arrival": temperature > 0 and of.arrivals % 7 == 0,
            "stream": bool(body.get("stream")),
            "pause": of.last_end > 0 and time.monotonic() - of.last_end > 0.8,
            "chat": chat and self.met,
            "choices": index > 0 and self.met,
        }.get(of.defect, False)
        count = body.get("max_tokens", 16)
        tokens, scores = [], []
        for at in range(count):
            # The state is the text so far, so scoring reads what generating wrote.
            drawn = _number(state, at, self.number % 3 if wrong and at >= 5 and of.defect != "stream" else "")
            tokens.append(WORDS[drawn % len(WORDS)])
            score = -1.0 - (_number(ids, tokens) % 1000) / 997
            scores.append(round(score, 3) if wrong and of.defect == "stream" else score)
        asked = body.get("logprobs") if not chat else (body.get("top_logprobs", 0) if body.get("logprobs") else None)
        choice: dict[str, Any] = {"index": index, "finish_reason": "length"}
        text = "".join(f" {token}" for token in tokens)
        if chat:
            choice["message"] = {"role": "assistant", "content": text}
        else:
            choice["text"] = text
        choice["logprobs"] = None
        if of.logprobs and asked is not None:
            if chat:
                choice["logprobs"] = {
                    "content": [
                        {"token": token, "logprob": score, "top_logprobs": [{"token": token, "logprob": score}]}
                        for token, score in zip(tokens, scores, strict=True)
                    ]
                }
            else:
                choice["logprobs"] = {
                    "tokens": tokens,
                    "token_logprobs": scores,
                    "top_logprobs": [{t: s} for t, s in zip(tokens, scores, strict=True)],
                    "text_offset": [],
                }
        if of.token_ids and body.get("return_token_ids"):
            choice["token_ids"] = [WORDS.index(token) for token in tokens]
            choice["prompt_token_ids"] = ids
        return choice

    def _stream(self, choices: list[dict[str, Any]], chat: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        if self.of.breaks_streams:
            self.send_header("Content-Length", "1000000")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for choice in choices:
                whole = choice.pop("message" if chat else "text")
                text = whole["content"] if chat else whole
                middle = len(text) // 2
                for part in (text[:middle], text[middle:]):
                    said = {"delta": {"content": part}} if chat else {"text": part}
                    self._event({"index": choice["index"], "finish_reason": None, "logprobs": None, **said})
                if self.of.breaks_streams:
                    return
                self._event({**choice, **({"delta": {}} if chat else {"text": ""})})
            self.wfile.write(b"data: [DONE]\n\n")

    def _event(self, choice: dict[str, Any]) -> None:
        chunk = {"id": "x", "object": "chunk", "created": 0, "model": "m", "choices": [choice]}
        self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.flush()


@contextlib.contextmanager
def serving(designed: Designed | None = None) -> Iterator[Designed]:
    """Serves it on a free port of the loopback interface."""
    designed = designed or Designed()
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    server.request_queue_size = 128
    server.designed = designed  # type: ignore[attr-defined]
    designed.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield designed
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


if __name__ == "__main__":
    import sys

    with serving(Designed(**dict(argument.split("=", 1) for argument in sys.argv[1:]))) as running:
        print(running.url, flush=True)
        time.sleep(3600)
