"""`quantspec serve` under OpenAI's own client: many streams over a few slots, clients that leave, a
long time, signals.

    python benchmarks/server.py --model M --text T.txt --output benchmarks/NAME.json [--what ...]

streams   all at once, of different lengths, greedy and sampled; each text against what `generate`
          makes alone, and what an engine of as many slots makes alone (whose products have as many
          rows: with other row counts XLA's sums differ in their last bits, and a tie may fall to
          the other side)
leaving   every fifth client hangs up midway; rounds until its slot is free
soak      requests of all kinds, twice as many at once as there are slots, spread over a time,
          once the memory for prompts that come again (--cache-bytes) is full; the server's memory
          after a tenth of it, and the most after that
malformed wrong bodies, bytes that are no HTTP, clients that stop halfway (tests/fuzz/clients.py)
signals   SIGTERM without and with a request that runs
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import jax
import numpy as np
import openai
import script

import quantspec_jax as qs
from quantspec_jax.bench import record
from quantspec_jax.engine.engine import Engine
from quantspec_jax.engine.reply import Reply

MORE = {"ignore_eos": True}
Note = Callable[[dict[str, Any]], None]  # writes a row that is not finished


class Server:
    """`quantspec serve` in a process of its own."""

    def __init__(self, args: argparse.Namespace, *options: str):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        command = [sys.executable, "-m", "quantspec_jax.cli", "serve", "--name", "m"]
        command += ["--model", str(args.model), "--port", str(port), "--slots", str(args.slots)]
        command += ["--max-length", str(args.max_length), "--queue", "256", *options]
        command += ["--cache-bytes", str(args.cache_bytes)]
        if args.gamma != "auto":
            command += ["--gamma", args.gamma]
        self.process = subprocess.Popen(command)
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{self.url}/health", timeout=10).status_code == 200:
                    break
            assert self.process.poll() is None, "the server has ended"
            time.sleep(0.2)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait(60)

    def client(self) -> openai.AsyncOpenAI:
        limits = httpx.Limits(max_connections=None)
        http = httpx.AsyncClient(limits=limits, timeout=1200)
        return openai.AsyncOpenAI(
            base_url=f"{self.url}/v1", api_key="none", max_retries=0, http_client=http
        )

    def resident_bytes(self) -> int:
        pages = Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]
        return int(pages) * resource.getpagesize()

    def metrics(self) -> dict[str, float]:
        lines = httpx.get(f"{self.url}/metrics", timeout=600).text.splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}


@dataclasses.dataclass(frozen=True)
class Wish:
    """One request."""

    prompt: list[int]
    new: int
    temperature: float
    seed: int


def wishes(model: qs.Model, args: argparse.Namespace) -> list[Wish]:
    """Parts of the text, of different lengths; every second one is sampled."""
    ids = script.tokens(model, args.text, 20_000)
    rng = np.random.default_rng(0)
    found = []
    for i in range(args.requests):
        length = int(rng.integers(20, args.longest))
        start = int(rng.integers(0, len(ids) - length))
        new = int(rng.integers(args.new_tokens // 4, args.new_tokens))
        found.append(Wish(ids[start : start + length], new, 0.8 * (i % 2), i))
    return found


async def asked(client: openai.AsyncOpenAI, wish: Wish) -> tuple[str, dict[str, Any]]:
    """The streamed text, and the server's statistics of it."""
    stream = await client.completions.create(
        model="m",
        prompt=wish.prompt,
        max_tokens=wish.new,
        temperature=wish.temperature,
        seed=wish.seed,
        stream=True,
        extra_body=MORE,
    )
    text, last = "", {}
    async for chunk in stream:
        text += chunk.choices[0].text
        last = chunk.quantspec
    return text, last


def config_of(args: argparse.Namespace, length: int) -> qs.GenerateConfig:
    gamma = args.gamma if args.gamma == "auto" else int(args.gamma)
    return qs.GenerateConfig(
        gamma=gamma,
        coupling="invariant",
        prefill="tiles",
        max_length=length,
        max_new_tokens=length - 1,
        ignore_eos=True,
        logprobs=20,
    )


def alone(engine: Engine, wish: Wish) -> tuple[str, list[float]]:
    """Its text from an engine that does nothing else, and by how much each token is the likeliest
    before the next one."""
    config = dataclasses.replace(
        engine.config, max_new_tokens=wish.new, temperature=wish.temperature, logprobs=2
    )
    reply = Reply(engine.model, wish.prompt, config)
    (slot,) = engine.add([wish.prompt], config, jax.random.key(wish.seed))
    while engine.running:
        engine.step()
        reply.look(engine, slot)
    engine.remove(slot)
    return reply.text, [score.top[0][1] - score.top[1][1] for score in reply.logprobs]


