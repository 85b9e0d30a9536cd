"""Argument parsers of the commands without a config; they and their --help need no jax."""

import argparse
import difflib
import json
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from jaxft.cli import commands, run_generation
from jaxft.errors import RequestError
from jaxft.generation.sampling_config import Sampling
from jaxft.utils.files import expand_user

DTYPES = ("float32", "bfloat16", "float16")  # of `jaxft.hf.export_tensors.EXPORT_DTYPES`
LAYOUTS = ("concat", "pack", "pad")  # of `config.data.layout`
DEVICES = ("gpu", "tpu")  # `jaxft.utils.backend.REQUIRE_CHOICES`

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WEIGHT_PATTERNS = ("*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")
# Other tools' names for a flag, if they are nearer to another flag's name, or to none.
SUGGESTIONS = {
  "block_size": "--sequence_length",
  "max_seq_length": "--sequence_length",
  "validation_file": "--data",
  "train_file": "--data",
  "per_device_eval_batch_size": "--batch_size",
  "output_dir": "--out",
  "num_samples": "--num_return_sequences",
}
MIN_SIMILARITY = 0.6  # of a suggested flag, by difflib


class Parser(argparse.ArgumentParser):
  """A parser that raises RequestError with one line.

  Names may have dashes for underscores, and no name is guessed.
  """

  def __init__(self, command: str, description: str):
    super().__init__(commands.as_typed(command), description=description, allow_abbrev=False)
    self._aliases: dict[str, str] = {}

  def add_bool(self, flag: str, help: str) -> None:
    """Add a flag that is true alone, or takes True or False; None if it is not given."""
    self.add_argument(
      flag, nargs="?", const=True, type=_parse_bool, metavar="True|False", help=help
    )

  def add_alias(self, name: str, other: str) -> None:
    """Add --NAME as an alias of --OTHER, which exists, and is None if it is not given."""
    action = self._option_string_actions[f"--{other}"]
    self._aliases[name] = other
    same = {it: getattr(action, it) for it in ("nargs", "const", "type", "metavar")}
    same["nargs"] = 1 if action.nargs == "+" else action.nargs
    self.add_argument(f"--{name}", **same, help=f"= --{other}")

  def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
    words = list(sys.argv[1:] if args is None else args)
    arguments, rest = self.parse_known_args(self._with_known_names(words), namespace)
    arguments.given_as = {}  # flag -> the alias that was given
    for name, other in self._aliases.items():
      value = vars(arguments).pop(name)
      if value is not None:
        self._set(arguments, other, value, f"--{name}")
        arguments.given_as[other] = name
    self.finalize(arguments, rest)
    return arguments

  def finalize(self, arguments: argparse.Namespace, rest: list[str]) -> None:
    """Check the parsed arguments, and the words that are left over."""
    if rest:
      self.error(f"{rest[0]!r}: a word too many; --help shows what there is")

  def error(self, message: str) -> NoReturn:
    raise RequestError(message.removeprefix("argument "))

  def _set(self, arguments: argparse.Namespace, name: str, value: object, alias: str) -> None:
    current = getattr(arguments, name)
    if current is not None and current != value:
      both = f"{alias}={_format_value(value)} and --{name}={_format_value(current)}"
      self.error(f"{both} are one setting; give one of them")
    setattr(arguments, name, value)

  def _with_known_names(self, words: list[str]) -> list[str]:
    """Replace each flag's name by its known spelling, and reject unknown ones.

    argparse would report a missing flag before a mistyped one.
    """
    result = []
    for i, word in enumerate(words):
      name, equals, value = word.partition("=")
      if word == "--":
        return result + words[i:]
      if name in self._option_string_actions or not re.fullmatch(r"--?[^\W\d][\w.-]*", name):
        known = name
      elif (known := "--" + name[2:].replace("-", "_")) not in self._option_string_actions:
        self.error(f"{name}: no such flag{self._suggestion(name)}")
      action = self._option_string_actions.get(known)
      next_word = "".join(words[i + 1 : i + 2]).lower()
      if action and action.nargs == "?" and not equals and next_word not in BOOLEANS:
        # Otherwise the next word, which may be a model, would be its value.
        equals = "="
        value = "True"
      result.append(known + equals + value)
    return result

  def _suggestion(self, name: str) -> str:
    """Suggest the flags that are most like this name."""
    name = name.strip("-").lower().replace("-", "_")
    if SUGGESTIONS.get(name) in self._option_string_actions:
      return f"; did you mean {SUGGESTIONS[name]}?"
    similarity = {
      flag: difflib.SequenceMatcher(None, flag[2:], name).ratio()
      for flag in self._option_string_actions
      if flag.startswith("--")
    }
    best = max(similarity.values())
    if best < MIN_SIMILARITY:
      return "; --help shows what there is"
    return f"; did you mean {' or '.join(flag for flag in similarity if similarity[flag] == best)}?"


