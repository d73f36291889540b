"""Quality over a text, teacher-forced: each position sees exactly what decoding would."""

from quantspec_jax.evaluate.codecs import codecs
from quantspec_jax.evaluate.measures import acceptance, perplexity
from quantspec_jax.evaluate.quality import quality
from quantspec_jax.evaluate.sweep import sweep

__all__ = ["acceptance", "codecs", "perplexity", "quality", "sweep"]
