"""Compiled programs: made once a form of arguments, kept while they are used, bounded in number."""

from __future__ import annotations

import collections
import dataclasses
import os
import threading
import time
import weakref
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from pallas_kernels import dispatch
from quantspec_jax.cache import create
from quantspec_jax.engine.draft_cost import with_gamma
from quantspec_jax.generate.loop import generate_tokens
from quantspec_jax.generate.state import Program
from quantspec_jax.loading import Model
from quantspec_jax.memory import code_bytes, free_bytes, require_memory, temporary_bytes, tree_bytes
from quantspec_jax.peers import addresses
from quantspec_jax.weights.sizes import draft_bytes

MOST_PROGRAMS = 32  # on a CPU, one takes up to 75 MB and some 500 memory maps
MOST_CODE_BYTES = 2 << 30  # of all of them, where the backend says how many
# Its loops are the host's to repeat. Tried on an H200: loops in CUDA graphs (XLA's command buffers,
# with WHILE and CONDITIONAL). With JAX 0.12 a further step of a call takes 20 to 30 µs less, but a
# profile misses most of the rounds, and of 128 draft steps of Qwen2.5-1.5B in a call each took
# 0.728 ms (without, on another card, 0.730). With JAX 0.11 a round of it takes 23% longer.
DECODE = jax.jit(generate_tokens, static_argnames="program", donate_argnames="state")


