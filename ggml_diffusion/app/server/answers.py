"""The answers, in the forms of OpenAI and of llama-server, whole and as server-sent events.

Deliberately not here: HTTP (routes.py). Sources: as requests.py.
"""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from ggml_diffusion.app.server.jobs import State, Written
from ggml_diffusion.app.server.requests import RequestError

DONE = "data: [DONE]\n\n"


@dataclass(frozen=True)
class OpenAiAnswer:
    """One answer of `/v1/completions` or, with `is_chat`, of `/v1/chat/completions`."""

    model: str
    is_chat: bool
    with_usage: bool = False
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def whole(self, written: Written) -> dict[str, Any]:
        """The answer without streaming."""
        text: dict[str, Any] = (
            {"message": {"role": "assistant", "content": written.text}}
            if self.is_chat
            else {"text": written.text}
        )
        choice = {"index": 0, **text, "logprobs": None, "finish_reason": _finish(written)}
        kind = "chat.completion" if self.is_chat else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": _usage(written), **_extras(written)}

    def first(self) -> str | None:
        """What a stream of a chat begins with."""
        return event(self._chunk({"role": "assistant", "content": ""}, None)) if self.is_chat else None

    def state(self, state: State) -> str:
        """A step; its piece of the text may be empty."""
        denoising = {"step": state.step, "n_steps": state.n_steps, "tokens": state.tokens}
        return event({**self._chunk(self._text(state.piece), None), "denoising": denoising})

    def last(self, written: Written) -> str:
        """The rest of the text, why it ends, and what it took."""
        events = event({**self._chunk(self._text(written.piece), _finish(written)), **_extras(written)})
        if self.with_usage:
            kind = "chat.completion.chunk" if self.is_chat else "text_completion"
            events += event({**self._head(kind), "choices": [], "usage": _usage(written)})
        return events + DONE

    def _text(self, piece: str) -> dict[str, str]:
        return {"content": piece} if self.is_chat else {"text": piece}

    def _chunk(self, text: dict[str, str], finish: str | None) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self.is_chat else "text_completion"
        inner: dict[str, Any] = {"delta": text} if self.is_chat else text
        choice = {"index": 0, **inner, "logprobs": None, "finish_reason": finish}
        return {**self._head(kind), "choices": [choice]}

    def _head(self, kind: str) -> dict[str, Any]:
        name = ("chatcmpl-" if self.is_chat else "cmpl-") + self.id
        return {"id": name, "object": kind, "created": self.created, "model": self.model}


@dataclass(frozen=True)
class LlamaAnswer:
    """One answer of `/infill`."""

    model: str
    fields: list[str] | None = None

    def whole(self, written: Written) -> dict[str, Any]:
        """The answer without streaming, of which only the fields that were asked for."""
        ms = written.time_s * 1000
        rate = written.n_written / written.time_s if written.time_s > 0 else 0.0
        answer = {
            "content": written.text,
            "model": self.model,
            "index": 0,
            "stop": True,
            "stop_type": "limit" if written.is_cut else "eos",
            "tokens_predicted": written.n_written,
            "tokens_evaluated": written.n_prompt,
            "tokens_cached": 0,
            # The prompt is no phase of its own: it is seen while the text is written.
            "timings": {
                "prompt_n": written.n_prompt,
                "prompt_ms": 0.0,
                "prompt_per_token_ms": 0.0,
                "prompt_per_second": 0.0,
                "predicted_n": written.n_written,
                "predicted_ms": ms,
                "predicted_per_token_ms": ms / max(written.n_written, 1),
                "predicted_per_second": rate,
            },
            **_extras(written),
        }
        return answer if self.fields is None else _picked(answer, self.fields)

    def first(self) -> str | None:
        """Nothing comes before the text."""
        return None

    def state(self, state: State) -> str:
        """A step."""
        denoising = {"step": state.step, "n_steps": state.n_steps, "tokens": state.tokens}
        return event({"index": 0, "content": state.piece, "stop": False, "denoising": denoising})

    def last(self, written: Written) -> str:
        """The rest of the text, and what it took."""
        whole = self.whole(written)
        return event({**whole, "content": written.piece, "stop": True})


def nothing_written() -> Written:
    """What a request for no token gets: editors send it to warm a cache that is not here."""
    return Written("", "", 0, 0, 0, is_cut=True, seed=0, time_s=0.0)


def event(value: object) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def error_body(error: RequestError) -> dict[str, Any]:
    """An error in OpenAI's form."""
    kind = "invalid_request_error" if error.status < 500 else "server_error"
    return {"error": {"message": error.message, "type": kind, "param": error.field, "code": error.code}}


def _finish(written: Written) -> str:
    return "length" if written.is_cut else "stop"


def _usage(written: Written) -> dict[str, int]:
    total = written.n_prompt + written.n_written
    return {
        "prompt_tokens": written.n_prompt,
        "completion_tokens": written.n_written,
        "total_tokens": total,
    }


def _extras(written: Written) -> dict[str, Any]:
    return {
        "truncated": written.n_dropped > 0,
        "tokens_dropped": written.n_dropped,
        "seed": written.seed,
    }


def _picked(answer: dict[str, Any], fields: list[str]) -> dict[str, Any]:
    """Fields by their paths, under these paths, as llama-server does."""
    picked: dict[str, Any] = {}
    for path in fields:
        value: Any = answer
        for name in path.split("/"):
            value = value.get(name) if isinstance(value, dict) else None
        if value is not None:
            picked[path] = value
    return picked
