"""What runs in a process of its own, with little memory and time: chat templates, and tokenizers
with regular expressions that are not known (`quantspec_jax/text/child.py` starts and ends it).

A request a line in, an answer a line out. It is run as a script, so that it need not import the
package, and jax with it.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any


def load_tokenizer(directory: str, family: str | None, named: str | None) -> Any:
    """The tokenizer in a directory of files, tried out. Python that a checkpoint brings along is
    never run, and nobody is asked whether to.

    Args:
      family: config.json's model_type; transformers chooses the class for it. None: the tokenizer
        is read exactly as it was saved.
      named: config.json's tokenizer_class.
    """
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if family is None:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, **options)
    else:
        # The class depends on these alone; transformers would check every other value, too.
        config = AutoConfig.for_model(family, tokenizer_class=named)
        tokenizer = AutoTokenizer.from_pretrained(directory, config=config, **options)
    try_out(tokenizer)
    return tokenizer


def try_out(tokenizer: Any) -> None:
    """A damaged tokenizer that can be read may yet panic when it is used."""
    ids = tokenizer("a b\n1", verbose=False)["input_ids"]
    tokenizer.decode(ids)
    _ = tokenizer.special_tokens_map, len(tokenizer)


def main(most_bytes: int) -> None:
    import transformers
    from transformers.utils.chat_template_utils import render_jinja_template

    # Imported now, when nobody waits for an answer.
    _ = transformers.AutoConfig, transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast
    answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
        "template": lambda request: _rendered(render_jinja_template, **request),
        "load": lambda request: _loaded(**request),
        "encode": _Encoder(),
    }
    _limit_memory(most_bytes)
    print("{}", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(_answer(answers[request.pop("what")], request)), flush=True)


def _limit_memory(most_bytes: int) -> None:
    """Beyond what Python and transformers take. Where the system knows such a limit and says how
    much there is already."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        with open("/proc/self/statm") as statm:
            pages = int(statm.read().split()[0])
        most = pages * resource.getpagesize() + most_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _answer(work: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> dict[str, Any]:
    from jinja2 import TemplateError

    try:
        return work(request)
    except BaseException as error:  # a template may raise anything, and Rust panics
        message = (str(error).strip() or "no message").splitlines()[0][:300]
        refused = isinstance(error, TemplateError)
        return {"kind": type(error).__name__, "message": message, "refused": refused}


def _rendered(
    render: Any, template: str, messages: list[Any], names: dict[str, Any], most: int
) -> dict[str, Any]:
    rendered = render([messages], chat_template=template, add_generation_prompt=True, **names)
    text = rendered[0][0] if isinstance(rendered, tuple) else rendered[0]
    if len(text) > most:
        raise OverflowError(f"it renders {len(text):,} characters, of {most:,} that are allowed")
    return {"text": text}


def _loaded(**request: Any) -> dict[str, Any]:
    load_tokenizer(**request)
    return {}


class _Encoder:
    """Texts to ids by the tokenizer that was sent last. Without one the answer is {}."""

    def __init__(self) -> None:
        self._name = ""
        self._tokenizer: Any = None

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        from tokenizers import Tokenizer

        if "definition" in request:
            tokenizer = Tokenizer.from_str(request["definition"])
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._name, self._tokenizer = request["name"], tokenizer
        if self._tokenizer is None or self._name != request["name"]:
            return {}
        text, special = request["text"], request["special"]
        return {"ids": self._tokenizer.encode(text, add_special_tokens=special).ids}


if __name__ == "__main__":
    main(int(sys.argv[1]))
