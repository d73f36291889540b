"""Sessions and saved caches: a conversation goes on as if it had never stopped."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

import quantspec_jax as qs
from quantspec_jax.commands.generate import summary
from quantspec_jax.engine import saved
from quantspec_jax.engine.engine import Engine
from quantspec_jax.models.module import init_params

G = 16
MODES = [
    {"gamma": 3, "coupling": "invariant", "temperature": 0.7},
    {"mode": "autoregressive", "kv": "full"},
]
DOCUMENT = "The cache is stored once, in two planes of four bits each. " * 3


def make_model(tokenizer, seed: int = 0):
    config = qs.ModelConfig("llama", 325, 32, 64, 1, 4, 2, 16, 1024)
    params = init_params(config, jax.random.key(seed))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, tokenizer, qs.DraftConfig(group_size=32))


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    return make_model(byte_level_tokenizer)


def config_of(mode) -> qs.GenerateConfig:
    new = 20 if "gamma" in mode else 1  # no rounds, which are to be compiled
    return qs.GenerateConfig(max_new_tokens=new, group_size=G, max_length=384, **mode)


def tiles(session: qs.Session) -> dict[bytes, dict[str, bytes]]:
    """What is kept, to the bit."""
    return {
        name: {part: np.asarray(x).tobytes() for part, x in tile.items()}
        for name, tile in session.prefixes._kept.items()
    }


@pytest.mark.parametrize("mode", MODES, ids=["quantspec", "full"])
def test_a_conversation_goes_on_from_its_file_as_if_it_had_never_stopped(model, mode, tmp_path):
    config = config_of(mode)
    keys = jax.random.split(jax.random.key(1), 3)
    whole = qs.Session(model, config, system="Be short.")
    turns = [whole.chat(DOCUMENT, keys[0]), whole.chat("And?", keys[1])]
    assert turns[0].stats["cached_tokens"] == 0
    kept, prompt = turns[1].stats["cached_tokens"], turns[0].stats["prompt_tokens"]
    assert prompt - 2 * G < kept <= prompt
    path = tmp_path / "talk.safetensors"
    whole.save(path)
    again = qs.Session.load(path, model, config)
    assert again.messages == whole.messages
    assert again.tokens == whole.tokens
    every = tiles(whole)
    assert tiles(again).items() <= every.items()
    assert len(tiles(again)) == turns[1].stats["prompt_tokens"] // G
    third, other = whole.chat("Why?", keys[2]), again.chat("Why?", keys[2])
    assert other.tokens == third.tokens
    assert other.stats["cached_tokens"] == third.stats["cached_tokens"] >= kept
    # A fresh run reads all of it.
    fresh = qs.Session(model, config)
    fresh.messages = whole.messages[:-2]
    assert fresh.chat("Why?", keys[2]).tokens == third.tokens


@pytest.fixture(scope="module")
def saved_file(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "a.safetensors"
    session = qs.Session(model, config_of(MODES[0]))
    session.generate(DOCUMENT)
    session.save(path)
    return path


def test_another_model_or_form_is_refused_by_name(model, byte_fallback_tokenizer, saved_file):
    config = config_of(MODES[0])

    def refused(words, model=model, **changes):
        with pytest.raises(ValueError, match=words):
            qs.Session.load(saved_file, model, qs.GenerateConfig(**{**vars(config), **changes}))

    refused("another model's", make_model(model.tokenizer, seed=1))
    tuned = model.params | {"final_norm": model.params["final_norm"] * 2}
    refused("another model's", qs.Model(model.config, tuned, model.tokenizer))
    other = qs.Model(model.config, model.params, byte_fallback_tokenizer)
    refused("another tokenizer's", other)
    refused("of group_size 16, not 32", group_size=32)
    refused("of codec 'hierarchical', not 'full'", mode="autoregressive", gamma="auto", kv="full")
    refused("of view 'int8', not 'int4'", mode="autoregressive", gamma="auto", kv="int4")


def test_another_version_and_what_is_no_cache_are_refused(model, saved_file, tmp_path, monkeypatch):
    config = config_of(MODES[0])
    with monkeypatch.context() as later:
        later.setattr(saved, "CACHE_VERSION", 1)
        with pytest.raises(ValueError, match="of version 2, not 1"):
            qs.Session.load(saved_file, model, config)
    for name, content in {"empty": b"", "text": b"no cache" * 20}.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="is damaged, or no saved cache"):
            qs.Session.load(tmp_path / name, model, config)
    with pytest.raises(ValueError, match=r"path is .*absent"):
        qs.Session.load(tmp_path / "absent", model, config)
    with pytest.raises(ValueError, match="a file in an existing directory"):
        qs.Session(model, config).save(tmp_path / "no" / "where")


def test_the_same_cache_makes_the_same_bytes(model, saved_file, tmp_path):
    """A file can be compared by its sum."""
    session = qs.Session.load(saved_file, model, config_of(MODES[0]))
    for i in range(8):
        session.save(tmp_path / str(i))
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {saved_file.read_bytes()}


def test_of_the_first_version_the_version_is_said(model, saved_file, tmp_path):
    """Its header had its own sum beside it."""
    with safe_open(saved_file, framework="np") as file:
        text = file.metadata()["quantspec"].partition("\n")[0].replace(": 2,", ": 1,", 1)
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata = {"quantspec": text, "crc32": str(zlib.crc32(text.encode()))}
    save_file(arrays, tmp_path / "old", metadata)
    with pytest.raises(ValueError, match="of version 1, not 2"):
        qs.Session.load(tmp_path / "old", model, config_of(MODES[0]))


def test_a_flipped_bit_is_noticed_wherever_it_is(model, saved_file, tmp_path):
    """In the header or in any array, and a file cut short."""
    config = config_of(MODES[0])
    good = saved_file.read_bytes()
    cache = qs.Session(model, config)._engine.program.cache
    damaged = tmp_path / "b.safetensors"
    rng = np.random.default_rng(0)
    header = int.from_bytes(good[:8], "little")
    places = [*rng.integers(0, 8 + header, 30), *rng.integers(8 + header, len(good), 30)]
    for place in places:
        content = bytearray(good)
        content[place] ^= 1 << int(rng.integers(8))
        damaged.write_bytes(content)
        with pytest.raises(ValueError, match=re.escape(str(damaged))):
            saved.load(damaged, model, cache)
    damaged.write_bytes(good[:-1])
    with pytest.raises(ValueError, match="is damaged"):
        saved.load(damaged, model, cache)


def test_a_file_is_held_once(byte_level_tokenizer, tmp_path):
    """While it is written, and while it is read: at most an array or two besides the tiles."""
    config = qs.ModelConfig("llama", 325, 32, 64, 4, 4, 4, 256, 1024)
    model = qs.Model(config, init_params(config, jax.random.key(0)), byte_level_tokenizer)
    cache = qs.Session(model, config_of(MODES[1]))._engine.program.cache
    forms, rng = saved._forms(model, cache, "planes")(0), np.random.default_rng(0)

    def random(form: jax.ShapeDtypeStruct) -> np.ndarray:
        return np.frombuffer(rng.bytes(form.size * form.dtype.itemsize), form.dtype)

    tiles = [
        {name: random(form).reshape(form.shape) for name, form in forms.items()} for _ in range(16)
    ]
    array = max(x.nbytes for x in tiles[0].values())
    held = sum(x.nbytes for tile in tiles for x in tile.values())
    assert held > 16 * array

    def peak(call: Callable[[], Any]) -> tuple[Any, int]:
        tracemalloc.start()
        try:
            return call(), tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    def save() -> None:
        saved.save(tmp_path / "a", model, cache, [1] * (G * len(tiles)), tiles, {})

    save()  # compiles
    _, writing = peak(save)
    assert writing < 2 * array
    read, reading = peak(lambda: saved.load(tmp_path / "a", model, cache))
    assert reading < held + 2 * array
    for ours, theirs in zip(tiles, read.tiles, strict=True):
        assert all(ours[name].tobytes() == theirs[name].tobytes() for name in forms)


SAVING = """
import sys, numpy as np
from quantspec_jax.files import whole
from safetensors.numpy import save_file
print("ready", flush=True)
i = 0
while True:
    i += 1
    with whole(__import__("pathlib").Path(sys.argv[1])) as partial:
        save_file({"a": np.full(1 << 20, i % 100, np.uint8)}, partial)
