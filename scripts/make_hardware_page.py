"""Write docs/hardware.md: the memory of each published model on each hardware, by real compilers.

    python scripts/make_hardware_page.py          # needs the plan extra; about an hour on two cores

For each model and target: the least `memory.offload` that fits a sequence, the largest micro-batch,
and the peak. For each file in configs/: its plan for the hardware that its docstring names. The
search for the largest micro-batch starts from the present page.
"""

import dataclasses
import datetime
import importlib.metadata
import math
import re
import runpy
import sys
from pathlib import Path

import jaxft
import jaxft.config
from jaxft.errors import RequestError
from jaxft.hardware import specs
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.decoder import parameter_count
from jaxft.plan import aot_compiler, rendering
from jaxft.plan.search import MEMORY_MARGIN

ROOT = Path(__file__).resolve().parent.parent
PAGE, CONFIGS = ROOT / "docs" / "hardware.md", sorted((ROOT / "configs").glob("*.py"))
MODELS = ("gpt2", "gpt2-xl", "EleutherAI/gpt-neo-2.7B", "EleutherAI/gpt-j-6b")
TARGETS = ("rtx3070", "t4", "rtx4090", "h100", "h100x8", "v5e:2x4")
OFFLOAD = ("none", "optimizer", "all")
MOST_ROWS = 64
HEAD = """# What fits where

This page is about full fine-tuning with AdamW. A sequence fills all positions of the model: \
1,024 tokens for GPT-2, 2,048 for
the others. The flags are `--config.memory.remat=full --config.memory.loss_chunk=256 \
--config.model.dropout=0`.

Each cell has three entries:

- the largest micro-batch of a device, in powers of two; {most} sequences are the most that was \
tried, and more may fit
- the peak memory of a device
- `memory.offload`, if it is needed: the least offload (nothing, `optimizer`, `all`) that fits \
one sequence

More offload, up to `all`, fits more sequences and spends more time on the bus. To use a cell, \
add its settings to the flags above,
such as `--config.memory.offload=all --config.train.micro_batch_size=8`. `train.batch_size` must \
be divisible by that micro-batch on
all devices.

Every cell accumulates two micro-batches. With `all`, each further one takes the input of its \
layers, {input} per sequence for
GPT-J-6B; otherwise it takes no memory. If a cell is empty (-), one batch without accumulation \
may still fit, because it needs no sum
of gradients. GPT-J-6B on a v5e:2x4 is such a case: see `gptj_6b_v5e8.py` below.

`python scripts/make_hardware_page.py` compiled the train step of every cell for that hardware \
({date}, {versions}). They were
not run there. {margin} of the process's memory stays free. A T4 has no bfloat16, and computes in \
float32. With GPT-2's own dropout
of 0.1, a device takes a little more. `--fit` of `jaxft.plan` finds the fastest settings for one \
machine; this page shows the possible
ones.

"""
CONFIGS_HEAD = """
## The configs of this repository

Each config is unchanged, on the hardware that its docstring names. Seconds per step are an \
estimate, with the assumptions that
`jaxft plan` prints.

| config | for | peak of a device, of | in the host's memory, each device | a step |
|---|---|---|---|---|
"""


class Cells:
  """Asks the compiler, and remembers."""

  def __init__(self, compiler: aot_compiler.Compiler, before: dict[tuple[str, str, str], int]):
    """`before`: rows that fitted when the page was made last, by model, target and offload."""
    self._compiler, self._before, self._known, self._lines = compiler, before, {}, {}

  def peak(self, model: str, target: specs.Target, offload: str, rows: int) -> float:
    """Bytes of a device with so many rows on each; infinite where the compiler refuses."""
    key = (model, target.name, offload, rows)
    if key not in self._known:
      cfg = model_config.from_hf_config(PUBLISHED[model])
      config = jaxft.config.default()
      config.model.path, config.data.train, config.train.steps = model, ("texts",), 100
      config.data.sequence_length, config.train.batch_size = cfg.P, 2 * rows * target.count
      config.train.micro_batch_size, config.model.dropout = rows, 0.0
      config.memory.remat, config.memory.loss_chunk, config.memory.offload = "full", 256, offload
      found = self._compiler(
        aot_compiler.CompileRequest(
          jaxft.config.to_json(config), dataclasses.asdict(cfg), target.name
        )
      )
      self._known[key] = max(found.get("peak_bytes", math.inf), found.get("eval_peak_bytes", 0))
      print(
        f"{model} {target.name} {offload} {rows}: {self._known[key] / 2**30:.2f} GiB",
        file=sys.stderr,
        flush=True,
      )
    return self._known[key]

  def line(self, model: str, target: specs.Target, offload: str) -> tuple[float, float]:
    """Return the bytes of one row, and of each further one.

    The peak grows in nearly a straight line, which is alike on most GPUs.
    """
    key = (model, offload, target.count, target.kind in specs.GPUS, target.spec.bfloat16)
    if key not in self._lines:
      one, four = self.peak(model, target, offload, 1), self.peak(model, target, offload, 4)
      self._lines[key] = one, max(four - one, 1) / 3 if four < math.inf else math.inf
    return self._lines[key]

  def likely(self, model: str, target: specs.Target, offload: str) -> int:
    """The most rows that fit, if the peak grows in a straight line; 1 where one is too many."""
    if self.peak(model, target, offload, 1) > (room := (1 - MEMORY_MARGIN) * target.usable_bytes):
      return 1
    one, slope = self.line(model, target, offload)
    return max(
      rows
      for rows in (2**n for n in range(MOST_ROWS.bit_length()))
      if one + (rows - 1) * slope <= room
    )

  def largest(self, model: str, target: specs.Target, offload: str) -> tuple[int, float] | None:
    """The most rows that fit, with their peak; None where one is too many."""
    room = (1 - MEMORY_MARGIN) * target.usable_bytes
    state = 16 * parameter_count(model_config.from_hf_config(PUBLISHED[model])) / target.count
    if offload == "none" and state > room:  # float32 weights, gradient and two moments
      return None
    rows = self._before.get((model, target.name, offload)) or self.likely(model, target, offload)
    while rows and self.peak(model, target, offload, rows) > room:
      rows //= 2
    if not rows:
      return None
    while rows < MOST_ROWS and self.peak(model, target, offload, 2 * rows) <= room:
      rows *= 2
    return rows, self.peak(model, target, offload, rows)

  def cell(self, model: str, target: specs.Target) -> str:
    for offload in OFFLOAD if target.kind in specs.GPUS else ("none",):
      try:
        found = self.largest(model, target, offload)
      except RequestError as error:  # the compiler's process has died; the next cell starts another
        print(error, file=sys.stderr, flush=True)
        return "the compiler fails"
      if found:
        rows, peak = found
        return f"{rows}, {rendering.format_bytes(peak)}" + (
          "" if offload == "none" else f", `{offload}`"
        )
    return "-"


