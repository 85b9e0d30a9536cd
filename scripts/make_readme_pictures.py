"""Make the two pictures of README.md: a terminal recording and a screenshot of a report page.

    python scripts/make_readme_pictures.py            # runs the quickstart: about three minutes
    python scripts/make_readme_pictures.py --no-run   # pictures of the run that is already there

The recording is an SVG that plays once, in ten seconds, however long the run took. The screenshot
needs Chromium (`chromium` on the PATH).
"""

import argparse
import html
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
WORKDIR = ROOT / "runs" / "quickstart"
COMMAND = "jaxft quickstart"

COLUMNS = 100
SECONDS = 10.0
CHARACTER = 8.0  # width and height of a character cell at 13 px, in px
LINE = 19.0
MARGIN = 18.0
COLORS = {
  "command": "#e6edf3",
  "log": "#9da7b3",
  "before": "#e3b341",
  "after": "#56d364",
  "result": "#79c0ff",
  "bar": "#e6edf3",
}


def record() -> list[str]:
  """Run the quickstart and return the lines that it prints."""
  shutil.rmtree(WORKDIR, ignore_errors=True)
  command = [sys.executable, "-m", "jaxft.train", "--config", "configs/quickstart.py"]
  command += ["--workdir", str(WORKDIR.relative_to(ROOT))]
  return subprocess.run(command, cwd=ROOT, check=True, text=True, capture_output=True).stdout


def scenes(output: str) -> list[tuple[float, float | None, str, str]]:
  """Return (start, end, color, text) of every line of the recording; end None: it stays.

  Progress lines share one row of the terminal, as a progress bar does.
  """
  lines = output.replace(f"{ROOT}/", "").splitlines()
  numbers = [i for i, line in enumerate(lines) if "tokens/s" in line]
  first, last = numbers[0], numbers[-1]
  shown = [(0.3, None, "command", f"$ {COMMAND}")]
  head = _wrapped(lines[:first])
  tail = _wrapped(lines[last + 1 :])
  # A second for the lines before training, seven for the steps, the rest for what follows.
  for i, (kind, line) in enumerate(head):
    shown.append((0.8 + 1.2 * i / len(head), None, kind, line))
  steps = [line for line in lines[first : last + 1] if "tokens/s" in line]
  start, length = 2.2, 5.3
  for i, line in enumerate(steps):
    begin = start + length * i / len(steps)
    end = start + length * (i + 1) / len(steps) if i + 1 < len(steps) else None
    shown.append((begin, end, "bar", _with_bar(line)))
  for i, (kind, line) in enumerate(tail):
    shown.append((7.7 + (SECONDS - 7.9) * i / len(tail), None, kind, line))
  return shown


def _wrapped(lines: list[str]) -> list[tuple[str, str]]:
  """Keep the first two lines of each sample, and cut every line at the terminal's width."""
  shown, kind, samples = [], "log", 0
  for line in lines:
    if line.lstrip().startswith(("[before]", "[after]")):
      kind = "before" if "[before]" in line else "after"
      samples += 1
      teaser = textwrap.wrap(line.strip(), COLUMNS - 4)[:2] if samples == 1 else []
      shown += [(kind, f"  {it}") for it in teaser]
    elif line.startswith("  ") and kind in ("before", "after"):
      continue  # the rest of a sample
    else:
      samples = 0
      kind = "result" if line.startswith(("eval loss", "exported", "report")) else "log"
      shown.append((kind, line))
  return [
    (kind, textwrap.shorten(line, COLUMNS, placeholder=" …"))
    if not line.startswith("  ")
    else (kind, line)
    for kind, line in shown
  ]


def _with_bar(line: str) -> str:
  """Return a log line of a step with a bar of its share of all steps."""
  step, rest = line.removeprefix("step ").split("  ", 1)
  done, total = (int(it.replace(",", "")) for it in step.split("/"))
  width = 30
  full = round(width * done / total)
  return f"{'━' * full}{'╌' * (width - full)} {done}/{total}  {rest.rsplit('  ', 1)[0]}"


def render(shown: list[tuple[float, float | None, str, str]]) -> str:
  """Return the SVG: one text element a line, each with its own start."""
  rows, row = [], -1
  previous = ""
  for _, _, kind, _ in shown:
    row += not (kind == "bar" and previous == "bar")
    rows.append(row)
    previous = kind
  width = 2 * MARGIN + CHARACTER * COLUMNS
  height = 2 * MARGIN + LINE * (row + 1) + 22
  parts = []
  for (start, end, kind, line), row in zip(shown, rows, strict=True):
    y = MARGIN + 22 + LINE * (row + 0.75)
    name = "stay" if end is None else "flash"
    length = 0.01 if end is None else end - start
    style = f"animation:{name} {length:.2f}s linear {start:.2f}s {'both' if end is None else ''}"
    parts.append(
      f'<text class="{name}" x="{MARGIN:g}" y="{y:.1f}" fill="{COLORS[kind]}" style="{style}">'
      f"{html.escape(line)}</text>"
    )
  dots = "".join(
    f'<circle cx="{MARGIN + 4 + 18 * i}" cy="18" r="5.5" fill="{color}"/>'
    for i, color in enumerate(("#ff5f57", "#febc2e", "#28c840"))
  )
  return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img">
<title>{COMMAND}: a small GPT-2 is fine-tuned and exported</title>
<style>
text {{ font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre }}
text.flash {{ opacity: 0 }}
@keyframes stay {{ from {{ opacity: 0 }} to {{ opacity: 1 }} }}
@keyframes flash {{ from, to {{ opacity: 1 }} }}
@media (prefers-reduced-motion: reduce) {{ text {{ animation: none !important }} }}
</style>
<rect width="{width:g}" height="{height:g}" rx="10" fill="#0d1117"/>
{dots}
{chr(10).join(parts)}
</svg>
"""


def screenshot(page: Path, picture: Path, width: int, height: int) -> None:
  """Take a picture of a page, at two pixels a CSS pixel."""
  with tempfile.TemporaryDirectory() as profile:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += ["--no-first-run", "--disable-background-networking", "--disable-sync"]
    command += [f"--user-data-dir={profile}", f"--window-size={width},{height}"]
    command += ["--force-device-scale-factor=1.5", f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--no-run", action="store_true", help="use the run in runs/quickstart")
  args = parser.parse_args()
  log = WORKDIR / "stdout.txt"
  if not args.no_run:
    output = record()
    log.write_text(output)
  FIGURES.mkdir(exist_ok=True)
  (FIGURES / "terminal.svg").write_text(render(scenes(log.read_text())))
  screenshot(WORKDIR / "report.html", FIGURES / "report.png", 1100, 1240)
  print(f"made {FIGURES / 'terminal.svg'} and {FIGURES / 'report.png'}")


if __name__ == "__main__":
  main()
