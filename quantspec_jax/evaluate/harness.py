"""This package's models in EleutherAI's harness (`pip install 'quantspec-jax[lm-eval]'`):

    python -m quantspec_jax.evaluate.harness run --model quantspec --model_args pretrained=DIR ...

takes what `lm_eval` takes, and knows one model more. An lm-eval that reads the entry points of
packages knows it without: releases up to 0.4.13 do not. Its arguments (`--model_args`):

    pretrained                      whatever `quantspec_jax.load` takes
    dtype, mode, kv, gamma, group_size, max_gen_toks      as on the command line
    of                              target (default) or draft: whose log-likelihoods

Log-likelihoods are those of decoding: the target reads its view of the cache (`kv`; in mode
quantspec int8) of the tokens before its buffer; the draft reads the same cache as it does when it
proposes. What is generated is the target's in every mode, so a draft generates nothing here.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

import quantspec_jax as qs
from quantspec_jax.checks import require
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.evaluate.teacher_forced import compare, score
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.chat import conversation_text
from quantspec_jax.text.prompts import encode
from quantspec_jax.weights.formats import DraftConfig

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import Collator, handle_stop_sequences, normalize_gen_kwargs
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise ImportError(f"{error}: pip install 'quantspec-jax[lm-eval]'") from error

WHOSE = ("target", "draft")
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


@register_model("quantspec")
class QuantSpecLM(TemplateLM):
    """`pretrained` may be a loaded `Model`. What lm-eval gives every model and means nothing here,
    a device, a greatest batch, is taken and not used."""

    def __init__(
        self,
        pretrained: str | Model,
        dtype: str | None = None,
        of: str = "target",
        max_gen_toks: int = 256,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **decoding: Any,
    ) -> None:
        super().__init__()
        require(of in WHOSE, "of", of, ", ".join(WHOSE))
        known = [field.name for field in dataclasses.fields(GenerateConfig)]
        unknown = [name for name in decoding if name not in known]
        require(not unknown, "model_args", ", ".join(unknown), ", ".join(known))
        self.decoding = GenerateConfig(**decoding)
        drafts = self.decoding.mode == "quantspec"
        require(of == "target" or drafts, "of", of, "target in mode autoregressive: no draft")
        number = str(batch_size).isdecimal() and int(batch_size) > 0
        require(number, "batch_size", batch_size, "a number of prompts, 1 or more")
        if isinstance(pretrained, str):
            draft = None if drafts else DraftConfig(bits=None)
            pretrained = qs.load(pretrained, dtype=dtype, draft=draft)
        require(
            pretrained.tokenizer is not None, "pretrained", "a model without a tokenizer", "one"
        )
        self.model, self.of, self.max_gen_toks = pretrained, of, max_gen_toks
        self.tokenizer: Any = pretrained.tokenizer
        self.batch_size, self._samples = int(batch_size), itertools.count()

    @property
    def max_length(self) -> int:
        """The model's context."""
        return self.model.config.max_context

    @property
    def eot_token_id(self) -> int:
        """What ends a text."""
        found = (self.tokenizer.eos_token_id, *self.model.config.eos_ids)
        return next(int(x) for x in found if x is not None)

    @property
    def prefix_token_id(self) -> int:
        """What a text without a context comes after."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """A name for caches of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids, with the tokenizer's own special tokens unless the text begins with one."""
        if add_special_tokens is None:
            beginning = self.tokenizer.decode([self.prefix_token_id])
            add_special_tokens = not (beginning and string.startswith(beginning))
        return encode(string, self.tokenizer, special=add_special_tokens) if string else []

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the tokenizer's template."""
        begun = "a conversation that an answer comes after"
        require(add_generation_prompt, "chat", "one with the beginning of an answer", begun)
        return conversation_text(chat_history, self.tokenizer)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for asked, context, following in tqdm(requests, desc="log-likelihoods", **_bar(kwargs)):
            ids = [*context, *following][-self.max_length :]
            log_prob, top = self._predictions(ids)
            n = min(len(following), len(ids) - 1)
            own = slice(len(ids) - 1 - n, len(ids) - 1)
            answer = float(log_prob[own].sum(dtype=np.float64)), bool((top[own] == ids[-n:]).all())
            if asked is not None:
                self.cache_hook.add_partial("loglikelihood", asked, answer)
            found.append(answer)
        return found

    def _predictions(self, ids: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Of each position the following token's log-probability, and the first choice. Padding
        comes last, where nothing reads it; a program serves all lengths of a bucket."""
        padded = [*ids, *[0] * (min(bucket(len(ids)), self.max_length) - len(ids))]
        options: dict[str, Any] = {
            "group_size": self.decoding.group_size,
            "backend": self.decoding.backend,
        }
        if self.of == "draft":
            both = compare(self.model, padded, **options)
            return both.draft_log_prob, both.draft_top
        seen = score(self.model, padded, self.decoding.target_view, **options)
        return seen.log_prob, seen.top

    def loglikelihood_rolling(self, requests: Sequence[Any], **kwargs: Any) -> list[float]:
        """Of whole texts, in windows of the model's context."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            rows = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(rows, **kwargs)))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], **kwargs: Any) -> list[str]:
        """By the target, `batch_size` prompts of the same options at a time."""
        require(self.of == "target", "of", self.of, "target where text is generated")
        ordered = Collator(
            [request.args for request in requests],
            sort_fn=lambda asked: -len(asked[0]),
            group_by="gen_kwargs",
            group_fn=lambda asked: asked[1],
        )
        found = []
        bar = tqdm(total=len(requests), desc="generated", **_bar(kwargs))
        for asked in ordered.get_batched(n=self.batch_size, batch_fn=None):
            texts = self._generated([context for context, _ in asked], asked[0][1])
            for each, text in zip(asked, texts, strict=True):
                self.cache_hook.add_partial("generate_until", each, text)
            found += texts
            bar.update(len(asked))
        bar.close()
        return ordered.get_original(found)

    def _generated(self, contexts: Sequence[str], options: dict[str, Any]) -> list[str]:
        given = normalize_gen_kwargs(options, self.max_gen_toks)
        end = self.tokenizer.decode([self.eot_token_id])
        stop = [each for each in handle_stop_sequences(given.pop("until", None), end) if each]
        most, samples = given.pop("max_gen_toks"), given.pop("do_sample", False)
        unknown = [name for name in given if name not in SAMPLING]
        require(not unknown, "generation options", ", ".join(unknown), ", ".join(SAMPLING))
        if samples:
            given.setdefault("temperature", 1.0)
        room = self.max_length - most
        require(room > 0, "max_gen_toks", most, f"less than {self.max_length}, the context")
        prompts = [
            self.tok_encode(context)[-room:] or [self.prefix_token_id] for context in contexts
        ]
        config = dataclasses.replace(self.decoding, max_new_tokens=most, stop=tuple(stop), **given)
        return qs.generate(self.model, prompts, config, jax.random.key(next(self._samples))).text


def _bar(options: dict[str, Any]) -> dict[str, Any]:
    return {"disable": options.get("disable_tqdm", False)}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
