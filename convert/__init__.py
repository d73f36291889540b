"""Checkpoints: Hugging Face directories, GGUF files and hub ids in, Orbax out."""

from convert.drafts.open import open_draft
from convert.sources import Checkpoint, open_source
from convert.write import convert

__all__ = ["Checkpoint", "convert", "open_draft", "open_source"]