class ModelParser(Parser):
  """A parser of a command that opens a model: MODEL, --model, or --workdir with --step."""

  def __init__(self, command: str, description: str):
    super().__init__(command, description)
    self.add_argument("MODEL", nargs="?", type=expand_user, help="= --model")
    self.add_argument(
      "--model",
      type=expand_user,
      metavar="PATH_OR_ID",
      help="a Hugging Face folder or hub id, or a run",
    )
    self.add_alias("model_name_or_path", "model")
    self.add_argument(
      "--workdir",
      type=expand_user,
      metavar="DIR",
      help="a run: the model of its best checkpoint where train.keep_best_metric is set, else of "
      "its newest",
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

  def finalize(self, arguments: argparse.Namespace, rest: list[str]) -> None:
    word = vars(arguments).pop("MODEL")
    if rest:
      way_out = "give a text to complete as --prompt, in quotes where it has blanks"
      self.error(f"{rest[0]!r}: a word too many; {way_out}")
    if word is not None:
      self._set(arguments, "model", word, "MODEL")
    model = arguments.model
    if model is not None and arguments.workdir is not None:
      self.error(f"--model={model} and --workdir={arguments.workdir}: give one of them")
    if model is None and arguments.workdir is None:
      self.error(
        "--model is missing: name a Hugging Face folder or hub id, or a run with --workdir"
      )
    if model is not None and _is_workdir(Path(model)):
      print(f"--model={model}: a run, read as --workdir={model}", file=sys.stderr)
      arguments.workdir = model
      arguments.model = None


def _is_workdir(folder: Path) -> bool:
  """Whether a folder is the workdir of a run, and not a Hugging Face folder."""
  try:
    if not (folder / "checkpoints").is_dir():
      return False
    if any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS):
      return False
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
  except (OSError, ValueError, RecursionError):
    return False
  sections = ("data", "train")
  return isinstance(config, dict) and all(isinstance(config.get(it), dict) for it in sections)


def _parse_bool(text: str) -> bool:
  if text.lower() not in BOOLEANS:
    raise argparse.ArgumentTypeError(f"{text!r}: must be True or False")
  return BOOLEANS[text.lower()]


def _format_value(value: object) -> str:
  return " ".join(value) if isinstance(value, list) else str(value)


def _path(path: str) -> Path:
  return Path(expand_user(path))


def generate() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.generate", description="Completes prompts. With none, on a terminal, it asks."
  )
  add = parser.add_argument
  add(
    "--prompt",
    nargs="+",
    action="extend",
    default=[],
    metavar="TEXT",
    help="text to complete (with no prompt, and no terminal: the lines of standard input)",
  )
  add(
    "--prompt_file",
    type=expand_user,
    metavar="F",
    help="a file with one prompt a line; empty lines are left out",
  )
  add("--stop_strings", nargs="+", metavar="TEXT", help="end a text when it has one of these")
  for name, default in Sampling._field_defaults.items():
    add(
      f"--{name}",
      type=type(default),
      help="as in transformers (default: what the model's generation_config.json says, or "
      f"{default})",
    )
  parser.add_bool(
    "--do_sample", "False: as --temperature=0; True: draw, whatever generation_config.json says"
  )
  add("--prefix", metavar="TEXT", help="text that the model reads before each prompt")
  _add_transformers_flags(parser)
  add("--json", action="store_true", help="print one JSON object")
  return parser


