"""What the commands that take no config understand, and their --help: made before jax is imported, which takes seconds."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.cli import run_generation
from jaxft.errors import RequestError
from jaxft.generation.sampling import Sampling
from jaxft.utils.files import expand_user

DTYPES = ("float32", "bfloat16", "float16")  # of `jaxft.hf.export_tensors.EXPORT_DTYPES`
LAYOUTS = ("concat", "pack", "pad")  # of `config.data.layout`
DEVICES = ("gpu", "tpu")  # `jaxft.utils.backend.REQUIRE_CHOICES`


BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WEIGHT_PATTERNS = ("*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")
# What other tools call a flag, where that is nearer to another one's name, or to none.
SUGGESTIONS = {
  "block_size": "--sequence_length",
  "max_seq_length": "--sequence_length",
  "validation_file": "--data",
  "train_file": "--data",
  "per_device_eval_batch_size": "--batch_size",
  "output_dir": "--out",
  "num_samples": "--num_return_sequences",
}
MIN_SIMILARITY = 0.6  # of a flag that is meant, by difflib


class Parser(argparse.ArgumentParser):
  """Whose faults are RequestErrors of one line; names may have dashes for underscores, and no name is guessed."""

  def __init__(self, command: str, description: str):
    super().__init__(command, description=description, allow_abbrev=False)
    self._same: dict[str, str] = {}

  def add_switch(self, flag: str, help: str) -> None:
    """A flag that is true alone, or takes True or False; None where it is not given."""
    self.add_argument(flag, nargs="?", const=True, type=_truth, metavar="True|False", help=help)

  def add_same(self, name: str, other: str) -> None:
    """--NAME, another name of the flag --OTHER, which is there already and is None where it is not given."""
    action, self._same[name] = self._option_string_actions[f"--{other}"], other
    nargs = 1 if action.nargs == "+" else action.nargs
    self.add_argument(
      f"--{name}",
      nargs=nargs,
      const=action.const,
      type=action.type,
      metavar=action.metavar,
      help=f"= --{other}",
    )

  def parse_args(
    self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
  ) -> Any:
    words = list(sys.argv[1:] if args is None else args)
    arguments, rest = self.parse_known_args(self._with_known_names(words), namespace)
    arguments.given_as = {}  # flags that were given by another name -> that name
    for name, other in self._same.items():
      value = vars(arguments).pop(name)
      if value is not None:
        self._set(arguments, other, value, f"--{name}")
        arguments.given_as[other] = name
    self.settle(arguments, rest)
    return arguments

  def settle(self, arguments: argparse.Namespace, rest: list[str]) -> None:
    """What is to be done when all words are read, and some are left over."""
    if rest:
      self.error(f"{rest[0]!r}: a word too many; --help shows what there is")

  def error(self, message: str) -> None:
    raise RequestError(message.removeprefix("argument "))

  def _set(self, arguments: argparse.Namespace, name: str, value: Any, said: str) -> None:
    there = getattr(arguments, name)
    if there is not None and there != value:
      self.error(
        f"{said}={_told(value)} and --{name}={_told(there)} are one setting; give one of them"
      )
    setattr(arguments, name, value)

  def _with_known_names(self, words: list[str]) -> list[str]:
    """The words with each name of a flag as it is known here. argparse would tell what is missing before what is mistyped."""
    found = []
    for i, word in enumerate(words):
      name, equals, value = word.partition("=")
      if word == "--":
        return found + words[i:]
      if name in self._option_string_actions or not re.fullmatch(r"--?[^\W\d][\w.-]*", name):
        known = name
      elif (known := "--" + name[2:].replace("-", "_")) not in self._option_string_actions:
        self.error(f"{name}: no such flag{self._meant(name)}")
      action = self._option_string_actions.get(known)
      if (
        action
        and action.nargs == "?"
        and not equals
        and "".join(words[i + 1 : i + 2]).lower() not in BOOLEANS
      ):
        equals, value = "=", "True"  # or the next word, which may be a model, would be its value
      found.append(known + equals + value)
    return found

  def _meant(self, name: str) -> str:
    """The flags that are most like this name."""
    name = name.strip("-").lower().replace("-", "_")
    if SUGGESTIONS.get(name) in self._option_string_actions:
      return f"; did you mean {SUGGESTIONS[name]}?"
    like = {
      flag: difflib.SequenceMatcher(None, flag[2:], name).ratio()
      for flag in self._option_string_actions
      if flag.startswith("--")
    }
    best = max(like.values())
    if best < MIN_SIMILARITY:
      return "; --help shows what there is"
    return (
      f"; did you mean {' or '.join(flag for flag, likeness in like.items() if likeness == best)}?"
    )


class ModelParser(Parser):
  """Of a command that opens a model: MODEL, --model or --model_name_or_path, or --workdir with --step."""

  def __init__(self, command: str, description: str):
    super().__init__(command, description)
    self.add_argument("MODEL", nargs="?", type=expand_user, help="= --model")
    self.add_argument(
      "--model",
      type=expand_user,
      metavar="PATH_OR_ID",
      help="a Hugging Face folder or hub id, or a run",
    )
    self.add_same("model_name_or_path", "model")
    self.add_argument(
      "--workdir",
      type=expand_user,
      metavar="DIR",
      help="a run: the model of its best checkpoint where train.keep_best_metric is set, else of its newest",
    )
    self.add_argument(
      "--step", type=int, metavar="N", help="with --workdir: the checkpoint of this step"
    )
    self.add_argument(
      "--revision", default="main", help="with --model: branch, tag or commit (default: main)"
    )
    self.add_argument(
      "--require", choices=DEVICES, help="end where JAX would compute on anything else"
    )
    self.add_argument(
      "--torch_bin",
      action="store_true",
      help="with --model: read pytorch_model*.bin through torch, weights_only",
    )

  def settle(self, arguments: argparse.Namespace, rest: list[str]) -> None:
    word = vars(arguments).pop("MODEL")
    if rest:
      self.error(
        f"{rest[0]!r}: a word too many; give a text to complete as --prompt, in quotes where it has blanks"
      )
    if word is not None:
      self._set(arguments, "model", word, "MODEL")
    if arguments.model is not None and arguments.workdir is not None:
      self.error(f"--model={arguments.model} and --workdir={arguments.workdir}: give one of them")
    if arguments.model is None and arguments.workdir is None:
      self.error(
        "--model is missing: name a Hugging Face folder or hub id, or a run with --workdir"
      )
    if arguments.model is not None and _is_run(Path(arguments.model)):
      print(
        f"--model={arguments.model}: a run, read as --workdir={arguments.model}", file=sys.stderr
      )
      arguments.workdir, arguments.model = arguments.model, None


def _is_run(folder: Path) -> bool:
  """Whether a folder is what a run was given as --workdir, and no Hugging Face folder."""
  try:
    if not (folder / "checkpoints").is_dir() or any(
      any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS
    ):
      return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  return isinstance(config, dict) and all(
    isinstance(config.get(section), dict) for section in ("data", "train")
  )


def _truth(text: str) -> bool:
  if text.lower() not in BOOLEANS:
    raise argparse.ArgumentTypeError(f"{text!r}: must be True or False")
  return BOOLEANS[text.lower()]


def _told(value: Any) -> str:
  return " ".join(value) if isinstance(value, list) else str(value)


def _path(path: str) -> Path:
  return Path(expand_user(path))


def generate() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.generate", description="Completes prompts. With none, on a terminal, it asks."
  )
  parser.add_argument(
    "--prompt",
    nargs="+",
    action="extend",
    default=[],
    metavar="TEXT",
    help="text to complete (with no prompt, and no terminal: the lines of standard input)",
  )
  parser.add_argument(
    "--prompt_file",
    type=expand_user,
    metavar="F",
    help="a file with one prompt a line; empty lines are left out",
  )
  parser.add_argument(
    "--stop_strings", nargs="+", metavar="TEXT", help="end a text when it has one of these"
  )
  for name, default in Sampling._field_defaults.items():
    parser.add_argument(
      f"--{name}",
      type=type(default),
      help=f"as in transformers (default: what the model's generation_config.json says, or {default})",
    )
  parser.add_switch(
    "--do_sample", "False: as --temperature=0; True: draw, whatever generation_config.json says"
  )
  parser.add_argument(
    "--prefix", metavar="TEXT", help="text that the model reads before each prompt"
  )
  _add_flags_of_transformers(parser)
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  return parser


def _add_flags_of_transformers(parser: Parser) -> None:
  parser.add_argument(
    "--model_type",
    type=str.lower,
    choices=run_generation.MODEL_TYPES,
    help="of the model; where nothing is said it is done as run_generation.py has it",
  )
  parser.add_switch("--use_cpu", "compute on the CPU")
  parser.add_switch("--fp16", "bfloat16 where the device has it, as always")
  for name, (value, why) in run_generation.FIXED.items():
    parser.add_switch(f"--{name}", f"{value}, always so: {why}")
  name, about = run_generation.PAD_TOKEN
  parser.add_argument(f"--{name}", type=int, metavar="N", help=about)
  for name, reason in run_generation.UNSUPPORTED.items():
    parser.add_argument(f"--{name}", metavar="X", help=f"refused: {reason}")
  for name, other in run_generation.ALIASES.items():
    if other != "model":
      parser.add_same(name, other)


def evaluate() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.evaluate", description="Loss and perplexity of a model on a text."
  )
  parser.add_argument(
    "--data",
    nargs="+",
    type=expand_user,
    default=[],
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]; default with --workdir: what the run has held out",
  )
  parser.add_argument(
    "--text_column", help="column that holds the text (default: as the run has it, or text)"
  )
  parser.add_argument(
    "--label_column",
    help="column that holds the label, for a model that classifies (default: as the run, or label)",
  )
  parser.add_argument(
    "--layout",
    choices=LAYOUTS,
    help="concat: one stream cut into rows; pad: each text alone, as lm-eval has it; pack: several of them in a row "
    "(default: as the run has it, or concat)",
  )
  parser.add_argument(
    "--sequence_length",
    type=int,
    default=0,
    help="tokens a row (default: as the run, or the model's positions)",
  )
  parser.add_argument(
    "--stride",
    type=int,
    default=0,
    help="rows of one stream that overlap, this many tokens apart: more context for each token, as transformers' page on "
    "perplexity has it (default: rows do not overlap)",
  )
  parser.add_argument(
    "--batch_size",
    type=int,
    default=8,
    help="rows at once; changes speed and memory only (default: 8)",
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  return parser


def export() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.export", description="Writes a Hugging Face folder and verifies it."
  )
  parser.add_argument(
    "--out",
    required=True,
    type=expand_user,
    metavar="DIR",
    help="folder to write; replaces an earlier export",
  )
  parser.add_argument(
    "--dtype",
    choices=DTYPES,
    help="of the weights (default: float32 for a run, what the weights are stored in for a --model)",
  )
  parser.add_argument(
    "--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)"
  )
  parser.add_argument(
    "--push_to_hub", metavar="REPO", help="upload the folder to this hub repository (OWNER/NAME)"
  )
  return parser


def tokenizer() -> Parser:
  parser = Parser(
    "python -m jaxft.tokenizer",
    description="A BPE tokenizer of your own text, or a model with tokens of your own.",
  )
  begin = parser.add_mutually_exclusive_group(required=True)
  begin.add_argument(
    "--data",
    nargs="+",
    type=expand_user,
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]",
  )
  begin.add_argument(
    "--model", type=expand_user, metavar="PATH_OR_ID", help="model to add tokens to"
  )
  parser.add_argument(
    "--revision", default="main", help="with --model: branch, tag or commit (default: main)"
  )
  parser.add_argument(
    "--torch_bin",
    action="store_true",
    help="with --model: read pytorch_model*.bin through torch, weights_only",
  )
  parser.add_argument(
    "--add",
    nargs="+",
    metavar="[ROLE=]TOKEN",
    help="with --model: the special tokens to add; bos=, eos= or pad= before one, new or not, gives it that role",
  )
  parser.add_argument(
    "--text_column", default="text", help="column that holds the text (default: text)"
  )
  parser.add_argument("--vocab_size", type=int, default=16384, help="tokens (default: 16384)")
  parser.add_argument(
    "--out", required=True, type=expand_user, metavar="FOLDER", help="folder to write; a new one"
  )
  return parser


def report() -> Parser:
  parser = Parser(
    "python -m jaxft.report",
    description="Writes the page of a run again, or one that compares several runs.",
  )
  parser.add_argument(
    "workdirs", nargs="+", type=_path, metavar="WORKDIR", help="what a run was given as --workdir"
  )
  parser.add_argument(
    "--out",
    type=_path,
    metavar="FILE",
    help="the page (default: WORKDIR/report.html; of several: comparison.html)",
  )
  return parser
