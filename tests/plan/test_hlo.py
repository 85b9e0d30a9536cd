"""What is read from compiled programs: bytes moved, collectives, trip counts of loops."""

from pathlib import Path

import jax
import numpy as np
import pytest

from jaxft.plan import hlo


def test_hbm_bytes_count_slices_in_loops():
  """A loop of five iterations that adds row i of a matrix reads one row in each."""

  def total(x):
    return jax.lax.fori_loop(
      0, 5, lambda i, s: s + jax.lax.dynamic_index_in_dim(x, i, keepdims=False), x[0]
    )

  text = jax.jit(total).lower(jax.ShapeDtypeStruct((5, 100_000), np.float32)).compile().as_text()
  row = 4 * 100_000
  assert 15 * row <= hlo.hbm_bytes(text) <= 25 * row


OF_A_TPU = """
%all-reduce-scatter.1 (input: bf16[64,8]) -> bf16[16,8] {
  %all-reduce.1 = bf16[64,8]TILED all-reduce(%input), channel_id=1, to_apply=%add
  ROOT %dynamic-slice.1 = bf16[16,8]TILED dynamic-slice(%all-reduce.1, %zero, %zero)
}

%async_collective_fusion.1 (input: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.1 = bf16[64,8]TILED all-gather(%input), channel_id=2, dimensions={0}
}

%async_collective_fusion.2 (input: bf16[16,8]) -> bf16[64,8] {
  ROOT %all-gather.2 = bf16[64,8]TILED all-gather(%input), channel_id=2, dimensions={0}
}

%body.1 (param.1: (s32[], bf16[16,8])) -> (s32[], bf16[16,8]) {
  %custom-call.1 = bf16[64,8]{1,0} custom-call(%param.1), KERNEL, backend_config={"of": {
}}, metadata={op_name="a kernel"}
  %fusion.1 = bf16[16,8]{1,0} fusion(%custom-call.1), kind=kCustom, calls=%all-reduce-scatter.1
  %fusion.2 = bf16[64,8]{1,0} fusion(%fusion.1), kind=kCustom, calls=%async_collective_fusion.1
  %fusion.3 = bf16[64,8]{1,0} fusion(%fusion.2), kind=kCustom, calls=%async_collective_fusion.2
}

%condition.1 (param.2: (s32[], bf16[16,8])) -> pred[] {
  %constant.1 = s32[]{:T(128)} constant(12)
  ROOT %lt.1 = pred[]{:T(512)} compare(%get-tuple-element.1, %constant.1), direction=LT
}

ENTRY %main (param.3: bf16[16,8]) -> bf16[16,8] {
  %while.1 = (s32[]{:T(128)}, bf16[16,8]{1,0}) while(%tuple.1), condition=%condition.1, body=%body.1
}
"""
OF_A_TPU = OF_A_TPU.replace("TILED", "{1,0:T(8,128)(2,1)}")
OF_A_TPU = OF_A_TPU.replace("KERNEL", 'custom_call_target="tpu_custom_call"')


def test_tpu_loops_without_known_trip_count():
  """libtpu notes no trip counts: they are read from the loops' conditions."""
  nbytes = 12 * 2 * 64 * 8
  assert hlo.bytes_by_kind(hlo.collectives(OF_A_TPU)) == {
    "reduce-scatter": nbytes,
    "all-gather": nbytes,
  }


# A forward loop over five layers of 64 x 64 (tanh(x @ w), 8 rows), the backward loop, and an
# update, compiled for an H100.
STEPS = sorted((Path(__file__).parent / "hlo").glob("step_of_jax_*.hlo.txt"))


@pytest.mark.parametrize("file", STEPS, ids=lambda file: file.name)
def test_hbm_bytes_agree_across_jax_versions(file):
  """Since 0.11 slices in loops are asynchronous fusions ("fusion-start").

  These were counted with all of their inputs: 2.79 MB.
  """
  text = file.read_text()
  assert ("fusion-start(" in text) == ("0.10.2" not in file.name) and len(STEPS) == 3
  matrices, rows = 4 * 5 * 64 * 64, 4 * 5 * 8 * 64
  # Matrices: read forward and backward, their gradient zeroed, written and read, read and written
  # by the update; and the rows.
  assert 7 * matrices < hlo.hbm_bytes(text) < 14 * matrices + 30 * rows
  assert hlo.hbm_bytes(text) == pytest.approx(1_265_950, rel=0.04)
