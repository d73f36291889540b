"""Tokenizers: a transformers tokenizer from a directory's files or from a GGUF file's metadata.

transformers reads a GGUF tokenizer only where torch is installed, so it is built here from the
same metadata; the ids are those of transformers' own reading.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantspec_jax.checks import require

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN_SPLIT = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# tokenizer.ggml.pre → the expression that splits text before the merges; None: GPT-2's own, which
# is what transformers takes for SmolLM's files too.
SPLITS: dict[str, str | None] = {
    "gpt-2": None,
    "smollm": None,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "smaug-bpe": _LLAMA3_SPLIT,
    "falcon3": _LLAMA3_SPLIT,
    "qwen2": _QWEN2_SPLIT,
    "deepseek-r1-qwen": _QWEN2_SPLIT,
    "megrez": _QWEN2_SPLIT,
    "tekken": _TEKKEN_SPLIT,
}


def pretrained_tokenizer(directory: Path) -> Any | None:
    """The tokenizer in a directory of Hugging Face files, in the class that transformers chooses
    for the model; None where there is none."""
    from transformers import AutoTokenizer

    return _from_files(AutoTokenizer, directory)


def saved_tokenizer(directory: Path) -> Any | None:
    """The tokenizer that `save_pretrained` wrote into a directory, exactly as it was: a class
    chosen by the model's type would put its own rules in place of tokenizer.json's."""
    from transformers import PreTrainedTokenizerFast

    return _from_files(PreTrainedTokenizerFast, directory)


def _from_files(tokenizer_class: Any, directory: Path) -> Any | None:
    if not any((directory / name).exists() for name in _FILES):
        return None
    try:
        return tokenizer_class.from_pretrained(str(directory), local_files_only=True)
    except Exception as error:  # of many kinds, for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"the tokenizer in {directory} cannot be read: {reason}") from error


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Any | None:
    """The tokenizer that a GGUF file's metadata describes; None where it describes none.

    Raises ValueError, naming the key, for a kind that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    from transformers import PreTrainedTokenizerFast

    require(kind in _BUILDERS, "tokenizer.ggml.model", kind, ", ".join(_BUILDERS))
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokenizer.ggml.tokens is missing or no list of strings")
    backend = _BUILDERS[kind](metadata, tokens)
    _add_special_tokens(backend, metadata, tokens)
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", kind == "llama")
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=add_bos,
        add_eos_token=metadata.get("tokenizer.ggml.add_eos_token", False),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **_named_tokens(metadata, tokens),
    )


def _named_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str | None]:
    named: dict[str, str | None] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            require(False, f"tokenizer.ggml.{key}_token_id", index, f"0 to {len(tokens) - 1}")
        named[f"{name}_token"] = None if index is None else tokens[index]
    return named


def _byte_level_backend(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen."""
    from tokenizers import Regex, decoders, pre_tokenizers

    name = metadata.get("tokenizer.ggml.pre")
    require(name in SPLITS, "tokenizer.ggml.pre", name, ", ".join(SPLITS))
    split = SPLITS[str(name)]
    spelling = _byte_spelling()
    alphabet = set(spelling)
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    vocabulary = {
        token
        if kind in (_CONTROL, _USER_DEFINED) or set(token) <= alphabet
        else "".join(spelling[byte] for byte in token.encode()): index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    }
    backend = _bpe(vocabulary, _merges(metadata))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = byte_level
    else:
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(split), behavior="isolated"), byte_level]
        )
    backend.decoder = decoders.ByteLevel()
    return backend


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: bool) -> Any:
    from tokenizers import Tokenizer, models

    try:
        return Tokenizer(models.BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # the library has no type of its own for it
        raise ValueError(f"tokenizer.ggml.merges do not fit the tokens: {error}") from error


def _byte_spelling() -> list[str]:
    """The character that stands for each byte: itself where it prints, else one from 256 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(b) if b in printable else chr(256 + others.index(b)) for b in range(256)]


def _merges(metadata: Mapping[str, Any]) -> list[tuple[str, str]]:
    merges = metadata.get("tokenizer.ggml.merges")
    pairs = [tuple(merge.split(" ")) for merge in merges] if merges is not None else None
    if pairs is None or any(len(pair) != 2 for pair in pairs):
        raise ValueError("tokenizer.ggml.merges is missing or no list of pairs")
    return pairs


def _sentencepiece_backend(metadata: Mapping[str, Any], tokens: list[str]) -> Any:
    """BPE over SentencePiece's pieces, as in Llama 2 and Mistral."""
    from tokenizers import decoders, pre_tokenizers

    prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
    merges = (
        _merges(metadata)
        if "tokenizer.ggml.merges" in metadata
        else _merges_from_scores(tokens, metadata.get("tokenizer.ggml.scores"))
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = _bpe(vocabulary, merges, fuse_unk=True, byte_fallback=True)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first" if prefix else "never", split=False
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges_from_scores(tokens: list[str], scores: Any) -> list[tuple[str, str]]:
    """Every way to put a piece together from two others, the best-scored piece first.

    Among ways of one score the longer left part is first, then the longer right one, then the
    order of the pieces' ids.
    """
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise ValueError("tokenizer.ggml.scores is missing or not one number a token")
    index = {token: i for i, token in enumerate(tokens)}
    ways = []
    for piece, score in dict(zip(tokens, scores, strict=True)).items():
        cuts = [(piece[:i], piece[i:]) for i in range(1, len(piece))]
        pairs = [(left, right) for left, right in cuts if left in index and right in index]
        pairs.sort(key=lambda pair: (index[pair[0]], index[pair[1]]))
        ways += [(score, left, right) for left, right in pairs]
    ways.sort(key=lambda way: (way[0], len(way[1]), len(way[2])), reverse=True)
    return [(left, right) for _, left, right in ways]


def _add_special_tokens(backend: Any, metadata: Mapping[str, Any], tokens: list[str]) -> None:
    """Control tokens (special) and user-defined ones stay whole wherever they stand in a text."""
    from tokenizers import AddedToken

    types = metadata.get("tokenizer.ggml.token_type") or []
    by_kind: dict[int, list[AddedToken]] = {_CONTROL: [], _USER_DEFINED: []}
    for token, kind in zip(tokens, types, strict=False):
        if kind in by_kind:
            by_kind[kind].append(AddedToken(token, normalized=False, special=kind == _CONTROL))
    backend.add_special_tokens(by_kind[_CONTROL])
    backend.add_tokens(by_kind[_USER_DEFINED])


_BUILDERS = {"gpt2": _byte_level_backend, "llama": _sentencepiece_backend}
