"""Write the figures of the documentation, docs/figures/*.svg.

    python scripts/make_figures.py              # seconds; no device and no compiler
    python scripts/make_figures.py --plan       # compile the plans of PLANS again first: minutes

Numbers come from scripts/figure_plans.json (the plans), docs/hardware.md (what fits) and
docs/architecture.md (packages). A test compares the figures with the committed files. Text stays
text, in the reader's font; colors follow the color scheme of the page.
"""

import json
import re
import sys
from collections.abc import Iterable
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDER, NUMBERS = ROOT / "docs" / "figures", Path(__file__).with_name("figure_plans.json")
# As `python -m jaxft.plan --config configs/NAME.py --device DEVICE --json` prints them.
PLANS = {
  "gpt2_tinystories": "rtx4090",
  "gptj_6b_lora": "rtx4080",
  "gptneo_2b7_16gb": "t4",
  "gptj_6b_24gb": "rtx4090",
  "gptj_6b_v5e8": "v5e:2x4",
}
PLAN_KEYS = ("device", "usable_bytes", "peak_bytes", "breakdown", "host_bytes", "versions")
GIB = 2**30
WIDTH = 760
# Light and dark: text, quiet text, lines, panels, and five fills on which `text` is readable.
COLORS = {
  "ground": ("#ffffff", "#16181c"),
  "text": ("#1c2024", "#e6e8eb"),
  "quiet": ("#5b6168", "#a2a8b0"),
  "line": ("#9aa1a9", "#6b7178"),
  "panel": ("#f3f4f6", "#262a30"),
  "blue": ("#a9cbf5", "#28588f"),
  "orange": ("#f7c79b", "#8a4f1d"),
  "green": ("#aadcb4", "#2b6b3d"),
  "purple": ("#d3c2f0", "#5c4592"),
  "gray": ("#d5d9de", "#484e56"),
}


def style() -> str:
  rules = ["text{font:14px system-ui,sans-serif;fill:var(--text)}"]
  rules += [".q{fill:var(--quiet)}.b{font-weight:600}.m{text-anchor:middle}.e{text-anchor:end}"]
  rules += [".s{font-size:12px}.c{font-family:ui-monospace,monospace;font-size:12px}"]
  rules += [".l{stroke:var(--line);fill:none;stroke-width:1.5}"]
  rules += [f".{name}{{fill:var(--{name})}}" for name in COLORS if name not in ("text", "quiet")]
  scheme = lambda i: "".join(f"--{name}:{pair[i]};" for name, pair in COLORS.items())
  dark = f"@media(prefers-color-scheme:dark){{svg{{{scheme(1)}}}}}"
  return f"<style>svg{{{scheme(0)}}}{''.join(rules)}{dark}</style>"


