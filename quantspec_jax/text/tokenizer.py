"""Tokenizers: a transformers tokenizer from a directory's files or from a GGUF file's metadata.

transformers reads a GGUF tokenizer only where torch is installed, so it is built here from the
same metadata; the ids are those of the model's own tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quantspec_jax.checks import is_int, require

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

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

_GPT2_SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
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


_LLAMA3 = BytePairs((_LLAMA3_SPLIT,), whole_words=True, bos=True)
_QWEN2 = BytePairs((_QWEN2_SPLIT,), compose=True)
_DEFAULT = BytePairs((
    r"[\p{P}\$\+<=>\^~\|]+",
    _GPT2_SPLIT.removesuffix(r"|\s+"),
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
))  # fmt: skip

# By tokenizer.ggml.pre.
BYTE_PAIRS: dict[str, BytePairs] = {
    "default": _DEFAULT,
    "gpt-2": BytePairs((_GPT2_SPLIT,)),
    "smollm": BytePairs((r"\p{N}", _GPT2_SPLIT)),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "falcon3": _LLAMA3,
    "smaug-bpe": BytePairs((_LLAMA3_SPLIT,), whole_words=True),
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "megrez": _QWEN2,
    "tekken": BytePairs((_TEKKEN_SPLIT,), whole_words=True, bos=True),
}


def pretrained_tokenizer(directory: Path, config: Mapping[str, Any]) -> Any | None:
    """The tokenizer in a directory of Hugging Face files, in the class that transformers chooses
    for the model whose config.json holds `config`; None where there is none."""
    from transformers import AutoConfig, AutoTokenizer

    named = config.get("tokenizer_class")
    # The class depends on these alone; transformers would check every other value, too.
    chosen = AutoConfig.for_model(
        str(config.get("model_type")), tokenizer_class=named if isinstance(named, str) else None
    )
    return _from_files(AutoTokenizer, directory, config=chosen)


def saved_tokenizer(directory: Path) -> Any | None:
    """The tokenizer that `save_pretrained` wrote into a directory, exactly as it was: a class
    chosen by the model's type would put its own rules in place of tokenizer.json's."""
    from transformers import PreTrainedTokenizerFast

    return _from_files(PreTrainedTokenizerFast, directory)


def _from_files(tokenizer_class: Any, directory: Path, **options: Any) -> Any | None:
    """Python that a checkpoint brings along is never run, and nobody is asked whether to."""
    if not any((directory / name).exists() for name in _FILES):
        return None
    try:
        tokenizer = tokenizer_class.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # of many kinds, for damaged files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if "custom code" in reason:
            reason = "its auto_map names Python code of its own, which is not run"
        raise ValueError(f"the tokenizer in {directory} cannot be read: {reason}") from error
    tokenizer.init_kwargs.pop("auto_map", None)  # nor by those who open what is saved of it
    return tokenizer


def gguf_tokenizer(metadata: Mapping[str, Any]) -> Any | None:
    """The tokenizer that a GGUF file's metadata describes; None where it describes none.

    Raises ValueError, naming the key, for a kind that is not known.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind is None:
        return None
    from transformers import PreTrainedTokenizerFast

    require(kind in _BUILDERS, "tokenizer.ggml.model", kind, ", ".join(_BUILDERS))
    tokens = _tokens(metadata)
    types = _token_types(metadata, tokens)
    backend, bos = _BUILDERS[kind](metadata, tokens, types)
    _add_special_tokens(backend, tokens, types)
    named = _named_tokens(metadata, tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        add_bos_token=_flag(metadata, "add_bos_token", bos) and named["bos_token"] is not None,
        add_eos_token=_flag(metadata, "add_eos_token", False) and named["eos_token"] is not None,
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **named,
    )


