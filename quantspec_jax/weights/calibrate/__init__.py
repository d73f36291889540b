"""Calibrated quantization of the draft's weights."""

from quantspec_jax.weights.calibrate.blocks import calibrate
from quantspec_jax.weights.calibrate.text import calibration_tokens

__all__ = ["calibrate", "calibration_tokens"]
