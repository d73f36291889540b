"""Sessions: one text after the other over one cache that stays, and can be saved.

    session = qs.Session(model)
    session.chat("What is in this file? ...")     reads the whole conversation
    session.chat("And who wrote it?")             reads what came since, and at most 2G tokens again
    session.save("talk.safetensors")

A prompt that begins as an earlier one did keeps its whole tiles. What the model wrote itself is
read again as a part of the next prompt: so text and planes are, to the bit, those of a session that
begins with that prompt.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from quantspec_jax.checks import is_int, require
from quantspec_jax.engine import saved
from quantspec_jax.engine.at_rest import Coder, check_format
from quantspec_jax.engine.engine import Engine, TokenLogprob
from quantspec_jax.engine.prefixes import HostTile, Prefixes, names
from quantspec_jax.engine.reply import Reply, since
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.loading import Model
from quantspec_jax.text.chat import conversation_ids
from quantspec_jax.text.prompts import read_prompts

LONGEST = 16_384  # tokens, unless the caller or the model says otherwise
CACHE_BYTES = 4 << 30
Message = dict[str, str]


@dataclasses.dataclass(frozen=True)
class Turn:
    """What the model said: as an entry of `Generation`'s lists."""

    text: str
    tokens: list[int]
    stats: dict[str, Any]
    logprobs: list[TokenLogprob]
    drafted: list[bool]


class Session:
    """A conversation, or prompts of any kind, one after the other.

    Args:
      model: from `load`.
      config: how to decode. Its `prefill` is `tiles` here, and `max_length`, the tokens that prompt
        and reply may have together, 16,384 or the model's context where it is None.
      system: the system message of `chat`.
      cache_bytes: of the host's memory, for tiles of earlier prompts; the least recently used go.

    Attributes:
      messages: of `chat`, so far.
      tokens: of the newest prompt and its reply.
      prefixes: the tiles that are kept.
      format: of the file that it came from; of a session that is new, planes.
    """

    def __init__(
        self,
        model: Model,
        config: GenerateConfig | None = None,
        *,
        system: str | None = None,
        cache_bytes: int = CACHE_BYTES,
    ):
        config = config or GenerateConfig()
        require(
            is_int(cache_bytes) and cache_bytes >= 0, "cache_bytes", cache_bytes, "an integer ≥ 0"
        )
        length = config.max_length or min(model.config.max_context, LONGEST)
        self.model = model
        self.config = dataclasses.replace(config, prefill="tiles", max_length=length)
        self.messages: list[Message] = []
        if system is not None:
            self.messages.append({"role": "system", "content": system})
        self.tokens: list[int] = []
        self.prefixes = Prefixes(cache_bytes)
        self.format = "planes"
        longest = length - config.max_new_tokens
        require(
            longest >= 1, "max_new_tokens", config.max_new_tokens, f"below max_length = {length}"
        )
        self._engine = self._new_engine()
        self._prompt: list[int] = []
        self._coder: Coder | None = None

    def _new_engine(self) -> Engine:
        length = self.config.max_length or 0
        longest = length - self.config.max_new_tokens
        return Engine(self.model, self.config, longest, prefixes=self.prefixes)

    def generate(
        self,
        prompt: str | Sequence[int],
        key: jax.Array | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Turn:
        """Continue a prompt, whole: of one that begins as an earlier one did, the beginning is not
        read again. Ctrl-C ends it; what was made is returned."""
        (ids,) = read_prompts(prompt, self.model.tokenizer, self.model.config.vocab_size)
        return self._generate(ids, key, on_text)

    def chat(
        self,
        message: str,
        key: jax.Array | None = None,
        *,
        on_text: Callable[[str], None] | None = None,
    ) -> Turn:
        """Say something, by the model's chat template; returns the answer. Both are messages."""
        asked = [*self.messages, {"role": "user", "content": message}]
        turn = self._generate(conversation_ids(asked, self.model.tokenizer), key, on_text)
        self.messages = [*asked, {"role": "assistant", "content": turn.text}]
        return turn

    def _generate(
        self, ids: list[int], key: jax.Array | None, on_text: Callable[[str], None] | None
    ) -> Turn:
        engine, before = self._engine, copy.copy(self._engine.clock)
        reply = Reply(self.model, ids, self.config)
        (slot,) = engine.add([ids], self.config, key)
        try:
            for piece in self._pieces(reply, slot, on_text is not None):
                if on_text is not None and piece:
                    on_text(piece)
        except KeyboardInterrupt:  # what was running may have taken its state with it
            self._engine = self._new_engine()
        finally:
            reply.interrupt()
            engine.remove(slot)
        self._prompt, self.tokens = ids, ids + reply.tokens
        stats = reply.statistics(engine, since(engine.clock, before))
        return Turn(reply.text, reply.tokens, stats, reply.logprobs, reply.drafted)

    def _pieces(self, reply: Reply, slot: int, heard: bool) -> Iterator[str]:
        while reply.finish_reason is None:
            self._engine.step(heard=heard or bool(self.config.stop))
            yield reply.look(self._engine, slot)

    def save(self, path: str | Path, format: str = "planes") -> None:
        """Write the cache of the newest prompt, and the conversation, to a safetensors file, whole
        or not at all.

        Args:
          format: `planes`, the tiles as they are. `aqua`, in the 2, 3 or 4 bits a value of the
            AQUA-KV that is stored with the model: what is loaded is near to what was saved, and a
            text that goes on from it may become another (`engine.at_rest`).

        Raises:
          ValueError: there is no such directory; or no such format, or not for this model.
        """
        check_format(format, self.model)
        cache = self._engine.program.cache
        every = names(self._prompt, cache.group_size)
        tiles = self.prefixes.find(every)
        if format == "aqua":
            tiles = self._codes().encode(every, tiles)
        extra = {"messages": self.messages, "prompt_tokens": len(self._prompt)}
        saved.save(path, self.model, cache, self.tokens, tiles, extra, format)

    def _codes(self) -> Coder:
        """What codes tiles, and keeps those that it has coded."""
        if self._coder is None:
            self._coder = Coder(self.model, self._engine.program.cache)
        return self._coder

    @classmethod
    def load(
        cls,
        path: str | Path,
        model: Model,
        config: GenerateConfig | None = None,
        *,
        cache_bytes: int = CACHE_BYTES,
    ) -> Session:
        """The session that `save` wrote, in either format: it goes on as if it had never stopped,
        draft included; of format `aqua`, from what the codes say.

        Raises:
          ValueError: the file is damaged, or of another model, tokenizer, type, codec, group size,
            version or calibration; says which.
        """
        session = cls(model, config, cache_bytes=cache_bytes)
        cache = session._engine.program.cache
        found = saved.load(path, model, cache)
        every = names(found.tokens, cache.group_size)
        tiles: Iterable[HostTile] = found.tiles
        if found.format == "aqua":
            tiles = session._codes().decode(every, found.tiles)
        for i, tile in enumerate(tiles, 1):
            session.prefixes.keep(every[:i], tile)
        session.format = found.format
        session.messages = found.extra["messages"]
        session.tokens = found.tokens
        session._prompt = found.tokens[: found.extra["prompt_tokens"]]
        return session
