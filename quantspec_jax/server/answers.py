"""What clients get, in OpenAI's objects. Beside them chunks have `quantspec`: their text in pieces,
of each whether the token that completed it was drafted, and what speculation did so far."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from quantspec_jax.engine.engine import TokenLogprob
from quantspec_jax.engine.scheduler import Event, Job
from quantspec_jax.server.requests import ChatRequest, CompletionRequest

REASONS = {"eos": "stop", "stop": "stop", "length": "length"}


class Form:
    """The form of one request's answer."""

    def __init__(self, request: CompletionRequest | ChatRequest, model: str, tokenizer: Any):
        self._chat = isinstance(request, ChatRequest)
        self._logprobs = request.alternatives is not None
        self._tokenizer = tokenizer
        options = request.stream_options
        self.usage_wanted = options is not None and options.include_usage
        prefix = "chatcmpl-" if self._chat else "cmpl-"
        self._about = {
            "id": prefix + secrets.token_hex(12),
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": "quantspec-jax",
        }
        self._offsets: dict[int, int] = {}

    def whole(self, jobs: Sequence[Job], events: Sequence[Sequence[Event]]) -> dict[str, Any]:
        """The object of an answer that is not streamed."""
        choices = []
        for number, each in enumerate(events):
            text = "".join(text for event in each for text, _ in event.spans)
            last = each[-1].finish_reason
            tokens = [token for event in each for token in event.tokens]
            scores = [score for event in each for score in event.logprobs]
            content: dict[str, Any] = {"text": text}
            if self._chat:
                content = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(
                {
                    "index": number,
                    **content,
                    "logprobs": self._scores(number, tokens, scores),
                    "finish_reason": REASONS[last or "length"],
                }
            )
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._about, "object": kind, "choices": choices, "usage": usage(jobs)}

    def first(self, number: int) -> dict[str, Any] | None:
        """The chunk before the first token, which chat has."""
        if not self._chat:
            return None
        delta = {"role": "assistant", "content": ""}
        choice = {"index": number, "delta": delta, "logprobs": None, "finish_reason": None}
        return self._chunk([choice])

    def chunk(self, number: int, event: Event, extra: dict[str, Any]) -> dict[str, Any]:
        """One event, and what speculation did so far."""
        text = "".join(text for text, _ in event.spans)
        content: dict[str, Any] = {"text": text}
        if self._chat:
            content = {"delta": {"content": text} if text or not event.finish_reason else {}}
        reason = event.finish_reason and REASONS[event.finish_reason]
        choice = {
            "index": number,
            **content,
            "logprobs": self._scores(number, event.tokens, event.logprobs),
            "finish_reason": reason,
        }
        own = {"spans": event.spans, "tokens": len(event.tokens), **extra}
        return {**self._chunk([choice]), "quantspec": own}

    def last(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """The chunk with the usage, where it is asked for."""
        return self._chunk([]) | {"usage": usage(jobs)}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        nothing = {"usage": None} if self.usage_wanted else {}
        return {**self._about, "object": kind, "choices": choices, **nothing}

    def _scores(
        self, number: int, tokens: Sequence[int], scores: Sequence[TokenLogprob]
    ) -> dict[str, Any] | None:
        if not self._logprobs:
            return None
        pairs = list(zip(tokens, scores, strict=True))
        if self._chat:
            content = [
                {**self._token(token, s.own), "top_logprobs": [self._token(*t) for t in s.top]}
                for token, s in pairs
            ]
            return {"content": content, "refusal": None}
        texts = [self._text(token) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self._offsets.setdefault(number, 0))
            self._offsets[number] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [score.own for score in scores],
            "top_logprobs": [{self._text(i): p for i, p in score.top} for score in scores],
            "text_offset": offsets,
        }

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(token)
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        return self._tokenizer.decode([token], clean_up_tokenization_spaces=False)


def usage(jobs: Sequence[Job]) -> dict[str, Any]:
    """Tokens of a request; a prompt counts once, however many sequences go on from it."""
    prompts = {tuple(job.prompt): job for job in reversed(jobs)}.values()
    replies = [job.reply for job in jobs if job.reply is not None]
    prompt = sum(len(job.prompt) for job in prompts)
    new = sum(len(reply.tokens) for reply in replies)
    cached = sum(job.reply.kept for job in prompts if job.reply is not None)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
