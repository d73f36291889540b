"""Tokenizers: a transformers tokenizer from a directory's files or from a GGUF file's metadata.

transformers reads a GGUF tokenizer only where torch is installed, so it is built here from the
same metadata; the ids are those of the model's own tokenizer.json.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from quantspec_jax.checks import is_int, require
from quantspec_jax.files import check_regular
from quantspec_jax.settings import Settings
from quantspec_jax.text import expressions
from quantspec_jax.text.limited import load_tokenizer, try_out

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_SUFFIXES = (".json", ".jinja", ".txt", ".model")
_MOST_BYTES = 256 << 20  # of a file of a tokenizer; the largest have 35 million
_MOST_IDS = 1 << 22  # the largest vocabularies have a million

# tokenizer.ggml.token_type
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4

# What models end their answers with, whatever a file names as its one EOS. <|endoftext|>,
# <|repo_name|> and <|file_sep|> end what Qwen-Coder fills in.
_END_TEXTS = frozenset({
    "</s>", "<eos>", "[EOS]", "<EOT>", "_<EOT>", "[EOT]", "<|endoftext|>", "<|end_of_text|>",
    "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
    "<end_of_utterance>", "<|end_of_turn|>", "<｜end▁of▁sentence｜>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class BytePairs:
    """What a byte-level tokenizer does before its merges.

    splits       expressions; each one cuts what the one before left into matches and the rest
    compose      Unicode's NFC comes first
    whole_words  a piece that is in the vocabulary is one token, whatever the merges would make
    bos          a BOS token goes before the text where the file does not say
    """

    splits: tuple[str, ...]
    compose: bool = False
    whole_words: bool = False
    bos: bool = False


_LLAMA3 = BytePairs((expressions.LLAMA3,), whole_words=True, bos=True)
_QWEN2 = BytePairs((expressions.QWEN2,), compose=True)
_DEFAULT = BytePairs((
    *(expressions.PUNCTUATION, expressions.GPT2_OPEN),
    *(expressions.DIGITS, expressions.THREE_DIGITS),
))  # fmt: skip

# By tokenizer.ggml.pre.
BYTE_PAIRS: dict[str, BytePairs] = {
    "default": _DEFAULT,
    "gpt-2": BytePairs((expressions.GPT2,)),
    "smollm": BytePairs((expressions.DIGIT, expressions.GPT2)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": BytePairs((expressions.LLAMA3,), whole_words=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": BytePairs((expressions.TEKKEN,), whole_words=True, bos=True),
}


def pretrained_tokenizer(directory: Path, config: Mapping[str, Any]) -> Any | None:
    """The tokenizer in a directory of Hugging Face files, in the class that transformers chooses
    for the model whose config.json holds `config`; None where there is none."""
    named = config.get("tokenizer_class")
    named = named if isinstance(named, str) else None
    return _from_files(directory, family=str(config.get("model_type")), named=named)


def saved_tokenizer(directory: Path) -> Any | None:
    """The tokenizer that `save_pretrained` wrote into a directory, exactly as it was: a class
    chosen by the model's type would put its own rules in place of tokenizer.json's."""
    return _from_files(directory, family=None, named=None)


def _from_files(directory: Path, **chosen: str | None) -> Any | None:
    if not any((directory / name).exists() for name in _FILES):
        return None
    inside = [directory, *(path for path in directory.glob("*chat_templates") if path.is_dir())]
    texts = [p for d in inside for p in d.iterdir() if p.suffix.lower() in _SUFFIXES]
    check_regular(texts, _MOST_BYTES)
    _check_ids(texts)
    with _streams_held(str(directory)):
        try:
            if expressions.foreign_in_files(texts):
                expressions.try_to_load({"directory": str(directory), **chosen}, texts)
            tokenizer = load_tokenizer(str(directory), **chosen)
            expressions.mark(tokenizer, str(directory))
        except BaseException as error:  # of many kinds, for damaged files
            if not (isinstance(error, Exception) or is_panic(error)):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            if "custom code" in reason:
                reason = "its auto_map names Python code of its own, which is not run"
            raise ValueError(f"the tokenizer in {directory} cannot be read: {reason}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # nor by those who open what is saved of it
    return tokenizer


def _check_ids(paths: Iterable[Path]) -> None:
    """Before tokenizers reads them: it lists every id that is missing below the largest when it
    copies or writes a tokenizer, so one token with id 2³¹ takes 8 GiB, or aborts the process."""
    for path in paths:
        for key, value in _ids(path):
            allowed = f"an id below {_MOST_IDS:,}"
            require(not is_int(value) or value < _MOST_IDS, f"{key} in {path}", value, allowed)


def _ids(path: Path) -> Iterator[tuple[str, Any]]:
    """(key, id) of each token in a file of them."""
    if path.name not in ("tokenizer.json", "vocab.json", "added_tokens.json"):
        return
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError):  # what is no JSON for Python is none for tokenizers
        return
    whole = path.name == "tokenizer.json"
    vocabulary = _entry(_entry(values, "model"), "vocab") if whole else values
    for token, index in vocabulary.items() if isinstance(vocabulary, dict) else ():
        yield f"the id of {token[:40]!r}", index
    added = _entry(values, "added_tokens") if whole else None
    for entry in added if isinstance(added, list) else ():
        yield "added_tokens' id", _entry(entry, "id")


def _entry(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, dict) else None


def is_panic(error: BaseException) -> bool:
    """Whether it is Rust's, of the tokenizers package: pyo3's PanicException, no Exception."""
    return type(error).__name__ == "PanicException"


_STREAMS = threading.Lock()  # are the process's


@contextlib.contextmanager
def _streams_held(where: str) -> Iterator[None]:
    """Rust reports a panic on the process's standard error before it becomes an exception, and
    notes on its standard output, which is for results. So both are held meanwhile: an exception
    says the same, and without one what was held becomes a warning."""
    with _STREAMS, tempfile.TemporaryFile() as held:
        own = _replace_streams([held.fileno(), held.fileno()])
        try:
            yield
        except BaseException:
            held.truncate(0)
            raise
        finally:
            for replaced in _replace_streams(own) + own:
                os.close(replaced)
            held.seek(0)
            said = held.read().decode(errors="replace").strip()
            if said:
                warnings.warn(f"the tokenizer in {where}: {said[:300]}", stacklevel=2)


def _replace_streams(descriptors: list[int]) -> list[int]:
    """Standard output and error become these; returns copies of what they were."""
    sys.stdout.flush()
    sys.stderr.flush()
    before = [os.dup(1), os.dup(2)]
    os.dup2(descriptors[0], 1)
    os.dup2(descriptors[1], 2)
    return before


def gguf_tokenizer(metadata: Mapping[str, Any], where: str = "") -> Any | None:
    """The tokenizer that a GGUF file's metadata describes; None where it describes none.

    Raises ValueError, naming the key and the file, `where`, for a kind that is not known.
    """
    keys = Settings(metadata, where, _PREFIX)
    if keys.get("model", None) is None:
        return None
    from transformers import PreTrainedTokenizerFast

    kind = keys.choice("model", _BUILDERS)
    tokens = _tokens(keys)
    types = _token_types(keys, tokens)
    named = _named_tokens(keys, tokens)
    begins, ends = (named[f"{name}_token"] is not None for name in ("bos", "eos"))
    template = Settings(metadata, where, "tokenizer.").text("chat_template", None)
    with _streams_held(where):
        try:
            backend, bos = _BUILDERS[kind](keys, tokens, types)
            _add_special_tokens(backend, tokens, types)
            tokenizer = PreTrainedTokenizerFast(
                tokenizer_object=backend,
                add_bos_token=keys.flag("add_bos_token", bos) and begins,
                add_eos_token=keys.flag("add_eos_token", False) and ends,
                chat_template=template,
                clean_up_tokenization_spaces=False,
                **named,
            )
            try_out(tokenizer)
        except BaseException as error:
            ours = where in str(error)  # it says which key, too
            if ours or not (isinstance(error, Exception) or is_panic(error)):
                raise
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"the tokenizer in {where} cannot be read: {reason}") from error
    return tokenizer


_PREFIX = "tokenizer.ggml."
_LONGEST_TOKEN = 4096  # characters; real ones have a hundred


def gguf_eos_ids(metadata: Mapping[str, Any], vocab_size: int, where: str = "") -> tuple[int, ...]:
    """What ends an answer: the ends of sequence, turn and message that the file names, then the
    control tokens whose text says that they are one.

    Files name one EOS, while a model may end its turns with another token (Llama 3 Instruct, with
    <|eot_id|>) and what it fills in with a third (Qwen2.5-Coder, with <|endoftext|>).
    """
    keys = Settings(metadata, where, _PREFIX)
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [_token_id(keys, name, vocab_size) for name in names]
    tokens, types = keys.texts("tokens", []), keys.integers("token_type", [])
    pairs = enumerate(zip(tokens[:vocab_size], types, strict=False))
    ids += [i for i, (text, kind) in pairs if kind == CONTROL and text in _END_TEXTS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _token_id(keys: Settings, name: str, count: int) -> int | None:
    """An id that is no token (−1, as an unsigned number too) is none."""
    index = keys.get(name, None)
    keys.require(name, index is None or is_int(index), index, "an integer")
    return index if index is not None and 0 <= index < count else None


def _tokens(keys: Settings) -> list[str]:
    tokens = keys.texts("tokens")
    longest = max(map(len, tokens), default=0)
    keys.require("tokens", longest > 0, "a list without a text", "a list of tokens")
    allowed = f"tokens of {_LONGEST_TOKEN} characters at most"
    keys.require("tokens", longest <= _LONGEST_TOKEN, f"one of {longest} characters", allowed)
    return tokens


def _token_types(keys: Settings, tokens: Sequence[str]) -> list[int]:
    types = keys.integers("token_type", None)
    if types is None:
        return [NORMAL] * len(tokens)
    given = f"{len(types)} numbers"
    keys.require(
        "token_type", len(types) == len(tokens), given, f"a list of {len(tokens)}, one a token"
    )
    return types


def _named_tokens(keys: Settings, tokens: Sequence[str]) -> dict[str, str | None]:
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(keys, f"{key}_token_id", len(tokens)) for name, key in names.items()}
    return {f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()}


def _byte_level_backend(keys: Settings, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen; and whether BOS goes before the text."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    how = _byte_pairs(keys)
    spelling = _byte_spelling()
    alphabet = set(spelling)
    vocabulary = {
        token
        if kind in (CONTROL, USER_DEFINED) or set(token) <= alphabet
        else "".join(spelling[byte] for byte in token.encode()): index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    }
    merges = _merges(keys, vocabulary)
    backend = _bpe(keys, vocabulary, merges, ignore_merges=how.whole_words)
    if how.compose:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in how.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, how.bos


def _byte_pairs(keys: Settings) -> BytePairs:
    name = keys.get("pre", None)
    if name in (None, "default"):
        warnings.warn(
            f"tokenizer.ggml.pre is {name!r}, so text is split by llama.cpp's default rules; the "
            "model's own may be others, and the output worse for it",
            stacklevel=2,
        )
        return _DEFAULT
    return BYTE_PAIRS[keys.choice("pre", BYTE_PAIRS)]


def _bpe(
    keys: Settings, vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any
) -> Any:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library has no type of its own for it
        keys.require("merges", False, str(error), "merges of tokens into tokens")
        raise AssertionError("unreachable") from error


def _byte_spelling() -> list[str]:
    """The character that stands for each byte: itself where it prints, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _merges(keys: Settings, vocabulary: Mapping[str, int]) -> list[tuple[str, str]]:
    pairs = []
    for merge in keys.texts("merges"):
        left, space, right = merge.partition(" ")
        keys.require("merges", bool(space) and " " not in right, merge, "two pieces each")
        known = left in vocabulary and right in vocabulary and left + right in vocabulary
        keys.require("merges", known, merge, "two tokens that make a third")
        pairs.append((left, right))
    return pairs


