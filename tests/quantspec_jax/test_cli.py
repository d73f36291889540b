"""The command line: results on standard output, one line an error, exit statuses."""

from __future__ import annotations

import errno
import functools
import io
import json
import os
import re
import signal
import sys
import time
import warnings
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import pytest

import convert
import quantspec_jax as qs
from quantspec_jax import cli, compilation_cache
from quantspec_jax.cache import create
from quantspec_jax.cache.config import CacheConfig
from quantspec_jax.commands import generate, terminal
from quantspec_jax.generate.couplings import COUPLINGS
from quantspec_jax.text.chat import chat_ids
from quantspec_jax.text.detokenize import decode
from quantspec_jax.weights.formats import DraftConfig

STATISTICS = {
    "finish_reason",
    "mode",
    "kv",
    "gamma",
    "coupling",
    "draft_policy",
    "backend",
    "dtype",
    "prompt_tokens",
    "cached_tokens",
    "new_tokens",
    "rounds",
    "proposed",
    "accepted",
    "lookup_rounds",
    "lookup_proposed",
    "lookup_accepted",
    "acceptance_rate",
    "accepted_by_position",
    "draft_read_share",
    "tokens_per_round",
    "prefill_seconds",
    "decode_seconds",
    "decode_tokens_per_second",
    "compile_seconds",
    "trial_seconds",
    "cache_bytes",
    "programs",
}
OF_GAMMA_AUTO = {"mean_gamma", "draft_cost"}
CACHE_PARTS = {"upper", "lower", "scales", "buffer", "total", "bf16_equivalent"}


@pytest.fixture(autouse=True)
def no_compilation_cache(monkeypatch):
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")