class Drawing:
  """An SVG file in the making; sizes are in its units, about pixels."""

  def __init__(self, title: str, width: int = WIDTH):
    self.title, self.width, self._parts = title, width, []

  def rect(self, x: float, y: float, w: float, h: float, fill: str, r: float = 3) -> None:
    self._add(f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{r:g}" class="{fill}"/>')

  def text(self, x: float, y: float, text: str, look: str = "") -> None:
    look = f' class="{look}"' if look else ""
    self._add(f'<text x="{x:g}" y="{y:g}"{look}>{escape(text, quote=False)}</text>')

  def line(self, *points: tuple[float, float], arrow: bool = False) -> None:
    at = " ".join(f"{x:g},{y:g}" for x, y in points)
    end = ' marker-end="url(#a)"' if arrow else ""
    self._add(f'<polyline points="{at}" class="l"{end}/>')

  def curve(self, x: float, y: float, x2: float, y2: float) -> None:
    """Draw an arrow down or up that leaves and arrives vertically."""
    half = (y + y2) / 2
    self._add(
      f'<path d="M{x:g} {y:g}C{x:g} {half:g} {x2:g} {half:g} {x2:g} {y2:g}" class="l" '
      'marker-end="url(#a)"/>'
    )

  def _add(self, part: str) -> None:
    self._parts.append(part)

  def svg(self, height: float) -> str:
    head = (
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {height:g}" '
      f'width="{self.width}" height="{height:g}" role="img" aria-label="{escape(self.title)}">'
    )
    marker = (
      '<marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
      'orient="auto"><path d="M0 0L8 4L0 8z" class="line"/></marker>'
    )
    # Without a ground, the text of one color scheme is lost on a page of the other.
    ground = f'<rect width="{self.width}" height="{height:g}" class="ground"/>'
    parts = [f"<title>{escape(self.title)}</title>", style(), f"<defs>{marker}</defs>", ground]
    return "\n".join([head, *parts, *self._parts, "</svg>", ""])


def legend(drawing: Drawing, x: float, y: float, entries: Iterable[tuple[str, str]]) -> None:
  for fill, words in entries:
    drawing.rect(x, y - 11, 13, 13, fill)
    drawing.text(x + 19, y, words, "s")
    x += 38 + 6.6 * len(words)


def batch() -> str:
  """The path of a batch, from a source to an update."""
  drawing = Drawing("The path of a batch: source, example, tokens, sequences; batch, loss, update")
  W, H, GAP = 168, 150, 29
  at = lambda i: ((i % 4) * (W + GAP), (i // 4) * (H + 92))
  steps = [
    ("Sources", "data.train"),
    ("Examples", "data.format"),
    ("Tokens", "model.tokenizer"),
    ("Sequences", "data.layout"),
    ("Batch", "train.batch_size, mesh"),
    ("Loss", "memory.loss_chunk"),
    ("Gradient", "train.micro_batch_size"),
    ("Update", "optim"),
  ]
  for i, (name, setting) in enumerate(steps):
    x, y = at(i)
    drawing.rect(x, y, W, H, "panel", 8)
    drawing.text(x + W / 2, y + H + 20, name, "b m")
    drawing.text(x + W / 2, y + H + 38, setting, "c q m")
    if i % 4 < 3:
      drawing.line((x + W + 4, y + H / 2), (x + W + GAP - 4, y + H / 2), arrow=True)
  right, low = at(3)[0] + W / 2, H + 48
  drawing.line((right, low), (right, low + 18), (W / 2, low + 18), (W / 2, low + 40), arrow=True)

  x, y = at(0)
  for i, name in enumerate(("stories.jsonl", "my_texts/", "hub:NAME")):
    drawing.rect(x + 16, y + 18 + 40 * i, W - 32, 32, ("blue", "orange", "green")[i])
    drawing.text(x + W / 2, y + 39 + 40 * i, name, "c m")
  x, y = at(1)
  for i, words in enumerate(("Once upon a time …", "Question: why? …", "The sea was calm …")):
    drawing.rect(x + 10, y + 18 + 40 * i, W - 20, 32, ("blue", "orange", "green")[i])
    drawing.text(x + W / 2, y + 39 + 40 * i, words, "s m")
  x, y = at(2)
  for i, ids in enumerate(((7454, 2402, 257), (24361, 25, 1521), (464, 5417, 373))):
    for j, number in enumerate(ids):
      drawing.rect(x + 11 + 50 * j, y + 18 + 40 * i, 46, 32, ("blue", "orange", "green")[i])
      drawing.text(x + 34 + 50 * j, y + 39 + 40 * i, str(number), "s m")
  x, y = at(3)
  rows = ("blue " * 8, "blue " * 3 + "orange " * 5, "orange " * 2 + "green " * 6)
  cells(drawing, x + 13, y + 18, [row.split() for row in rows], 18, 34)
  drawing.text(x + W / 2, y + 136, "sequence_length tokens", "s q m")
  x, y = at(4)
  cells(drawing, x + 13, y + 10, [row.split() for row in rows], 18, 18)
  cells(drawing, x + 13, y + 73, [row.split() for row in (rows[2], rows[0], rows[1])], 18, 18)
  drawing.line((x + 8, y + 68), (x + W - 8, y + 68))
  drawing.text(x + W / 2, y + 142, "split over devices", "s q m")
  x, y = at(5)
  for i, chance in enumerate((0.12, 0.2, 0.55, 0.13)):
    drawing.rect(x + 26 + 31 * i, y + 100 - 120 * chance, 24, 120 * chance, "purple")
  drawing.line((x + 20, y + 100), (x + W - 20, y + 100))
  drawing.text(x + W / 2, y + 122, "cross-entropy of the", "s q m")
  drawing.text(x + W / 2, y + 138, "next token, in nats", "s q m")
  x, y = at(6)
  for i in range(3):
    drawing.rect(x + 18 + 46 * i, y + 24, 38, 38, "purple")
    drawing.text(x + 37 + 46 * i, y + 48, "∇", "m")
    drawing.line((x + 37 + 46 * i, y + 66), (x + W / 2 + 12 * (i - 1), y + 88), arrow=True)
  drawing.text(x + W / 2, y + 106, "Σ", "b m")
  drawing.text(x + W / 2, y + 124, "summed over parts", "s q m")
  drawing.text(x + W / 2, y + 140, "and devices, clipped", "s q m")
  x, y = at(7)
  for i, (name, fill) in enumerate(
    (("weights", "blue"), ("optimizer state", "orange"), ("step + 1", "gray"))
  ):
    drawing.rect(x + 16, y + 18 + 40 * i, W - 32, 32, fill)
    drawing.text(x + W / 2, y + 39 + 40 * i, name, "s m")
  return drawing.svg(at(4)[1] + H + 48)


def cells(
  drawing: Drawing, x: float, y: float, rows: list[list[str]], size: float, pitch: float
) -> None:
  """Draw rows of tokens as squares."""
  for i, row in enumerate(rows):
    for j, fill in enumerate(row):
      drawing.rect(x + size * j, y + pitch * i, size - 2, size - 2, fill, 2)


def zero() -> str:
  """What each of four devices stores, by ZeRO stage."""
  drawing = Drawing("Bytes a parameter on each of four devices, by ZeRO stage")
  kinds = (("blue", "weights", 4), ("green", "gradients", 4), ("orange", "optimizer state", 8))
  splits = ((1, 1, 1), (1, 1, 4), (1, 4, 4), (4, 4, 4))
  UNIT, TOP, BAR, PITCH = 13, 62, 34, 40
  legend(
    drawing, 0, 18, [(fill, f"{name}, {size} bytes a parameter") for fill, name, size in kinds]
  )
  for stage, split in enumerate(splits):
    left = stage * 194
    total = sum(size / parts for (_, _, size), parts in zip(kinds, split))
    for device in range(4):
      y = TOP + 16 * UNIT
      for (fill, _, size), parts in zip(kinds, split):
        height = size / parts * UNIT
        y -= height
        drawing.rect(left + device * PITCH, y, BAR, height - 1.5, fill, 2)
      drawing.text(left + device * PITCH + BAR / 2, TOP + 16 * UNIT + 17, str(device), "s q m")
    middle = left + (3 * PITCH + BAR) / 2
    drawing.line((left - 4, TOP + 16 * UNIT), (left + 3 * PITCH + BAR + 4, TOP + 16 * UNIT))
    drawing.text(middle, TOP + 16 * UNIT + 42, f"zero_stage={stage}", "c m")
    drawing.text(middle, TOP + 16 * UNIT + 62, f"{total:g} bytes a device", "b m")
  return drawing.svg(TOP + 16 * UNIT + 74)


def mesh() -> str:
  """What each of eight devices holds of a matrix and of a batch."""
  drawing = Drawing("A mesh of data=2 x fsdp=2 x tensor=2: what each device holds")
  SIZE, TOP, GAP = 76, 66, 24
  legend(
    drawing,
    0,
    18,
    [("blue", "its part of a weight matrix"), ("green", "its sequences of the batch")],
  )
  for data in range(2):
    left = 30 + data * 394
    drawing.rect(left - 30, TOP - 32, 366, 2 * (SIZE + 58) + 30, "panel", 8)
    drawing.text(left + 153, TOP - 12, f"data = {data}", "c m")
    for fsdp in range(2):
      for tensor in range(2):
        x, y = left + fsdp * 156, TOP + tensor * (SIZE + 58)
        drawing.rect(x, y, SIZE, SIZE, "gray")
        half = SIZE / 2
        drawing.rect(x + tensor * half, y + fsdp * half, half, half, "blue")
        for row in range(4):
          mine = row == 2 * data + fsdp
          drawing.rect(
            x + SIZE + 12, y + row * SIZE / 4, 40, SIZE / 4 - 3, "green" if mine else "gray"
          )
        drawing.text(x, y + SIZE + 18, f"fsdp {fsdp}, tensor {tensor}", "s")
        drawing.text(x, y + SIZE + 34, f"device {4 * data + 2 * fsdp + tensor}", "s q")
  y = TOP + 2 * (SIZE + 58) + 26
  for words in (
    "data: copies of the weights, different sequences.",
    "fsdp: parts of the weights, different sequences.",
    "tensor: parts of the weights, the same sequences.",
  ):
    drawing.text(0, y, words, "s")
    y += 20
  return drawing.svg(y - 8 + GAP / 3)


def offload() -> str:
  """What memory.offload puts where."""
  drawing = Drawing("What memory.offload keeps on the device and in the host's memory")
  columns = {
    "none": (
      [
        ("blue", "weights, float32"),
        ("green", "gradient"),
        ("orange", "optimizer state"),
        ("purple", "activations"),
      ],
      [],
    ),
    "optimizer": (
      [
        ("blue", "matrices, compute dtype"),
        ("green", "their gradient"),
        ("purple", "activations"),
      ],
      [("blue", "weights, float32"), ("orange", "optimizer state")],
    ),
    "all": (
      [
        ("blue", "one layer, tables in use"),
        ("green", "that layer's gradient"),
        ("purple", "the input of each layer"),
      ],
      [("blue", "weights"), ("green", "gradient"), ("orange", "optimizer state")],
    ),
  }
  W, DEVICE, HOST, ROW = 222, 178, 140, 36
  for i, (name, (device, host)) in enumerate(columns.items()):
    x = 46 + i * (W + 24)
    drawing.text(x + W / 2, 16, f"offload={name}", "c b m")
    for top, height, items in ((32, DEVICE, device), (32 + DEVICE + 44, HOST, host)):
      drawing.rect(x, top, W, height, "panel", 8)
      for j, (fill, words) in enumerate(items):
        drawing.rect(x + 12, top + 12 + (ROW + 4) * j, W - 24, ROW, fill)
        drawing.text(x + W / 2, top + 35 + (ROW + 4) * j, words, "s m")
    if host:
      low, high = 32 + DEVICE + 40, 32 + DEVICE + 4
      drawing.line((x + W / 2 - 40, low), (x + W / 2 - 40, high), arrow=True)
      drawing.line((x + W / 2 + 40, high), (x + W / 2 + 40, low), arrow=True)
      drawing.text(x + W / 2, 32 + DEVICE + 27, "bus", "s q m")
  for y, words in ((32 + DEVICE / 2, "Device"), (32 + DEVICE + 44 + HOST / 2, "Host")):
    drawing._add(
      f'<text transform="translate(22 {y:g}) rotate(-90)" class="b m">{words} memory</text>'
    )
  return drawing.svg(32 + DEVICE + 44 + HOST + 4)


def step_memory(plans: dict) -> str:
  """Memory of a step by kind, for several plans."""
  drawing = Drawing("Peak memory of a train step on one device, by kind")
  kinds = {
    "parameters": ("blue", "weights"),
    "gradients": ("green", "gradients"),
    "optimizer": ("orange", "optimizer state"),
    "activations": ("purple", "activations and temporaries"),
  }
  legend(drawing, 0, 18, kinds.values())
  LEFT, ROW, MOST = 196, 58, 24 * GIB
  scale = (WIDTH - LEFT - 8) / MOST
  for i, (name, plan) in enumerate(plans.items()):
    y, x = 44 + ROW * i, float(LEFT)
    drawing.text(0, y + 15, name, "c")
    drawing.text(
      0,
      y + 33,
      f"on a {plan['device']}"
      if ":" not in plan["device"]
      else f"on each chip of a {plan['device']}",
      "s q",
    )
    drawing.rect(LEFT, y, plan["usable_bytes"] * scale, 26, "panel")
    for kind, (fill, _) in kinds.items():
      width = plan["breakdown"][kind] * scale
      if width >= 0.5:
        drawing.rect(x, y, width, 26, fill, 0)
        x += width
    end = LEFT + plan["usable_bytes"] * scale
    drawing.line((end, y - 3), (end, y + 29))
    host = f", and {plan['host_bytes'] / GIB:.1f} GiB in the host's memory"
    words = f"{plan['peak_bytes'] / GIB:.1f} of {plan['usable_bytes'] / GIB:.1f} GiB"
    drawing.text(LEFT, y + 43, words + (host if plan["host_bytes"] else ""), "s q")
  y = 44 + ROW * len(plans) + 10
  versions = next(iter(plans.values()))["versions"]
  drawing.text(
    0,
    y,
    f"The line is the memory that a process gets. Compiled, not measured: jax {versions['jax']}.",
    "s q",
  )
  streamed = (
    "With memory.offload=all a device holds temporaries only: a layer, and inputs of layers."
  )
  drawing.text(0, y + 20, streamed, "s q")
  return drawing.svg(y + 28)


def fits(page: str) -> str:
  """The table of docs/hardware.md as a map."""
  rows = [
    [cell.strip() for cell in line.split("|")[1:-1]]
    for line in page.splitlines()
    if line.startswith("|")
  ]
  head, models = rows[0][1:], rows[2 : rows.index(next(it for it in rows[2:] if "for" in it))]
  drawing = Drawing("The largest micro-batch and its memory, by model and device")
  LEFT, ROW, TOP = 104, 70, 58
  W = (WIDTH - LEFT) / len(head)
  for j, name in enumerate(head):
    device, _, memory = name.partition(", ")
    drawing.text(LEFT + W * (j + 0.5), 18, device, "b m")
    drawing.text(LEFT + W * (j + 0.5), 36, memory, "s q m")
  for i, (model, *found) in enumerate(models):
    y = TOP + ROW * i
    drawing.text(0, y + 36, model, "s b")
    for j, cell in enumerate(found):
      x, middle = LEFT + W * j, LEFT + W * (j + 0.5)
      match = re.fullmatch(r"(\d+), ([\d.]+ GiB)(?:, `(\w+)`)?", cell)
      if not match:
        drawing.rect(x + 2, y, W - 4, ROW - 4, "panel")
        drawing.text(middle, y + 37, "—" if cell == "-" else cell, "s q m")
        continue
      fill = {None: "green", "optimizer": "blue", "all": "orange"}[match[3]]
      drawing.rect(x + 2, y, W - 4, ROW - 4, fill)
      drawing.text(middle, y + 25, match[1], "b m")
      drawing.text(middle, y + 43, match[2], "s m")
      if match[3]:
        drawing.text(middle, y + 58, match[3], "c m")
  y = TOP + ROW * len(models) + 22
  legend(
    drawing,
    LEFT,
    y,
    [
      ("green", "memory.offload=none"),
      ("blue", "memory.offload=optimizer"),
      ("orange", "memory.offload=all"),
    ],
  )
  first = "Bold: the largest micro-batch, in sequences of 1,024 tokens (GPT-2) or 2,048."
  drawing.text(LEFT, y + 24, first, "s q")
  drawing.text(LEFT, y + 42, "Below it: the peak memory of one device, as compiled.", "s q")
  drawing.text(
    LEFT, y + 60, "—: does not fit with gradient accumulation; gptj_6b_v5e8 fits without it.", "s q"
  )
  return drawing.svg(y + 70)


def packages(page: str) -> str:
  """The arrows of docs/architecture.md: a package is above all that it imports."""
  block = re.search(r"```mermaid\ngraph BT\n(.*?)```", page, re.DOTALL)
  arrows = re.findall(r"(\w+) --> (\w+)", block[1])
  names = list(dict.fromkeys(name for arrow in arrows for name in arrow))
  level = dict.fromkeys(names, 0)
  for _ in names:
    for low, high in arrows:
      level[high] = max(level[high], level[low] + 1)
  drawing = Drawing("Packages of jaxft; an arrow leads to the package that imports")
  W, H, PITCH = 104, 30, 70
  top = max(level.values())
  layers = [[it for it in names if level[it] == number] for number in range(top + 1)]
  where: dict[str, tuple[float, float]] = {}
  for number, layer in enumerate(layers):
    # Near the packages that they import.
    center = lambda name: [where[low][0] for low, high in arrows if high == name and low in where]
    layer.sort(key=lambda name: sum(center(name)) / max(len(center(name)), 1))
    for i, name in enumerate(layer):
      where[name] = WIDTH * (i + 1) / (len(layer) + 1), (top - number) * PITCH + H / 2 + 2
  for low, high in arrows:
    (x, y), (x2, y2) = where[low], where[high]
    drawing.curve(x, y - H / 2, x2, y2 + H / 2 + 2)
  for name, (x, y) in where.items():
    drawing.rect(x - W / 2, y - H / 2, W, H, "blue", 6)
    drawing.text(x, y + 5, name, "c m")
  return drawing.svg(top * PITCH + H + 4)


def figures() -> dict[Path, str]:
  page = lambda name: (ROOT / "docs" / name).read_text(encoding="utf-8")
  plans = json.loads(NUMBERS.read_text(encoding="utf-8"))["plans"]
  drawn = {
    "batch": batch(),
    "zero": zero(),
    "mesh": mesh(),
    "offload": offload(),
    "step_memory": step_memory(plans),
    "fits": fits(page("hardware.md")),
    "packages": packages(page("architecture.md")),
  }
  return {FOLDER / f"{name}.svg": text for name, text in drawn.items()}


def write_plans() -> None:
  """Compile PLANS and keep what the figures need."""
  import runpy

  import jaxft

  plans = {}
  for name, device in PLANS.items():
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    plan = jaxft.plan_for(config, device)
    plans[name] = {key: plan[key] for key in PLAN_KEYS}
  command = "python scripts/make_figures.py --plan"
  text = json.dumps({"command": command, "plans": plans}, indent=1)
  NUMBERS.write_text(text + "\n", encoding="utf-8")


def main() -> None:
  if "--plan" in sys.argv[1:]:
    write_plans()
  for file, text in figures().items():
    file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
  main()