def _sentencepiece_backend(keys: Settings, tokens: list[str], types: list[int]) -> tuple[Any, bool]:
    """BPE over SentencePiece's pieces, as in Llama 2 and Mistral; BOS goes before the text.

    A space goes before the text, and before every part of it that follows a special token, even
    where the part begins with one.
    """
    from tokenizers import decoders, normalizers

    prefix = keys.flag("add_space_prefix", True)
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if keys.get("merges", None) is not None:
        merges = _merges(keys, vocabulary)
    else:
        merges = _merges_from_scores(keys, tokens)
    unknown = _token_id(keys, "unknown_token_id", len(tokens))
    backend = _bpe(
        keys,
        vocabulary,
        merges,
        unk_token=None if unknown is None else tokens[unknown],
        fuse_unk=True,
        byte_fallback=True,
    )
    spaces: Any = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        spaces = normalizers.Sequence([normalizers.Prepend("▁"), spaces])
        steps.append(decoders.Strip(content=" ", left=1))
    backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend, True


def _merges_from_scores(keys: Settings, tokens: list[str]) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored piece first.

    Among ways of one score the longer left part is first, then the longer right one, then the
    order of the pieces' ids.
    """
    scores = keys.numbers("scores")
    given = f"{len(scores)} numbers"
    keys.require("scores", len(scores) == len(tokens), given, "one number a token")
    index = {token: i for i, token in enumerate(tokens)}
    ways = []
    for piece, score in dict(zip(tokens, scores, strict=True)).items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        ways += [(score, left, right) for left, right in pairs]
    ways.sort(key=lambda way: (way[0], len(way[1]), len(way[2])), reverse=True)
    return [(left, right) for _, left, right in ways]


def _add_special_tokens(backend: Any, tokens: Sequence[str], types: Sequence[int]) -> None:
    """Control tokens (special) and user-defined ones stay whole wherever they stand in a text."""
    from tokenizers import AddedToken

    special: list[AddedToken] = []
    others: list[AddedToken] = []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (CONTROL, UNKNOWN):
            special.append(AddedToken(token, normalized=False, special=True))
        elif kind == USER_DEFINED:
            others.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(special)
    backend.add_tokens(others)


_BUILDERS = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}