"""


def test_a_save_that_is_killed_leaves_the_file_of_before(tmp_path):
    """kill −9 in the middle of saves: what lies there is always one of those that were whole."""
    path = tmp_path / "a.safetensors"
    for _ in range(3):
        child = subprocess.Popen([sys.executable, "-c", SAVING, path], stdout=subprocess.PIPE)
        assert child.stdout is not None
        assert child.stdout.readline() == b"ready\n"
        time.sleep(0.05)
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
        child.stdout.close()
        if path.exists():
            with safe_open(path, framework="np") as file:
                values = file.get_tensor("a")
            assert (values == values[0]).all()
    assert path.exists()


def test_an_interruption_before_the_first_token_has_all_statistics(model, monkeypatch):
    def interrupted(engine, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(Engine, "step", interrupted)
    turn = qs.Session(model, config_of(MODES[0])).generate(DOCUMENT)
    assert (turn.tokens, turn.text, turn.stats["rounds"]) == ([], "", 0)
    assert turn.stats["acceptance_rate"] is turn.stats["tokens_per_round"] is None
    assert summary(turn.stats).startswith("0 tokens (interrupted)")


def test_after_an_interruption_in_a_prompt_the_text_is_that_of_a_fresh_run(model, monkeypatch):
    """What was read of it by then is kept, up to the tile that was on its way to the host."""
    config = config_of(MODES[0])
    session, read, count = qs.Session(model, config), Engine._read_next, 0

    def interrupted(engine, prompt):
        nonlocal count
        count += 1
        read(engine, prompt)
        if count == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(Engine, "_read_next", interrupted)
        assert session.generate(DOCUMENT).tokens == []
    turn, fresh = session.generate(DOCUMENT), qs.Session(model, config)
    assert turn.stats["cached_tokens"] == 4 * G
    assert turn.tokens == fresh.generate(DOCUMENT).tokens
    assert tiles(session) == tiles(fresh)