@pytest.fixture
def run(capsys):
    """Run a command; returns (status, standard output, standard error)."""

    def run(*argv):
        status = cli.main([str(a) for a in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.fixture
def run_json(run):
    """Run a command with --json, which prints exactly one object."""

    def run_json(*argv):
        status, out, _ = run(*argv, "--json")
        assert status == 0
        assert out.count("\n") == 1
        return json.loads(out)

    return run_json


def prompt(text="the cat"):
    return ["--prompt", text]


NEEDED = ["generate", "--model", "nowhere", *prompt()]
EVALUATE = ["eval", "perplexity", "--model", "nowhere", "--text", "t"]


class TestErrors:
    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "required: COMMAND"),
            (["sing"], "invalid choice: 'sing'"),
            (["generate"], "--model"),
            (["generate", "--model", "m"], "--prompt --prompt-file is required"),
            ([*NEEDED, "--prompt-file", "f"], "not allowed with argument --prompt"),
            ([*NEEDED, "--frobnicate"], "--frobnicate"),
            ([*NEEDED, "--max-new", "3"], "--max-new"),  # no abbreviations
            ([*NEEDED, "--gamma", "x"], "--gamma: 'x' is no integer, nor auto"),
            ([*NEEDED, "--gamma", "0"], "gamma is 0"),
            ([*NEEDED, "--gamma", "128"], "gamma is 128"),
            ([*NEEDED, "--mesh", "tp=0,pp=2"], "--mesh: 'tp=0,pp=2' is not tp=N,cp=N,dp=N"),
            ([*NEEDED, "--max-new-tokens", "0"], "max_new_tokens is 0"),
            ([*NEEDED, "--temperature", "-1"], "temperature is -1.0"),
            ([*NEEDED, "--temperature", "nan"], "temperature is nan"),
            ([*NEEDED, "--top-p", "0"], "top_p is 0.0"),
            ([*NEEDED, "--top-p", "1.5"], "top_p is 1.5"),
            ([*NEEDED, "--top-k", "-1"], "top_k is -1"),
            ([*NEEDED, "--min-p", "2"], "min_p is 2.0"),
            ([*NEEDED, "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
            ([*NEEDED, "--seed", "-1"], "--seed: -1 is not from 0"),
            ([*NEEDED, "--stop", ""], "stop is"),
            ([*NEEDED, "--dtype", "int3"], "--dtype"),
            ([*NEEDED, "--backend", "cuda"], "--backend"),
            ([*NEEDED, "--kv", "full"], "kv is 'full'; allowed: int8 in mode quantspec"),
            ([*NEEDED, "--kv", "int4"], "kv is 'int4'"),
            ([*NEEDED, "--cache-format", "aqua"], "--cache-format cannot go with a cache that is"),
            (["chat", "--model", "x", "--cache-format", "aqua"], "--cache-format cannot go with a"),
            ([*NEEDED, "--pass-width", "5"], "--pass-width cannot go with --mode quantspec"),
            ([*NEEDED, "--mode", "autoregressive", "--gamma", "4"], "--gamma cannot go with"),
            (
                [*NEEDED, "--mode", "autoregressive", "--draft-bits", "4", "--draft-symmetric"],
                "--draft-bits, --draft-symmetric cannot go with --mode autoregressive",
            ),
            ([*NEEDED, "--draft-bits", "3"], "--draft-bits"),
            ([*NEEDED, "--draft-bits", "none", "--draft-group", "32"], "--draft-group cannot go"),
            ([*NEEDED, "--draft-group", "7"], "draft group_size is 7"),
            ([*NEEDED, "--system", "S"], "--system needs --chat"),
            ([*NEEDED, "--stop-id", "x"], "--stop-id: invalid int value: 'x'"),
            ([*NEEDED, "--stop-id", "1", "-1"], "stop_ids is (1, -1)"),
            ([*NEEDED, "--coupling", "none"], "--coupling: invalid choice"),
            (
                [*NEEDED, "--mode", "autoregressive", "--coupling", "block"],
                "--coupling cannot go with --mode autoregressive",
            ),
            ([*NEEDED, "--rope-scaling", "ntk"], "--rope-scaling: invalid choice"),
            ([*NEEDED, "--rope-scaling", "yarn"], "--rope-scale is None; allowed: a number > 1"),
            ([*NEEDED, "--rope-scaling", "yarn", "--rope-scale", "1"], "factor is 1.0"),
            ([*NEEDED, "--rope-scaling", "none", "--rope-scale", "2"], "--rope-scale cannot go"),
            ([*NEEDED, "--rope-scale", "2"], "name --rope-scaling"),
            (["convert", "nowhere", "out", "--rope-scale", "2"], "--rope-scale cannot go with"),
            (
                [*EVALUATE, "--context", "64", "--rope-scaling", "linear"],
                "--rope-scale is None",
            ),
            (["generate", "--model", "m", "--prompt", ""], "prompt is ''"),
            (["generate", "--model", "m", "--prompt-file", "gone.txt"], "gone.txt: No such file"),
            (["generate", "--model", "m", "--prompt-file", "."], ".: Is a directory"),
            (NEEDED, "nowhere"),
            (["info", "nowhere"], "nowhere"),
            (["convert", "nowhere", "out"], "nowhere"),
            (["convert", "nowhere", "out", "--draft-group", "32"], "--draft-group cannot go with"),
            (
                ["convert", "nowhere", "out", "--draft-text", "t"],
                "--draft-text cannot go with --draft none",
            ),
            (["convert", "nowhere", "out", "--draft", "rtn", "--draft-text", "t"], "--draft rtn"),
            (["convert", "nowhere", "out", "--draft", "rtn", "--draft-bits", "4.5"], "gptq"),
            (["convert", "nowhere", "out", "--draft", "gptq", "--draft-bits", "3"], "is 3.0"),
            (["convert", "nowhere", "out", "--draft", "gptq", "--draft-bits", "x"], "'x' is not"),
            (
                ["convert", "nowhere", "out", "--draft", "gptq", "--draft-text", "gone.txt"],
                "gone.txt: No such file",
            ),
            (
                ["convert", "nowhere", "out", "--draft-from", "m", "--draft-bits", "4"],
                "--draft-bits cannot go with --draft-from",
            ),
            (
                ["convert", "nowhere", "out", "--draft-from", "m", "--draft", "rtn"],
                "--draft cannot go with --draft-from",
            ),
            ([*NEEDED, "--draft-from", "m", "--draft-layers", "mlp"], "--draft-layers cannot go"),
            ([*NEEDED, "--draft-layers", "mlp,"], "draft layers is 'mlp,'"),
            (["eval", "speed", "--model", "m"], "invalid choice: 'speed'"),
            (
                ["eval", "perplexity", "--model", "m", "--text", "gone.txt", "--context", "64"],
                "gone.txt: No such file",
            ),
            (
                ["eval", "perplexity", "--model", "m", "--text", "t", "--context", "0"],
                "--context is 0",
            ),
            (["bench"], "required: BENCH"),
            (["serve", "--model", "m", "--draft-policy", "snapkv"], "draft_policy is 'snapkv'"),
            (["serve", "--model", "m", "--port", "70000"], "port is 70000"),
            (["chat", "--model", "m", "--draft-policy", "snapkv"], "draft_policy is 'snapkv'"),
            (["chat", "--model", "m", "--system", "s", "--cache", "."], "--system is 's'"),
        ],
    )
    def test_what_the_caller_got_wrong(self, run, tmp_path, monkeypatch, argv, message):
        monkeypatch.chdir(tmp_path)
        status, out, err = run(*argv)
        assert status == 2
        assert out == ""
        assert err.startswith("quantspec: error: ")
        assert err.count("\n") == 1
        assert message in err
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("error", "status", "message"),
        [
            (RuntimeError("first\nsecond"), 1, "RuntimeError: first second"),
            (NotImplementedError("float64 on this backend"), 1, "float64 on this backend"),
            (OSError(errno.ENOSPC, "No space left on device"), 1, "No space left on device"),
            (ValueError("x is 1; allowed: 2"), 2, "x is 1; allowed: 2"),
            (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission"),
            (KeyError("weight"), 1, "KeyError: 'weight'"),
            (KeyboardInterrupt(), 130, "interrupted"),
        ],
    )
    def test_statuses(self, run, monkeypatch, error, status, message):
        def fail(source):
            raise error

        monkeypatch.setattr(convert, "open_source", fail)
        got, out, err = run("info", "somewhere")
        assert (got, out) == (status, "")
        assert err.count("\n") == 1
        assert message in err

    @pytest.mark.usefixtures("interruptible")
    def test_an_interruption_during_garbage_collection_is_not_lost(self, run, monkeypatch):
        class Interrupted:
            def __del__(self):
                raise KeyboardInterrupt

        def work(source):
            Interrupted()
            for _ in range(1000):
                time.sleep(0.01)

        monkeypatch.setattr(convert, "open_source", work)
        status, _, err = run("info", "somewhere")
        assert (status, err) == (130, "quantspec: error: interrupted\n")

    @pytest.mark.parametrize("collecting", [False, True])
    def test_a_termination_is_an_interruption(self, run, monkeypatch, collecting):
        def terminate():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

        class Terminated:
            def __del__(self):
                terminate()

        def work(source):
            if collecting:
                Terminated()
            else:
                terminate()
            for _ in range(1000):
                time.sleep(0.01)

        monkeypatch.setattr(convert, "open_source", work)
        status, out, err = run("info", "somewhere")
        assert (status, out, err) == (143, "", "quantspec: error: terminated\n")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    @pytest.mark.usefixtures("interruptible")
    @pytest.mark.parametrize(
        ("number", "status", "said"),
        [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
    )
    def test_an_interruption_that_jax_takes_for_its_own_error_is_one(
        self, run, monkeypatch, number, status, said
    ):
        """JAX compares a program's arguments in C++, which calls what Python compares with."""

        class Compared:
            def __init__(self, strikes):
                self.strikes = strikes

            def __hash__(self):
                return 0

            def __eq__(self, other):
                if self.strikes or other.strikes:
                    signal.raise_signal(number)  # in this thread: it need not be waited for
                return True

        @functools.partial(
            jax.tree_util.register_dataclass, data_fields=["x"], meta_fields=["compared"]
        )
        @dataclass
        class Node:
            x: jax.Array
            compared: Compared

        def work(source):
            program = jax.jit(lambda node: node.x + 1)
            for strikes in (False, True):
                program(Node(jax.numpy.ones(2), Compared(strikes)))

        monkeypatch.setattr(convert, "open_source", work)
        assert run("info", "somewhere") == (status, "", f"quantspec: error: {said}\n")

    def test_warnings_are_a_line_each_and_none_twice(self, run, monkeypatch):
        def work(source):
            warnings.simplefilter("always")
            for name in ("layer", "end", "layer"):
                warnings.warn(f"Error writing '{name}':\nno space", stacklevel=1)
            warnings.warn("something else", stacklevel=1)
            raise ValueError("the end")

        monkeypatch.setattr(convert, "open_source", work)
        with warnings.catch_warnings():
            _, _, err = run("info", "somewhere")
        assert err.splitlines() == [
            "quantspec: warning: Error writing 'layer': no space",
            "quantspec: warning: something else",
            "quantspec: error: the end",
        ]

    def test_traceback_only_with_debug(self, run):
        _, _, err = run("info", "nowhere")
        assert "Traceback" not in err
        status, _, err = run("info", "nowhere", "--debug")
        assert status == 2
        assert err.startswith("Traceback")

    def test_a_prompt_file_that_is_not_utf8(self, run, tmp_path):
        path = tmp_path / "latin1.txt"
        path.write_bytes("größer".encode("latin-1"))
        status, _, err = run("generate", "--model", "m", "--prompt-file", path)
        assert status == 2
        assert f"{path}: not UTF-8 (byte 0xF6 at offset 2)" in err

    def test_a_prompt_that_does_not_fit_the_context(self, run, one_layer_llama_dir):
        status, _, err = run(
            "generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 4000
        )
        assert status == 2
        assert "2048" in err.splitlines()[-1]

    def test_chat_without_a_template(self, run, make_tiny_llama, tmp_path):
        model = make_tiny_llama(tmp_path, chat=False)
        status, _, err = run("generate", "--model", model, *prompt(), "--chat")
        assert status == 2
        assert "no chat template" in err


class TestGenerate:
    def test_json(self, run_json, one_layer_llama_dir):
        result = run_json(
            *("generate", "--model", one_layer_llama_dir, *prompt()),
            *("--max-new-tokens", 24, "--ignore-eos", "--gamma", 4),
        )
        assert set(result) == STATISTICS | {"text", "tokens"}
        assert set(result["cache_bytes"]) == CACHE_PARTS
        tokenizer = convert.open_source(str(one_layer_llama_dir)).tokenizer
        assert result["text"] == decode(tokenizer, result["tokens"])
        assert result["prompt_tokens"] == len(tokenizer("the cat")["input_ids"])
        assert len(result["tokens"]) == result["new_tokens"] == 24
        assert result["finish_reason"] == "length"
        assert (result["mode"], result["kv"], result["gamma"]) == ("quantspec", "int8", 4)
        assert result["acceptance_rate"] == result["accepted"] / result["proposed"]

    def test_several_prompts(self, run_json, one_layer_llama_dir):
        common = [
            "generate",
            "--model",
            one_layer_llama_dir,
            "--max-new-tokens",
            24,
            "--ignore-eos",
        ]
        result = run_json(*common, *prompt("the cat"), *prompt("中文"))
        assert set(result) == {"outputs"}
        assert [set(output) for output in result["outputs"]] == [
            STATISTICS | OF_GAMMA_AUTO | {"text", "tokens"}
        ] * 2
        assert [output["gamma"] for output in result["outputs"]] == ["auto"] * 2

    def test_text_is_streamed_and_statistics_are_one_line(self, run, run_json, one_layer_llama_dir):
        argv = [
            "generate",
            "--model",
            one_layer_llama_dir,
            *prompt(),
            "--max-new-tokens",
            24,
            "--gamma",
            4,
        ]
        expected = run_json(*argv)["text"]
        status, out, err = run(*argv)
        assert (status, out) == (0, expected + "\n")
        statistics = err.splitlines()[-1]
        for word in ("tokens/s", "acceptance", "tokens a round", "bytes", "of bf16"):
            assert word in statistics
        assert "backend xla" in err

    def test_prompt_from_file_or_standard_input(
        self, run_json, one_layer_llama_dir, tmp_path, monkeypatch
    ):
        argv = ["generate", "--model", one_layer_llama_dir, "--max-new-tokens", 24]
        expected = run_json(*argv, *prompt("größer\n"))["tokens"]
        path = tmp_path / "prompt.txt"
        path.write_text("größer\n", "utf-8")
        assert run_json(*argv, "--prompt-file", path)["tokens"] == expected
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
        assert run_json(*argv, "--prompt-file", "-")["tokens"] == expected

    def test_chat(self, run_json, one_layer_llama_dir):
        result = run_json(
            "generate", "--model", one_layer_llama_dir, *prompt("Hi"), "--chat",
            "--system", "Be brief.", "--max-new-tokens", 24,
        )  # fmt: skip
        tokenizer = convert.open_source(str(one_layer_llama_dir)).tokenizer
        assert result["prompt_tokens"] == len(chat_ids("Hi", tokenizer, "Be brief."))

    def test_stop_strings_end_the_text_before_them(self, run_json, one_layer_llama_dir):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 24]
        full = run_json(*argv)
        stop = full["text"][3:5]
        result = run_json(*argv, "--stop", "not in the text", stop, "--stop", "neither")
        assert result["finish_reason"] == "stop"
        assert result["text"] == full["text"][: full["text"].index(stop)]
        assert result["tokens"] == full["tokens"][: len(result["tokens"])]

    def test_options_reach_the_decoding(self, run_json, one_layer_llama_dir):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 24]
        argv += ["--ignore-eos", "--temperature", 0.9, "--top-k", 20]
        first, again, other = (run_json(*argv, "--seed", seed)["tokens"] for seed in (1, 1, 2))
        assert first == again != other

        argv += ["--gamma", 2, "--draft-bits", "none", "--dtype", "bfloat16", "--logprobs", 2]
        sampled = run_json(*argv)
        assert (sampled["gamma"], sampled["dtype"]) == (2, "bfloat16")
        assert [len(score["top"]) for score in sampled["logprobs"]] == [2] * len(sampled["tokens"])
        assert all(score["own"] <= score["top"][0][1] for score in sampled["logprobs"])

    def test_stop_ids_end_the_text_with_them(self, run_json, one_layer_llama_dir):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 24]
        full = run_json(*argv, "--ignore-eos")["tokens"]
        end = full[5]
        unused = next(i for i in range(100) if i not in full)
        result = run_json(*argv, "--ignore-eos", "--stop-id", unused, end, "--stop-id", unused)
        assert result["tokens"] == full[: full.index(end) + 1]
        assert result["finish_reason"] != "length"

    @pytest.mark.parametrize("coupling", COUPLINGS)
    def test_coupling_is_reported(self, run_json, one_layer_llama_dir, coupling):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 8]
        result = run_json(*argv, "--temperature", 0.9, "--coupling", coupling)
        assert result["coupling"] == coupling

    def test_autoregressive(self, run_json, one_layer_llama_dir):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 24]
        result = run_json(*argv, "--ignore-eos", "--mode", "autoregressive")
        assert result["kv"] == "full"
        assert result["acceptance_rate"] is None
        assert len(result["tokens"]) == 24

    def test_interruption_keeps_what_was_produced(
        self, run, run_json, one_layer_llama_dir, monkeypatch
    ):
        argv = ["generate", "--model", one_layer_llama_dir, *prompt(), "--max-new-tokens", 24]
        full = run_json(*argv)["text"]
        configure, written = generate.generate_config, []

        def write(text):
            written.append(text)
            if len(written) == 1:
                raise KeyboardInterrupt

        monkeypatch.setattr(
            generate, "generate_config", lambda args: replace(configure(args), rounds_per_chunk=1)
        )
        monkeypatch.setattr(terminal, "write", write)
        status, _, err = run(*argv)
        assert status == 0
        assert "(interrupted)" in err.splitlines()[-1]
        assert "Traceback" not in err
        text = "".join(written)
        assert text.endswith("\n")
        assert 0 < len(text) - 1 < len(full)
        assert full.startswith(text[:-1])


