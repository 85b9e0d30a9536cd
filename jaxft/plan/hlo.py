"""What a compiled program does, read out of its text: collectives, with the trip counts of the loops they stand in."""

import collections
import math
import re
from typing import NamedTuple

BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
BYTES |= {"f64": 8, "s64": 8, "u64": 8}
COLLECTIVES = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")
SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
HEAD = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"(?:body|condition|calls|to_apply)=%?([\w.\-]+)|(?:called|branch)_computations=\{([^}]*)\}")
TRIPS = re.compile(r'known_trip_count"?:\{"?n"?:"?(\d+)')
COLLECTIVE = re.compile(rf"= (.*?) ({'|'.join(COLLECTIVES)})(-start)?\(")


class Collective(NamedTuple):
  kind: str
  shapes: tuple[tuple[str, tuple[int, ...]], ...]  # of the larger of what goes in and what comes out
  times: int  # how often it runs in one run of the program

  @property
  def nbytes(self) -> int:
    """Of all its runs."""
    return self.times * sum(BYTES[dtype] * math.prod(shape) for dtype, shape in self.shapes)


def collectives(text: str) -> list[Collective]:
  """Every collective of a program, from `compiled.as_text()`."""
  computations, entry = _computations(text)
  times = _times(computations, entry)
  found = []
  for name, lines in computations.items():
    for line in lines:
      match = COLLECTIVE.search(line)
      if match and times[name]:
        found.append(Collective(match[2], _largest(match[1]), times[name]))
  return found


def by_kind(found: list[Collective]) -> dict[str, int]:
  """Bytes of a run of the program for each kind of collective."""
  total = collections.Counter()
  for collective in found:
    total[collective.kind] += collective.nbytes
  return dict(total)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
  found, entry, name = {}, "", None
  for line in text.splitlines():
    head = HEAD.match(line)
    if head:
      name = head[1]
      found[name] = []
      entry = name if line.startswith("ENTRY") else entry
    elif line.startswith("}"):
      name = None
    elif name:
      found[name].append(line)
  return found, entry


def _times(computations: dict[str, list[str]], entry: str) -> collections.Counter:
  """How often each computation runs."""
  times = collections.Counter()

  def visit(name: str, count: int) -> None:
    times[name] += count
    for line in computations.get(name, ()):
      trips = TRIPS.search(line)
      inside = count * int(trips[1]) if trips and " while(" in line else count
      for one, several in CALLED.findall(line):
        for called in [one] if one else re.findall(r"[\w.\-]+", several):
          visit(called, inside)

  visit(entry, 1)
  return times


def _largest(text: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
  """Of "(what goes in), (what comes out)" the larger; or all of it where it is one group."""
  groups = re.findall(r"\(([^()]*)\)", text.removeprefix("(")) if text.startswith("((") else [text]
  if len(groups) == 1 and text.startswith("("):
    groups = SHAPE.findall(text) and [f"{dtype}[{dims}]" for dtype, dims in SHAPE.findall(text)]
  parsed = [tuple((dtype, _dims(dims)) for dtype, dims in SHAPE.findall(group) if dtype in BYTES) for group in groups]
  return max(parsed, key=lambda group: sum(BYTES[dtype] * math.prod(shape) for dtype, shape in group))


def _dims(text: str) -> tuple[int, ...]:
  return tuple(int(size) for size in text.split(",") if size)
