"""Token ids of GGUF tokenizers against those of the models' own tokenizer.json files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import warnings

import pytest
import transformers
from tokenizers import Tokenizer, pre_tokenizers

import convert
from quantspec_jax.text.tokenizer import BYTE_PAIRS, gguf_tokenizer

# Stretches of Unicode: scripts with and without spaces, combining marks, digits of other scripts,
# joiners and flags, private use, the astral planes.
RANGES = [
    (0x20, 0x7E), (0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x3FF), (0x400, 0x4FF),
    (0x590, 0x6FF), (0x900, 0x97F), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F),
    (0x2070, 0x209F), (0x2150, 0x218F), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3),
    (0xE000, 0xE0FF), (0xFE00, 0xFE0F), (0xFF10, 0xFF5A), (0x1D400, 0x1D7FF), (0x1F1E6, 0x1F1FF),
    (0x1F300, 0x1FAFF), (0x20000, 0x2A6DF), (0x10FF00, 0x10FFFF),
]  # fmt: skip
PIECES = [
    " ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "the", " The", " of", "ing", "'s", "'LL",
    "123", " 4567", "3.14", "def f(x):", "https://", "🏳️‍🌈", "👩‍👩‍👧", "é", "e\u0301",
    "\0", "\ufeff", "\ufffd", "...", "!!!", "<|im_start|>", "<|im_end|>", "<|endoftext|>",
    "<s>", "</s>", "<|user|>", "ſ", "İ", "ß", "٣٤٥", "½⅓", "①②",
]  # fmt: skip


def random_strings(count: int) -> list[str]:
    rng = random.Random(0)

    def piece() -> str:
        if rng.random() < 0.4:
            return rng.choice(PIECES)
        low, high = rng.choice(RANGES)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 8)))

    return ["".join(piece() for _ in range(rng.randint(0, 12))) for _ in range(count)]


def assert_same_ids(ours, theirs, strings) -> None:
    for text in strings:
        assert ours(text)["input_ids"] == theirs(text)["input_ids"], repr(text)
        ids = ours(text, add_special_tokens=False)["input_ids"]
        assert ids == theirs(text, add_special_tokens=False)["input_ids"], repr(text)
        assert ours.decode(ids) == theirs.decode(ids), repr(text)


@pytest.fixture(scope="module")
def smollm2(smollm2_gguf):
    return convert.open_source(smollm2_gguf).tokenizer


@pytest.fixture(scope="module")
def smollm2_by_transformers(smollm2_gguf):
    """transformers' own reading, which needs torch, with the digits split as tokenizer.json has
    it: that reading forgets it."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        smollm2_gguf.parent, gguf_file=smollm2_gguf.name
    )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("text", "ids"),
    [("  1", [256, 33]), ("\n 1", [3805, 33]), ("x = 10\n    42", None), ("a  2b ½", None)],
)
def test_smollm2_splits_digits_off_first(text, ids, smollm2, smollm2_by_transformers):
    theirs = smollm2_by_transformers(text)["input_ids"]
    assert smollm2(text)["input_ids"] == theirs == (ids or theirs)


def test_smollm2_ids_equal_transformers(smollm2, smollm2_by_transformers):
    strings = random_strings(1000)
    assert any(ord(c) > 0xFFFF for text in strings for c in text)
    assert_same_ids(smollm2, smollm2_by_transformers, strings)


def test_smollm2_special_tokens_and_template_equal_transformers(smollm2, smollm2_by_transformers):
    theirs = smollm2_by_transformers
    assert len(smollm2) == len(theirs) == 49152
    assert smollm2.special_tokens_map == theirs.special_tokens_map
    assert smollm2.eos_token_id == 2
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 🙂"}]
    for kwargs in ({"tokenize": False}, {"add_generation_prompt": True, "return_dict": False}):
        ours = smollm2.apply_chat_template(chat, **kwargs)
        assert ours == theirs.apply_chat_template(chat, **kwargs)
    ids = smollm2.apply_chat_template(chat, return_dict=False)
    assert smollm2.decode(ids, skip_special_tokens=True) == theirs.decode(
        ids, skip_special_tokens=True
    )


