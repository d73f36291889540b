"""`open_draft`: an existing 4-bit checkpoint of the same model as a draft."""

from __future__ import annotations

from pathlib import Path

from convert.drafts.codes import QuantizedCheckpoint
from convert.drafts.gguf import GgufBlocks
from convert.drafts.gptq_awq import Awq, Gptq, PackedSafetensors
from convert.files import hub
from convert.sources import looks_like_hub_id, user_path
from quantspec_jax.checks import require
from quantspec_jax.files import exists, open_file, read_json
from quantspec_jax.models.config import ModelConfig
from quantspec_jax.settings import Settings

_METHODS: dict[str, type[PackedSafetensors]] = {"gptq": Gptq, "awq": Awq}
_CONFIGS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # older checkpoints' own
_ALLOWED = "a GGUF file with 4-bit blocks, or a directory or hub id of a GPTQ or AWQ checkpoint"


def open_draft(source: str | Path, config: ModelConfig) -> QuantizedCheckpoint:
    """A quantized checkpoint of the model that `config` describes; reads headers alone.

    Raises:
      ValueError: not a 4-bit checkpoint, another model's, of unknown packing, or damaged.
    """
    source = str(source)
    path = user_path(source, "draft_from")
    if exists(path) and not path.is_dir():
        with open_file(path) as stream:
            require(stream.read(4) == b"GGUF", "draft_from", source, _ALLOWED)
        return GgufBlocks(source, path, config)
    if not exists(path):
        require(looks_like_hub_id(source), "draft_from (which does not exist)", source, _ALLOWED)
        path = hub.fetch_weights(source)
    method, quantization = _quantization(source, path)
    return _METHODS[method](source, path, config, quantization)


def _quantization(source: str, directory: Path) -> tuple[str, Settings]:
    """The method and the quantization config of a directory."""
    if not (directory / "config.json").exists():
        raise ValueError(f"draft_from is {source!r}, a directory without config.json")
    found = read_json(directory / "config.json").get("quantization_config")
    default = None
    for name, implied in _CONFIGS.items():
        if found is None and (directory / name).exists():
            found, default = read_json(directory / name), implied
    if found is None:
        raise ValueError(f"draft_from is {source!r}, which has no quantization_config: it is not "
                         f"quantized; allowed: {_ALLOWED}")  # fmt: skip
    require(isinstance(found, dict), f"quantization_config in {source}", found, "an object")
    values = Settings(found, source)
    key = "quant_method" if "quant_method" in found or "method" not in found else "method"
    return values.choice(key, _METHODS, default), values
