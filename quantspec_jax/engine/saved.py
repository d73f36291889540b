"""Saved caches: the tiles of one prompt, in one safetensors file.

    tokens            [n] int32, the prompt's and the text's after it
    tile.0.<name>     the arrays of `cache.tiles`, both views, or those of `at_rest`; tile 1, ...
    metadata          `quantspec`: an object of what the tiles depend on and a CRC-32 of each array,
                      and its own after it, in a line. (Of two keys the order would be random.)

The file is written whole or not at all. Arrays go to it from where they lie, and come from it one
after the other.
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from pallas_kernels.layout import CACHE_VERSION
from quantspec_jax.cache import create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.cache.tiles import get_tile
from quantspec_jax.checks import require, within
from quantspec_jax.engine import at_rest, fingerprint
from quantspec_jax.engine.prefixes import HostTile
from quantspec_jax.files import exists, open_file, whole
from quantspec_jax.loading import Model

Forms = Callable[[int], dict[str, jax.ShapeDtypeStruct]]  # of a tile by its number


@dataclasses.dataclass(frozen=True)
class Saved:
    """What a file holds: tokens, the tiles of their beginning, as they lie in a file of its format,
    and what else its writer put in."""

    tokens: list[int]
    tiles: Sequence[HostTile]
    extra: dict[str, Any]
    format: str


def identity(model: Model, cache: CacheConfig, format: str) -> dict[str, Any]:
    """What tiles depend on, and what has to be the same where they are read again."""
    codec = next(name for name, codec in _codecs().items() if codec == cache.codec)
    found = {
        "version": CACHE_VERSION,
        "model": fingerprint.of_model(model),
        "tokenizer": fingerprint.of_tokenizer(model.tokenizer),
        "dtype": cache.dtype.name,
        "codec": codec,
        "view": cache.view,
        "group_size": cache.group_size,
    }
    if format == "planes":
        return found
    assert model.kv is not None
    learned = {"bits": model.kv.stored.bits, "kv": fingerprint.of_kv(model.kv)}
    return found | {"version": at_rest.VERSION, "format": format} | learned


def _codecs() -> Mapping[str, Any]:
    from quantspec_jax.cache.codecs import CODECS

    return CODECS


def save(
    path: str | Path,
    model: Model,
    cache: CacheConfig,
    tokens: Sequence[int],
    tiles: Sequence[HostTile],
    extra: Mapping[str, Any],
    format: str = "planes",
) -> None:
    """Write a file; what lay there before stays until it is whole. `tiles` are as they lie there:
    of format aqua, coded."""
    path = Path(path)
    require(path.parent.is_dir(), "path", str(path), "a file in an existing directory")
    arrays = {"tokens": np.asarray(tokens, np.int32)}
    for i, tile in enumerate(tiles):
        arrays |= {f"tile.{i}.{name}": _plain(x) for name, x in tile.items()}
    sums = {name: zlib.crc32(x.data.cast("B")) for name, x in arrays.items()}
    about = identity(model, cache, format) | {"tokens": len(tokens), "tiles": len(tiles)}
    about |= {"extra": extra, "crc32": sums}
    text = json.dumps(about)
    with whole(path) as partial:
        save_file(arrays, partial, {"quantspec": f"{text}\n{zlib.crc32(text.encode())}"})


def _plain(x: np.ndarray) -> np.ndarray:
    """In a type that NumPy has itself, the bits as they are."""
    return np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def load(path: str | Path, model: Model, cache: CacheConfig) -> Saved:
    """Read a file.

    Raises:
      ValueError: it is damaged, or of another model, tokenizer, type, codec, group size, version or
        calibration; says which.
    """
    require(exists(Path(path)), "path", str(path), "a file that `save` wrote")
    open_file(path).close()  # a regular one
    try:
        with within(path), safe_open(path, framework="np") as file:
            about = _about(path, file.metadata() or {})
            format = about.get("format", "planes")
            at_rest.check_format(format, model)
            _check_same(path, about, identity(model, cache, format))
            count = jax.ShapeDtypeStruct((about["tokens"],), np.dtype(np.int32))
            tokens = _array(path, file, about, "tokens", count).tolist()
            forms = _forms(model, cache, format)
            tiles = [
                {
                    name: _array(path, file, about, f"tile.{i}.{name}", form)
                    for name, form in forms(i).items()
                }
                for i in range(about["tiles"])
            ]
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no saved cache: {error}") from error
    inside = all(0 <= token < model.config.vocab_size for token in tokens)
    if not inside or len(tiles) * cache.group_size > len(tokens):
        raise ValueError(f"{path} is damaged: its tokens are not those of its tiles")
    return Saved(tokens, tiles, about["extra"], format)


def _about(path: str | Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if "quantspec" not in metadata:
        raise ValueError(f"{path} is no saved cache: its header says nothing of one")
    text, _, own = metadata["quantspec"].rpartition("\n")
    if not text:  # of the first version, which is told below
        text, own = own, metadata.get("crc32", "")
    if own != str(zlib.crc32(text.encode())):
        raise ValueError(f"{path} is damaged: its header is not what was written")
    return json.loads(text)


def _check_same(path: str | Path, there: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    for name, wanted in here.items():
        found = there.get(name)
        words = {
            "model": "another model's (or other weights')",
            "tokenizer": "another tokenizer's",
            "kv": "of another calibration of AQUA-KV",
        }.get(name, f"of {name} {found!r}, not {wanted!r}")
        if found != wanted:
            raise ValueError(f"{path} is a cache {words}; allowed: what was saved with the same")


def _forms(model: Model, cache: CacheConfig, format: str) -> Forms:
    """Shapes and types of a tile's arrays."""
    if format == "aqua":
        return partial(at_rest.forms, model, cache)

    def tile() -> Any:
        empty = create(model.config, cache.arrays, 1)
        return get_tile(empty.layers, jnp.int32(0), jnp.int32(0), cache.group_size)

    same = jax.eval_shape(tile)
    return lambda _: same


def _array(
    path: str | Path,
    file: Any,
    about: Mapping[str, Any],
    name: str,
    form: jax.ShapeDtypeStruct,
) -> np.ndarray:
    x = file.get_tensor(name)
    if zlib.crc32(np.ascontiguousarray(x).data.cast("B")) != about["crc32"].get(name):
        raise ValueError(f"{path} is damaged: {name} is not what was written")
    if x.shape != form.shape or x.dtype.itemsize != form.dtype.itemsize:
        raise ValueError(f"{path} is damaged: {name} has shape {x.shape}, not {form.shape}")
    return x.view(form.dtype)