def test_the_converted_checkpoint_keeps_the_tokenizer(smollm2, smollm2_gguf, tmp_path):
    out = convert.convert(smollm2_gguf, tmp_path / "out", progress=False)
    reopened = convert.open_source(out).tokenizer
    assert_same_ids(reopened, smollm2, random_strings(300))
    assert reopened.special_tokens_map == smollm2.special_tokens_map
    assert reopened.chat_template == smollm2.chat_template
    assert (
        transformers.AutoTokenizer.from_pretrained(out)("a b")["input_ids"]
        == (smollm2("a b")["input_ids"])
    )


def test_gguf_tokenizer_without_torch(smollm2_gguf):
    program = (
        "import sys; sys.modules['torch'] = None; import convert; "
        f"t = convert.open_source({str(smollm2_gguf)!r}).tokenizer; "
        "print(t('Hello world<|im_end|>')['input_ids'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[19556, 905, 2]"


# Other kinds of tokenizer, trained here on little text and written into small GGUF files.


def byte_level_metadata(tokenizer) -> dict:
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    special = set(tokenizer.all_special_tokens)
    return {
        "tokens": tokens,
        "types": [3 if t in special or t.startswith("<|") else 1 for t in tokens],
        "merges": [" ".join(merge) for merge in model["merges"]],
    }


LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def pattern(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated",
            "invert": False}  # fmt: skip


def byte_level(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
            "use_regex": use_regex}  # fmt: skip


# What the published tokenizer.json has beside the vocabulary: normalizer, pre-tokenizers, settings
# of the model; and whether BOS goes before the text.
PUBLISHED = {
    "llama-bpe": (None, [pattern(LLAMA3_PATTERN)], {"ignore_merges": True}, True),
    "qwen2": ({"type": "NFC"}, [pattern(LLAMA3_PATTERN.replace("{1,3}", ""))], {}, False),
    "smollm": (None, [{"type": "Digits", "individual_digits": True}], {}, False),
    "gpt-2": (None, [], {}, False),
}


def published(pre: str, metadata: dict) -> Tokenizer:
    normalizer, splits, settings, _ = PUBLISHED[pre]
    own = pre in ("smollm", "gpt-2")
    merges = [merge.split(" ") for merge in metadata["merges"]]
    vocabulary = {token: i for i, token in enumerate(metadata["tokens"])}
    special = [i for i, kind in enumerate(metadata["types"]) if kind == 3]
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    content = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": metadata["tokens"][i], "special": True, **flags} for i in special
        ],
        "normalizer": normalizer,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level(own)]},
        "decoder": byte_level(True),
        "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, **settings},
    }
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_level_kinds_equal_published_files(pre, byte_level_tokenizer, tools, tmp_path):
    """BOS as the kind has it: the file does not say."""
    metadata = byte_level_metadata(byte_level_tokenizer)
    word = "ĠXyz"  # a word of the vocabulary that no merges make
    metadata["tokens"].append(word)
    metadata["types"].append(1)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(metadata["tokens"])
        writer.add_token_types(metadata["types"])
        writer.add_token_merges(metadata["merges"])

    model = tools.make_model("qwen3", vocab_size=len(metadata["tokens"]))
    path = tools.write_gguf(model, tmp_path / "model.gguf", with_tokenizer=add)
    ours = convert.open_source(path).tokenizer
    theirs = published(pre, metadata)
    out = convert.convert(path, tmp_path / "out", progress=False)
    strings = [*random_strings(200), " Xyz", "  Xyz", "cafe\u0301 12 1234", "\n 1", "  1"]
    bos = PUBLISHED[pre][-1]
    for tokenizer in (ours, convert.open_source(out).tokenizer):
        for text in strings:
            ids = tokenizer(text)["input_ids"]
            assert ids == [model.config.bos_token_id] * bos + theirs.encode(text).ids, repr(text)
            assert tokenizer.decode(ids[bos:]) == theirs.decode(ids[bos:], False)
    assert (ours.convert_tokens_to_ids(word) in ours(" Xyz")["input_ids"]) == (pre == "llama-bpe")


