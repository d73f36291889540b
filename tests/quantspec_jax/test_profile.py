"""Where a trace's time went."""

from __future__ import annotations

import pytest

from pallas_kernels.timing import Kernel
from quantspec_jax.bench.profile import breakdown, busy, kind_of


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("kv_attention_merge_mosaic_gpu_kernel", "merges"),
        ("kv_attention_int4_mosaic_gpu_kernel", "int4 attention"),
        ("kv_attention_int8_mosaic_gpu_kernel", "int8 attention"),
        ("kv_attention_full_mosaic_gpu_kernel", "full attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma", "full attention"),
        ("nvjet_sm90_tst_128x8_64x12_4x1_v_bz_NNT", "full products"),
        ("gemm_fusion_dot_451", "full products"),
        ("int4_matmul_mosaic_gpu_kernel", "int4 products"),
        ("add_rms_norm_mosaic_gpu_kernel", "norms"),
        ("quantize_keys_mosaic_gpu_kernel", "quantization"),
        ("MemcpyD2H", "copies"),
        ("input_concatenate_fusion_2", "copies"),
        ("loop_transpose_fusion", "copies"),
        ("loop_dynamic_update_slice_fusion_3", "copies"),
        ("loop_add_fusion", "elementwise"),
    ],
)
def test_kernels_are_told_apart_by_name(name, kind):
    assert kind_of(name) == kind


def test_time_in_which_two_kernels_ran_counts_once():
    kernels = [Kernel(0, 10, "a"), Kernel(2, 3, "b"), Kernel(8, 6, "c"), Kernel(20, 5, "d")]
    assert busy(kernels) == 14 + 5


def test_parts_and_gaps_add_up_to_the_round():
    """Two rounds of kernels that do not overlap, 3 ms each as measured without a trace."""
    names = ("gemm", "kv_attention_int4", "loop_add_fusion", "memcpy32_post")
    kernels = [Kernel(1e6 * i, 5e5 + 1e5 * (i % 4), names[i % 4]) for i in range(8)]
    found = breakdown(kernels, 2, 3.0)
    assert found["int4 attention"] == pytest.approx(0.6)
    assert found["full products"] == pytest.approx(0.5)
    assert sum(found.values()) == pytest.approx(3.0)
