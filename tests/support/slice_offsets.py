"""Compare the byte offsets that XLA annotates slices of a GPU program with to their indices.

XLA turns a slice of a large array in a loop into a copy whose address is `byte_offset + byte_stride
x iteration`, and writes both numbers into the program. jax 0.10.2 wrote those of the loop's counter
instead of the index (openxla/xla #46231). This reads a compiled program and computes the index of
every annotated slice, iteration by iteration.
"""

import json
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
LINE = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([\w\-]+)\((.*)$")
ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([\d,]*)[^}]*\})?")
CONFIG = re.compile(r'"dynamic_slice_config":(\{[^{}]*(?:\{[^{}]*\})?[^{}]*\})')
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.\-]+)")
BRANCHES = re.compile(r"(?:branch|called)_computations=\{([^}]*)\}")
DTYPES = {
  "pred": np.bool_,
  "s8": np.int8,
  "u8": np.uint8,
  "s32": np.int32,
  "u32": np.uint32,
  "s64": np.int64,
}
BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "bf16": 2,
  "f16": 2,
  "s32": 4,
  "u32": 4,
  "f32": 4,
  "s64": 8,
  "u64": 8,
  "f64": 8,
}
SAME = {
  "copy",
  "bitcast",
  "reshape",
  "convert",
  "opt-barrier",
  "optimization-barrier",
  "copy-done",
  "fusion-done",
}
BINARY = {
  "add": np.add,
  "subtract": np.subtract,
  "multiply": np.multiply,
  "minimum": np.minimum,
  "maximum": np.maximum,
  "and": np.bitwise_and,
  "or": np.bitwise_or,
  "divide": lambda a, b: np.trunc(a / b),
  "remainder": np.fmod,
}
COMPARED = {"EQ": np.equal, "NE": np.not_equal, "LT": np.less, "LE": np.less_equal}
COMPARED |= {"GT": np.greater, "GE": np.greater_equal}


class Unknown(Exception):
  """A number that follows from the data, or from an instruction that is not read here."""


class Instruction(NamedTuple):
  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  inside: str  # what stands in the brackets
  after: str
  root: bool

  @property
  def called(self) -> list[str]:
    several = [re.findall(r"[\w.\-]+", names) for names in BRANCHES.findall(self.after)]
    return CALLED.findall(self.after) + [name for names in several for name in names]


class Slice(NamedTuple):
  """An annotated slice in one iteration of its loop."""

  name: str
  shape: str  # of the array that is sliced
  iteration: int
  annotated: int  # byte offset
  indexed: int  # byte offset, by its indices

  @property
  def on_host(self) -> bool:
    return "S(5)" in self.shape

  @property
  def backward(self) -> bool:
    return self.iteration == 0 and self.indexed > 0


def slices(text: str) -> list[Slice]:
  """Return the annotated slices of a compiled GPU program, in three iterations of their loops.

  These are the first, the second and the last. Raises Unknown for an annotated slice whose index
  does not follow from the counters of loops.
  """
  computations, entry = _computations(text)
  return list(_walk(Frame(computations, entry, _from_data)))


def count(text: str) -> int:
  """Annotations in the text, each of which `slices` must find."""
  return len(CONFIG.findall(text))


class Frame:
  """A computation that runs: numbers of its instructions, each computed when it is asked for."""

  def __init__(
    self, computations: Any, name: str, parameter: Callable[[int], Any], loops: tuple[int, ...] = ()
  ):
    self.computations, self.body = computations, computations[name]
    # loops: iterations of those around, innermost first
    self.parameter, self.loops = parameter, loops
    self._known = {}

  def value(self, name: str) -> Any:
    """An array of numbers, or a function: index -> element, for a tuple. Raises Unknown."""
    if name not in self._known:
      self._known[name] = self._value(self.body[name])
    return self._known[name]

  @property
  def root(self) -> Any:
    return self.value(next(it.name for it in self.body.values() if it.root))

  def inside(self, called: str, operands: tuple[str, ...]) -> "Frame":
    return Frame(self.computations, called, lambda i: self.value(operands[i]), self.loops)

  def iteration(self, loop: Instruction, k: int) -> "Frame":
    """The body of a loop in its iteration k."""
    carried = self.value(loop.operands[0]) if k == 0 else self.iteration(loop, k - 1).root
    return Frame(
      self.computations, CALLED.search(loop.after)[1], lambda _: carried, (k, *self.loops)
    )

  def _value(self, it: Instruction) -> Any:
    operand = lambda i: self.value(it.operands[i])
    dtype, dims = _array(it.shape)
    if it.op == "parameter":
      return self.parameter(int(it.inside))
    if it.op in ("tuple", "get-tuple-element"):
      return (
        operand if it.op == "tuple" else operand(0)(int(re.search(r"index=(\d+)", it.after)[1]))
      )
    if it.op in SAME or it.op == "copy-start":
      found = operand(0)
      return found if callable(found) else np.asarray(found).reshape(dims).astype(dtype)
    if it.op in ("fusion", "call", "fusion-start"):
      return self.inside(it.called[0], it.operands).root
    if it.op == "while":
      last = int(TRIPS.search(it.after)[1]) - 1
      return self.iteration(it, last).root
    if it.op == "conditional":
      branch = int(np.clip(operand(0), 0, len(it.called) - 1))
      return self.inside(it.called[branch], (it.operands[branch + 1],)).root
    if dtype is None:
      raise Unknown(f"{it.op} of {it.shape}")
    if it.op == "constant":
      text = it.inside.replace("{", "[").replace("}", "]")
      return np.array(json.loads(text), dtype).reshape(dims)
    if it.op == "iota":
      axis = int(re.search(r"iota_dimension=(\d+)", it.after)[1])
      return np.broadcast_to(
        np.arange(dims[axis]).reshape([-1 if i == axis else 1 for i in range(len(dims))]), dims
      )
    if it.op == "broadcast":
      axes = [int(n) for n in re.search(r"dimensions=\{([\d,]*)\}", it.after)[1].split(",") if n]
      return np.broadcast_to(
        operand(0).reshape([dims[i] if i in axes else 1 for i in range(len(dims))]), dims
      )
    if it.op == "dynamic-slice":
      starts = self.starts(it)
      return operand(0)[tuple(slice(at, at + size) for at, size in zip(starts, dims, strict=True))]
    if it.op == "compare":
      return COMPARED[re.search(r"direction=(\w\w)", it.after)[1]](operand(0), operand(1))
    if it.op == "select":
      return np.where(operand(0), operand(1), operand(2))
    if it.op == "clamp":
      return np.clip(operand(1), operand(0), operand(2))
    if it.op == "negate":
      return -operand(0)
    if it.op in BINARY:
      return BINARY[it.op](operand(0), operand(1)).astype(dtype)
    raise Unknown(it.op)

  def starts(self, it: Instruction) -> list[int]:
    """Where a slice begins, along each axis: XLA moves one that would reach over the end."""
    first = 1 if it.op == "dynamic-slice" else 2
    _, whole = _array(self.body[it.operands[0]].shape)
    _, sizes = _array(it.shape if it.op == "dynamic-slice" else self.body[it.operands[1]].shape)
    at = [int(self.value(name).reshape(())) for name in it.operands[first:]]
    return [min(max(i, 0), n - size) for i, n, size in zip(at, whole, sizes, strict=True)]


