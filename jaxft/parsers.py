"""What the commands that take no config understand, and their --help: made before jax is imported, which takes seconds."""

import argparse
from pathlib import Path

from jaxft.files import at_home
from jaxft.sampling import Sampling

DTYPES = ("float32", "bfloat16", "float16")  # of `jaxft.hf.unload.EXPORT_DTYPES`
LAYOUTS = ("concat", "pack", "pad")  # of `config.data.layout`
DEVICES = ("gpu", "tpu")  # `jaxft.backend.REQUIRED`


def _path(path: str) -> Path:
  return Path(at_home(path))


def generate() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m jaxft.generate", description="Completes prompts. With none, on a terminal, it asks."
  )
  _add_model_flags(parser)
  parser.add_argument("--prompt", nargs="+", action="extend", default=[], metavar="TEXT", help="text to complete")
  parser.add_argument(
    "--prompt_file", type=at_home, metavar="F", help="a file with one prompt a line; empty lines are left out"
  )
  parser.add_argument(
    "--stop_strings", nargs="+", default=[], metavar="TEXT", help="end a text when it has one of these"
  )
  for name, default in Sampling._field_defaults.items():
    parser.add_argument(
      f"--{name}",
      type=type(default),
      help=f"as in transformers (default: what the model's generation_config.json says, or {default})",
    )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  return parser


def evaluate() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser("python -m jaxft.evaluate", description="Loss and perplexity of a model on a text.")
  _add_model_flags(parser)
  parser.add_argument(
    "--data",
    nargs="+",
    type=at_home,
    default=[],
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]; default with --workdir: what the run has held out",
  )
  parser.add_argument("--text_column", help="column that holds the text (default: as the run has it, or text)")
  parser.add_argument(
    "--label_column", help="column that holds the label, for a model that classifies (default: as the run, or label)"
  )
  parser.add_argument(
    "--layout",
    choices=LAYOUTS,
    help="concat: one stream cut into rows; pad: each text alone, as lm-eval has it; pack: several of them in a row "
    "(default: as the run has it, or concat)",
  )
  parser.add_argument(
    "--sequence_length", type=int, default=0, help="tokens a row (default: as the run, or the model's positions)"
  )
  parser.add_argument(
    "--stride",
    type=int,
    default=0,
    help="rows of one stream that overlap, this many tokens apart: more context for each token, as transformers' page on "
    "perplexity has it (default: rows do not overlap)",
  )
  parser.add_argument(
    "--batch_size", type=int, default=8, help="rows at once; changes speed and memory only (default: 8)"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  return parser


def export() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m jaxft.export", description="Writes a Hugging Face folder and verifies it."
  )
  _add_model_flags(parser)
  parser.add_argument(
    "--out", required=True, type=at_home, metavar="DIR", help="folder to write; replaces an earlier export"
  )
  parser.add_argument(
    "--dtype",
    choices=DTYPES,
    help="of the weights (default: float32 for a run, what the weights are stored in for a --model)",
  )
  parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
  parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this hub repository (OWNER/NAME)")
  return parser


def tokenizer() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m jaxft.tokenizer", description="A BPE tokenizer of your own text, or a model with tokens of your own."
  )
  begin = parser.add_mutually_exclusive_group(required=True)
  begin.add_argument("--data", nargs="+", type=at_home, metavar="SOURCE", help="file, glob, folder or hub:NAME[:SPLIT]")
  begin.add_argument("--model", type=at_home, metavar="PATH_OR_ID", help="model to add tokens to")
  parser.add_argument("--revision", default="main", help="with --model: branch, tag or commit (default: main)")
  parser.add_argument(
    "--torch_bin", action="store_true", help="with --model: read pytorch_model*.bin through torch, weights_only"
  )
  parser.add_argument(
    "--add",
    nargs="+",
    metavar="[ROLE=]TOKEN",
    help="with --model: the special tokens to add; bos=, eos= or pad= before one, new or not, gives it that role",
  )
  parser.add_argument("--text_column", default="text", help="column that holds the text (default: text)")
  parser.add_argument("--vocab_size", type=int, default=16384, help="tokens (default: 16384)")
  parser.add_argument("--out", required=True, type=at_home, metavar="FOLDER", help="folder to write; a new one")
  return parser


def report() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    "python -m jaxft.report", description="Writes the page of a run again, or one that compares several runs."
  )
  parser.add_argument("workdirs", nargs="+", type=_path, metavar="WORKDIR", help="what a run was given as --workdir")
  parser.add_argument(
    "--out", type=_path, metavar="FILE", help="the page (default: WORKDIR/report.html; of several: comparison.html)"
  )
  return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
  """--model, or --workdir with --step: what `command_line.open_model` opens."""
  which = parser.add_mutually_exclusive_group(required=True)
  which.add_argument("--model", type=at_home, metavar="PATH_OR_ID", help="a Hugging Face folder or hub id")
  which.add_argument(
    "--workdir",
    type=at_home,
    metavar="DIR",
    help="a run: the model of its best checkpoint where train.keep_best_metric is set, else of its newest",
  )
  parser.add_argument("--step", type=int, metavar="N", help="with --workdir: the checkpoint of this step")
  parser.add_argument("--revision", default="main", help="with --model: branch, tag or commit (default: main)")
  parser.add_argument("--require", choices=DEVICES, help="end where JAX would compute on anything else")
  parser.add_argument(
    "--torch_bin", action="store_true", help="with --model: read pytorch_model*.bin through torch, weights_only"
  )
