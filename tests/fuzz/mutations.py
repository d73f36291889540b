"""Damage: to bytes, to values of JSON, to the parts of a GGUF file, to what has a file's name."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from seeds import ARRAY, BOOL, F32, F64, STRING, U32, Gguf

_DIGITS = "@5000 digits@"
_DEEP = "@deep@"
_TEMPLATES = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 10 }}",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
    "{{ '%1000000000d' % 1 }}",
    "{{ ''.__class__.__mro__ }}",
    "{% for %}",
    "{{ messages[0].content.x.y }}",
]
_EXPRESSIONS = [
    "(?:a|aa|aaa){1,11}c",
    "(a+)+$",
    "(?=(a*a*a*)*b)",
    "b+",
    "(",
    "a{1000}{1000}",
    "$",
    "",
]
_VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 3, 5, 7, 31, 64, 2**31 - 1, 2**31, 2**32, 2**63, 2**64),
    *(10**400, -(10**400), 0.5, -1.0, 1e-50, 5e-324, 1e30, 1e38, 1e308, math.nan, math.inf),
    *(-math.inf, "", "4096", "x", "llama", "yarn", "gptq", "\0", "\ud800", "\x1b[31m", "é" * 300),
    *("x" * 300, "x" * 70_000, "../../etc/passwd", "/dev/zero", "model.safetensors", [], [1], [[]]),
    *([None], ["x"], [1, 2, 3], [[1, 2]] * 3, list(range(5000)), {}, {"a": 1}, {"rope_type": 3}),
    *([1.5, True], {"": {}}, _DIGITS, _DEEP, *_TEMPLATES),
]


def change_json(text: bytes, rng: random.Random) -> bytes:
    """One to three values, keys or places of a JSON text."""
    values = json.loads(text)
    if isinstance(values, dict) and "pre_tokenizer" in values and rng.random() < 0.04:
        values |= _expression(rng)
    else:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            values = _changed(values, rng)
    changed = json.dumps(values)
    changed = changed.replace(f'"{_DIGITS}"', "1" + "0" * 5000)
    changed = changed.replace(f'"{_DEEP}"', "[" * 100_000 + "]" * 100_000)
    if rng.random() < 0.05:  # a key twice
        key = next(iter(values), "x") if isinstance(values, dict) else "x"
        changed = changed.replace("{", "{" + json.dumps(str(key)) + ": 0, ", 1)
    return changed.encode("utf-8", "surrogatepass")


def _expression(rng: random.Random) -> dict[str, Any]:
    """A part of a tokenizer, with a regular expression, and a token that the part is applied to."""
    pattern = {"Regex": rng.choice(_EXPRESSIONS)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    replace = {"type": "Replace", "pattern": pattern, "content": rng.choice(("x", "aa"))}
    part = rng.choice(("pre_tokenizer", "normalizer", "decoder"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "special"), False)
    token = {"id": 3, "content": "a" * 2000, "normalized": True, **flags}
    parts = {part: split if part == "pre_tokenizer" else replace}
    return parts | ({"added_tokens": [token]} if rng.random() < 0.3 else {})


def _changed(values: Any, rng: random.Random) -> Any:
    places = list(_places(values))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(_VALUES))
    # Half of the time one at the top, where a large vocabulary does not hide the others.
    top = [place for place in places if place[0] is values]
    holder, key = rng.choice(top if rng.random() < 0.5 and top else places)
    what = rng.random()
    if what < 0.7:
        holder[key] = copy.deepcopy(rng.choice(_VALUES))
    elif what < 0.8:
        del holder[key]
    elif what < 0.9 and isinstance(holder[key], int | float):
        x = holder[key]
        holder[key] = rng.choice((x * 2, x + 1, -x, x / 3 if abs(x) < 1e300 else x // 3))
    else:
        other, name = rng.choice(places)
        value = copy.deepcopy(other[name])
        holder[key] = rng.choice((value, [value], {"x": value}))
    return values


def _places(values: Any) -> Any:
    """(holder, key) of every value within."""
    if isinstance(values, dict | list):
        for key in values if isinstance(values, dict) else range(len(values)):
            yield values, key
            yield from _places(values[key])


def change_safetensors(content: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file, whose length is right again."""
    (length,) = struct.unpack("<Q", content[:8])
    header = change_json(content[8 : 8 + length], rng)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def change_gguf(parts: Gguf, rng: random.Random) -> bytes:
    """Metadata of another type or value, or a tensor's name, shape or type."""
    parts = copy.deepcopy(parts)
    for _ in range(rng.choice((1, 1, 2))):
        if rng.random() < 0.75 or not parts.tensors:
            i = rng.randrange(len(parts.metadata))
            what, (key, kind, value) = rng.random(), parts.metadata[i]
            if what < 0.08:
                del parts.metadata[i]
            elif what < 0.12:
                parts.metadata.insert(rng.randrange(i + 1), parts.metadata[i])
            elif what < 0.2:
                parts.metadata[i] = (key + rng.choice(("", "x", ".type")), kind, value)
            elif what < 0.45 and kind == ARRAY:
                parts.metadata[i] = (key, kind, _changed_array(value, rng))
            else:
                parts.metadata[i] = (key, *_gguf_value(rng))
        else:
            i = rng.randrange(len(parts.tensors))
            parts.tensors[i] = _changed_tensor(parts.tensors[i], rng)
    return parts.to_bytes()