def gguf_eos_ids(metadata: Mapping[str, Any], vocab_size: int) -> tuple[int, ...]:
    """What ends an answer: the ends of sequence, turn and message that the file names, then the
    control tokens whose text says that they are one.

    Files name one EOS, while a model may end its turns with another token (Llama 3 Instruct, with
    <|eot_id|>) and what it fills in with a third (Qwen2.5-Coder, with <|endoftext|>).
    """
    names = ("eos_token_id", "eot_token_id", "eom_token_id")
    ids = [_token_id(metadata, name, vocab_size) for name in names]
    tokens, types = (metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(types, list):
        pairs = enumerate(zip(tokens, types, strict=False))
        ids += [i for i, (text, kind) in pairs if kind == CONTROL and text in _END_TEXTS]
    return tuple(dict.fromkeys(i for i in ids if i is not None))


def _token_id(metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    """An id that is no token (−1, as an unsigned number too) is none."""
    index = metadata.get(f"tokenizer.ggml.{name}")
    require(index is None or is_int(index), f"tokenizer.ggml.{name}", index, "an integer")
    return index if index is not None and 0 <= index < count else None


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    require(isinstance(value, bool), f"tokenizer.ggml.{name}", value, "true, false")
    return value


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    tokens = metadata.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError("tokenizer.ggml.tokens is missing or no list of strings")
    return tokens


def _token_types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        given = f"{len(types)} numbers" if isinstance(types, list) else types
        require(False, "tokenizer.ggml.token_type", given, f"a list of {len(tokens)}, one a token")
    return types


def _named_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> dict[str, str | None]:
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ids = {name: _token_id(metadata, f"{key}_token_id", len(tokens)) for name, key in keys.items()}
    return {f"{name}_token": None if i is None else tokens[i] for name, i in ids.items()}


def _byte_level_backend(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Any, bool]:
    """Byte-level BPE, as in GPT-2, Llama 3 and Qwen; and whether BOS goes before the text."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    how = _byte_pairs(metadata)
    spelling = _byte_spelling()
    alphabet = set(spelling)
    vocabulary = {
        token
        if kind in (CONTROL, USER_DEFINED) or set(token) <= alphabet
        else "".join(spelling[byte] for byte in token.encode()): index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    }
    backend = _bpe(vocabulary, _merges(metadata), ignore_merges=how.whole_words)
    if how.compose:
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(split), behavior="isolated") for split in how.splits]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, how.bos


def _byte_pairs(metadata: Mapping[str, Any]) -> BytePairs:
    name = metadata.get("tokenizer.ggml.pre")
    if name in (None, "default"):
        warnings.warn(
            f"tokenizer.ggml.pre is {name!r}, so text is split by llama.cpp's default rules; the "
            "model's own may be others, and the output worse for it",
            stacklevel=2,
        )
        return _DEFAULT
    require(name in BYTE_PAIRS, "tokenizer.ggml.pre", name, ", ".join(BYTE_PAIRS))
    return BYTE_PAIRS[name]


def _bpe(vocabulary: dict[str, int], merges: list[tuple[str, str]], **options: Any) -> Any:
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
    if not isinstance(merges, list) or not all(isinstance(merge, str) for merge in merges):
        raise ValueError("tokenizer.ggml.merges is missing or no list of strings")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    if wrong := next((merge for merge in pairs if len(merge) != 2), None):
        require(False, "an element of tokenizer.ggml.merges", " ".join(wrong), "two pieces")
    return [(left, right) for left, right in pairs]


def _sentencepiece_backend(
    metadata: Mapping[str, Any], tokens: list[str], types: list[int]
) -> tuple[Any, bool]:
    """BPE over SentencePiece's pieces, as in Llama 2 and Mistral; BOS goes before the text.

    A space goes before the text, and before every part of it that follows a special token, even
    where the part begins with one.
    """
    from tokenizers import decoders, normalizers

    prefix = _flag(metadata, "add_space_prefix", True)
    merges = (
        _merges(metadata)
        if "tokenizer.ggml.merges" in metadata
        else _merges_from_scores(tokens, metadata.get("tokenizer.ggml.scores"))
    )
    vocabulary = {token: index for index, token in enumerate(tokens)}
    unknown = _token_id(metadata, "unknown_token_id", len(tokens))
    backend = _bpe(
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
