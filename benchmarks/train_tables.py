"""The tables of benchmarks/train.py, from the lines that it noted.

Contenders of one batch are in one table, whichever command ran them.
"""

import statistics
import types
from typing import Any

import page
from models import PUBLISHED

# Settings that contenders of a table share.
SAME = (
  "model",
  "rows",
  "length",
  "dropout",
  "checkpointing",
)
Line = dict[str, Any]


def sections(lines: list[Line]) -> dict[str, tuple[str, str]]:
  """{name of a section: (device, text)}, for each batch, device and `memory.remat` of jaxft."""
  found = {}
  for device in dict.fromkeys(line["device"] for line in lines if "device" in line):
    folders = {line.get("folder") for line in lines if line.get("device") == device}
    # An error has no device: it is of those that its folder has.
    on_it = [
      line
      for line in lines
      if line.get("device", device) == device and line.get("folder") in folders
    ]
    for line in on_it:
      if line["contender"] == "jaxft" and "error" not in line:
        found[name_of(line["settings"], device)] = (
          device,
          table(of_table(on_it, line["settings"]), device),
        )
  return found


def name_of(settings: Line, device: str) -> str:
  return (
    f"training {settings['model']} on {page.where(device)}, {settings['rows']} x "
    f"{settings['length']} tokens, dropout {settings['dropout']:g}, remat {settings['remat']}"
  )


def of_table(lines: list[Line], settings: Line) -> dict[str, list[Line]]:
  """{contender: its turns}; what jaxft computes again is a setting of jaxft's own."""
  found: dict[str, list[Line]] = {"jaxft": []}
  for line in lines:
    same = (*SAME, "remat") if line["contender"] == "jaxft" else SAME
    if all(line["settings"][name] == settings[name] for name in same):
      found.setdefault(line["contender"], []).append(line)
  return {name: of_newest_run(turns) for name, turns in found.items()}


def of_newest_run(turns: list[Line]) -> list[Line]:
  """Those of the newest of several runs into one folder; of one that has figures, if any has."""
  sound = [turn for turn in turns if "error" not in turn] or turns
  newest = max((float(turn.get("run", 0)) for turn in sound), default=0)
  return [turn for turn in turns if float(turn.get("run", 0)) == newest]


def table(found: dict[str, list[Line]], device: str) -> str:
  sound = {name: [turn for turn in turns if "error" not in turn] for name, turns in found.items()}
  first = sound["jaxft"][0]
  settings, at_peak = first["settings"], tokens_per_second_at_peak(first["settings"], device)
  speed = lambda name: statistics.median(turn["tokens_per_second"] for turn in sound[name])
  best = max(
    (speed(name) for name, turns in sound.items() if name != "jaxft" and turns), default=None
  )
  columns = ["", "tokens/s", "to Trainer's best", *(["MFU"] if at_peak else []), "peak memory"]
  columns += (
    ["first step"] if settings["filled_caches"] else ["first step, empty caches", "filled caches"]
  )
  lines = [
    about(first, len(found["jaxft"]), device),
    "",
    f"| {' | '.join(columns)} |",
    f"|{'---|' * len(columns)}",
  ]
  for name, turns in found.items():
    if not sound[name]:
      lines.append(f"| {name} | {turns[0]['error']} |{' |' * (len(columns) - 2)}")
      continue
    speeds = sorted(turn["tokens_per_second"] for turn in sound[name])
    failed = len(turns) - len(sound[name])
    cells = [name + (f", {failed} of {len(turns)} turns failed" if failed else "")]
    cells.append(f"{speed(name):,.0f} ({speeds[0]:,.0f} to {speeds[-1]:,.0f})")
    cells.append(f"{speed(name) / best:.2f}" if best else "")
    cells += [f"{speed(name) / at_peak:.1%}"] if at_peak else []
    cells.append(f"{statistics.median(turn['peak_bytes'] for turn in sound[name]) / 2**30:.2f} GiB")
    lines.append(f"| {' | '.join(cells + first_steps(sound[name], settings['filled_caches']))} |")
  return "\n".join(lines)


def about(line: Line, turns: int, device: str) -> str:
  """What the table is of; `line` is one of jaxft's."""
  it, precision = line["settings"], ("float32" if device == "cpu" else "bfloat16")
  again = "activations computed again" if it["checkpointing"] else "nothing computed again"
  caches = (
    "caches of compiled programs are as earlier commands left them"
    if it["filled_caches"]
    else "in the first turn and in later ones"
  )
  return (
    f"{line['versions']}. {it['model']}, {it['rows']} x {it['length']} tokens, {precision}, AdamW, "
    f"dropout {it['dropout']:g}; jaxft with `memory.remat={it['remat']}`, Trainer with {again}; "
    f"medians of {turns} turns of {it['steps']} steps, in brackets the slowest and fastest. First "
    f"step: seconds from the command to its end, {caches}."
  )


def first_steps(turns: list[Line], filled: bool) -> list[str]:
  """The cells of when the first step is over."""

  def median(selected: list[Line]) -> str:
    seconds = [turn["first_step_seconds"] for turn in selected]
    return f"{statistics.median(seconds):.1f} s" if seconds else ""

  if filled:
    return [median(turns)]
  return [
    median([turn for turn in turns if turn["turn"] == 1]),
    median([turn for turn in turns if turn["turn"] > 1]),
  ]


def tokens_per_second_at_peak(settings: Line, device: str) -> float | None:
  """Of a device that never waits, by the model's FLOPs; None if jaxft has no data sheet."""
  from jaxft.hardware import flops, roofline, specs
  from jaxft.hf import model_config

  target = specs.local_target(types.SimpleNamespace(device_kind=device), 1)
  model_flops = flops.model_flops(
    model_config.from_hf_config(PUBLISHED[settings["model"]]), settings["rows"], settings["length"]
  )
  seconds = roofline.ideal_step_seconds(target, 1, model_flops)
  return None if seconds is None else settings["rows"] * settings["length"] / seconds
