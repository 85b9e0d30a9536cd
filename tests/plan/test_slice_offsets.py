"""The reader of annotated slices that checks every GPU program, on a program written by hand."""

import pytest
import slice_offsets

# A backward loop over twelve layers: iteration i writes layer 11 - i of an array in the host's
# memory, out of a fusion.
REVERSED = """
%write (stack: f32[12,8,3], row: f32[1,8,3], layer: s32[]) -> f32[12,8,3] {
  %stack = f32[12,8,3]{2,1,0:S(5)} parameter(0)
  %row = f32[1,8,3]{2,1,0} parameter(1)
  %layer = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %update = f32[12,8,3]{2,1,0:S(5)} dynamic-update-slice(UPDATED), ANNOTATED
}

%body (carried: (s32[], f32[12,8,3], f32[1,8,3])) -> (s32[], f32[12,8,3], f32[1,8,3]) {
  %carried = (s32[], f32[12,8,3]{2,1,0:S(5)}, f32[1,8,3]{2,1,0}) parameter(0)
  %i = s32[] get-tuple-element(%carried), index=0
  %weights = f32[12,8,3]{2,1,0:S(5)} get-tuple-element(%carried), index=1
  %gradient = f32[1,8,3]{2,1,0} get-tuple-element(%carried), index=2
  %one = s32[] constant(1)
  %last = s32[] constant(11)
  %next = s32[] add(%i, %one)
  %index = s32[] subtract(%last, %i)
  %written = f32[12,8,3]{2,1,0:S(5)} fusion(%weights, %gradient, %index), kind=kCustom, calls=%write
  ROOT %out = (s32[], f32[12,8,3]{2,1,0:S(5)}, f32[1,8,3]{2,1,0}) tuple(%next, %written, %gradient)
}

%condition (carried.1: (s32[], f32[12,8,3], f32[1,8,3])) -> pred[] {
  %carried.1 = (s32[], f32[12,8,3]{2,1,0:S(5)}, f32[1,8,3]{2,1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%carried.1), index=0
  %twelve = s32[] constant(12)
  ROOT %more = pred[] compare(%i.1, %twelve), direction=LT
}

ENTRY %main (all: f32[12,8,3], one.1: f32[1,8,3]) -> f32[12,8,3] {
  %all = f32[12,8,3]{2,1,0:S(5)} parameter(0)
  %one.1 = f32[1,8,3]{2,1,0} parameter(1)
  %none = s32[] constant(0)
  %begin = (s32[], f32[12,8,3]{2,1,0:S(5)}, f32[1,8,3]{2,1,0}) tuple(%none, %all, %one.1)
  %loop = (s32[], f32[12,8,3]{2,1,0:S(5)}, f32[1,8,3]{2,1,0}) while(%begin), CALLED, TWELVE
  ROOT %result = f32[12,8,3]{2,1,0:S(5)} get-tuple-element(%loop), index=1
}
"""
LAYER = 4 * 8 * 3  # bytes


def program(config, index="subtract(%last, %i)"):
  """The text with this annotation and this index of the layer."""
  text = REVERSED.replace("UPDATED", "%stack, %row, %layer, %zero, /*index=4*/%zero")
  text = text.replace("CALLED", "condition=%condition, body=%body")
  text = text.replace("ANNOTATED", f'backend_config={{"dynamic_slice_config":{config}}}')
  text = text.replace("TWELVE", 'backend_config={"known_trip_count":{"n":"12"}}')
  return text.replace("subtract(%last, %i)", index)


def slices(offset, stride, nested):
  """The slices with this annotation, as jax 0.10 writes it or, nested, as jax 0.11 and 0.12 do."""
  linear = f'"byte_offset":"{offset}","byte_stride":"{stride}"'
  zero = '"byte_offset":"0","byte_stride":"0"'
  fields = f'{zero},"linear":{{{linear}}}' if nested else linear
  config = f'{{"loop_index":"0",{fields}}}'
  return slice_offsets.slices(program(config))


@pytest.mark.parametrize("nested", [False, True])
def test_slice_offset_follows_its_index(nested):
  found = slices(11 * LAYER, -LAYER, nested)
  assert [(it.iteration, it.indexed) for it in found] == [(0, 11 * LAYER), (1, 10 * LAYER), (11, 0)]
  assert not slice_offsets.mismatches(found)
  assert all(it.on_host for it in found) and found[0].backward


@pytest.mark.parametrize("nested", [False, True])
def test_slice_offset_of_loop_counter_is_wrong(nested):
  """As jax 0.10.2 annotates the gradients of layers: that of layer 11 goes to layer 0."""
  found = slices(0, LAYER, nested)
  assert slice_offsets.mismatches(found)[0].endswith(
    f"iteration 0 at 0, its index says {11 * LAYER}"
  )
  assert len(slice_offsets.mismatches(found)) == 3


def test_slice_offset_needs_index_without_data():
  """An index that comes from data cannot be annotated."""
  config = '{"loop_index":"0","byte_offset":"0","byte_stride":"4"}'
  with pytest.raises(slice_offsets.Unknown, match="argument 0"):
    slice_offsets.slices(program(config, "convert(%weights)"))
