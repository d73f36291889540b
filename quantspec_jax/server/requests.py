"""What clients may ask for: JSON to checked objects.

Types are strict: "3" is no number. Fields that would change the answer and are not served are
refused by name; those that change nothing here (`user`, `store`, `metadata`) are let pass.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from quantspec_jax.generate.config import PENALTIES
from quantspec_jax.generate.logprobs import MOST as MOST_LOGPROBS

MOST_CHOICES = 16
MOST_PROMPTS = 16
MOST_MESSAGES = 4096


class RefusedError(Exception):
    """A request that is not served: an HTTP status, and OpenAI's description of the error."""

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.param, self.code, self.headers = status, param, code, headers or {}

    def body(self) -> dict[str, Any]:
        """The answer."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        return {"error": error}


def _utf8(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"what is not UTF-8, at character {error.start}") from None
    return text


Text = Annotated[str, AfterValidator(_utf8)]
Stop = Annotated[Text, Field(min_length=1, max_length=256)]
Id = Annotated[int, Field(ge=0, lt=2**31)]
Zero = Annotated[float, Field(ge=0, le=0)]
Ids = Annotated[list[Id], Field(min_length=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Strict):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False


class _Common(_Strict):
    """What completions and chat have alike."""

    model: Text | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=2**31)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=PENALTIES[0], le=PENALTIES[1])
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    speculate: bool = True
    presence_penalty: Zero | None = None
    frequency_penalty: Zero | None = None
    # They change nothing here.
    user: Any = None
    store: Any = None
    metadata: Any = None
    service_tier: Any = None
    prompt_cache_key: Any = None
    safety_identifier: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(_Common):
    """`/v1/completions`."""

    prompt: (
        Text
        | Ids
        | Annotated[list[Text], Field(min_length=1, max_length=MOST_PROMPTS)]
        | Annotated[list[Ids], Field(min_length=1, max_length=MOST_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: None = None

    @property
    def alternatives(self) -> int | None:
        """`GenerateConfig.logprobs`."""
        return self.logprobs

    @property
    def most_tokens(self) -> int | None:
        """Tokens to make; None: as many as there is room for."""
        return 16 if self.max_tokens is None else self.max_tokens

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or more."""
        prompt = self.prompt
        single = isinstance(prompt, str) or isinstance(prompt[0], int)
        return [prompt] if single else list(prompt)  # type: ignore[arg-type, list-item]


class TextPart(_Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class ChatMessage(_Strict):
    """One turn of a conversation."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Text | list[TextPart]
    name: Any = None

    def plain(self) -> dict[str, str]:
        """As templates take it."""
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": self.role, "content": content}


class ChatRequest(_Common):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)

    @property
    def alternatives(self) -> int | None:
        """`GenerateConfig.logprobs`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def most_tokens(self) -> int | None:
        """Tokens to make; None: as many as there is room for."""
        wanted = [n for n in (self.max_completion_tokens, self.max_tokens) if n is not None]
        return wanted[0] if wanted else None


class TokenizeRequest(_Strict):
    """`/tokenize`."""

    model: Text | None = None
    prompt: Text | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)] | None = None
    add_special_tokens: bool = True


def read(kind: type[BaseModel], body: bytes) -> Any:
    """A request of this kind; RefusedError where it is none."""

    def no_number(name: str) -> float:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body.decode("utf-8"), parse_constant=no_number)
    except RecursionError:
        raise RefusedError(400, "the body is nested too deep") from None
    except ValueError as error:
        raise RefusedError(400, f"the body is not JSON: {str(error)[:200]}") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _refused(error) from None
    except RecursionError:
        raise RefusedError(400, "the body is nested too deep") from None


def _refused(error: ValidationError) -> RefusedError:
    """The first thing that is wrong, by the field's name."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    where = [str(part)[:64] for part in first["loc"]]
    name = where[0] if where else None
    words = "is not served here" if first["type"] == "extra_forbidden" else first["msg"]
    path = ".".join(where[:4]) or "the body"
    return RefusedError(400, f"{path}: {words}", name)
