"""Analysis of a compiled program's text (HLO): collectives and memory traffic.

A program is a list of computations, each a list of instructions. A loop calls its body's
computation as often as its trip count. A fusion calls a computation too, but runs it as one kernel,
whose intermediate values never reach memory.
"""

import collections
import math
import re
from typing import NamedTuple

DTYPE_BYTES = dict.fromkeys(("pred", "s8", "u8", "f8"), 1)
DTYPE_BYTES |= dict.fromkeys(("bf16", "f16", "s16", "u16"), 2)
DTYPE_BYTES |= dict.fromkeys(("f32", "s32", "u32"), 4) | dict.fromkeys(("f64", "s64", "u64"), 8)
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
COMPUTATION_HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED_COMPUTATIONS = re.compile(
  r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)|(?:called|branch)_computations=\{([^}]*)\}"
)
TRIP_COUNT = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
CHANNEL = re.compile(r"channel_id=(\d+)")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
LOOP_LIMIT = re.compile(r"= s32\[\]\S* constant\((\d+)\)")
NAME = re.compile(r"[\w.\-]+")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
# Instructions that run other computations as programs. Other callers, such as fusions, inline them.
CONTROL_FLOW_OPS = {"while", "conditional", "call"}
# Instructions that move no bytes themselves: they name memory or control the order.
NO_TRAFFIC_OPS = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
NO_TRAFFIC_OPS |= {"partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota"}
NO_TRAFFIC_OPS |= CONTROL_FLOW_OPS
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # (dtype, dimensions) of each array


class Collective(NamedTuple):
  """A collective operation of a program."""

  kind: str
  shapes: Shapes  # its inputs or its outputs, whichever are larger
  times: int  # executions in one run of the program

  @property
  def nbytes(self) -> int:
    """Bytes of all its executions in one run of the program."""
    return self.times * sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)


def collectives(text: str) -> list[Collective]:
  """Return every collective of a program, from `compiled.as_text()`."""
  computations, entry = _parse_computations(text)
  times = _execution_counts(computations, entry)
  ops = []
  channels = set()
  for name, lines in computations.items():
    for line in lines:
      match = COLLECTIVE.search(line)
      if match and times[name]:
        # libtpu spreads one collective over several fusions: count a channel once.
        if "fus" in name and (channel := CHANNEL.search(line)):
          if channel[1] in channels:
            continue
          channels.add(channel[1])
        # libtpu fuses an all-reduce with a slice of its result; only the slice is sent.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
        ops.append(Collective(kind, _largest_shapes(match[1]), times[name]))
  return ops


def bytes_by_kind(ops: list[Collective]) -> dict[str, int]:
  """Return the bytes of each kind of collective in one run of the program."""
  total = collections.Counter()
  for collective in ops:
    total[collective.kind] += collective.nbytes
  return dict(total)


def hbm_bytes(text: str) -> int:
  """Return the bytes that one run of a program moves from and to device memory.

  A fusion reads its operands and writes its result once. If an array is only sliced, or updated by
  a slice, only the slice counts. For example, every iteration of the loop over layers takes the
  weights of all layers, but reads those of one.

  Args:
    text: `compiled.as_text()`.
  """
  computations, entry = _parse_computations(text)
  module: HloModule = {}
  for name, lines in computations.items():
    module[name] = {it.name: it for it in map(_parse_instruction, lines) if it}
  instructions = [it for body in module.values() for it in body.values()]
  fused = {name for it in instructions if it.op not in CONTROL_FLOW_OPS for name in it.called}
  times = _execution_counts(computations, entry)
  return sum(
    times[name] * sum(_instruction_bytes(module, body, it) for it in body.values())
    for name, body in module.items()
    if times[name] and name not in fused
  )


class Instruction(NamedTuple):
  """An instruction of a computation."""

  name: str
  op: str
  shapes: tuple[int, ...]  # bytes of each array of its result
  operands: tuple[str, ...]
  called: tuple[str, ...]
  root: bool
  index: int  # number of a parameter; -1 for other instructions

  @property
  def nbytes(self) -> int:
    """Bytes of its result."""
    return sum(self.shapes)


HloModule = dict[str, dict[str, Instruction]]


def _parse_instruction(line: str) -> Instruction | None:
  match = INSTRUCTION.match(line)
  if not match:
    return None
  name, shape, op, rest = match.groups()
  # Split the operands from the attributes: find the parenthesis that closes the operands.
  depth = 1
  end = 0
  while end < len(rest) and depth:
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  inner, after = rest[: end - 1], rest[end:]
  return Instruction(
    name=name,
    op=op,
    shapes=tuple(DTYPE_BYTES[dtype] * math.prod(dims) for dtype, dims in _parse_shapes(shape)),
    operands=tuple(re.findall(r"%([\w.\-]+)", inner)),
    called=tuple(_called_computations(after)),
    root=line.lstrip().startswith("ROOT "),
    index=int(inner) if op == "parameter" else -1,
  )