class TestCaches:
    PLAIN = ("--mode", "autoregressive", "--max-new-tokens", 6, "--ignore-eos")

    def test_a_saved_cache_is_used_where_the_prompt_begins_like_it(
        self, run, run_json, one_layer_llama_dir, tmp_path
    ):
        file, text = tmp_path / "a.safetensors", "The sea was calm. " * 30
        argv = ["generate", "--model", one_layer_llama_dir, *self.PLAIN, "--cache", file]
        first = run_json(*argv, "--prompt", text)
        assert first["cached_tokens"] == 0
        written = file.stat().st_mtime_ns
        again = run_json(*argv, "--prompt", text)
        assert (again["text"], again["tokens"]) == (first["text"], first["tokens"])
        assert again["prompt_tokens"] - 2 * 128 < again["cached_tokens"]
        assert file.stat().st_mtime_ns == written
        other = run_json(*argv, "--prompt", "Once again. " * 45)
        assert other["cached_tokens"] == 0
        assert file.stat().st_mtime_ns > written
        status, _, err = run(*argv, "--kv", "int8", "--prompt", text)
        assert status == 2
        assert "is a cache of codec 'full', not 'hierarchical'" in err
        # A model without predictors: said before anything is generated.
        written = file.read_bytes()
        status, out, err = run(*argv, "--cache-format", "aqua", "--prompt", "Something else.")
        assert (status, out, file.read_bytes()) == (2, "", written)
        assert "format is 'aqua'; allowed: planes; aqua of what `quantspec convert" in err

    def test_a_conversation_goes_on_from_its_file(
        self, run, one_layer_llama_dir, tmp_path, monkeypatch
    ):
        file = tmp_path / "talk.safetensors"
        argv = ["chat", "--model", one_layer_llama_dir, *self.PLAIN, "--cache", file]

        def say(*lines):
            text = "".join(f"{line}\n" for line in lines).encode()
            monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text)))
            status, out, err = run(*argv)
            assert status == 0
            return out.splitlines(), err

        first, err = say("The sea was calm. " * 30, "", "And then?")
        assert err.count(" kept") == 2  # an empty line is no message
        second, err = say("And why?")
        assert f"4 messages from {file}" in err
        kept, prompt = re.findall(r"(\d+) of (\d+) kept", err)[0]
        assert 0 < int(prompt) - int(kept) < 2 * 128
        file.unlink()
        whole, _ = say("The sea was calm. " * 30, "And then?", "And why?")
        assert whole == [*first, *second]