def rows_before(page: str) -> dict[tuple[str, str, str], int]:
  """The most rows of each cell of a page, by model, target and offload."""
  table = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in page.splitlines()
    if line.startswith("|")
  ]
  found, names = {}, [cell.partition(",")[0] for cell in table[0][1:]]
  for model, *cells in table:
    for name, cell in zip(names, cells):
      if match := re.fullmatch(r"(\d+), [\d.]+ GiB(?:, `(\w+)`)?", cell):
        whole = next((it for it in MODELS if it.rpartition("/")[2] == model), model)
        found[whole, name, match[2] or "none"] = int(match[1])
  return found


def config_lines() -> list[str]:
  """Return a row for each file in configs/ and each device of its docstring's plan command.

  Without such a command the device is the CPU.
  """
  lines = []
  for file in CONFIGS:
    module = runpy.run_path(str(file))
    named = re.search(r"--device (\S+)", module["__doc__"])
    planned_as = re.search(
      r"jaxft\.plan (?:.*\\\n)?.*--config\.model\.path=(\S+)", module["__doc__"]
    )
    config = module["get_config"]()
    config.model.path = planned_as[1] if planned_as else config.model.path
    for device in named[1].split(",") if named else ["cpu"]:
      plan = jaxft.plan_for(config, device)
      peak = max(plan["peak_bytes"], plan.get("eval_peak_bytes", 0))
      seconds = plan["step_seconds_estimate"]
      usable = rendering.format_bytes(plan["usable_bytes"])
      host = rendering.format_bytes(plan["host_bytes"]) if plan["host_bytes"] else "-"
      step = f"{seconds:.1f} s" if seconds else "-"
      memory = f"{rendering.format_bytes(peak)} of {usable}"
      lines.append(f"| `{file.name}` | {device} | {memory} | {host} | {step} |")
      print(lines[-1], flush=True)
  return lines


def main() -> None:
  wanted = [specs.parse_device(name) for name in TARGETS]
  lines = [
    "| | "
    + " | ".join(f"{it.name}, {rendering.format_bytes(it.usable_bytes)}" for it in wanted)
    + " |",
    "|---" * (len(wanted) + 1) + "|",
  ]
  with aot_compiler.Compiler() as compiler:
    cells = Cells(compiler, rows_before(PAGE.read_text(encoding="utf-8")) if PAGE.exists() else {})
    for model in MODELS:
      lines.append(
        f"| {model.rpartition('/')[2]} | "
        + " | ".join(cells.cell(model, it) for it in wanted)
        + " |"
      )
      print(lines[-1], flush=True)
  gptj = model_config.from_hf_config(PUBLISHED["EleutherAI/gpt-j-6b"])
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "jax-cuda13-plugin", "libtpu")
  )
  head = HEAD.format(
    most=MOST_ROWS,
    input=rendering.format_bytes(2 * gptj.L * gptj.P * gptj.D),
    date=datetime.date.today(),
    versions=versions,
    margin=f"{MEMORY_MARGIN:.0%}",
  )
  page = head + "\n".join(lines) + "\n"
  PAGE.write_text(page, encoding="utf-8")  # an hour's work, whatever a config does
  PAGE.write_text(page + CONFIGS_HEAD + "\n".join(config_lines()) + "\n", encoding="utf-8")


if __name__ == "__main__":
  main()
