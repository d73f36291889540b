"""Rollouts for reinforcement learning: a sampler with the signature of google/tunix's `BaseSampler`
(`tunix.generate.base_sampler`; extra `tunix`), whose weights can be replaced between calls.

    sampler = Sampler(model)
    out = sampler(["prompt", ...], max_generation_steps=256, temperature=1.0, seed=0)
    sampler.update_params(weights)      the target's; the draft's are rounded from them again

The text follows the distribution of the weights of the moment, whatever the draft.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from quantspec_jax.api import generate
from quantspec_jax.checks import is_int, require
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.models.module import Decoder
from quantspec_jax.models.parameters import Params, flatten, nest
from quantspec_jax.text.detokenize import decode
from quantspec_jax.text.prompts import encode

try:
    from tunix.generate.base_sampler import BaseSampler, SamplerOutput
except ImportError:  # their documented forms, so that the sampler can be used without the package

    class BaseSampler:  # type: ignore[no-redef]
        """As in tunix."""

    @dataclasses.dataclass
    class SamplerOutput:  # type: ignore[no-redef]
        """As in tunix: of each sequence its new text, its new token ids, the end token included,
        and, where they were asked for, their log-probabilities; and the prompts, [B, P], padded on
        the left. `logits` is None."""

        text: list[str]
        logits: Any
        tokens: list[np.ndarray] | np.ndarray
        padded_prompt_tokens: np.ndarray
        logprobs: list[list[float]] | None


class Sampler(BaseSampler):
    """Samples with speculation.

    Args:
      model: from `load`, with a tokenizer.
      config: how to decode; what a call says goes before it.
      to_params: makes the tree of `quantspec_jax.models.parameters` of what the trainer has;
        None: it is that tree, or a part of it, or such a state of `transformer`.
    """

    def __init__(
        self,
        model: Model,
        config: GenerateConfig | None = None,
        to_params: Callable[[Any], Any] | None = None,
    ):
        require(model.tokenizer is not None, "model.tokenizer", None, "a tokenizer")
        self.model, self.config = model, config or GenerateConfig()
        self._to_params = to_params or (lambda weights: weights)

    # Weights.

    @property
    def transformer(self) -> nnx.Module:
        """The module that owns the weights; it is not called."""
        return nnx.merge(*self._split())

    @property
    def transformer_state(self) -> nnx.State:
        """The weights of the target."""
        return self._split()[1]

    @transformer_state.setter
    def transformer_state(self, state: nnx.State) -> None:
        self.update_params(state)

    def _split(self) -> tuple[nnx.GraphDef, nnx.State]:
        config, dtype = self.model.config, self.model.dtype
        module = nnx.eval_shape(lambda: Decoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
        graph, state = nnx.split(module)
        params = flatten(self.model.params)
        filled = {
            path: leaf.replace(params[_name(path)]) for path, leaf in nnx.to_flat_state(state)
        }
        return graph, nnx.from_flat_state(filled)

    def update_params(
        self, updated_weights: Any, filter_types: tuple[Any, ...] | None = None
    ) -> None:
        """Replace weights of the target, all or some; the draft is rounded from them at the next
        call, to nearest: what was calibrated was so for other weights.

        Args:
          updated_weights: see `to_params`; cast to the model's type, and laid out as its own.
          filter_types: not used; which weights are there says what is replaced.

        Raises:
          ValueError: one of them is none of the model's, or of another shape.
        """
        old = flatten(self.model.params)
        new = _arrays(self._to_params(updated_weights))
        for path, leaf in new.items():
            require(path in old, "updated_weights", path, "names of the model's parameters")
            shape = tuple(leaf.shape)
            require(shape == old[path].shape, f"shape of {path}", shape, str(old[path].shape))
        placed = {
            path: jax.device_put(jnp.asarray(leaf, self.model.dtype), old[path].sharding)
            for path, leaf in new.items()
        }
        draft = dataclasses.replace(self.model.draft, method="rtn", average_bits=None)
        self.model = Model(self.model.config, nest(old | placed), self.model.tokenizer, draft)

    # Sampling.

    def __call__(
        self,
        input_strings: str | Sequence[str],
        max_generation_steps: int,
        max_prompt_length: int | None = None,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        beam_size: int | None = None,
        seed: int | jax.Array | None = None,
        multi_sampling: int = 1,
        return_logits: bool = True,
        echo: bool = False,
        pad_output: bool = False,
        *,
        eos_tokens: Sequence[int] | None = None,
        return_logprobs: bool = False,
    ) -> SamplerOutput:
        """Continue prompts.

        Args:
          max_prompt_length: columns of `padded_prompt_tokens`; as many as the longest prompt needs
            where that is more, or None: the next power of two.
          seed: a number, or a typed key; None: 0.
          multi_sampling: sequences a prompt, one after the other in the output.
          return_logits: `logits` is None in any case: rounds of several tokens keep none.
          echo: whether text and tokens begin with the prompt's.
          pad_output: tokens as one array, filled up on the right.
          eos_tokens: ends of a sequence in place of the model's.
          return_logprobs: of the target's raw distribution.

        Raises:
          ValueError: an argument is wrong.
          NotImplementedError: beams.
        """
        if beam_size is not None:
            raise NotImplementedError(f"beam_size is {beam_size}; allowed: None")
        positive = is_int(multi_sampling) and multi_sampling >= 1
        require(positive, "multi_sampling", multi_sampling, "an integer ≥ 1")
        prompts = [input_strings] if isinstance(input_strings, str) else list(input_strings)
        ids = [self.tokenize(prompt).tolist() for prompt in prompts]
        repeated = [each for each in ids for _ in range(multi_sampling)]
        more: dict[str, Any] = {}
        if eos_tokens is not None:
            more = {"ignore_eos": True, "stop_ids": tuple(map(int, eos_tokens))}
        config = dataclasses.replace(
            self.config,
            max_new_tokens=max_generation_steps,
            temperature=float(temperature),
            top_p=1.0 if top_p is None else float(top_p),
            top_k=0 if top_k is None else top_k,
            logprobs=0 if return_logprobs else None,
            **more,
        )
        key = seed if isinstance(seed, jax.Array) else jax.random.key(seed or 0)
        out = generate(self.model, repeated, config, key)
        tokens = [np.asarray(new, np.int32) for new in out.tokens]
        texts = out.text
        width = max(max_prompt_length or 0, max(map(len, ids)))
        if width != max_prompt_length:
            width = 1 << (width - 1).bit_length()
        if echo:
            pairs = zip(repeated, tokens, strict=True)
            tokens = [np.asarray([*ids, *new], np.int32) for ids, new in pairs]
            texts = [decode(self.model.tokenizer, each.tolist()) for each in tokens]
        steps = max_generation_steps + (width if echo else 0)
        scores = [[score.own for score in each] for each in out.logprobs]
        return SamplerOutput(
            text=texts,
            logits=None,
            tokens=self._padded(tokens, steps, left=False) if pad_output else tokens,
            padded_prompt_tokens=self._padded(repeated, width, left=True),
            logprobs=scores if return_logprobs else None,
        )

    def tokenize(self, input_string: str) -> np.ndarray:
        """Token ids of a prompt, with the special tokens that the tokenizer begins texts with."""
        return np.asarray(encode(input_string, self.model.tokenizer), np.int32)

    @property
    def pad_id(self) -> int:
        """What fills up: the tokenizer's own, else an end token, else 0."""
        tokenizer: Any = self.model.tokenizer
        own = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return next(token for token in own if token is not None)

    def _padded(self, rows: Sequence[Any], width: int, *, left: bool) -> np.ndarray:
        """[B, width] int32."""
        out = np.full((len(rows), width), self.pad_id, np.int32)
        for line, row in zip(out, rows, strict=True):
            line[width - len(row) if left else 0 :][: len(row)] = row
        return out


def _name(path: Any) -> str:
    return ".".join(map(str, path))


def _arrays(weights: Any) -> Params:
    """Arrays by the dotted names of their parameters."""
    if isinstance(weights, nnx.State):
        return {_name(path): leaf[...] for path, leaf in nnx.to_flat_state(weights)}
    return flatten(weights)
