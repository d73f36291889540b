"""Calibrated quantization of the draft's weights."""

from quantspec_jax.weights.calibrate.blocks import calibrate, calibrate_in_turn
from quantspec_jax.weights.calibrate.text import calibration_tokens

__all__ = ["calibrate", "calibrate_in_turn", "calibration_tokens"]