def _add_transformers_flags(parser: Parser) -> None:
  add = parser.add_argument
  add(
    "--model_type",
    type=str.lower,
    choices=run_generation.MODEL_TYPES,
    help="of the model; where nothing is said it is done as run_generation.py has it",
  )
  parser.add_bool("--use_cpu", "compute on the CPU")
  parser.add_bool("--fp16", "bfloat16 where the device has it, as always")
  for name, (value, why) in run_generation.FIXED.items():
    parser.add_bool(f"--{name}", f"{value}, always so: {why}")
  name, about = run_generation.PAD_TOKEN
  add(f"--{name}", type=int, metavar="N", help=about)
  for name, reason in run_generation.UNSUPPORTED.items():
    add(f"--{name}", metavar="X", help=f"refused: {reason}")
  for name, other in run_generation.ALIASES.items():
    if other != "model":
      parser.add_alias(name, other)


def evaluate() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.evaluate", description="Loss and perplexity of a model on a text."
  )
  add = parser.add_argument
  add(
    "--data",
    nargs="+",
    type=expand_user,
    default=[],
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]; default with --workdir: what the run has held "
    "out",
  )
  add("--text_column", help="column that holds the text (default: as the run has it, or text)")
  add(
    "--label_column",
    help="column that holds the label, for a model that classifies (default: as the run, or label)",
  )
  add(
    "--layout",
    choices=LAYOUTS,
    help="concat: one stream cut into rows; pad: each text alone, as lm-eval has it; pack: "
    "several of them in a row (default: as the run has it, or concat)",
  )
  add(
    "--sequence_length",
    type=int,
    default=0,
    help="tokens a row (default: as the run, or the model's positions)",
  )
  add(
    "--stride",
    type=int,
    default=0,
    help="rows of one stream that overlap, this many tokens apart: more context for each token, as "
    "transformers' page on perplexity has it (default: rows do not overlap)",
  )
  add(
    "--batch_size",
    type=int,
    default=8,
    help="rows at once; changes speed and memory only (default: 8)",
  )
  add("--json", action="store_true", help="print one JSON object")
  return parser


def export() -> ModelParser:
  parser = ModelParser(
    "python -m jaxft.export", description="Writes a Hugging Face folder and verifies it."
  )
  add = parser.add_argument
  add(
    "--out",
    required=True,
    type=expand_user,
    metavar="DIR",
    help="folder to write; replaces an earlier export",
  )
  add(
    "--dtype",
    choices=DTYPES,
    help="of the weights (default: float32 for a run, what the weights are stored in for a "
    "--model)",
  )
  add("--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
  add("--push_to_hub", metavar="REPO", help="upload the folder to this hub repository (OWNER/NAME)")
  return parser


def tokenizer() -> Parser:
  parser = Parser(
    "python -m jaxft.tokenizer",
    description="A BPE tokenizer of your own text, or a model with tokens of your own.",
  )
  add = parser.add_argument
  begin = parser.add_mutually_exclusive_group(required=True).add_argument
  begin(
    "--data",
    nargs="+",
    type=expand_user,
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]",
  )
  begin("--model", type=expand_user, metavar="PATH_OR_ID", help="model to add tokens to")
  add("--revision", default="main", help="with --model: branch, tag or commit (default: main)")
  add(
    "--torch_bin",
    action="store_true",
    help="with --model: read pytorch_model*.bin through torch, weights_only",
  )
  add(
    "--add",
    nargs="+",
    metavar="[ROLE=]TOKEN",
    help="with --model: the special tokens to add; bos=, eos= or pad= before one, new or not, "
    "gives it that role",
  )
  add("--text_column", default="text", help="column that holds the text (default: text)")
  add("--vocab_size", type=int, default=16384, help="tokens (default: 16384)")
  add("--out", required=True, type=expand_user, metavar="FOLDER", help="folder to write; a new one")
  return parser


def report() -> Parser:
  parser = Parser(
    "python -m jaxft.report",
    description="Writes the page of a run again, or one that compares several runs.",
  )
  add = parser.add_argument
  add(
    "workdirs", nargs="+", type=_path, metavar="WORKDIR", help="what a run was given as --workdir"
  )
  add(
    "--out",
    type=_path,
    metavar="FILE",
    help="the page (default: WORKDIR/report.html; of several: comparison.html)",
  )
  return parser
