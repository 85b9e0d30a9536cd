"""What a compiled program does, read out of its text: collectives and bytes moved, with the trip counts of loops."""

import collections
import math
import re
from typing import NamedTuple

DTYPE_BYTES = {
  "pred": 1,
  "s8": 1,
  "u8": 1,
  "f8": 1,
  "bf16": 2,
  "f16": 2,
  "s16": 2,
  "u16": 2,
  "f32": 4,
  "s32": 4,
  "u32": 4,
}
DTYPE_BYTES |= {"f64": 8, "s64": 8, "u64": 8}
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
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
# Instructions that name memory or steer, and move nothing themselves.
NO_TRAFFIC_OPS = {
  "parameter",
  "constant",
  "tuple",
  "get-tuple-element",
  "bitcast",
  "while",
  "conditional",
  "call",
  "after-all",
}
NO_TRAFFIC_OPS |= {"partition-id", "replica-id", "opt-barrier", "optimization-barrier", "iota"}
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


class Collective(NamedTuple):
  kind: str
  shapes: tuple[
    tuple[str, tuple[int, ...]], ...
  ]  # of the larger of what goes in and what comes out
  times: int  # how often it runs in one run of the program

  @property
  def nbytes(self) -> int:
    """Of all its runs."""
    return self.times * sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)


def collectives(text: str) -> list[Collective]:
  """Every collective of a program, from `compiled.as_text()`."""
  computations, entry = _parse_computations(text)
  times = _execution_counts(computations, entry)
  found, spread = [], set()
  for name, lines in computations.items():
    for line in lines:
      match = COLLECTIVE.search(line)
      if match and times[name]:
        if "fus" in name and (
          channel := CHANNEL.search(line)
        ):  # libtpu spreads one over several fusions
          if channel[1] in spread:
            continue
          spread.add(channel[1])
        # libtpu's fusion of an all-reduce with a slice of it, which is what travels.
        kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else match[2]
        found.append(Collective(kind, _largest_shapes(match[1]), times[name]))
  return found


def bytes_by_kind(found: list[Collective]) -> dict[str, int]:
  """Bytes of a run of the program for each kind of collective."""
  total = collections.Counter()
  for collective in found:
    total[collective.kind] += collective.nbytes
  return dict(total)


def hbm_bytes(text: str) -> int:
  """Bytes that the instructions of a program read from a device's memory and write to it, in one run.

  A fusion reads its operands and writes its result once. Of an array that is only sliced or updated in place the slice counts:
  the weights of all layers go into every turn of the loop over layers, which reads those of one.
  """
  computations, entry = _parse_computations(text)
  program = {
    name: {i.name: i for i in map(_parse_instruction, lines) if i}
    for name, lines in computations.items()
  }
  inside = {
    called
    for body in program.values()
    for it in body.values()
    if it.op not in CONTROL_FLOW_OPS
    for called in it.called
  }
  times = _execution_counts(computations, entry)
  return sum(
    times[name] * sum(_instruction_bytes(program, body, it) for it in body.values())
    for name, body in program.items()
    if times[name] and name not in inside
  )


class Instruction(NamedTuple):
  name: str
  op: str
  shapes: tuple[int, ...]  # bytes of each part of its result
  operands: tuple[str, ...]
  called: tuple[str, ...]
  root: bool
  index: int  # of a parameter

  @property
  def nbytes(self) -> int:
    return sum(self.shapes)


CONTROL_FLOW_OPS = {
  "while",
  "conditional",
  "call",
}  # what they call are programs, not the inside of an instruction
HloModule = dict[str, dict[str, Instruction]]


def _parse_instruction(line: str) -> Instruction | None:
  match = INSTRUCTION.match(line)
  if not match:
    return None
  name, shape, op, rest = match.groups()
  depth, end = 1, 0
  while end < len(rest) and depth:
    depth += {"(": 1, ")": -1}.get(rest[end], 0)
    end += 1
  inner, after = rest[: end - 1], rest[end:]
  called = [
    part
    for one, several in CALLED_COMPUTATIONS.findall(after)
    for part in [one, *re.findall(r"[\w.\-]+", several)]
    if part
  ]
  return Instruction(
    name,
    op,
    tuple(
      DTYPE_BYTES[dtype] * math.prod(_parse_dims(dims))
      for dtype, dims in SHAPE.findall(shape)
      if dtype in DTYPE_BYTES
    ),
    tuple(re.findall(r"%([\w.\-]+)", inner)),
    tuple(called),
    line.lstrip().startswith("ROOT "),
    int(inner) if op == "parameter" else -1,
  )


