"""README.md: its examples run as they stand, and its tables are what the recorded runs say."""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shlex
from pathlib import Path
from types import ModuleType

import pytest

from quantspec_jax import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in the examples; here a tiny model stands for it


def blocks(language: str) -> list[str]:
    """The fenced blocks of a language, in order."""
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch, tiny_llama_dir):
    """A working directory with the files that the examples name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("QUANTSPEC_CACHE_DIR", "")
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


def test_commands_run(folder, tiny_llama_dir, capsys):
    lines = "".join(blocks("console")).splitlines()
    assert len(lines) >= 6
    assert all(line.startswith("$ quantspec ") for line in lines)
    for line in lines:
        out = run_command(line, tiny_llama_dir, capsys)
        assert out.strip(), line
        if "--json" in line:
            assert len(json.loads(out)["outputs"]) == line.count("--prompt ")


def test_python_runs(folder, tiny_llama_dir, capsys):
    assert cli.main(["convert", str(tiny_llama_dir), "smollm2"]) == 0
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert [len(tokens) for tokens in names["out"].tokens] == [
        stats["new_tokens"] for stats in names["out"].stats
    ]
    assert names["logits"].shape == (1, 3, names["model"].config.vocab_size)
    assert names["precise"].draft.group_size == 32


def help_texts(parser: argparse.ArgumentParser) -> str:
    """The help of a parser and of all its commands."""
    commands = [a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return parser.format_help() + "".join(help_texts(p) for c in commands for p in c.values())


def test_options_exist():
    """Every option that the text mentions is one of the parser's."""
    text = re.sub(r"<!-- results.*<!-- end", "", README, flags=re.DOTALL)
    mentioned = set(re.findall(r"(?<=[ `])--[a-z][a-z-]+", text)) - {"--no-deps"}
    assert mentioned
    known = help_texts(cli.make_parser(["bench"]))
    assert not [option for option in mentioned if option not in known]


def test_commands_for_an_accelerator_parse():
    lines = "".join(blocks("sh")).splitlines()
    assert lines
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "quantspec"
        cli.make_parser(arguments).parse_args(arguments)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z]+) ", README)) | {"demo", "test"}:
        if re.search(rf"[`\n ]make {target}[ `]", README):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_files_exist():
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.fixture(scope="module")
def render() -> ModuleType:
    spec = importlib.util.spec_from_file_location("render", ROOT / "benchmarks" / "render.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_up_to_date(render):
    assert render.rendered(README) == README, "run: python benchmarks/render.py"


def test_recorded_runs_say_what_it_takes_to_repeat_them():
    for path in sorted((ROOT / "benchmarks").glob("*.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        assert {"what", "command", "versions", "device", "date", "rows"} <= set(run), path.name
        assert run["rows"], path.name


def test_a_table_shows_every_value(render):
    rows = [
        {"kernel": "a", "milliseconds": 0.5, "peers": {"b": 12.25}, "rate": None, "seed": 0},
        {"kernel": "a|c", "milliseconds": 1e-5, "peers": {"b": 3.0}, "rate": 0.5, "seed": 0},
    ]
    run = {
        "what": "w",
        "command": ["x", "y"],
        "versions": {"jax": "1"},
        "device": "d",
        "model": "m",
    }
    table = render.table(run | {"date": "2030-01-01", "rows": rows}, Path("r.json"))
    assert "**W** · d · 2030-01-01 · jax 1" in table
    assert "`x y`; model m, seed 0" in table
    assert "| kernel | milliseconds | peers b | rate |" in table
    assert "| a | 0.5 | 12.25 |  |" in table
    assert "| a\\|c | 1.00e-05 | 3 | 0.5 |" in table


def test_long_runs_are_cut_and_say_so(render):
    rows = [{"n": n} for n in range(100)]
    run = {"what": "w", "command": "c", "device": "d", "date": "2030-01-01", "rows": rows}
    table = render.table(run, Path("r.json"))
    assert f"The first {render.MOST_ROWS} of 100 rows" in table
    assert "| 99 |" not in table


def test_rendering_keeps_the_text_around(render, tmp_path):
    text = f"before\n{render.BEGIN}\nold\n{render.END}\nafter\n"
    new = render.rendered(text, tmp_path)
    assert new.startswith("before\n")
    assert new.endswith("\nafter\n")
    assert "old" not in new
    assert render.rendered(new, tmp_path) == new
    with pytest.raises(ValueError, match="lacks a line"):
        render.rendered("no markers", tmp_path)
