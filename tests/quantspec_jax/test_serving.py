"""Requests that come and go: in an engine, and from OpenAI's own client to `quantspec serve`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref

import browser
import clients
import httpx
import jax
import jax.numpy as jnp
import numpy as np
import openai
import pytest

import quantspec_jax as qs
from quantspec_jax.cache.tiles import get_tile
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.prefixes import Prefixes, names
from quantspec_jax.engine.programs import PROGRAMS
from quantspec_jax.engine.reply import Reply
from quantspec_jax.engine.scheduler import rounds_between_looks
from quantspec_jax.models.module import init_params
from quantspec_jax.server import listen
from quantspec_jax.server.app import make_app
from quantspec_jax.server.service import Answers, ServerConfig, Service

G, LENGTH, KEY = 16, 192, "secret"
# Drafts that read few pages, of which no verification has voted yet when a prompt is read.
FEW = {"draft_policy": "top-pages", "draft_share": 0.4}
DECODING = {"group_size": G, "gamma": 3, "coupling": "invariant", **FEW}


@pytest.fixture(scope="module")
def model(byte_level_tokenizer):
    config = qs.ModelConfig("llama", 325, 32, 64, 2, 4, 2, 16, 1024, eos_ids=(1,))
    params = init_params(config, jax.random.key(0))
    params = jax.tree.map(lambda x: 5 * x if x.ndim > 1 else x, params)
    return qs.Model(config, params, byte_level_tokenizer, qs.DraftConfig(group_size=32))


@contextlib.contextmanager
def serving(service: Service):
    """What `quantspec serve` runs, in a thread; its address."""
    server = listen.Server(make_app(service), 1, service.end)
    bound = listen.bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def service(model):
    config = ServerConfig(
        slots=4,
        max_length=LENGTH,
        queue=64,
        api_key=KEY,
        name="tiny",
        body_bytes=1 << 16,
        body_seconds=1.0,
    )
    return Service(model, qs.GenerateConfig(**DECODING), config)


@pytest.fixture(scope="module")
def url(service):
    with serving(service) as address:
        yield address


@pytest.fixture(scope="module")
def client(url):
    with openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def engine(model):
    """One of one's own, with the server's programs."""
    config = qs.GenerateConfig(
        **DECODING, max_new_tokens=LENGTH - 1, prefill="tiles", max_length=LENGTH, logprobs=20
    )
    return Engine(model, config, 1, slots=4)


def alone(
    engine: Engine, ids, new, *, seed=0, n=1, wish=None, key=None, speculate=True, **options
) -> list[Reply]:
    """What an engine that does nothing else makes, with `generate`'s keys."""
    wants = {**vars(engine.config), "logprobs": None, "max_new_tokens": new, **options}
    wish = qs.GenerateConfig(**wants) if wish is None else wish
    replies = [Reply(engine.model, ids, wish) for _ in range(n)]
    slots = engine.add([ids] * n, wish, jax.random.key(seed) if key is None else key)
    while engine.running:
        engine.advance(8, speculate)
    for slot, reply in zip(slots, replies, strict=True):
        reply.slot = slot
        reply.look(engine, slot)
        engine.remove(slot)
    return replies


PROMPT = "The cache is stored once, in two planes of four bits each."
PROMPTS = [[5, 6, 7] * 20, [9, 8] * 35, [11] * 33, list(range(1, 120)), [3, 1, 4, 1, 5]]
MODES = [{"gamma": 3, "coupling": "invariant", **FEW}, {"mode": "autoregressive", "kv": "full"}]
TILE = jax.jit(get_tile, static_argnums=3)


def bits(engine: Engine, slot: int, number: int) -> dict[str, bytes]:
    """A tile, as it lies in a slot."""
    tile = TILE(engine._state.cache.layers, jnp.int32(slot), jnp.int32(number), G)
    return {name: np.asarray(x).tobytes() for name, x in tile.items()}


def reusing_config(mode) -> qs.GenerateConfig:
    common = {"group_size": G, "prefill": "tiles", "max_length": LENGTH, "logprobs": 20}
    return qs.GenerateConfig(**common, **mode, max_new_tokens=LENGTH - 1)