class TestInfo:
    def test_sizes_without_loading_weights(self, run_json, run, tiny_llama_dir, monkeypatch):
        from safetensors.numpy import load_file

        tensors = load_file(tiny_llama_dir / "model.safetensors").values()
        kinds = type(convert.open_source(str(tiny_llama_dir))).__mro__
        monkeypatch.delattr(next(kind for kind in kinds if "load" in vars(kind)), "load")
        result = run_json("info", tiny_llama_dir)
        assert result["parameters"] == sum(tensor.size for tensor in tensors)
        assert result["parameter_bytes"] == sum(tensor.nbytes for tensor in tensors)
        assert result["architecture"]["num_layers"] == 2
        assert [row["context"] for row in result["cache"]] == [2048]
        (cache,) = result["cache"]
        assert cache["upper"] == cache["lower"] == 2 * 2 * 2048 * 2 * 16 // 2
        assert cache["bf16_equivalent"] == 2 * 2 * 2048 * 2 * 16 * 2
        assert 4 < result["draft_bits_per_weight"] < 5

        status, out, _ = run("info", tiny_llama_dir)
        assert status == 0
        assert f"{result['parameters']:,}" in out

    @pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is another device")
    def test_the_device_and_its_kernels(self, run_json, run, tiny_llama_dir):
        device = run_json("info", "--device")["device"]
        assert {*device["kernels"].values()} == {
            "it needs a CUDA device of compute capability 8.0 or later"
        }
        status, out, _ = run("info", tiny_llama_dir, "--device")
        assert status == 0
        assert "parameters" in out
        names = "add_rms_norm, int4_matmul, kv_attention, logit_filter, page_choice, quantize_pack"
        assert f"in XLA: {names}, rope_append" in out
        status, _, err = run("info")
        assert status == 2
        assert "SOURCE is 'missing'" in err

    def test_the_cache_takes_what_is_said(self, run_json, tiny_llama_dir):
        (said,) = run_json("info", tiny_llama_dir)["cache"]
        config = convert.open_source(str(tiny_llama_dir)).config
        cache = create(config, CacheConfig(max_length=2048, dtype="bfloat16"), 1)
        assert said["total"] == sum(array.nbytes for array in jax.tree.leaves(cache))


