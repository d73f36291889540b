"""Quality over a text, teacher-forced: each position sees exactly what decoding would."""

from quantspec_jax.evaluate.measures import acceptance, perplexity

__all__ = ["acceptance", "perplexity"]