def of_generate(model: qs.Model, args: argparse.Namespace, wish: Wish) -> qs.Generation:
    config = dataclasses.replace(
        config_of(args, args.max_length),
        max_new_tokens=wish.new,
        temperature=wish.temperature,
        logprobs=None,
    )
    return qs.generate(model, [wish.prompt], config, jax.random.key(wish.seed))


def first_difference(a: str, b: str) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), -1)


def streams(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """All at once, in waves."""
    every = wishes(model, args)
    resident, seconds, found = [], [], []

    async def wave(server: Server) -> list[tuple[str, dict[str, Any]]]:
        async with server.client() as client:
            return await asyncio.gather(*(asked(client, wish) for wish in every))

    with Server(args, "--coupling", "invariant") as server:
        for _ in range(args.waves):
            started = time.perf_counter()
            found = asyncio.run(wave(server))
            seconds.append(time.perf_counter() - started)
            resident.append(server.resident_bytes())
            print(f"a wave: {seconds[-1]:.1f} s, {resident[-1]:,} bytes", file=sys.stderr)
    firsts = sorted(stats["seconds_to_first_token"] for _, stats in found)
    waits = sorted(stats["seconds_waited"] for _, stats in found)
    row = {
        "what": f"{len(every)} streams over {args.slots} slots",
        "answered": sum(bool(text) for text, _ in found),
        "new_tokens": sum(wish.new for wish in every),
        "prompt_tokens": sum(len(wish.prompt) for wish in every),
        "seconds_of_waves": seconds,
        "first_token_seconds_median": firsts[len(firsts) // 2],
        "first_token_seconds_longest": firsts[-1],
        "waited_seconds_median": waits[len(waits) // 2],
        "waited_seconds_longest": waits[-1],
        "resident_bytes_after_waves": resident,
        "resident_growth": resident[-1] / resident[0],
    }
    note(row)
    engine = Engine(model, config_of(args, args.max_length), 1, args.slots)
    same_engine, same_generate, other = 0, 0, []
    for i, (wish, (text, _)) in enumerate(zip(every, found, strict=True)):
        ours, margins = alone(engine, wish)
        same_engine += text == ours
        single = of_generate(model, args, wish).text[0]
        same_generate += text == single
        if text != single:
            place = first_difference(text, single)
            near = min(margins) if wish.temperature == 0 else None
            other.append({"character": place, "greedy": near is not None, "least_margin": near})
        row |= {
            "compared": i + 1,
            "same_as_an_engine_of_as_many_slots_alone": same_engine,
            "same_as_generate_alone": same_generate,
            "differ_from_generate": other,
        }
        note(row)
    return row


@contextlib.contextmanager
def served(model: qs.Model, args: argparse.Namespace) -> Iterator[tuple[Any, str]]:
    """A server in this process, whose scheduler can be looked at."""
    from quantspec_jax.server import listen
    from quantspec_jax.server.app import make_app
    from quantspec_jax.server.service import ServerConfig, Service

    config = ServerConfig(slots=args.slots, max_length=args.max_length, queue=256, name="m")
    service = Service(model, config_of(args, args.max_length), config)
    server = listen.Server(make_app(service), 1, service.end)
    bound = listen.bound("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        time.sleep(0.05)
    try:
        yield service, f"http://127.0.0.1:{bound.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(60)


def leaving(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Every fifth client hangs up after its second piece of text."""
    every = wishes(model, args)
    rounds, most_rounds, cancelled, freed = 0, 0, {}, {}
    closed, noticed = {}, {}

    async def one(client: openai.AsyncOpenAI, i: int) -> str | None:
        wish = dataclasses.replace(every[i], new=args.new_tokens) if i % 5 == 4 else every[i]
        if i % 5 != 4:
            return (await asked(client, wish))[0]
        stream = await client.completions.create(
            model="m", prompt=wish.prompt, max_tokens=wish.new, stream=True, extra_body=MORE
        )
        pieces = 0
        async for _ in stream:
            pieces += 1
            if pieces == 2:
                closed[tuple(wish.prompt)] = time.perf_counter()
                await stream.close()
                return None
        return None

    async def all_of_them(url: str) -> list[str | None]:
        http = httpx.AsyncClient(limits=httpx.Limits(max_connections=None), timeout=1200)
        async with openai.AsyncOpenAI(
            base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http
        ) as client:
            return await asyncio.gather(*(one(client, i) for i in range(len(every))))

    with served(model, args) as (service, url):
        scheduler = service.scheduler
        engine, cancel, ended = scheduler.engine, scheduler.cancel, scheduler.on_end
        advance = engine.advance

        def counted(most: int, speculate: bool = True) -> None:
            nonlocal rounds, most_rounds
            advance(most, speculate)
            rounds, most_rounds = rounds + most, max(most, most_rounds)

        def noted(*jobs: Any) -> None:
            for job in jobs:
                if job.slot is not None and job.reply.finish_reason is None:
                    cancelled.setdefault(id(job), rounds)
                    noticed[id(job)] = time.perf_counter()
            cancel(*jobs)

        def over(job: Any) -> None:
            if id(job) in cancelled:
                freed[id(job)] = (rounds - cancelled[id(job)], job)
                noticed[id(job)] = time.perf_counter() - closed[tuple(job.prompt)]
            ended(job)

        engine.advance, scheduler.cancel, scheduler.on_end = counted, noted, over
        found = asyncio.run(all_of_them(url))
        time.sleep(1)
        free = engine.free_slots
    return {
        "what": f"of {len(every)} clients every fifth leaves midway",
        "left": sum(text is None for text in found),
        "cancelled_in_their_slots": len(freed),
        "rounds_a_step": most_rounds,
        "rounds_until_free_most": max((n for n, _ in freed.values()), default=None),
        "seconds_until_free_most": max(noticed.values(), default=None),
        "answered": sum(bool(text) for text in found),
        "free_slots_at_the_end": free,
    }


def soak(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Requests of all kinds."""
    ids = script.tokens(model, args.text, 20_000)
    kinds: dict[str, int] = {}
    values: list[tuple[float, int, int]] = []
    started = 0.0
    numbers, at_once = itertools.count(), 2 * args.slots

    def so_far() -> dict[str, Any]:
        seconds = values[-1][0]
        warm = [(size, kept) for at, size, kept in values if at >= 0.1 * seconds]
        return {
            "what": "soak",
            "requests": sum(kinds.values()),
            "seconds": seconds,
            "kinds": dict(kinds),
            "resident_bytes_warm": warm[0][0],
            "resident_bytes_most": max(size for size, _ in warm),
            "resident_bytes_last": warm[-1][0],
            "resident_growth": max(size for size, _ in warm) / warm[0][0],
            "kept_prompt_bytes_warm": warm[0][1],
            "kept_prompt_bytes_last": warm[-1][1],
        }

    def count(kind: str) -> None:
        kinds[kind] = kinds.get(kind, 0) + 1

    async def one(client: openai.AsyncOpenAI, i: int) -> None:
        rng = random.Random(i)
        length = rng.choice((5, 20, 60, 100, 126, 150))
        start = rng.randrange(300) if i % 3 == 0 else rng.randrange(len(ids) - length)
        wants: dict[str, Any] = {
            "model": "m",
            "prompt": ids[start : start + length],
            "max_tokens": rng.randint(1, 12),
            "temperature": rng.choice((0, 0.8)),
            "seed": i,
        }
        if i % 7 == 0:
            wants["logprobs"] = 3
        if i % 20 == 1:
            wants["temperature"] = "hot"
        try:
            if i % 3 == 1:
                stream = await client.completions.create(**wants, stream=True)
                async for _ in stream:
                    if i % 9 == 1:
                        await stream.close()
                        count("left")
                        return
                count("streamed")
                return
            if i % 5 == 0:
                messages = [{"role": "user", "content": f"Say {i}."}]
                del wants["prompt"]
                wants.pop("logprobs", None)
                await client.chat.completions.create(**wants, messages=messages)
                count("chat")
                return
            await client.completions.create(**wants)
            count("whole")
        except openai.BadRequestError:
            count("refused")

    async def worker(client: openai.AsyncOpenAI) -> None:
        for i in numbers:
            due = (i - i % at_once) * args.soak_seconds / args.soak_requests
            await asyncio.sleep(max(0, started + due - time.perf_counter()))
            if i >= args.soak_requests:
                return
            await one(client, i)

    async def fill(client: openai.AsyncOpenAI, server: Server) -> None:
        """Prompts that differ, until one leaves no more bytes than were there before."""
        before, kept, number = -1.0, 0.0, 0
        length = min(args.max_length - 2, len(ids) // 2)
        while kept > before:
            start = number * length % (len(ids) - length)
            prompt = [*ids[number : number + 1], *ids[start : start + length - 1]]
            await client.completions.create(model="m", prompt=prompt, max_tokens=1)
            before, number = kept, number + 1
            kept = (await asyncio.to_thread(server.metrics))["quantspec_kept_bytes"]

    async def watch(server: Server, done: asyncio.Event) -> None:
        while not done.is_set():
            kept = (await asyncio.to_thread(server.metrics))["quantspec_kept_bytes"]
            at = time.perf_counter() - started
            values.append((at, server.resident_bytes(), int(kept)))
            if len(values) % 10 == 0:
                note(so_far())
                print(json.dumps(so_far()), file=sys.stderr, flush=True)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), args.soak_seconds / 200)

    async def all_of_them(server: Server) -> None:
        nonlocal started
        done = asyncio.Event()
        async with server.client() as client:
            await fill(client, server)
            started = time.perf_counter()
            watching = asyncio.create_task(watch(server, done))
            await asyncio.gather(*(worker(client) for _ in range(at_once)))
        done.set()
        await watching

    with Server(args) as server:
        asyncio.run(all_of_them(server))
        metrics = server.metrics()
    programs = {
        name: int(metrics[f"quantspec_{name}"])
        for name in ("programs_kept", "programs_made")
        if f"quantspec_{name}" in metrics
    }
    return {
        **so_far(),
        **programs,
        "new_tokens": int(metrics["quantspec_new_tokens_total"]),
        "first_token_seconds_mean": metrics["quantspec_time_to_first_token_seconds_sum"]
        / metrics["quantspec_time_to_first_token_seconds_count"],
    }


def malformed(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """Clients that are wrong, a good request after every tenth."""
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "fuzz"))
    from clients import Clients

    with Server(args) as server:
        wrong, started = Clients(server.url), time.perf_counter()
        wrong.run(args.cases)
        seconds = time.perf_counter() - started
        files = len(os.listdir(f"/proc/{server.process.pid}/fd"))
    return {
        "what": "malformed requests",
        "cases": args.cases,
        "failures": wrong.failures,
        "seconds": seconds,
        "answers": dict(sorted(wrong.seen.items())),
        "good_request_seconds_longest": wrong.longest,
        "open_files_of_the_server_after": files,
    }


def signals(model: qs.Model, args: argparse.Namespace, note: Note) -> dict[str, Any]:
    """SIGTERM: seconds until the process is gone, its exit status, what a client sees."""
    grace = 3

    def ended(server: Server) -> tuple[float, int]:
        started = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        status = server.process.wait(60)
        return time.perf_counter() - started, status

    with Server(args, "--grace", str(grace)) as server:
        idle = ended(server)
    lines: list[str] = []
    with Server(args, "--grace", str(grace)) as server:
        body = {"prompt": [5] * 20, "max_tokens": args.max_length - 30, "stream": True, **MORE}

        def read() -> None:
            with (
                contextlib.suppress(httpx.HTTPError),
                httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as got,
            ):
                lines.extend(line for line in got.iter_lines() if line)

        reading = threading.Thread(target=read)
        reading.start()
        while not server.metrics()["quantspec_slots_in_use"]:
            time.sleep(0.05)
        busy = ended(server)
        reading.join(60)
    return {
        "what": "SIGTERM",
        "grace_seconds": grace,
        "idle_seconds": idle[0],
        "idle_status": idle[1],
        "busy_seconds": busy[0],
        "busy_status": busy[1],
        "chunks_that_came": len(lines),
        "last_chunk": json.loads(lines[-1][6:]) if lines and "{" in lines[-1] else lines[-1:],
    }


STEPS = {
    "streams": streams,
    "leaving": leaving,
    "soak": soak,
    "malformed": malformed,
    "signals": signals,
}


def make_parser() -> argparse.ArgumentParser:
    parser = script.new_parser(__doc__)
    script.add_model(parser)
    script.add_text(parser)
    parser.add_argument("--what", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--cache-bytes", type=int, default=64 << 20)
    parser.add_argument("--gamma", default="4")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--waves", type=int, default=3, help="times that all streams are asked for")
    parser.add_argument("--longest", type=int, default=600, help="tokens of a prompt")
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--cases", type=int, default=2000, help="malformed requests")
    parser.add_argument("--soak-requests", type=int, default=3000)
    parser.add_argument("--soak-seconds", type=float, default=3600)
    return parser


def main() -> None:
    """Run and record, what is done so far after each step."""
    args = make_parser().parse_args()
    model = qs.load(args.model)
    about = {"model": record.model_name(args.model), "dtype": model.dtype.name}
    rows: list[dict[str, Any]] = []

    def note(row: dict[str, Any]) -> None:
        cores = len(os.sched_getaffinity(0))
        script.write(__file__, args, [*rows, row], **about, cores=cores)

    for name in args.what:
        row = script.show(STEPS[name](model, args, note))
        note(row)
        rows.append(row)


if __name__ == "__main__":
    main()