class TestRopeScaling:
    OPTIONS = ("--rope-scaling", "yarn", "--rope-scale", 2)

    @pytest.mark.parametrize(
        "argv",
        [
            ("convert", "s", "o"),
            ("generate", "--model", "m", "--prompt", "p"),
            ("eval", "acceptance", "--model", "m", "--text", "text", "--context", 64),
        ],
    )
    @pytest.mark.parametrize(
        ("options", "scaling"),
        [
            (OPTIONS, qs.RopeScaling("yarn", 2)),
            (("--rope-scaling", "none"), qs.RopeScaling("none")),
            ((), None),
        ],
    )
    def test_options(self, argv, options, scaling, monkeypatch, run, tmp_path):
        given = []
        for module, name in ((convert, "convert"), (qs, "load")):
            monkeypatch.setattr(module, name, lambda *_, rope, **__: given.append(rope))
        monkeypatch.chdir(tmp_path)
        (tmp_path / "text").write_text("the cat")
        run(*argv, *options)
        assert given == [scaling]

    def test_is_stored_and_shown(self, run, run_json, tiny_llama_dir, tmp_path):
        before = run_json("info", tiny_llama_dir)["context_limit"]
        assert run("convert", tiny_llama_dir, tmp_path / "out", *self.OPTIONS)[0] == 0
        shown = run_json("info", tmp_path / "out")
        rope = shown["architecture"]["rope"]
        assert (rope["type"], rope["factor"]) == ("yarn", 2)
        assert shown["context_limit"] == 2 * before
        _, table, _ = run("info", tmp_path / "out")
        assert f"{2 * before:,} (RoPE yarn × 2 from {before:,}, theta" in table