def test_tekken_equals_transformers(byte_level_tokenizer, tools, tmp_path):
    metadata = byte_level_metadata(byte_level_tokenizer)

    def add(writer):
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("tekken")
        writer.add_token_list(metadata["tokens"])
        writer.add_token_types(metadata["types"])
        writer.add_token_merges(metadata["merges"])
        writer.add_add_bos_token(False)

    model = tools.make_model("qwen3")
    path = tools.write_gguf(model, tmp_path / "model.gguf", with_tokenizer=add)
    ours = convert.open_source(path).tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    # Where a file has no <|endoftext|>, transformers adds one, with an id past the vocabulary.
    strings = [text for text in random_strings(200) if "<|endoftext|>" not in text]
    assert_same_ids(ours, theirs, strings)
    assert ours("a")["input_ids"] == ours("a", add_special_tokens=False)["input_ids"]


QWEN2 = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "qwen2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>", "1", "Ġ", "!"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3, 1, 1, 1],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.bos_token_id": 3,
}


@pytest.mark.parametrize("pre", sorted(BYTE_PAIRS))
def test_bos_goes_first_where_the_file_or_its_kind_says_so(pre):
    kind = QWEN2 | {"tokenizer.ggml.pre": pre}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        own = gguf_tokenizer(kind)("ab").input_ids == [3, 2]
        assert own == (pre in ("llama-bpe", "llama3", "llama-v3", "falcon3", "tekken"))
        for said in (True, False):
            tokenizer = gguf_tokenizer(kind | {"tokenizer.ggml.add_bos_token": said})
            assert tokenizer("ab").input_ids == [3] * said + [2]
            unnamed = kind | {"tokenizer.ggml.add_bos_token": said}
            del unnamed["tokenizer.ggml.bos_token_id"]
            assert gguf_tokenizer(unnamed)("ab").input_ids == [2]


@pytest.mark.parametrize("pre", [None, "default"])
def test_a_file_that_names_no_split_takes_llama_cpps_default(pre, byte_level_tokenizer):
    metadata = byte_level_metadata(byte_level_tokenizer)
    given = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": metadata["tokens"],
        "tokenizer.ggml.token_type": metadata["types"],
        "tokenizer.ggml.merges": metadata["merges"],
        **({"tokenizer.ggml.pre": pre} if pre else {}),
    }
    with pytest.warns(UserWarning, match=r"tokenizer.ggml.pre is .* default rules"):
        tokenizer = gguf_tokenizer(given)
    pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("it's $12345, a b!!  \n")
    assert [text for text, _ in pieces] == [
        "it", "'", "s", "Ġ", "$", "123", "45", ",", "Ġa", "Ġb", "!!", "ĠĠĊ",
    ]  # fmt: skip
    for text in random_strings(50):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


WORDS = [
    "▁",
    "e",
    "t",
    "a",
    "o",
    "h",
    "n",
    "▁t",
    "he",
    "▁the",
    "▁a",
    "an",
    "▁an",
    "at",
    "hat",
    "▁that",
]


def sentencepiece_parts(merges: bool) -> dict:
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), *WORDS]
    tokens += ["<|user|>", "<extra>"]
    types = [2, 3, 3] + [6] * 256 + [1] * len(WORDS) + [3, 4]
    scores = [0.0] * 259 + [-float(i) for i in range(len(WORDS))] + [0.0, 0.0]
    pairs = ["▁ t", "h e", "▁t he", "▁ a", "a n", "▁a n", "a t", "h at", "▁t hat"]
    return {"tokens": tokens, "types": types, "scores": scores, "merges": merges and pairs}


