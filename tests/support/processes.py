"""jaxft's commands in processes of their own, and what they leave behind."""

import json
from pathlib import Path

import preloaded

ROOT = Path(__file__).parents[2]
CONFIG = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import tiny

def get_config():
  return tiny.config(Path({folder!r}), Path({stories!r}))
"""


def run(*arguments, check=0, timeout=300, **how):
  done = preloaded.run(["-m", *arguments], capture_output=True, text=True, timeout=timeout, **how)
  assert check is None or done.returncode == check, done.stdout + done.stderr
  assert "Traceback" not in done.stderr
  return done


def train(config_file, workdir, *more, **how):
  return run("jaxft.train", "--config", config_file, "--workdir", workdir, *more, **how)


def lines(file):
  return [json.loads(line) for line in file.read_text().splitlines()]


def losses(workdir):
  """Every loss by step, which an interrupted run must share with an undisturbed one."""
  return {
    (line["step"], key): line[key]
    for line in lines(workdir / "metrics.jsonl")
    for key in ("train/loss", "eval/loss", "train/tokens")
    if key in line
  }