class TestDraft:
    """Options that say what the draft's weights are."""

    CONVERT = ("convert", "s", "o")
    GENERATE = ("generate", "--model", "m", "--prompt", "p")

    @pytest.mark.parametrize(
        ("argv", "draft"),
        [
            ((*GENERATE, "--draft-bits", "8"), DraftConfig(bits=8)),
            ((*GENERATE, "--draft-layers", "*.down"), DraftConfig(layers="*.down")),
            ((*GENERATE, "--draft-from", "m.gguf"), "m.gguf"),
            ((*CONVERT, "--draft", "rtn"), DraftConfig()),
            ((*CONVERT, "--draft", "rtn", "--draft-bits", "8"), DraftConfig(bits=8)),
            ((*CONVERT, "--draft", "gptq"), DraftConfig(method="gptq")),
            (
                (*CONVERT, "--draft", "gptq", "--draft-bits", "4.75", "--draft-group", "128"),
                DraftConfig(group_size=128, method="gptq", average_bits=4.75),
            ),
            (
                (*CONVERT, "--draft", "gptq", "--draft-symmetric", "--draft-layers", "mlp"),
                DraftConfig(symmetric=True, layers="mlp", method="gptq"),
            ),
            ((*CONVERT, "--draft-from", "awq"), "awq"),
        ],
    )
    def test_options(self, argv, draft, monkeypatch, run):
        given = []
        if argv[0] == "convert":
            monkeypatch.setattr(
                convert,
                "convert",
                lambda *_, draft, draft_from, **__: given.append(draft or draft_from),
            )
        else:
            monkeypatch.setattr(qs, "load", lambda *_, draft, **__: given.append(draft))
            monkeypatch.setattr(
                convert, "open_source", lambda _: SimpleNamespace(draft_config=None)
            )
        run(*argv)
        assert given == [draft]

    def test_text_is_read(self, monkeypatch, run, tmp_path):
        given = {}
        monkeypatch.setattr(convert, "convert", lambda *_, **options: given.update(options))
        (tmp_path / "text").write_text("größer", "utf-8")
        run(*self.CONVERT, "--draft", "gptq", "--draft-text", tmp_path / "text")
        assert given["draft_text"] == "größer"
        (tmp_path / "text").write_bytes(b"\xff")
        status, _, err = run(*self.CONVERT, "--draft", "gptq", "--draft-text", tmp_path / "text")
        assert status == 2
        assert "not UTF-8" in err

    def test_a_stored_draft_is_shown_and_overridden(self, run, run_json, tiny_llama_dir, tmp_path):
        out = tmp_path / "out"
        argv = ["convert", tiny_llama_dir, out, "--draft", "rtn", "--draft-bits", 8]
        status, _, _ = run(*argv, "--draft-group", 32, "--draft-layers", "layers.0.*")
        assert status == 0
        shown = run_json("info", out)
        assert shown["draft_stored"]
        assert shown["draft_formats"] == [
            {"layers": 7, "bits": 8, "group_size": 32, "symmetric": False},
            {"layers": 7, "bits": 16, "group_size": 64, "symmetric": False},
        ]
        assert 12 < shown["draft_bits_per_weight"] < 13
        _, table, _ = run("info", out)
        assert "7 layers 8-bit asymmetric, group 32; 7 layers as they are" in table
        text = tmp_path / "text"
        text.write_text("the cat " * 100)
        argv = ["eval", "acceptance", "--model", out, "--text", text, "--context", 64]
        status, _, err = run(*argv, "--draft-from", tiny_llama_dir)
        assert status == 2
        assert "draft options override the stored draft (8-bit rtn" in err
        assert "has no quantization_config" in err

    def test_what_is_not_made_at_load_is_refused(self, tiny_llama_dir):
        refused = [
            (DraftConfig(method="gptq"), "Convert once with --draft gptq"),
            (DraftConfig(method="imported"), "name the quantized checkpoint"),
            (DraftConfig(layers="*.dwon"), "fits no layer"),
        ]
        for draft, words in refused:
            with pytest.raises(ValueError, match=words):
                qs.load(str(tiny_llama_dir), draft=draft)