class Programs:
    """The programs that were used last, by function, static arguments and forms of the others: at
    most so many, and so many bytes of code."""

    def __init__(self, most: int = MOST_PROGRAMS, most_bytes: int = MOST_CODE_BYTES):
        self.most, self.most_bytes = most, most_bytes
        self.made = self.bytes = 0
        self._by_form: dict[Any, Any] = {}
        # The same with their forms, the one that was used last at the end.
        self._kept: collections.OrderedDict[Any, Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def statistics(self) -> dict[str, int]:
        """Of this process: programs that are kept, how many may be, how many were ever made, and
        bytes of the code of those that are kept."""
        return {"kept": len(self), "most": self.most, "made": self.made, "bytes": self.bytes}

    def compiled(self, function: Any, *args: Any, **static: Any) -> tuple[Any, float]:
        """The executable for arguments of these forms (arrays or their shapes), and the seconds it
        took to make: 0 where it existed."""
        leaves, tree = jax.tree.flatten(args)
        forms = tuple(map(_form, leaves))
        key = (id(function), tree, forms, tuple(sorted(static.items())))
        with self._lock:
            if key in self._by_form:
                self._kept.move_to_end(self._by_form[key])
                return self._by_form[key], 0.0
        started = time.perf_counter()
        executable = function.lower(*args, **static).compile()
        function.clear_cache()  # JAX would keep it for as long as the function is there
        with self._lock:
            self.made += 1
            if self.made % self.most == 0:
                dispatch.forget_traces()
            executable = self._keep(key, executable)
        return executable, time.perf_counter() - started

    def _keep(self, key: Any, executable: Any) -> Any:
        """The executable, or another thread's of the same form, as the one that was used last."""
        executable = self._by_form.setdefault(key, executable)
        if executable not in self._kept:
            self.bytes += code_bytes(executable)
        self._kept[executable] = key
        self._kept.move_to_end(executable)
        while len(self) > self.most or (self.bytes > self.most_bytes and len(self) > 1):
            forgotten, form = self._kept.popitem(last=False)
            self.bytes -= code_bytes(forgotten)
            del self._by_form[form]
        return executable

    def used(self, executable: Any) -> None:
        """Keep it for longer than those that were used before, if it is kept."""
        with self._lock:
            if executable in self._kept:
                self._kept.move_to_end(executable)


def _form(x: Any) -> tuple[Any, ...]:
    """An argument's shape, type, and how it is split over devices; None: it is not. (JAX's
    `result_type` takes as long as all the rest.)"""
    if not hasattr(x, "dtype"):
        return jnp.shape(x), jnp.result_type(x), None
    where = getattr(x, "sharding", None)
    return x.shape, x.dtype, where if isinstance(where, NamedSharding) else None


PROGRAMS = Programs()


class Runner:
    """Runs functions as compiled programs, each known to fit into the device's memory beside what
    lies there. Counts the seconds that compilation takes."""

    def __init__(self, model: Model, program: Program, batch: int):
        self.compile_seconds = 0.0
        self._what = f"a context of {program.cache.max_length} tokens, {batch} at a time,"
        self._parts = {"weights": tree_bytes(model.params)}
        self._made = {"weights"}
        if program.gamma:
            self._parts["draft"] = draft_bytes(model.config, model.draft) // program.axes.tp
            if model.has_draft_arrays:
                self._made.add("draft")
        if free_bytes() is not None:
            cache = jax.eval_shape(lambda: create(model.config, program.cache, batch))
            self._parts["cache"] = tree_bytes(cache) // program.axes.size
        # Executables whose memory is known to be there. They are `PROGRAMS`' to keep, or to forget.
        self._checked: weakref.WeakSet[Any] = weakref.WeakSet()
        self._known: weakref.WeakValueDictionary[Any, Any] = weakref.WeakValueDictionary()
        # Of a number in the same place of memory as before, a GPU's graphs need no update.
        self._limits: dict[tuple[int, ...], jax.Array] = {}
        self._check()

    def made(self, part: str) -> None:
        """A part that lies on the device from now on."""
        self._made.add(part)

    def _check(self) -> None:
        """ValueError unless the parts that are still to be made fit."""
        present = sum(self._parts.get(name, 0) for name in self._made)
        require_memory(self._what, self._parts, present)

    def ready(
        self, function: Callable[..., Any], *args: Any, results: int = 0, **static: Any
    ) -> Any:
        """The executable; `results` bytes of results stay on the device."""
        executable, seconds = PROGRAMS.compiled(function, *args, **static)
        self.compile_seconds += seconds
        if executable not in self._checked:  # to ask takes milliseconds
            self._checked.add(executable)
            self._parts["temporaries"] = temporary_bytes(executable) + results
            self._check()
        return executable

    def known(self, what: Hashable, function: Callable[..., Any], *args: Any, **static: Any) -> Any:
        """`ready`, of arguments that have one form wherever `what` is the same: to look at them
        again takes milliseconds where they are many."""
        executable = self._known.get(what)
        if executable is None:
            executable = self._known[what] = self.ready(function, *args, **static)
        PROGRAMS.used(executable)
        return executable

    def prepare(self, model: Model, state: Any, limit: tuple[int, ...], program: Program) -> None:
        """Make the executable of `decode`, for a state and a limit of these forms; in any
        thread."""
        PROGRAMS.compiled(DECODE, *self._call(model, state, limit, program), program=program)

    def decode(
        self, model: Model, state: Any, limit: tuple[int, ...], program: Program
    ) -> tuple[Any, float]:
        """`generate_tokens`, and the seconds it ran; `state` is donated.

        Args:
          limit: its rounds, and a `Look` where the program looks.
        """
        self.made("draft")
        args = self._call(model, state, limit, program)
        executable = self.known((program, len(limit)), DECODE, *args, program=program)
        started = time.perf_counter()
        state = jax.block_until_ready(executable(*args))
        return state, time.perf_counter() - started

    def _call(
        self, model: Model, state: Any, limit: tuple[int, ...], program: Program
    ) -> tuple[Any, ...]:
        """Arguments of `generate_tokens`."""
        if limit not in self._limits:
            number = limit if len(limit) > 1 else limit[0]
            self._limits[limit] = jnp.asarray(number, jnp.int32)
        params = model.params_for(program.cache)
        drafts = model.draft_params if program.gamma else {}
        return params, drafts, state, self._limits[limit], *addresses(program.mesh)


class Ahead:
    """Decode programs that are made before they are needed, in threads of their own.

    Args:
      make_one: makes one.
      base: whose γ and copies are there, whatever is asked for.
    """

    def __init__(self, make_one: Callable[[Program], None], base: Program):
        self._base, self._make_one = base, make_one
        self._futures: dict[Program, Future[None]] = {}
        self._worker = ThreadPoolExecutor(1, "compiler")

    def make(self, programs: Sequence[Program]) -> None:
        """These, some side by side: each takes a core, and a gigabyte. Waits for them."""
        number = max(1, min(len(programs), (os.cpu_count() or 1) // 2))
        with ThreadPoolExecutor(number, "compiler") as workers:
            self._futures |= {each: workers.submit(self._make_one, each) for each in programs}
        for program in programs:
            self._futures[program].result()

    def ready(self, program: Program) -> Program:
        """The program; while it is not there, the same with γ and copies that are."""
        if program not in self._futures:
            self._futures[program] = self._worker.submit(self._make_one, program)
        future = self._futures[program]
        if future.done():
            return program
        lookup = self._base.lookup
        return dataclasses.replace(with_gamma(program, self._base.gamma), lookup=lookup)

    def close(self) -> None:
        """No more are made."""
        self._worker.shutdown(wait=False, cancel_futures=True)