def _called_computations(text: str) -> list[str]:
  matches = CALLED_COMPUTATIONS.findall(text)
  return [name for one, several in matches for name in [one] * bool(one) + NAME.findall(several)]


def _instruction_bytes(module: HloModule, body: dict[str, Instruction], it: Instruction) -> int:
  if it.op in NO_TRAFFIC_OPS or it.op.endswith("-done"):
    return 0
  if it.op in ("fusion", "fusion-start"):  # "fusion-start" is asynchronous, until its "-done"
    (fused,) = it.called
    operands = [(i, body[name]) for i, name in enumerate(it.operands) if name in body]
    read = sum(_fusion_bytes_read(module, fused, i, operand.nbytes) for i, operand in operands)
    return read + _fusion_bytes_written(module, fused)
  if it.op.endswith("-start"):
    return it.nbytes  # its result contains inputs and outputs
  if it.op in ("dynamic-slice", "slice", "gather"):
    return 2 * it.nbytes
  if it.op == "dynamic-update-slice":
    return 2 * body[it.operands[1]].nbytes
  # The first result of a custom call is its output, the others are workspace.
  written = it.shapes[:1] if it.op == "custom-call" else it.shapes
  return sum(written) + sum(body[name].nbytes for name in it.operands if name in body)


def _fusion_bytes_read(module: HloModule, fused: str, index: int, nbytes: int) -> int:
  """Return the bytes that a fusion reads of one operand of `nbytes` bytes."""
  body = module[fused]
  names = {it.name for it in body.values() if it.index == index}
  total = 0
  for it in body.values():  # in order: an instruction follows its operands
    uses = [i for i, name in enumerate(it.operands) if name in names]
    if not uses:
      continue
    if it.op == "bitcast":
      names.add(it.name)
    elif it.op in ("dynamic-slice", "slice", "gather") and uses == [0]:
      total += it.nbytes
    elif it.op == "dynamic-update-slice" and uses == [0]:
      total += 0  # a donated buffer: the updated slice counts as written
    elif it.op == "fusion":
      total += sum(_fusion_bytes_read(module, it.called[0], i, nbytes) for i in uses)
    elif it.op not in ("tuple", "get-tuple-element"):
      return nbytes
  return min(total, nbytes)


def _fusion_bytes_written(module: HloModule, fused: str) -> int:
  """Return the bytes that a fusion writes."""
  body = module[fused]

  def written(it: Instruction) -> int:
    if it.op == "dynamic-update-slice":
      return body[it.operands[1]].nbytes
    if it.op == "fusion":
      return _fusion_bytes_written(module, it.called[0])
    if it.op in ("bitcast", "get-tuple-element"):
      return min(it.nbytes, written(body[it.operands[0]]))
    return sum(written(body[name]) for name in it.operands) if it.op == "tuple" else it.nbytes

  return sum(written(it) for it in body.values() if it.root)


def _parse_computations(text: str) -> tuple[dict[str, list[str]], str]:
  """Return the lines of each computation by its name, and the name of the entry."""
  computations: dict[str, list[str]] = {}
  entry = name = ""
  for line in text.splitlines():
    head = COMPUTATION_HEAD.match(line)
    if head:
      name = head[1]
      computations[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith("}") and not line.startswith("}}"):  # "}}" ends a Pallas kernel's config
      name = ""
    elif name:
      computations[name].append(line)
  return computations, entry


def _execution_counts(computations: dict[str, list[str]], entry: str) -> collections.Counter:
  """Return how often each computation runs in one run of the program."""
  times = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in computations.get(name, ()):
      trips = _trip_count(line, computations) if " while(" in line else 1
      for called in _called_computations(line):
        visit(called, count * trips)

  visit(entry, 1)
  return times


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
  """Return the trip count of a loop, or 1 if it is unknown.

  Most compilers annotate it. libtpu (0.0.42) does not; there it is the limit that the condition
  compares the counter with.
  """
  if known := TRIP_COUNT.search(line):
    return int(known[1])
  match = CONDITION.search(line)
  condition = "\n".join(computations.get(match[1], ()) if match else ())
  limits = LOOP_LIMIT.findall(condition)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _largest_shapes(text: str) -> Shapes:
  """Return the larger group of "((inputs), (outputs))", or the largest array."""
  groups = re.findall(r"\(([^()]*)\)", text.removeprefix("(")) if text.startswith("((") else [text]
  if len(groups) == 1 and text.startswith("("):
    groups = [f"{dtype}[{dims}]" for dtype, dims in SHAPE.findall(text)]

  def nbytes(shapes: Shapes) -> int:
    return sum(DTYPE_BYTES[dtype] * math.prod(dims) for dtype, dims in shapes)

  return max(map(_parse_shapes, groups), key=nbytes)


def _parse_shapes(text: str) -> Shapes:
  """Return the (dtype, shape) of arrays in "f32[2,3], ..."; skip unknown dtypes."""
  arrays = [(dtype, dims.split(",")) for dtype, dims in SHAPE.findall(text) if dtype in DTYPE_BYTES]
  return tuple((dtype, tuple(int(size) for size in dims if size)) for dtype, dims in arrays)