class TestVersion:
    def test_names_what_matters_in_a_bug_report(self, run):
        status, out, _ = run("--version")
        assert status == 0
        names = [line.split()[0] for line in out.splitlines()]
        assert names[0] == "quantspec-jax"
        assert {"jax", "jaxlib", "flax", "transformers", "python", "platform", "device"} <= set(
            names
        )

    def test_help(self, run):
        status, out, err = run("generate", "--help")
        assert (status, err) == (0, "")
        assert "--max-new-tokens" in out


class TestCompilationCache:
    @pytest.fixture(autouse=True)
    def restore(self):
        names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
        before = {name: getattr(jax.config, name) for name in names}
        jax.config.update("jax_compilation_cache_dir", None)  # `load` may have set one
        yield
        for name, value in before.items():
            jax.config.update(name, value)

    def test_directory(self, monkeypatch, tmp_path):
        monkeypatch.setenv("QUANTSPEC_CACHE_DIR", str(tmp_path / "a" / "b"))
        assert compilation_cache.enable() == tmp_path / "a" / "b"
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a" / "b")
        monkeypatch.delenv("QUANTSPEC_CACHE_DIR")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert compilation_cache.directory() == tmp_path / "quantspec-jax" / "xla"

    def test_off_where_it_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").touch()
        for path in ("", str(tmp_path / "file" / "below"), os.devnull):
            monkeypatch.setenv("QUANTSPEC_CACHE_DIR", path)
            assert compilation_cache.enable() is None
            assert not jax.config.jax_compilation_cache_dir
