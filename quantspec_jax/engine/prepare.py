"""From prompts and settings to what the pure functions take."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pallas_kernels import dispatch
from quantspec_jax.cache.codecs import codec_of
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.checks import require
from quantspec_jax.cost import best_reading
from quantspec_jax.engine.adaptive import MOST_DRAFTED, PRIOR
from quantspec_jax.engine.bucket import bucket
from quantspec_jax.generate.config import GenerateConfig
from quantspec_jax.generate.couplings import coupling
from quantspec_jax.generate.policies import ALL, Policy, policy
from quantspec_jax.generate.requests import Requests, requests
from quantspec_jax.generate.sampling import GREEDY, Warpers
from quantspec_jax.generate.state import Program
from quantspec_jax.loading import Model
from quantspec_jax.sharding import mesh_of
from quantspec_jax.text.prompts import read_prompts


@dataclasses.dataclass(frozen=True)
class Prepared:
    """Arguments of `prefill` and `generate_tokens`.

    program   static; the prefill takes `program.prompt`
    capacity  static, how many new tokens the state has room for
    inputs    tokens [B, P] and lengths [B] of the prompts, and what the sequences want
    """

    program: Program
    capacity: int
    inputs: tuple[jax.Array, jax.Array, Requests]


def prepare(
    model: Model,
    prompts: Any,
    config: GenerateConfig | None = None,
    key: jax.Array | None = None,
) -> Prepared:
    """What a `jax.jit` of one's own needs to decode as `generate` does; arguments as there. γ
    "auto" stands for the most that it drafts. Rounds copy (`GenerateConfig.lookup`) where `prefill`
    was given `lookup=program.lookup`.

    Raises:
      ValueError: an argument is wrong, or prompt and new tokens exceed the model's context.
    """
    config = config or GenerateConfig()
    ids = read_prompts(prompts, model.tokenizer, model.config.vocab_size)
    program, padded = program_for(model, config, max(map(len, ids)))
    ends = config.end_ids(model.config.eos_ids, model.config.vocab_size)
    wants = requests(config, key, ends, len(ids))
    return Prepared(program, bucket(config.max_new_tokens), (*pad(ids, padded), wants))


# What programs are compiled for; who wants top-k has that of all filters.
KINDS = (GREEDY, Warpers(True, False, False), Warpers(True, False, True), Warpers())


def known_warpers(warpers: Warpers) -> Warpers | None:
    """`Program.warpers`, from what the sequences want: one of `KINDS`; None where branches cost
    nothing, and one program serves all."""
    if dispatch.device() is None:
        return None
    return next(kind for kind in KINDS if kind | warpers == kind)


def pad(prompts: Sequence[Sequence[int]], length: int) -> tuple[jax.Array, jax.Array]:
    """Token ids of each prompt → [B, `length`] int32, filled up with 0, and their lengths [B]."""
    rows = np.zeros((len(prompts), length), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return jnp.asarray(rows), jnp.asarray([len(prompt) for prompt in prompts], jnp.int32)


def program_for(model: Model, config: GenerateConfig, longest: int) -> tuple[Program, int]:
    """The program for prompts of at most `longest` tokens, and the length they are padded to. With
    γ "auto" it is the program of the first rounds.

    Raises:
      ValueError: the prompt and its new tokens exceed the model's context or `max_length`.
    """
    context = model.config.max_context
    needed = longest + config.max_new_tokens
    words = f"prompt ({longest} tokens) + max_new_tokens ({config.max_new_tokens})"
    require(needed <= context, words, needed, f"at most {context}, the model's context")
    if config.max_length is None:
        length = min(context, bucket(bucket(longest) + config.max_new_tokens))
    else:
        length = config.max_length
        require(length <= context, "max_length", length, f"at most {context}, the model's context")
        require(needed <= length, words, needed, f"at most max_length = {length}")
    gamma = 0
    if config.mode == "quantspec":
        most = min(MOST_DRAFTED, config.group_size - 1)
        gamma = most if config.gamma == "auto" else int(config.gamma)
    mesh = mesh_of(model.params)
    check_over_mesh(config, mesh)
    cache = CacheConfig(
        max_length=length,
        group_size=config.group_size,
        view=target_view(model, config),
        pass_width=max(gamma + 1, config.pass_width),
        dtype=model.dtype,
    )
    program = Program(
        model.config,
        cache,
        gamma,
        policy=draft_policy(model, config, length, gamma),
        draft_view=config.draft_view,
        exact_tiles=config.exact_tiles,
        coupling=coupling(config.coupling),
        warpers=known_warpers(config.warpers),
        backend=config.backend,
        mesh=None if mesh.size == 1 else mesh,
        lookup=config.copies,
    )
    return program, min(bucket(longest), length)


def target_view(model: Model, config: GenerateConfig) -> str:
    """The view of the cache that the target reads: of a codec that learns, the stored one's."""
    view = config.target_view
    if view != "aqua":
        return view
    converted = "a checkpoint that `quantspec convert --kv aqua` wrote"
    require(model.kv is not None, "kv", view, converted)
    if config.prefill == "tiles":
        raise NotImplementedError(
            "kv 'aqua' with prefill 'tiles' is not there: layers are coded together"
        )
    assert model.kv is not None
    return model.kv.stored.name


def check_over_mesh(config: GenerateConfig, mesh: Mesh) -> None:
    """NotImplementedError for what runs on one device alone."""
    view, tiles_split = config.target_view, mesh.shape.get("cp", 1) > 1
    sequences_split = mesh.shape.get("dp", 1) > 1
    has_tiles = view != "aqua" and codec_of(view).num_tiles(1, config.group_size) > 0
    reasons = {
        f"kv '{view}'": mesh.size > 1 and view == "aqua",
        "prefill 'tiles' with a mesh axis dp": sequences_split and config.prefill == "tiles",
        f"kv '{view}' with a mesh axis cp": tiles_split and not has_tiles,
    }
    for what, asked in reasons.items():
        if asked:
            raise NotImplementedError(f"{what} is not there over several devices")


def draft_policy(model: Model, config: GenerateConfig, length: int, most: int) -> Policy:
    """What the configuration names; "auto" is chosen for a cache of `length` tokens and for `most`
    proposals a round. Where nothing is drafted there is nothing to choose, or to remember."""
    if not most:
        return ALL
    if config.draft_policy != "auto":
        return policy(config.draft_policy, config.draft_share, config.draft_every)
    reading = best_reading(
        model.config,
        model.draft,
        length,
        PRIOR[0],
        most=most,
        itemsize=model.dtype.itemsize,
        group_size=config.group_size,
    )
    return policy(reading.policy, reading.share)
