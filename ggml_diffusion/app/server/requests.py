"""What clients send, checked: fields, types and ranges.

Fields that are unknown are ignored, as llama-server does; so are those that only make other servers quicker
(`cache_prompt`, `t_max_predict_ms`), and llama-server's choice of samplers. A field that would change the
form or the text of an answer and cannot be honoured is refused by name.

Deliberately not here: how the text is written (jobs.py), HTTP (routes.py).
Sources: OpenAI's API reference, "Completions" and "Chat"; tools/server/README.md of llama.cpp.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ggml_diffusion.errors import is_unicode, one_line
from ggml_diffusion.generation.denoise import Probability, ShareBelowOne, Temperature
from ggml_diffusion.generation.sampling import RevealOrder

MAX_TOKENS = 4096  # to be written by one request
MAX_STEPS = 4 * MAX_TOKENS
DEFAULT_TOKENS = 64
MAX_STOPS = 16

# Fields that would change what is answered, and the values with which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "n_probs": (0,),
    "tools": ([],),
    "functions": ([],),
    "response_format": ({"type": "text"},),
    "json_schema": ({},),
    "grammar": ("",),
    "logit_bias": ({}, []),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repeat_penalty": (1,),
    "modalities": (["text"],),
    "audio": (),
}


class RequestError(Exception):
    """A request that is refused: HTTP status, message, the field that is wrong, and a code of OpenAI's."""

    def __init__(
        self, message: str, *, field: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.message, self.field, self.status, self.code = message, field, status, code


class StreamOptions(BaseModel):
    """OpenAI's `stream_options`."""

    include_usage: bool = False


class Sampling(BaseModel):
    """What all requests have. None = the default of `GenerationConfig`."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    temperature: Temperature | None = None
    top_p: Probability | None = None
    top_k: int | None = Field(default=None, le=1 << 30)
    seed: Annotated[int, Field(ge=-1, lt=2**63)] | None = None
    stop: list[str] = Field(default=[], max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    model: str | None = None
    steps: int | None = Field(default=None, ge=1, le=MAX_STEPS)
    block_length: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    order: RevealOrder | None = None
    threshold: Probability | None = None
    remasking: ShareBelowOne | None = None
    length: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_or_several(cls, value: object) -> object:
        """One string, or several, or none."""
        stops = [] if value is None else [value] if isinstance(value, str) else value
        return [stop for stop in stops if stop != ""] if isinstance(stops, list) else stops

    def denoising(self) -> dict[str, Any]:
        """The settings of the denoising loop that were given."""
        names = ("steps", "block_length", "order", "threshold", "remasking")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def drawing(self) -> dict[str, Any]:
        """The settings of the draw that were given; llama-server's -1 and 0 for "none" are left out."""
        given = {"temperature": self.temperature, "top_p": self.top_p}
        if self.top_k is not None:
            given["top_k"] = max(self.top_k, 0)
        return {name: value for name, value in given.items() if value is not None}


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: str = ""
    suffix: str = ""
    max_tokens: int | None = Field(default=None, le=MAX_TOKENS, ge=-1)

    @field_validator("prompt", mode="before")
    @classmethod
    def _one(cls, value: object) -> object:
        """A list of one prompt is a prompt."""
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return value[0]
        return "" if value is None else value

    @field_validator("suffix", mode="before")
    @classmethod
    def _none(cls, value: object) -> object:
        return "" if value is None else value


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[dict[str, Any]] = Field(min_length=1, max_length=10_000)
    max_tokens: int | None = Field(default=None, le=MAX_TOKENS, ge=-1)
    max_completion_tokens: int | None = Field(default=None, le=MAX_TOKENS, ge=-1)
    n_predict: int | None = Field(default=None, le=MAX_TOKENS, ge=-1)

    @field_validator("messages")
    @classmethod
    def _texts(cls, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Roles and text; parts of text are joined."""
        return [{"role": _role(message), "content": _content(message)} for message in messages]


class ExtraChunk(BaseModel):
    """A piece of another file, which llama-server puts in front."""

    text: str = ""
    filename: str = ""


class InfillRequest(Sampling):
    """`POST /infill`."""

    input_prefix: str = ""
    input_suffix: str = ""
    input_extra: list[ExtraChunk] = Field(default=[], max_length=10_000)
    prompt: str = ""
    n_predict: int | None = Field(default=None, le=MAX_TOKENS, ge=-1)
    response_fields: list[str] | None = Field(default=None, max_length=100)


class PageRequest(Sampling):
    """`POST /fill`: a text with marked holes."""

    text: str
    at_most: int = Field(default=16, ge=1, le=64)
    stream: Literal[True] = True


def check(kind: type[BaseModel], body: object) -> Any:
    """A request of a kind out of the body.

    Raises:
        RequestError: it names the field.

    """
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    for name, neutral in _UNSUPPORTED.items():
        value = body.get(name)
        if value is not None and not any(_same(value, one) for one in neutral):
            raise RequestError(
                f"{name} is not supported: leave it out", field=name, code="unsupported_parameter"
            )
    if not _all_unicode(body):
        raise RequestError("a string holds half of a surrogate pair")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        field = ".".join(str(part) for part in fault["loc"])
        message = one_line(fault["msg"])
        raise RequestError(f"{field}: {message}", field=field) from None


def _same(value: object, neutral: object) -> bool:
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


def _role(message: Mapping[str, Any]) -> str:
    role = message.get("role")
    if not isinstance(role, str):
        raise ValueError('every message needs a string "role"')
    return {"developer": "system"}.get(role, role)


def _content(message: Mapping[str, Any]) -> str:
    if message.get("tool_calls"):
        raise ValueError("calls of tools are not supported")
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        if len(texts) == len(parts):
            return "".join(texts)
        raise ValueError("only parts of text are supported")
    if not isinstance(content, str):
        raise ValueError('every message needs a string "content"')
    return content


def _all_unicode(value: object) -> bool:
    """Whether all strings can be written as UTF-8."""
    if isinstance(value, str):
        return is_unicode(value)
    if isinstance(value, dict):
        return all(is_unicode(key) and _all_unicode(item) for key, item in value.items())
    return all(_all_unicode(item) for item in value) if isinstance(value, list) else True