def published_sentencepiece(parts: dict) -> Tokenizer:
    """As Llama 2's tokenizer.json: a space before the text and after every special token."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
    added = [
        {"id": i, "content": parts["tokens"][i], "special": kind in (2, 3), **flags}
        for i, kind in enumerate(parts["types"])
        if kind in (2, 3, 4)
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, space],
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                back,
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {token: i for i, token in enumerate(parts["tokens"])},
            "merges": [merge.split(" ") for merge in sentencepiece_parts(True)["merges"]],
        },
    }
    return Tokenizer.from_str(json.dumps(content))


@pytest.mark.parametrize("merges", [True, False])
def test_sentencepiece_kinds_equal_published_files(merges, tools, tmp_path):
    parts = sentencepiece_parts(merges)

    def add(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(parts["tokens"])
        writer.add_token_types(parts["types"])
        writer.add_token_scores(parts["scores"])
        writer.add_unk_token_id(0)
        if merges:
            writer.add_token_merges(parts["merges"])

    model = tools.make_model("llama", bos_token_id=1, eos_token_id=2)
    path = tools.write_gguf(model, tmp_path / "model.gguf", with_tokenizer=add)
    ours = convert.open_source(path).tokenizer
    out = convert.convert(path, tmp_path / "out", progress=False)
    theirs = published_sentencepiece(parts)
    strings = [
        "that then the hat", " at<|user|>the<extra> an", " the", "  the", "<s>the</s> the",
        "<s>", "<s> <|user|>  an", "a<unk>the", " ", "\n the", *random_strings(200),
    ]  # fmt: skip
    for tokenizer in (ours, convert.open_source(out).tokenizer):
        for text in strings:
            ids = tokenizer(text)["input_ids"]
            assert ids == [1, *theirs.encode(text).ids], repr(text)
            for special in (True, False):
                decoded = tokenizer.decode(ids, skip_special_tokens=special)
                assert decoded == theirs.decode(ids, skip_special_tokens=special), repr(text)
    index = parts["tokens"].index
    assert ours("the")["input_ids"] == [1, index("▁the")]
    assert ours(" the")["input_ids"] == [1, index("▁"), index("▁the")]
    assert ours("<s>the")["input_ids"] == [1, 1, index("▁the")]
    assert ours.decode(ours("that é")["input_ids"], skip_special_tokens=True) == "that é"


def test_a_file_may_say_that_no_space_goes_before_the_text():
    parts = sentencepiece_parts(True)
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": parts["tokens"],
        "tokenizer.ggml.merges": parts["merges"],
        "tokenizer.ggml.add_bos_token": False,
    }
    the, he = parts["tokens"].index("▁the"), parts["tokens"].index("he")
    assert gguf_tokenizer(metadata)("the").input_ids == [the]
    bare = gguf_tokenizer(metadata | {"tokenizer.ggml.add_space_prefix": False})
    assert bare("the").input_ids == [parts["tokens"].index("t"), he]
    assert bare.decode(bare(" the").input_ids) == " the"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokenizer.ggml.model": "bert"}, "tokenizer.ggml.model is 'bert'; allowed: gpt2, llama"),
        ({"tokenizer.ggml.pre": "deepseek-v3"}, "tokenizer.ggml.pre is 'deepseek-v3'"),
        ({"tokenizer.ggml.tokens": None}, "tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["a"]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.merges": ["a b c"]}, "tokenizer.ggml.merges is 'a b c'"),
        ({"tokenizer.ggml.merges": [1]}, "tokenizer.ggml.merges"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "tokenizer.ggml.eos_token_id is 'x'"),
        (
            {"tokenizer.ggml.token_type": [1, 1]},
            "tokenizer.ggml.token_type is '2 numbers'; allowed: a list of 3",
        ),
        ({"tokenizer.ggml.token_type": 1}, "tokenizer.ggml.token_type is 1"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes'"),
    ],
)
def test_what_is_not_known_is_refused_by_name(changes, words):
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": ["a", "b", "ab"],
        "tokenizer.ggml.merges": ["a b"],
    }
    assert gguf_tokenizer(metadata)("ab").input_ids == [2]
    with pytest.raises(ValueError, match=words):
        gguf_tokenizer(metadata | changes)


@pytest.mark.parametrize("value", [-1, 7, 2**32 - 1])
@pytest.mark.parametrize("name", ["bos", "eos", "unknown", "padding"])
def test_an_id_that_is_no_token_is_none(name, value):
    tokenizer = gguf_tokenizer(QWEN2 | {f"tokenizer.ggml.{name}_token_id": value})
    short = {"unknown": "unk", "padding": "pad"}.get(name, name)
    assert getattr(tokenizer, f"{short}_token") is None
    assert tokenizer("ab").input_ids == [2]


def test_no_tokenizer_is_none(llama_dir, tmp_path):
    assert convert.open_source(llama_dir).tokenizer is None
    assert gguf_tokenizer({}) is None
    out = convert.convert(llama_dir, tmp_path / "out", progress=False)
    assert convert.open_source(out).tokenizer is None


@pytest.mark.parametrize("family", ["llama", "qwen2"])
@pytest.mark.parametrize("kind", ["byte_level_tokenizer", "sentencepiece_tokenizer"])
def test_huggingface_files_are_read_by_transformers(kind, family, request, tools, tmp_path, capfd):
    """From the directory, in the class that belongs to the model, and from its conversion."""
    tokenizer = request.getfixturevalue(kind)
    tools.write_hf(tools.make_model(family), tmp_path)
    capfd.readouterr()
    tokenizer.save_pretrained(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    out = convert.convert(tmp_path, tmp_path / "out", progress=False)
    for source in (tmp_path, out):
        ours = convert.open_source(source).tokenizer
        assert_same_ids(ours, theirs, random_strings(50))
        assert ours.chat_template == theirs.chat_template
        assert ours.eos_token_id == theirs.eos_token_id
    assert capfd.readouterr() == ("", "")


def test_a_damaged_tokenizer_is_named(byte_level_tokenizer, llama_dir, tmp_path):
    byte_level_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes((llama_dir / "config.json").read_bytes())
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": ')
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read"):
        _ = convert.open_source(tmp_path).tokenizer


def test_python_of_a_checkpoint_never_runs_and_nobody_is_asked(
    byte_level_tokenizer, llama_dir, tmp_path, monkeypatch
):
    """Passed over where a class of transformers reads the files; else refused by name."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    byte_level_tokenizer.save_pretrained(tmp_path)
    config = json.loads((llama_dir / "config.json").read_text())
    auto_map = {"AutoTokenizer": ["foreign.Foreign", None], "AutoConfig": "foreign.Config"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    (tmp_path / "model.safetensors").write_bytes((llama_dir / "model.safetensors").read_bytes())
    (tmp_path / "foreign.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    own = json.loads((tmp_path / "tokenizer_config.json").read_text())
    texts = random_strings(20)
    for changes in ({}, {"tokenizer_class": "PreTrainedTokenizerFast"}):
        (tmp_path / "tokenizer_config.json").write_text(
            json.dumps({**own, **changes, "auto_map": auto_map})
        )
        tokenizer = convert.open_source(tmp_path).tokenizer
        assert [tokenizer(t).input_ids for t in texts] == [
            byte_level_tokenizer(t).input_ids for t in texts
        ]
        out = convert.convert(tmp_path, tmp_path / "out", overwrite=True, progress=False)
        assert "auto_map" not in (out / "tokenizer_config.json").read_text()
    foreign = {**own, "tokenizer_class": "Foreign", "auto_map": auto_map}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(foreign))
    with pytest.raises(ValueError, match=r"the tokenizer in .* cannot be read: .*Foreign|auto_map"):
        _ = convert.open_source(tmp_path).tokenizer
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [[1], "x", -1, 2**40])
def test_odd_ids_in_config_json_do_not_reach_the_tokenizer(
    value, byte_level_tokenizer, llama_dir, tmp_path
):
    byte_level_tokenizer.save_pretrained(tmp_path)
    config = json.loads((llama_dir / "config.json").read_text())
    odd = config | {"bos_token_id": value, "pad_token_id": value}
    (tmp_path / "config.json").write_text(json.dumps(odd))
    text = "größer 12"
    assert convert.open_source(tmp_path).tokenizer(text) == byte_level_tokenizer(text)


def test_every_split_is_a_valid_expression():
    from tokenizers import Regex

    assert all(Regex(split) for how in BYTE_PAIRS.values() for split in how.splits)
