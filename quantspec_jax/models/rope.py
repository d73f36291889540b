"""Rotary position embeddings (arXiv 2104.09864) and their scalings, in float32."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np

from pallas_kernels.shapes import Ids, Tables, shaped
from quantspec_jax.models.config import RopeConfig


def rope_frequencies(rope: RopeConfig, head_dim: int, length: int) -> tuple[np.ndarray, float]:
    """Inverse frequencies [D/2] float32 and the factor on cos and sin.

    `length`: tokens the generation is allocated for. Dynamic NTK takes its factor from it, one for
    the whole generation; the other types do not look at it.
    """
    if rope.type == "dynamic":
        return 1 / _periods(_ntk_theta(rope, head_dim, length), head_dim), 1.0
    periods = _periods(rope.theta, head_dim)
    if rope.type == "linear":
        return 1 / periods / np.float32(rope.factor), 1.0
    if rope.type == "llama3":
        return _llama3(rope, 1 / periods), 1.0
    if rope.type == "yarn":
        return _yarn(rope, periods), _yarn_attention_factor(rope)
    return 1 / periods, 1.0


def _periods(theta: float, head_dim: int) -> np.ndarray:
    """θ^(2i/D), [D/2] float32: tokens per radian, in the roundings with which models are trained.

    A unit in the last place matters: at position 131,072 it turns the first planes by up to 0.008
    radians. So θ, exponent and power are rounded to float32, as in transformers.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return (float(np.float32(theta)) ** exponent.astype(np.float64)).astype(np.float32)


def _ntk_theta(rope: RopeConfig, head_dim: int, length: int) -> float:
    """Dynamic NTK: the base grows with the length beyond the context of pre-training."""
    original = rope.original_max_position or length
    grown = rope.factor * max(length, original) / original - (rope.factor - 1)
    return rope.theta * grown ** (head_dim / (head_dim - 2))


def _llama3(rope: RopeConfig, inverse: np.ndarray) -> np.ndarray:
    """Llama 3.1: long wavelengths are slowed down by the factor, short ones stay, between them a
    linear blend."""
    original = rope.original_max_position or 0
    wavelength = 1 / inverse * np.float32(2 * math.pi)
    rotations = 1 / wavelength * np.float32(original)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0, 1)
    return (1 - blend) * inverse / np.float32(rope.factor) + blend * inverse


def _yarn(rope: RopeConfig, periods: np.ndarray) -> np.ndarray:
    """YaRN, arXiv 2309.00071, "NTK-by-parts": dimensions that rotate more than beta_fast times in
    the original context stay, those that rotate less than beta_slow times are interpolated."""
    original, head_dim = rope.original_max_position or 0, 2 * len(periods)

    def dimension(rotations: float) -> float:
        full_turns = math.log(original / (rotations * 2 * math.pi))
        return head_dim * full_turns / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    stays = 1 - np.clip((np.arange(len(periods), dtype=np.float32) - low) / (high - low), 0, 1)
    return 1 / (np.float32(rope.factor) * periods) * (1 - stays) + 1 / periods * stays


def _yarn_attention_factor(rope: RopeConfig) -> float:
    """YaRN's temperature on the attention, as a factor on cos and sin."""
    if rope.attention_factor is not None:
        return rope.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * weight * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.mscale) / mscale(rope.mscale_all_dim)
    return mscale(1.0)


@shaped
def rope_tables(frequencies: np.ndarray, attention: float, positions: Ids) -> tuple[Tables, Tables]:
    """cos and sin [B, S, 1, D] float32 at `positions` [B, S]."""
    both = np.concatenate([frequencies, frequencies])[None, None, None]
    angles = positions.astype(jnp.float32)[..., None, None] * jnp.asarray(both)
    return jnp.cos(angles) * attention, jnp.sin(angles) * attention