def test_a_short_prompt_is_read_alike_in_tiles_and_whole(model, engine):
    """Its first token and the logits behind it; beyond that all is the same program."""
    config = qs.GenerateConfig(max_new_tokens=1, group_size=G, logprobs=20, max_length=LENGTH)
    for prompt in ([3, 1, 4, 1, 5, 9], [2] * G):
        whole = qs.generate(model, [prompt], config)
        (tiled,) = alone(engine, prompt, 1, logprobs=20)
        assert whole.tokens == [tiled.tokens]
        np.testing.assert_allclose(
            [p for _, p in whole.logprobs[0][0].top],
            [p for _, p in tiled.logprobs[0].top],
            atol=1e-4,
        )


def test_requests_that_come_while_others_decode_get_what_they_get_alone(engine):
    """Sampled beside greedy; a step reads one tile at most, and cancelled slots are free."""
    keys = jax.random.split(jax.random.key(3), len(PROMPTS))
    common = {**vars(engine.config)}
    wishes = [
        qs.GenerateConfig(
            **{**common, "temperature": 0.9 * (i % 2), "max_new_tokens": 9 + 3 * i},
        )
        for i in range(len(PROMPTS))
    ]
    every = [
        alone(engine, p, 1, wish=w, key=keys[i : i + 1])[0]
        for i, (p, w) in enumerate(zip(PROMPTS, wishes, strict=True))
    ]
    (cancelled,) = engine.add([[2] * 90], wishes[0])
    (other,) = engine.add([[2] * 90], wishes[0])
    engine.step()
    engine.remove(cancelled)
    engine.step()
    engine.remove(other)
    busy = [engine.add([[8] * 5], wishes[0])[0] for _ in range(2)]  # two slots are taken
    waiting, running, found = list(range(len(PROMPTS))), {}, {}
    while waiting or running:
        while waiting and engine.free_slots:
            i = waiting.pop(0)
            (slot,) = engine.add([PROMPTS[i]], wishes[i], keys[i : i + 1])
            running[slot] = i
        before = {p.slot: p.position for p in engine._prompts}
        engine.step(2)
        left = {p.slot: p.position for p in engine._prompts}
        assert sum(left[slot] != before[slot] for slot in left) <= 1
        assert all(left[slot] <= before[slot] + G for slot in left)
        for slot in list(running):
            progress = engine.read(slot)
            if progress.finished:
                found[running.pop(slot)] = progress
                engine.remove(slot)
    for slot in busy:
        engine.remove(slot)
    read, coded = found[3].counters.draft_pages  # of a long prompt
    assert 0 < read < 0.6 * coded
    for i, one in enumerate(every):
        assert found[i].tokens == one.tokens
        own, same = ([s.own for s in x.logprobs] for x in (found[i], one))
        np.testing.assert_allclose(own, same, atol=2e-4)


