"""Shapes in signatures: checked here, of no cost to a user."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from pallas_kernels import shapes
from pallas_kernels.int4_matmul.api import int4_matmul
from pallas_kernels.kv_attention.api import Read, kv_attention
from pallas_kernels.layout import LayerCache
from pallas_kernels.quantize_pack.api import quantize_keys, quantize_values
from pallas_kernels.rope_append.heads import rotate
from quantspec_jax import prefill
from quantspec_jax.cache import append, from_prompt, rollback
from quantspec_jax.generate.accept import accept
from quantspec_jax.generate.cache_pass import cache_pass
from quantspec_jax.generate.sampling import choose, warp
from quantspec_jax.generate.verify import verify
from quantspec_jax.models.attention import prompt_attention
from quantspec_jax.models.rope import rope_tables

CHECKED = [
    *(int4_matmul, kv_attention, quantize_keys, quantize_values, append, from_prompt, rollback),
    *(prompt_attention, rope_tables, rotate, prefill, cache_pass, verify, accept, choose, warp),
]


@pytest.mark.parametrize("function", CHECKED, ids=lambda function: function.__name__)
def test_public_functions_of_arrays_are_checked(function):
    """Whatever it takes, it takes no text in place of its first array."""
    names = list(function.__annotations__)
    with pytest.raises(TypeCheckError):
        function(**dict.fromkeys([name for name in names if name != "return"], "text"))


def attention(starts: int = 2):
    """Two sequences with `starts` starts."""
    buffer, at = jnp.zeros((2, 2, 16, 8)), jnp.zeros(starts, jnp.int32)
    cache, q = LayerCache(None, None, buffer, buffer), jnp.zeros((2, 3, 4, 8))
    return kv_attention(q, cache, at, at, read=Read("full"), sm_scale=1.0, backend="xla")


def test_a_letter_is_one_size_in_a_call():
    out, log_sum_exp, _ = attention()
    assert out.shape == (2, 3, 4, 8)
    assert log_sum_exp.shape == (2, 3, 4)
    with pytest.raises(TypeCheckError, match=r"start|quantized_length"):
        attention(starts=1)
    with pytest.raises(TypeCheckError):
        jax.jit(attention, static_argnames="starts")(starts=3)


def test_a_function_is_left_as_it_is_where_nothing_checks(monkeypatch):
    monkeypatch.setattr(shapes, "checker", None)

    def function(q: shapes.Queries) -> shapes.Queries:
        return q

    assert shapes.shaped(function) is function