def _instruction_bytes(program: HloModule, body: dict[str, Instruction], it: Instruction) -> int:
  if it.op in NO_TRAFFIC_OPS or it.op.endswith("-done"):
    return 0
  if it.op in (
    "fusion",
    "fusion-start",
  ):  # the second is one that goes on beside others, up to its "-done"
    (fused,) = it.called
    read = sum(
      _fusion_bytes_read(program, fused, i, body[name].nbytes)
      for i, name in enumerate(it.operands)
      if name in body
    )
    return read + _fusion_bytes_written(program, fused)
  if it.op.endswith("-start"):
    return it.nbytes  # of what goes in and what comes out
  if it.op in ("dynamic-slice", "slice", "gather"):
    return 2 * it.nbytes
  if it.op == "dynamic-update-slice":
    return 2 * body[it.operands[1]].nbytes
  written = (
    it.shapes[:1] if it.op == "custom-call" else it.shapes
  )  # the rest of it is room to work in
  return sum(written) + sum(body[name].nbytes for name in it.operands if name in body)


def _fusion_bytes_read(program: HloModule, fused: str, index: int, nbytes: int) -> int:
  """Bytes that a fusion reads of one operand, which has `nbytes`."""
  body = program[fused]
  names = {it.name for it in body.values() if it.index == index}
  total = 0
  for it in body.values():  # each comes after what it uses
    at = [i for i, name in enumerate(it.operands) if name in names]
    if not at:
      continue
    if it.op == "bitcast":
      names.add(it.name)
    elif it.op in ("dynamic-slice", "slice", "gather") and at == [0]:
      total += it.nbytes
    elif it.op == "dynamic-update-slice" and at == [0]:
      total += 0  # in place: what it writes is counted as written
    elif it.op == "fusion":
      total += sum(_fusion_bytes_read(program, it.called[0], i, nbytes) for i in at)
    elif it.op not in ("tuple", "get-tuple-element"):
      return nbytes
  return min(total, nbytes)


def _fusion_bytes_written(program: HloModule, fused: str) -> int:
  """Bytes that a fusion writes."""
  body = program[fused]

  def of(it: Instruction) -> int:
    if it.op == "dynamic-update-slice":
      return body[it.operands[1]].nbytes
    if it.op == "fusion":
      return _fusion_bytes_written(program, it.called[0])
    if it.op in ("bitcast", "get-tuple-element"):
      return min(it.nbytes, of(body[it.operands[0]]))
    return sum(of(body[name]) for name in it.operands) if it.op == "tuple" else it.nbytes

  return sum(of(it) for it in body.values() if it.root)


def _parse_computations(text: str) -> tuple[dict[str, list[str]], str]:
  found, entry, name = {}, "", None
  for line in text.splitlines():
    head = COMPUTATION_HEAD.match(line)
    if head:
      name = head[1]
      found[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith("}") and not line.startswith(
      "}}"
    ):  # that is the end of what describes a Pallas kernel
      name = None
    elif name:
      found[name].append(line)
  return found, entry


def _execution_counts(computations: dict[str, list[str]], entry: str) -> collections.Counter:
  """How often each computation runs."""
  times = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in computations.get(name, ()):
      inside = count * _trip_count(line, computations) if " while(" in line else count
      for one, several in CALLED_COMPUTATIONS.findall(line):
        for called in [one] if one else re.findall(r"[\w.\-]+", several):
          visit(called, inside)

  visit(entry, 1)
  return times


def _trip_count(line: str, computations: dict[str, list[str]]) -> int:
  """Of a loop: as the compiler notes them or, as libtpu (0.0.42) does not, what its counter is compared with; else 1."""
  if known := TRIP_COUNT.search(line):
    return int(known[1])
  condition = "\n".join(computations.get(CONDITION.search(line)[1], ()))
  limits = LOOP_LIMIT.findall(condition)
  return int(limits[0]) if len(limits) == 1 and "direction=LT" in condition else 1


def _largest_shapes(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Of "(what goes in), (what comes out)" the larger; or all of it where it is one group."""
  groups = re.findall(r"\(([^()]*)\)", text.removeprefix("(")) if text.startswith("((") else [text]
  if len(groups) == 1 and text.startswith("("):
    groups = SHAPE.findall(text) and [f"{dtype}[{dims}]" for dtype, dims in SHAPE.findall(text)]
  parsed = [
    tuple(
      (dtype, _parse_dims(dims)) for dtype, dims in SHAPE.findall(group) if dtype in DTYPE_BYTES
    )
    for group in groups
  ]
  return max(
    parsed, key=lambda group: sum(DTYPE_BYTES[dtype] * math.prod(shape) for dtype, shape in group)
  )


def _parse_dims(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(",") if size)