@pytest.mark.parametrize("mode", MODES, ids=["quantspec", "full"])
def test_what_is_kept_is_what_a_fresh_prefill_makes_bit_for_bit(model, mode):
    """Prompts that begin alike; the text is that of the fresh run, too (its first token, where no
    rounds were to be compiled)."""
    config = reusing_config(mode)
    new = 24 if "gamma" in mode else 1
    reusing = Engine(model, config, 1, slots=4, prefixes=Prefixes(1 << 20))
    long, other = list(range(1, 120)), [*range(1, 90), *[4] * 50]
    answer = alone(reusing, long, new, logprobs=20)[0].tokens
    for prompt in ([7] * 30, other, long[:60], long + answer):
        fresh = Engine(model, config, 1, slots=4)
        (kept,), (made,) = (alone(e, prompt, new, logprobs=20) for e in (reusing, fresh))
        assert kept.tokens == made.tokens
        pairs = enumerate(zip(prompt, long, strict=False))
        shared = next((i for i, (a, b) in pairs if a != b), min(len(prompt), len(long)))
        assert shared - 2 * G < kept.kept <= shared
        for number in range(len(prompt) // G):
            assert bits(reusing, kept.slot, number) == bits(fresh, made.slot, number)
    first, second = alone(reusing, [9] * 120, 1, n=2)  # side by side: it is read once
    assert first.kept == 0 < 120 - 2 * G < second.kept
    assert first.tokens == second.tokens


@pytest.mark.parametrize("mode", MODES, ids=["quantspec", "full"])
def test_tiles_that_lie_in_a_slot_stay_there_while_others_decode(model, mode, monkeypatch):
    """A second turn copies nothing, though rounds run while it waits and while it is read; so does
    one after a prompt that was given up midway. Of several free slots each takes its own. Where it
    is taken, tiles are copied, some between two rounds."""
    config = reusing_config(mode)
    engine, fresh = (Engine(model, config, 1, 4, each) for each in (Prefixes(1 << 20), None))
    put, copied = Engine._put, []
    monkeypatch.setattr(Engine, "_put", lambda *args: (copied.append(args[2:]), put(*args)))
    wish = qs.GenerateConfig(**{**vars(config), "max_new_tokens": 3})
    long, other = list(range(1, 120)), [*range(130, 220)]
    own = [alone(engine, prompt, 3, wish=wish)[0].slot for prompt in (long, other)]
    assert len(set(own)) == 2
    endless = {"max_new_tokens": 110, "ignore_eos": True}
    (busy,) = engine.add([[2] * 20], qs.GenerateConfig(**{**vars(wish), **endless}))

    def between(slot: int, until: int) -> int:
        """Steps until so much of a slot's prompt is read, others decoding; how many."""
        for count in range(100):
            (position,) = {p.position for p in engine._prompts if p.slot == slot} or {LENGTH}
            if position >= until:
                return count
            engine.step(1)
        raise AssertionError

    between(busy, 20)
    (waits,) = engine.add([[3] * 50], wish)
    second = [*long[:100], *[7] * 40]
    (again,) = engine.add([second], wish)  # given up, after six tiles in place and one read
    assert again == own[0]
    assert between(waits, 50) > 2  # `again` stands still meanwhile
    assert between(again, 7 * G) == 1
    engine.remove(again)
    engine.remove(waits)
    engine.step(3)  # what is written for nobody lies behind what was read
    turns = {own[1]: [*other, *[5] * 5], own[0]: second}
    kept = {own[1]: 4 if "gamma" in mode else 5, own[0]: 7}
    assert engine.add(list(turns.values()), wish) == list(turns)
    while not all(engine.read(slot).finished for slot in turns):
        engine.step(1)
    assert not copied
    monkeypatch.setattr("quantspec_jax.engine.engine.TILES_PUT_BESIDE", 5)
    assert engine.add([second], wish) == [waits]
    engine.step(1)
    assert [len(tiles) for _, tiles in copied] == [4, 1]
    between(waits, LENGTH)
    turns[waits], kept[waits] = second, 7 if "gamma" in mode else 8
    while not engine.read(waits).finished:
        engine.step(1)
    assert [first for first, _ in copied] == [0, 4, *range(5, kept[waits])]
    assert not engine.read(busy).finished
    for slot, prompt in turns.items():
        (made,) = alone(fresh, prompt, 3, wish=wish)
        found = engine.read(slot)
        assert found.tokens == made.tokens
        assert found.kept == kept[slot] * G
        for number in range(len(prompt) // G):
            assert bits(engine, slot, number) == bits(fresh, made.slot, number)


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_logprobs_are_the_targets_with_and_without_speculation(model, engine, temperature):
    """Those of the raw distribution, as a pass over the whole text in full precision has them, up
    to what the cache's codes change."""
    prompt, wants = PROMPTS[0], {"temperature": temperature, "logprobs": 3}
    (out,) = alone(engine, prompt, 30, **wants)
    (same,) = alone(engine, prompt, 30, speculate=False, **wants)
    assert out.tokens == same.tokens
    own = [s.own for s in out.logprobs]
    np.testing.assert_allclose(own, [s.own for s in same.logprobs], atol=2e-4)
    firsts = [[[i for i, _ in s.top] for s in reply.logprobs] for reply in (out, same)]
    assert firsts[0] == firsts[1]
    text = np.array([prompt + out.tokens])
    raw = jax.nn.log_softmax(model.logits(text)[0, len(prompt) - 1 : -1])
    np.testing.assert_allclose(own, raw[np.arange(len(own)), out.tokens], atol=0.2)
    for score, row in zip(out.logprobs, np.asarray(raw), strict=True):
        np.testing.assert_allclose([p for _, p in score.top], np.sort(row)[::-1][:3], atol=0.2)
    assert any(out.drafted)
    assert not any(same.drafted)


def test_the_oldest_tiles_go_first_and_ends_before_beginnings():
    tile = {"x": np.zeros(10, np.uint8)}
    prefixes = Prefixes(60)
    old, new, third, large = (names([token] * 12, 4) for token in (1, 2, 3, 9))
    for every in (old, new):
        for number in (1, 2, 3):
            prefixes.keep(every[:number], tile)
    assert len(prefixes) == 6
    assert len(prefixes.find(old)) == 3  # used: the newer one is the older now
    prefixes.keep(third[:1], tile)
    prefixes.keep(large[:2], tile)  # nobody would find it: the one before it is not there
    assert [len(prefixes.find(x)) for x in (old, new, third)] == [3, 2, 1]
    assert prefixes.bytes == 60
    prefixes.keep(large[:1], {"x": np.zeros(61, np.uint8)})
    assert len(prefixes) == 6


@pytest.mark.parametrize(
    "bad",
    [
        *({"logprobs": 21}, {"logprobs": -1}, {"prefill": "half"}),
        {"draft_policy": "snapkv", "prefill": "tiles"},
    ],
)
def test_settings_that_are_none_are_refused_by_name(bad):
    with pytest.raises(ValueError, match=f"{next(iter(bad))} is .*; allowed: "):
        qs.GenerateConfig(**bad)


def test_completions_are_what_an_engine_makes_alone(model, client, engine):
    """n, seed, temperature, logprobs and usage."""
    wants = {"temperature": 0.8, "top_p": 0.95}
    more = {"top_k": 50, "min_p": 0.01, "repetition_penalty": 1.1}
    out = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=20,
        n=2,
        seed=7,
        logprobs=2,
        **wants,
        extra_body=more,
    )
    ids = model.tokenizer(PROMPT)["input_ids"]
    same = alone(engine, ids, 20, seed=7, n=2, logprobs=2, **wants, **more)
    assert [choice.text for choice in out.choices] == [reply.text for reply in same]
    assert same[0].text != same[1].text
    for choice, reply in zip(out.choices, same, strict=True):
        assert choice.finish_reason == {"eos": "stop"}.get(*[reply.finish_reason] * 2)
        found = choice.logprobs.token_logprobs
        np.testing.assert_allclose(found, [s.own for s in reply.logprobs], atol=1e-4)
        assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert out.usage.completion_tokens == sum(len(reply.tokens) for reply in same)
    assert out.usage.prompt_tokens == len(ids)
    again = client.completions.create(model="tiny", prompt=ids, max_tokens=1, temperature=0)
    assert len(ids) - 2 * G < again.usage.prompt_tokens_details.cached_tokens < len(ids)


def test_no_request_waits_for_a_compiler(client):
    """What a request of any kind needs was made before the first came."""
    made = PROGRAMS.made
    wishes = ({}, {"temperature": 0.8}, {"logprobs": 2}, {"extra_body": {"speculate": False}})
    for wish in wishes:
        wants = {"temperature": 0, "max_tokens": 6, **wish}
        client.completions.create(model="tiny", prompt=PROMPT, **wants)
    assert PROGRAMS.made == made


def test_chat_streams_what_it_says_whole(model, client):
    messages = [{"role": "system", "content": "Be short."}, {"role": "user", "content": PROMPT}]
    wants = {"model": "tiny", "messages": messages, "temperature": 0, "max_completion_tokens": 24}
    whole = client.chat.completions.create(**wants, logprobs=True, top_logprobs=3)
    chunks = list(
        client.chat.completions.create(**wants, stream=True, stream_options={"include_usage": True})
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content != ""
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert len(chunks) > 4
    spans = [
        span
        for c in chunks
        if c.choices
        for span in (getattr(c, "quantspec", None) or {}).get("spans", [])
    ]
    assert "".join(piece for piece, _ in spans) == text
    assert {drafted for _, drafted in spans} == {True, False}
    scores = whole.choices[0].logprobs.content
    assert len(scores) == whole.usage.completion_tokens
    assert all(s.logprob == s.top_logprobs[0].logprob for s in scores)  # greedy: the likeliest
    plain = client.chat.completions.create(**wants, logprobs=True, extra_body={"speculate": False})
    assert plain.choices[0].message.content == text
    stop = text[5:8]
    stopped = client.chat.completions.create(**wants, stop=[stop])
    assert stopped.choices[0].message.content == text[: text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"


def test_errors_are_openais(client, url):
    wrong = [
        ({"model": "other"}, openai.NotFoundError, "other"),
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "max_tokens"),
        ({"prompt": [[400]]}, openai.BadRequestError, "token id"),
        ({"prompt": [5] * LENGTH}, openai.BadRequestError, "prompt"),
        ({"extra_body": {"tools": []}}, openai.BadRequestError, "tools"),
        ({"prompt": "a" * 70_000}, openai.APIStatusError, "longer than 65536"),
    ]
    for changes, kind, words in wrong:
        with pytest.raises(kind, match=words) as caught:
            client.completions.create(**{"model": "tiny", "prompt": "a", **changes})
        assert caught.value.body["message"]
    stranger = openai.OpenAI(base_url=f"{url}/v1", api_key="no", max_retries=0)
    with stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()
    with httpx.Client(base_url=url) as plain:
        assert plain.get("/health").json() == {"status": "ok"}
        page = plain.get("/")
        assert "<title>" in page.text
        assert "http://" not in page.text.replace("http://www.w3.org", "")
        assert "https://" not in page.text
        assert plain.get("/metrics").status_code == 401


METRICS = (
    *("tokens_per_second", "queue", "slots_in_use", "cache_bytes", "kept_bytes"),
    *("time_to_first_token_seconds_count", "queue_seconds_count", "programs_kept", "programs_made"),
)


def test_models_tokenize_and_metrics(client, model, url):
    assert [m.id for m in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    headers = {"Authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers) as http:
        tokens = http.post("/tokenize", json={"prompt": PROMPT}).json()
        assert tokens["tokens"] == model.tokenizer(PROMPT)["input_ids"]
        chat = http.post("/tokenize", json={"messages": [{"role": "user", "content": "a"}]})
        assert chat.json()["count"] > 2
        text = http.get("/metrics").text
    values = dict(
        line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#")
    )
    assert float(values["quantspec_new_tokens_total"]) > 0
    hits, misses = (
        float(values[f"quantspec_{name}_prompt_tokens_total"]) for name in ("cached", "read")
    )
    assert hits + misses == float(values["quantspec_prompt_tokens_total"])
    assert hits > 0
    assert 0 < float(values["quantspec_acceptance_rate"]) <= 1
    assert values["quantspec_slots"] == "4.0"
    also = {f"quantspec_{name}" for name in METRICS}
    assert also <= values.keys()


@pytest.mark.parametrize(
    ("seconds", "before", "rounds"),
    [(None, 0, 2), (0.01, 0, 2), (0.01, 2, 4), (0.01, 8, 15), (1e-5, 32, 32), (1.0, 16, 2)],
)
def test_a_step_is_as_many_rounds_as_fit_into_a_moment(seconds, before, rounds):
    """A request's text begins soon; a call of two rounds would cost as much as it decodes in."""
    assert rounds_between_looks(seconds, before) == rounds


def test_many_at_once_get_each_what_they_get_alone_and_slots_of_those_who_leave_are_free(
    model, service, url, engine
):
    """24 streams over 4 slots, sampled and greedy; every fifth client leaves midway."""
    rng = np.random.default_rng(0)
    bodies = [
        {
            "prompt": rng.integers(3, 320, int(rng.integers(5, 90))).tolist(),
            "max_tokens": int(rng.integers(8, 40)),
            "temperature": float(i % 2),
            "seed": i,
            "stream": True,
            "ignore_eos": True,
        }
        for i in range(24)
    ]

    async def one(http: httpx.AsyncClient, i: int) -> str | None:
        text = ""
        async with http.stream("POST", "/v1/completions", json=bodies[i]) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line in ("", "data: [DONE]"):
                    continue
                text += json.loads(line[6:])["choices"][0]["text"]
                if i % 5 == 4:
                    return None
        return text

    async def all_of_them() -> list[str | None]:
        headers = {"Authorization": f"Bearer {KEY}"}
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(
            base_url=url, headers=headers, timeout=120, limits=limits
        ) as http:
            return await asyncio.gather(*(one(http, i) for i in range(len(bodies))))

    found = asyncio.run(all_of_them())
    deadline = time.monotonic() + 20
    while service.scheduler.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert service.scheduler.running == service.scheduler.waiting == 0
    assert service.scheduler.engine.free_slots == 4
    for i, (body, text) in enumerate(zip(bodies, found, strict=True)):
        if i % 5 == 4:
            assert text is None
            continue
        wants = {"temperature": body["temperature"], "ignore_eos": True}
        (reply,) = alone(engine, body["prompt"], body["max_tokens"], seed=i, **wants)
        assert text == reply.text


def test_nothing_of_a_request_is_kept_once_it_is_answered(url, monkeypatch):
    """Not even until a garbage collector comes by, which may take thousands of requests."""
    made = weakref.WeakSet()
    add = Answers.add

    def noted(answers, *args):
        add(answers, *args)
        made.update((answers, *answers.jobs))

    monkeypatch.setattr(Answers, "add", noted)
    headers = {"Authorization": f"Bearer {KEY}"}
    body = {"prompt": [5] * 20, "max_tokens": 3, "n": 2, "logprobs": 2}
    gc.collect()
    gc.disable()
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            for more in ({}, {"stream": True}, {"stop": "zzz", "temperature": 0.5}):
                answer = client.post("/v1/completions", json=body | more)
                assert answer.status_code == 200
        deadline = time.monotonic() + 10
        while made and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not list(made)
    finally:
        gc.enable()


def test_clients_that_are_wrong_are_refused_and_the_next_good_one_is_answered(url):
    """JSON that is none, wrong types, bytes that are no HTTP, clients that hang up halfway."""
    wrong = clients.Clients(url, KEY)
    wrong.run(120)
    assert not wrong.failures
    assert {kind.split()[0] for kind in wrong.seen} == {"wrong_body", "wrong_bytes", "slow"}
    assert wrong.longest < 10


def test_a_request_whose_head_or_body_does_not_come_is_ended(url, monkeypatch):
    monkeypatch.setattr(listen, "HEAD_SECONDS", 0.3)
    body = b"Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{"
    late = clients.POST + f"Authorization: Bearer {KEY}\r\n".encode() + body
    host, port = url.removeprefix("http://").split(":")
    for sent, status in ((b"", None), (b"GET / HT", None), (late, b"408")):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(sent)
            found = connection.recv(1 << 16)
        assert (found.split()[1] if found else None) == status


def test_a_full_queue_says_when_to_come_again_and_slow_requests_end(model):
    config = ServerConfig(slots=4, max_length=LENGTH, queue=1, name="tiny", seconds=0.8)
    service = Service(model, qs.GenerateConfig(**DECODING), config)
    body = {"prompt": [5] * 8, "max_tokens": 180, "ignore_eos": True, "stream": True}
    with serving(service) as url, httpx.Client(base_url=url, timeout=60) as http:
        advance = service.scheduler.engine.advance

        def slow(*args):
            time.sleep(0.2)
            advance(*args)

        service.scheduler.engine.advance = slow
        with (
            http.stream("POST", "/v1/completions", json=body | {"n": 4}) as first,
            http.stream("POST", "/v1/completions", json=body) as second,
        ):
            busy = http.post("/v1/completions", json=body | {"n": 2})
            assert busy.status_code == 429
            assert int(busy.headers["retry-after"]) > 0
            assert busy.json()["error"]["type"] == "rate_limit_error"
            for late in (first, second):
                lines = [line for line in late.iter_lines() if line]
                assert json.loads(lines[-1][6:])["error"]["code"] == "timeout"
        assert http.get("/health").json() == {"status": "ok"}
        deadline = time.monotonic() + 5
        while service.scheduler.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert service.scheduler.running == 0
        # The server ends while a request runs: the client is told.
        with http.stream("POST", "/v1/completions", json=body) as last:
            service.stop()
            lines = [line for line in last.iter_lines() if line]
        assert "error" in json.loads(lines[-1][6:])


def test_an_address_that_is_taken_is_refused():
    with listen.bound("127.0.0.1", 0) as taken:
        taken.listen()
        with pytest.raises(ValueError, match="host and port are"):
            listen.bound("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(ValueError, match="port is 70000"):
        listen.bound("127.0.0.1", 70_000)


def test_sigterm_ends_the_command_and_what_runs(one_layer_llama_dir):
    """Within the time that is given: the client's stream ends, the exit status is 0."""
    command = [sys.executable, "-m", "quantspec_jax.cli", "serve", "--model", one_layer_llama_dir]
    command += ["--port", "0", "--grace", "1", "--mode", "autoregressive", "--slots", "1"]
    body = {"prompt": "a", "max_tokens": 2000, "ignore_eos": True, "stream": True}
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(server.kill)
        url = server.stderr.readline().split()[1]
        assert url.startswith("http://127.0.0.1:"), "unless it is told"
        while True:
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"{url}/health").json() == {"status": "ok"}
                break
            assert server.poll() is None
            time.sleep(0.1)
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
            lines = answer.iter_lines()
            assert json.loads(next(lines)[6:])["choices"][0]["finish_reason"] is None
            began = time.monotonic()
            server.send_signal(signal.SIGTERM)
            last = [line for line in lines if line][-1]  # it was told, or the text was at its end
            assert last == "data: [DONE]" or "error" in json.loads(last[6:])
        assert server.wait(30) == 0
        assert time.monotonic() - began < 15
        said = server.stderr.read()
        assert not any(words in said for words in ("Traceback", "POST", "/v1/", "prompt"))


@pytest.mark.browser
@pytest.mark.skipif(browser.FOUND is None, reason="no Chromium is installed")
def test_the_page_streams_stops_and_compares(url, service, tmp_path):
    """With the keyboard; then a file that is dropped in, on a phone's width."""
    with browser.Browser(tmp_path / "a") as page:
        page.call("Page.navigate", url=url)
        page.wait("document.title == 'QuantSpec-JAX' && document.readyState == 'complete'")
        page.run(f"$('key').value = '{KEY}'; $('tokens').value = 40; $('message').focus(); name()")
        page.wait("$('model').textContent == 'tiny'")
        page.type("Say something.")
        page.press("Enter")
        page.wait("$('talk').querySelectorAll('.text span').length > 2")
        page.wait("!running")
        said = page.run("last.place.text.textContent")
        assert said == page.run("messages[1].content") != ""
        shades = page.run("['d', 'o'].map(c => last.place.text.querySelectorAll('.' + c).length)")
        assert all(number > 0 for number in shades)
        assert "acceptance" in page.run("$('live').textContent")
        assert "tokens/s" in page.run("$('live').textContent")
        page.run("$('compare').click()")
        page.wait("document.querySelectorAll('.pair .turn').length == 2 && !running")
        both = page.run("[...document.querySelectorAll('.pair .text')].map(x => x.textContent)")
        assert both == [said, said]
        page.picture(tmp_path / "compare.png")
        # Escape stops an answer, and its slot is free.
        advance = service.scheduler.engine.advance

        def slow(*args):
            time.sleep(0.05)
            advance(*args)

        service.scheduler.engine.advance = slow
        try:
            page.run("$('tokens').value = 60; $('clear').click(); $('message').focus()")
            page.type("And more?")
            page.press("Enter")
            page.wait("last && last.place.text.children.length > 1")
            page.press("Escape")
            page.wait("!running")
            deadline = time.monotonic() + 5
            while service.scheduler.running and time.monotonic() < deadline:
                time.sleep(0.01)
            assert service.scheduler.running == 0
        finally:
            del service.scheduler.engine.advance
        assert "stopped" in page.run("last.place.numbers.textContent")
        # A file, dropped.
        page.call(
            "Emulation.setDeviceMetricsOverride",
            width=360,
            height=700,
            deviceScaleFactor=1,
            mobile=True,
        )
        page.run("$('clear').click()")
        page.run(
            "(() => { const t = new DataTransfer(); t.items.add(new File(['the sea'], 'a.txt'));"
            " document.dispatchEvent(new DragEvent('drop', {dataTransfer: t, bubbles: true,"
            " cancelable: true})); })()"
        )
        page.wait("files.length == 1")
        page.run("$('tokens').value = 12; $('send').click()")
        page.wait("messages.length == 2 && !running")
        assert "the sea" in page.run("messages[0].content")
        assert page.run("document.documentElement.scrollWidth <= window.innerWidth")
        page.picture(tmp_path / "phone.png")
