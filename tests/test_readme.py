"""README.md, CONTRIBUTING.md and the tables: what they show can be typed, and is what runs say."""

from __future__ import annotations

import argparse
import importlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from quantspec_jax import cli
from quantspec_jax.bench import record
from quantspec_jax.commands.options import Parser
from quantspec_jax.engine import draft_cost

ROOT = Path(__file__).parents[1]
BENCHMARKS = ROOT / "benchmarks"
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCUMENTS = [
    *("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "convert/README.md"),
    *("quantspec_jax/README.md", "quantspec_jax/weights/README.md"),
    "quantspec_jax/engine/README.md",
]
RECORDS = sorted(BENCHMARKS.glob("*.json"))
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in the examples; here a tiny model stands for it
PIP_OPTIONS = {"--no-deps"}
SCRIPTS = ("benchmarks", "tests/fuzz")  # what a recorded command may start
LARGEST_README = 12 * 1024  # bytes: five minutes of reading


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def whole_commands(text: str) -> list[str]:
    """The lines of a document that are commands: in fenced blocks, and indented."""
    lines = "".join(blocks("console", text) + blocks("sh", text)).splitlines()
    lines += re.findall(r"^ {4}((?:quantspec|python|make|pip) .*)$", text, re.MULTILINE)
    return [line.removeprefix("$ ").partition("  #")[0].strip() for line in lines]


def mentions(text: str) -> list[str]:
    """What is said in code, `like this`, in one line or over two; no blocks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose)]


@pytest.fixture(autouse=True)
def scripts_import_each_other(monkeypatch):
    for folder in SCRIPTS:
        monkeypatch.syspath_prepend(ROOT / folder)


def parse(command: str) -> argparse.Namespace | None:
    """Read a command as its program does, without running it.

    Raises:
      ValueError, SystemExit: it cannot be typed.
    """
    program, *words = shlex.split(command)
    if program == "quantspec":
        return cli.make_parser().parse_args(words)
    if program == "python" and words[0] == "-m":
        assert words[1] == "pytest"
        return None
    if program == "python":
        script = importlib.import_module(Path(words[0]).stem)
        assert words[0].startswith(SCRIPTS)
        assert Path(script.__file__ or "") == ROOT / words[0]
        return script.make_parser().parse_args(words[1:])
    if program == "make":
        assert words[0] in make_targets()
        return None
    assert (program, words[0]) == ("pip", "install")
    return None


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", read("Makefile"), re.MULTILINE))


def parsers(parser: Parser) -> Iterator[Parser]:
    """A parser and those of its commands."""
    parser.complete()
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in action.choices.values():
                yield from parsers(each)


class TestCommands:
    @pytest.mark.parametrize("document", DOCUMENTS)
    def test_every_command_shown_can_be_typed(self, document):
        for line in whole_commands(read(document)):
            parse(line)

    def test_commands_are_found(self):
        found = {line.split()[0] for doc in DOCUMENTS for line in whole_commands(read(doc))}
        assert found == {"quantspec", "python", "make", "pip"}

    @pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
    def test_every_recorded_command_can_be_typed(self, path):
        run = json.loads(path.read_text(encoding="utf-8"))
        for command in run["command"].split("; "):
            assert parse(command) is not None

    @pytest.mark.parametrize(
        "command",
        [
            "quantspec bench decode --context 131072 (stopped before 32768)",
            "quantspec eval acceptance --model M --text T --context 64 --json, and --draft-bits 4",
            "quantspec eval acceptance --model M --context 64",
            "python benchmarks/identity.py --model M --output FILE",
            "python benchmarks/gone.py",
            "python benchmarks/fuzz.py --cases 10",
            "python tests/fuzz/fuzz.py --cases many",
            "make coffee",
        ],
    )
    def test_what_cannot_be_typed_is_seen(self, command):
        with pytest.raises((ValueError, SystemExit, ImportError, AssertionError)):
            parse(command)

    def test_a_scripts_recorded_command_gives_the_same_options(self):
        """Of files the names are kept."""
        given = parse(
            "python benchmarks/draft_weights.py --model /a/m.gguf --text /b/x.txt --text y.txt "
            "--output /c/o.json --method 'full weights' --context 64"
        )
        typed = record.command("python benchmarks/draft_weights.py", given)
        assert "/" not in typed.replace("benchmarks/", "")
        again = vars(parse(typed))
        files = {
            "model": "m.gguf",
            "text": [Path("x.txt"), Path("y.txt")],
            "output": Path("o.json"),
        }
        assert again == vars(given) | files

    def test_a_hub_id_is_kept_whole(self):
        line = "quantspec eval acceptance --model Qwen/Qwen2.5-7B --text t --context 64 --sweep"
        line += " --draft-of /a/one --draft-of two"
        typed = record.command("quantspec eval acceptance", parse(line))
        again = parse(typed)
        assert (again.model, again.draft_of) == ("Qwen/Qwen2.5-7B", ["one", "two"])
        assert again.sweep


@pytest.mark.parametrize("document", DOCUMENTS)
def test_options_exist(document):
    """Every option that a document mentions is one of a parser's."""
    known = {
        option for each in parsers(cli.make_parser()) for option in each._option_string_actions
    }
    spans = mentions(read(document))
    if document == "benchmarks/README.md":  # its commands are those of the records
        spans = [span for span in spans if not re.search(r"python (benchmarks|tests/fuzz)/", span)]
    mentioned = {word for span in spans for word in re.findall(r"(?<!\S)--[a-z][a-z-]*", span)}
    assert mentioned <= known | PIP_OPTIONS
    if document == "README.md":
        assert {"--gamma", "--backend"} <= mentioned


def test_make_targets_exist():
    """Every target that is mentioned, and every one that is declared."""
    said = [span for doc in DOCUMENTS for span in mentions(read(doc))]
    said += [line for doc in DOCUMENTS for line in whole_commands(read(doc))]
    mentioned = {found[1] for span in said if (found := re.match(r"make ([a-z]+)", span))}
    assert {"demo", "test", "lint", "format", "clean"} <= mentioned <= make_targets()
    (phony,) = re.findall(r"^\.PHONY: (.*)$", read("Makefile"), re.MULTILINE)
    assert set(phony.split()) <= make_targets()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_exist(document):
    folder = (ROOT / document).parent
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", read(document)):
        assert (folder / link).exists(), link


def test_files_to_change_exist():
    """CONTRIBUTING.md names files that are there."""
    paths = [span for span in mentions(read("CONTRIBUTING.md")) if re.fullmatch(r"\S+/\S*", span)]
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_readme_is_short():
    assert len(README.encode()) <= LARGEST_README


@pytest.fixture
def folder(tmp_path, monkeypatch, one_layer_llama_dir):
    """A working directory with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
    # γ "auto" compiles a program for each γ that it tries: at this cost none but the plain one.
    monkeypatch.setattr(draft_cost, "known", lambda key: 100.0)
    Path("book.txt").write_text("The cache is stored once, in two planes. " * 40, encoding="utf-8")
    return tmp_path


def run_command(line: str, tiny_model: Path, capsys) -> str:
    program, *arguments = shlex.split(line.removeprefix("$ "))
    assert program == "quantspec"
    arguments = [str(tiny_model) if word == HUB_ID else word for word in arguments]
    status = cli.main(arguments)
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out


def test_commands_run(folder, one_layer_llama_dir, capsys):
    lines = "".join(blocks("console")).splitlines()
    assert len(lines) >= 6
    assert all(line.startswith("$ quantspec ") for line in lines)
    for line in lines:
        out = run_command(line, one_layer_llama_dir, capsys)
        assert out.strip(), line
        if "--json" in line:
            assert len(json.loads(out)["outputs"]) == line.count("--prompt ")


def test_python_runs(folder, one_layer_llama_dir, capsys):
    assert cli.main(["convert", str(one_layer_llama_dir), "smollm2"]) == 0
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert [len(tokens) for tokens in names["out"].tokens] == [
        stats["new_tokens"] for stats in names["out"].stats
    ]
    assert names["logits"].shape == (1, 3, names["model"].config.vocab_size)
    assert names["precise"].draft.group_size == 32


def test_a_jit_of_ones_own_is_short_and_decodes_what_generate_does(folder, one_layer_llama_dir):
    assert cli.main(["convert", str(one_layer_llama_dir), "smollm2"]) == 0
    ((name, block),) = re.findall(
        r"<!-- ([^>]*): at most 6 lines -->\n```python\n(.*?)```", README, re.S
    )
    assert name == "decoding in a jit of one's own"
    assert sum(bool(line) for line in block.splitlines()) <= 6
    names: dict = {}
    setup = "import jax, quantspec_jax as qs\nmodel = qs.load('smollm2')\n"
    setup += "config = qs.GenerateConfig(max_new_tokens=32)\n"
    exec(setup + block, names)
    prompts = ["Once upon a time", "The sea was"]
    expected = names["qs"].generate(names["model"], prompts, names["config"]).tokens
    assert [row[: len(e)].tolist() for row, e in zip(names["tokens"], expected, strict=True)] == (
        expected
    )


def test_an_engine_stepped_by_hand_answers_all_and_sessions_keep_their_cache(
    folder, one_layer_llama_dir, capsys
):
    assert cli.main(["convert", str(one_layer_llama_dir), "smollm2"]) == 0
    text = read("quantspec_jax/engine/README.md")
    by_hand, sessions, rollouts = blocks("python", text)
    (short,) = re.findall(r"by hand: at most 15 lines -->\n```python\n(.*?)```", text, re.S)
    assert short == by_hand
    lines = [line for line in by_hand.splitlines() if line and "import " not in line]
    assert len(lines) <= 15
    names: dict = {}
    exec(by_hand, names)
    said = capsys.readouterr().out
    for prompt in ("Once upon a time", "The sea was", "In the city"):
        alone = names["qs"].generate(names["model"], prompt, names["config"]).tokens[0]
        assert f"{prompt} {names['model'].tokenizer.decode(alone)}\n" in said
    exec(sessions, names)
    assert [message["role"] for message in names["session"].messages[:2]] == ["system", "user"]
    assert names["session"].tokens
    exec(rollouts, names)
    assert 1 <= len(names["out"].tokens[0]) <= 64


@pytest.fixture
def render() -> ModuleType:
    return importlib.import_module("render")


def run_of(render, rows, what="w", **more):
    record = {"what": what, "command": "c", "device": "d", "date": "2030-01-01", "rows": rows}
    return render.Run(Path(f"{what}.json"), record | more)


class TestTables:
    def test_are_up_to_date(self, render):
        runs = render.recorded()
        assert render.rendered(README, runs) == README, "run: python benchmarks/render.py"
        assert render.all_runs(runs) == read("benchmarks/README.md"), "run the same"

    def test_every_run_has_one(self):
        text = read("benchmarks/README.md")
        for path in RECORDS:
            assert text.count(f"[{path.name}]({path.name})") == 1

    def test_recorded_runs_say_what_it_takes_to_repeat_them(self):
        for path in RECORDS:
            run = json.loads(path.read_text(encoding="utf-8"))
            assert {"what", "command", "versions", "device", "date", "rows"} <= set(run), path.name
            assert run["rows"], path.name

    def test_show_every_value(self, render):
        rows = [
            {"kernel": "a", "milliseconds": 0.5, "peers": {"b": 12.25}, "rate": None, "seed": 0},
            {"kernel": "a|c", "milliseconds": 1e-5, "peers": {"b": 3.0}, "rate": 0.5, "seed": 0},
        ]
        more = {"command": ["x", "y"], "versions": {"jax": "1"}, "model": "m", "note": "cut short"}
        table = render.table(run_of(render, rows, **more))
        assert "**W** · d · 2030-01-01 · jax 1" in table
        assert "`x y`; model m, seed 0 (cut short)" in table
        assert "| kernel | milliseconds | peers b | rate |" in table
        assert "| a | 0.5 | 12.25 |  |" in table
        assert "| a\\|c | 1.00e-05 | 3 | 0.5 |" in table

    def test_long_runs_are_cut_and_say_so(self, render):
        table = render.table(run_of(render, [{"n": n} for n in range(100)]))
        assert f"The first {render.MOST_ROWS} of 100 rows" in table
        assert "| 99 |" not in table

    def test_simulated_acceptance_is_in_the_title(self, render):
        run = run_of(render, [{"floor_milliseconds": 1.0}], "decode-x", simulated_acceptance=0.9)
        text = render.all_runs([run])
        assert "**Decode x, simulated acceptance** ·" in text
        assert "**Roofline, simulated acceptance** ·" in text
        for path in RECORDS:
            run = render.Run(path, json.loads(path.read_text(encoding="utf-8")))
            simulates = "--simulate-acceptance" in run.record["command"]
            assert simulates == run.title.endswith("simulated acceptance")

    def test_rendering_keeps_the_text_around(self, render):
        text = f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n"
        new = render.rendered(text, [])
        assert new.startswith("before\n")
        assert new.endswith("\nafter\n")
        assert "old" not in new
        assert render.rendered(new, []) == new
        with pytest.raises(ValueError, match="lacks a line"):
            render.rendered("no markers", [])


def text_row(context, gamma, speed, speed_up, **more):
    """A row of `quantspec bench text`."""
    mode = "autoregressive full" if gamma is None else "quantspec"
    rate = None if gamma is None else 0.9
    row = {"model": "m", "mode": mode, "context": context, "gamma": gamma, "temperature": 0.0}
    row |= {"tokens_per_second": speed, "speed_up": speed_up, "acceptance_rate": rate}
    return row | more


class TestHeadlines:
    """The one table of README.md."""

    def test_real_text_comes_first_and_simulated_rows_are_marked(self, render):
        simulated = [
            {
                "mode": "autoregressive full",
                "context": 8,
                "tokens_per_second": 50.0,
                "speed_up": 1.0,
            },
            {
                "mode": "quantspec",
                "context": 8,
                "tokens_per_second": 100.0,
                "speed_up": 2.0,
                "acceptance": 0.93,
                "acceptance_is_simulated": True,
            },
        ]
        real = [text_row(8, None, 40.0, 1.0), text_row(8, 4, 90.0, 2.25)]
        name = "decode-llama-2-7b-h200-2030-01-01"
        runs = [
            run_of(render, simulated, name, simulated_acceptance=0.93, preset="llama-2-7b"),
            run_of(render, real, "text-m-2030-01-01"),
        ]
        text = render.headline_text(runs)
        first, second = text.splitlines()[-2:]
        assert first == "| m | 8 | greedy | 40 | 90 | 2.25 × |  |  | 0.90 |"
        assert second == "| llama-2-7b | 8 |  | 50 | 100 | 2.00 × |  |  | 0.93, *simulated* |"
        assert text.startswith("On real text, m makes 90 tokens/s after 8 tokens, 2.25 times plain")

    def test_rows_are_those_of_gamma_auto_or_else_the_fastest(self, render):
        rows = [text_row(8, None, 40.0, 1.0), text_row(8, 2, 60.0, 1.5), text_row(8, 4, 80.0, 2.0)]
        (fixed,) = render.headlines([run_of(render, rows, "text-a")])
        assert fixed.ours == 80
        rows.append(text_row(8, "auto", 70.0, 1.75))
        (adaptive,) = render.headlines([run_of(render, rows, "text-a")])
        assert (adaptive.ours, adaptive.plain) == (70, pytest.approx(40))

    def test_a_policy_that_is_no_default_is_named_and_not_in_the_sentence(self, render):
        name = "policies-qwen2.5-coder-1.5b-131k-moby-dick-h200-2030-01-01"
        rows = [
            text_row(16, 4, speed, speed / 40, policy=policy, share=0.25)
            for policy, speed in (("top-pages", 80.0), ("window", 100.0))
        ]
        usual = [text_row(8, 4, 60.0, 1.5, policy="auto", share=None)]
        text = render.headline_text([run_of(render, usual, "text-a"), run_of(render, rows, name)])
        first, second = text.splitlines()[-2:]
        assert first == "| m | 8 | greedy | 40 | 60 | 1.50 × |  |  | 0.90 |"
        assert second == "| m | 16 | greedy, window 0.25 | 40 | 100 | 2.50 × |  |  | 0.90 |"
        assert text.startswith("On real text, m makes 60 tokens/s after 8 tokens, 1.50 times plain")

    def test_what_was_copied_is_said_beside_the_same_without_copies(self, render):
        """Of `lookup` the default, though another one is faster; devices where they differ."""
        rows = [
            text_row(8, gamma, speed, speed / 40, lookup=lookup, lookup_accepted=share)
            for gamma, lookup, speed, share in (
                *((4, 0, 70.0, 0.0), ("auto", 0, 60.0, 0.0), ("auto", 7, 90.0, 0.45)),
                ("auto", 15, 95.0, 0.6),
            )
        ]
        run = run_of(render, rows, "text-a")
        text = render.headline_text([run])
        row = "| m | 8 | greedy | 40 | 90 | 2.25 × | 45% | 1.50 × | 0.90 |"
        assert text.splitlines()[-1] == row
        assert "45% of them were copied" in text
        assert "Without copies it is 1.50 times." in text
        assert text.startswith("On real text, m makes 90 tokens/s")
        asked = [text_row(8, 4, 95.0, 2.375, lookup=7, lookup_accepted=0.6)]
        lines = render.headline_text([run, run_of(render, asked, "text-b")]).splitlines()
        assert lines[-1] == "| m | 8 | greedy, γ 4 | 40 | 95 | 2.38 × | 60% |  | 0.90 |"
        assert lines[0].startswith("On real text, m makes 90 tokens/s")
        other = run_of(render, rows, "text-b")
        other.record["device"] = "another"
        lines = render.headline_text([run, other]).splitlines()
        assert [line.split(" | ")[-1] for line in lines[-2:]] == ["d |", "another |"]

    def test_a_draft_whose_lm_head_is_no_default_is_named(self, render):
        rows = [text_row(8, None, 40.0, 1.0), text_row(8, "auto", 80.0, 2.0)]
        for draft, words in (
            ("4-bit gptq, all", ""),
            ("4-bit, lm_head 4-bit", ", draft lm_head 4-bit"),
        ):
            (row,) = render.headlines([run_of(render, rows, "text-a", draft=draft)])
            assert row.sampling == f"greedy{words}"

    def test_a_run_that_this_version_would_not_repeat_is_no_headline(self, render):
        rows = [text_row(8, None, 40.0, 1.0), text_row(8, 2, 60.0, 1.5)]
        run = run_of(render, rows, "text-a", outdated="Outdated: plain decoding is faster since.")
        assert render.headlines([run]) == []
        assert "(Outdated: plain decoding is faster since.)" in render.table(run)

    def test_rows_are_of_all_prompts(self, render):
        rows = [
            text_row(8, 4, speed, speed_up, prompts=prompts)
            for speed, speed_up, prompts in ((90.0, 3.0, 1), (50.0, 1.5, 1), (64.0, 2.0, 2))
        ]
        run = run_of(render, rows, "text-a")
        (row,) = render.headlines([run])
        assert (row.ours, row.speed_up) == (64, pytest.approx(2))
        assert "| 90 |" not in render.table(run)

    def test_speculation_that_switched_itself_off_is_a_row(self, render):
        row = text_row(8, "auto", 40.0, 1.0, acceptance_rate=None)
        (found,) = render.headlines([run_of(render, [row], "text-a")])
        assert (found.ours, found.acceptance) == (40, "nothing drafted")

    def test_there_are_at_most_eight(self, render):
        rows = [text_row(n, 4, 80.0, 2.0) for n in range(1, 20)]
        decode = [{"context": 1, "tokens_per_second": 1.0, "speed_up": 1.0, "acceptance": 0.9}] * 20
        names = ("decode-llama-2-7b-h200-x", "decode-llama-3.1-8b-h200-x")
        runs = [run_of(render, rows, "text-a")]
        runs += [
            run_of(
                render,
                [row | {"context": n} for n, row in enumerate(decode, 1)],
                name,
                simulated_acceptance=0.9,
                preset="p",
            )
            for name in names
        ]
        found = render.headlines(runs)
        assert len(found) == render.MOST_HEADLINES == 8
        assert [row.simulated for row in found] == sorted(row.simulated for row in found)