def _walk(frame: Frame) -> Iterator[Slice]:
  for it in frame.body.values():
    if config := CONFIG.search(it.after):
      yield _compared(frame, it, json.loads(config[1]))
    if it.op == "while":
      trips = int(TRIPS.search(it.after)[1]) if TRIPS.search(it.after) else 2
      for k in sorted({0, min(1, trips - 1), trips - 1}):
        yield from _walk(frame.iteration(it, k))
    elif it.op == "conditional":
      for branch, operand in zip(it.called, it.operands[1:], strict=True):
        yield from _walk(frame.inside(branch, (operand,)))
    elif it.op in ("fusion", "call", "fusion-start"):
      yield from _walk(frame.inside(it.called[0], it.operands))


def _compared(frame: Frame, it: Instruction, config: dict[str, Any]) -> Slice:
  linear = config.get("linear", config)  # since jax 0.11
  if other := config.keys() - {"loop_index", "byte_offset", "byte_stride", "linear"}:
    raise Unknown(f"an annotation with {other}")
  iteration = frame.loops[int(config["loop_index"])]
  shape = frame.body[it.operands[0]].shape
  indexed = sum(
    i * stride for i, stride in zip(frame.starts(it), _byte_strides(shape), strict=True)
  )
  annotated = int(linear["byte_offset"]) + int(linear["byte_stride"]) * iteration
  return Slice(it.name, shape, iteration, annotated, indexed)


def _byte_strides(shape: str) -> list[int]:
  dtype, dims, layout = ARRAY.match(shape).groups()
  sizes, stride, strides = [int(n) for n in dims.split(",") if n], BYTES[dtype], {}
  for axis in [int(n) for n in layout.split(",") if n]:
    strides[axis], stride = stride, stride * sizes[axis]
  return [strides[axis] for axis in range(len(sizes))]


def _array(shape: str) -> tuple[Any, list[int]]:
  """Dtype and sizes; the dtype is None where numbers of it are no indices, and for a tuple."""
  match = ARRAY.match(shape)
  return (DTYPES.get(match[1]), [int(n) for n in match[2].split(",") if n]) if match else (None, [])


def _from_data(index: int) -> Any:
  raise Unknown(f"argument {index} of the program")


def _computations(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
  found, entry, body = {}, "", None
  for line in text.splitlines():
    if head := HEAD.match(line):
      body = found[head[2]] = {}
      entry = head[2] if head[1] else entry
    elif body is not None and (it := _instruction(line)):
      body[it.name] = it
  return found, entry


def _instruction(line: str) -> Instruction | None:
  match = LINE.match(re.sub(r"/\*index=\d+\*/", "", line))
  if not match:
    return None
  root, name, shape, op, rest = match.groups()
  depth, end = 1, 0
  while depth:
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  inside = rest[: end - 1]
  operands = tuple(re.findall(r"%([\w.\-]+)", inside))
  return Instruction(name, shape, op, operands, inside, rest[end:], bool(root))


def mismatches(found: list[Slice]) -> list[str]:
  return sorted(
    {
      f"{it.name} of {it.shape}: iteration {it.iteration} at {it.annotated}, its index says "
      f"{it.indexed}"
      for it in found
      if it.annotated != it.indexed
    }
  )