def _gguf_value(rng: random.Random) -> tuple[int, Any]:
    choices: list[Callable[[], tuple[int, Any]]] = [
        lambda: (U32, rng.choice((0, 1, 2, 3, 31, 64, 256, 2**31, 2**32 - 1))),
        lambda: (5, rng.choice((-1, 0, -(2**31)))),
        lambda: (10, rng.choice((2**63, 2**64 - 1, 2**31, 5))),
        lambda: (F32, rng.choice((0.0, -1.0, 0.5, 1e30, 1e-45, math.nan, math.inf, -math.inf))),
        lambda: (F64, rng.choice((1e308, 5e-324, math.nan, 2.0))),
        lambda: (BOOL, rng.random() < 0.5),
        lambda: (STRING, rng.choice([v for v in _VALUES if isinstance(v, str)])),
        lambda: (ARRAY, (U32, [rng.choice((0, 1, 2, 2**32 - 1))] * rng.choice((0, 1, 2, 48)))),
        lambda: (ARRAY, (F32, [rng.choice((math.nan, 0.0, 1.0))] * rng.choice((0, 1, 2, 48)))),
        lambda: (ARRAY, (STRING, ["a", "b", "a b", ""][: rng.randrange(5)])),
        lambda: (ARRAY, (BOOL, [True, False])),
    ]
    return rng.choice(choices)()


def _changed_array(value: tuple[int, list[Any]], rng: random.Random) -> tuple[int, list[Any]]:
    kind, elements = value[0], list(value[1])
    if not elements:
        return kind, elements
    i, what = rng.randrange(len(elements)), rng.random()
    if what < 0.2:
        del elements[i]
    elif what < 0.4:
        elements.insert(i, elements[rng.randrange(len(elements))])
    elif kind == STRING:
        texts = ("", " ", "a b", "a  b", "ab c d", "zz zz", "é", "\0", "x" * 5000, elements[0])
        elements[i] = rng.choice(texts)
    elif kind == F32:
        elements[i] = rng.choice((math.nan, math.inf, 0.0, 1e38))
    else:
        elements[i] = rng.choice((0, 1, 2, 3, 4, 6, 99))
    return kind, elements


def _changed_tensor(tensor: tuple[str, tuple[int, ...], int, bytes], rng: random.Random) -> Any:
    name, shape, kind, content = tensor
    what = rng.random()
    if what < 0.2:
        name = rng.choice(
            (name + "x", "token_embd.weight", "rope_freqs.weight", "", "\0", "é" * 99)
        )
    elif what < 0.5:
        sizes = (0, 1, 8, 2**31, 2**63, 2**64 - 1, *shape[:1])
        shape = rng.choice((shape[::-1], (*shape, 1), (rng.choice(sizes), *shape[1:]), ()))
    elif what < 0.8:
        kind = rng.choice((0, 1, 2, 3, 6, 7, 8, 12, 13, 14, 16, 30, 99, 2**32 - 1))
    else:
        content = change_bytes(content, rng)
    return name, shape, kind, content


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Bits, spans, the length."""
    data = bytearray(content)
    at = (
        rng.randrange(len(data) + 1)
        if rng.random() < 0.6
        else rng.randrange(min(len(data), 400) + 1)
    )
    length = rng.choice((1, 2, 4, 8, 33, 500))
    what = rng.randrange(9)
    if what == 0:
        for _ in range(rng.choice((1, 1, 4))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif what == 1:
        data[at : at + length] = rng.randbytes(length)
    elif what == 2:
        data[at : at + length] = rng.choice((b"\0", b"\xff", b"9", b"[")) * length
    elif what == 3:
        del data[at:]
    elif what == 4:
        data += rng.choice((b"\0", b"x")) * length
    elif what == 5:
        data[at:at] = rng.randbytes(length)
    elif what == 6:
        del data[at : at + length]
    elif what == 7:
        data[at:at] = data[at : at + length]
    else:
        data[at : at + 8] = struct.pack("<Q", rng.choice((0, 1, 2**31, 2**63, 2**64 - 1, 1 << 40)))
    return bytes(data)


def change_entry(path: Path, rng: random.Random) -> str:
    """What has the file's name is another thing, or nothing. Returns what."""
    path.unlink()
    what = rng.choice(("nothing", "empty", "pipe", "directory", "/dev/zero", "loop", "dangling"))
    if what == "empty":
        path.touch()
    elif what == "pipe":
        os.mkfifo(path)
    elif what == "directory":
        path.mkdir()
    elif what != "nothing":
        path.symlink_to({"loop": path.name, "dangling": "not-there"}.get(what, what))
    return what
