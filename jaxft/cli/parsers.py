"""Argument parsers of commands without a config; this module does not import jax."""

import argparse
import contextlib
import difflib
import json
import re
import sys
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any, NoReturn

from jaxft.cli import commands, run_generation
from jaxft.errors import RequestError
from jaxft.generation.sampling_config import Sampling
from jaxft.utils.files import expand_user

DTYPES = ("float32", "bfloat16", "float16")  # `jaxft.hf.export_tensors.EXPORT_DTYPES`
LAYOUTS = ("concat", "pack", "pad")  # `config.data.layout`
BAD_ROW_CHOICES = ("error", "skip")  # `config.data.on_bad_row`
DEVICES = ("gpu", "tpu")  # `jaxft.utils.backend.REQUIRE_CHOICES`

BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
WEIGHT_PATTERNS = ("*.safetensors", "flax_model*.msgpack", "pytorch_model*.bin")
# Names of flags in other tools, if the nearest name by spelling would be wrong or missing.
SUGGESTIONS = {
  "block_size": "--sequence_length",
  "max_seq_length": "--sequence_length",
  "validation_file": "--data",
  "train_file": "--data",
  "per_device_eval_batch_size": "--batch_size",
  "output_dir": "--out",
  "num_samples": "--num_return_sequences",
}
MIN_SIMILARITY = 0.6  # of a suggested flag; ratio of difflib


class Parser(argparse.ArgumentParser):
  """A parser that raises RequestError with one line.

  Flags may be spelled with dashes or underscores, but not abbreviated.
  """

  def __init__(self, command: str, description: str):
    super().__init__(commands.as_typed(command), description=description, allow_abbrev=False)
    self._aliases: dict[str, str] = {}

  def add_bool(self, flag: str, help: str) -> None:
    """Add a flag that takes True, False or no value (True); the default is None."""
    self.add_argument(
      flag, nargs="?", const=True, type=_parse_bool, metavar="True|False", help=help
    )

  def add_alias(self, name: str, other: str) -> None:
    """Add --NAME as an alias of the flag --OTHER, whose default must be None."""
    action = self._option_string_actions[f"--{other}"]
    self._aliases[name] = other
    same = {it: getattr(action, it) for it in ("nargs", "const", "type", "metavar")}
    same["nargs"] = 1 if action.nargs == "+" else action.nargs
    self.add_argument(f"--{name}", **same, help=f"same as --{other}")

  def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
    """Parse words, by default those of `sys.argv`.

    Returns:
      The arguments under their main names; `given_as` maps a name to the alias that was used.

    Raises:
      RequestError: the first error.
    """
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
    """Check the parsed arguments; `rest` has the words that the parser did not consume."""
    if rest:
      self.error(f"{rest[0]!r}: unexpected argument; --help lists all flags")

  def error(self, message: str) -> NoReturn:
    """Raise RequestError instead of printing the usage."""
    message = message.removeprefix("argument ")
    if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
      message = f"{missing[1]} is missing; --help shows what it is for"
    message = re.sub(r": invalid int value: '(.*)'$", r"='\1': must be a whole number", message)
    message = re.sub(r": invalid float value: '(.*)'$", r"='\1': must be a number", message)
    raise RequestError(message)

  def _set(self, arguments: argparse.Namespace, name: str, value: object, alias: str) -> None:
    current = getattr(arguments, name)
    if current is not None and current != value:
      both = f"{alias}={_format_value(value)} and --{name}={_format_value(current)}"
      self.error(f"{both} set the same value; use only one of the two")
    setattr(arguments, name, value)

  def _with_known_names(self, words: list[str]) -> list[str]:
    """Normalize the spelling of flags, and reject unknown ones.

    argparse would report a missing flag before a misspelled one.
    """
    result = []
    for i, word in enumerate(words):
      name, equals, value = word.partition("=")
      if word == "--":
        return result + words[i:]
      if name in self._option_string_actions or not re.fullmatch(r"--?[^\W\d][\w.-]*", name):
        known = name
      elif (known := "--" + name[2:].replace("-", "_")) not in self._option_string_actions:
        self.error(f"{name}: unknown flag{self._suggestion(name)}")
      action = self._option_string_actions.get(known)
      next_word = "".join(words[i + 1 : i + 2]).lower()
      if action and action.nargs == "?" and not equals and next_word not in BOOLEANS:
        # Otherwise argparse would take the next word, which may be the model, as its value.
        equals = "="
        value = "True"
      result.append(known + equals + value)
    return result

  def _suggestion(self, name: str) -> str:
    """Suggest the flags with the most similar names."""
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
      return "; --help lists all flags"
    return f"; did you mean {' or '.join(flag for flag in similarity if similarity[flag] == best)}?"


class ModelParser(Parser):
  """A parser for commands that load a model: MODEL, --model, or --workdir with --step."""

  def __init__(self, command: str, description: str):
    super().__init__(command, description)
    self.add_argument("MODEL", nargs="?", type=expand_user, help="same as --model")
    self.add_argument(
      "--model",
      type=expand_user,
      metavar="PATH_OR_ID",
      help="a Hugging Face folder or hub id, or the workdir of a run",
    )
    self.add_alias("model_name_or_path", "model")
    self.add_argument(
      "--workdir",
      type=expand_user,
      metavar="DIR",
      help="a run: loads its best checkpoint if train.keep_best_metric is set, else its newest",
    )
    self.add_argument(
      "--step", type=int, metavar="N", help="with --workdir: load the checkpoint of this step"
    )
    self.add_argument(
      "--revision", default="main", help="with --model: branch, tag or commit (default: main)"
    )
    self.add_argument(
      "--require", choices=DEVICES, help="fail if JAX does not run on this kind of device"
    )
    self.add_argument(
      "--torch_bin",
      action="store_true",
      help="with --model: read pytorch_model*.bin with torch (weights_only=True)",
    )

  def finalize(self, arguments: argparse.Namespace, rest: list[str]) -> None:
    """Check that one model is given; a workdir as --model becomes --workdir."""
    word = vars(arguments).pop("MODEL")
    if rest:
      way_out = "use --prompt for text to complete, and quote text with spaces"
      self.error(f"{rest[0]!r}: unexpected argument; {way_out}")
    if word is not None:
      self._set(arguments, "model", word, "MODEL")
    model = arguments.model
    if model is not None and arguments.workdir is not None:
      self.error(f"--model={model} and --workdir={arguments.workdir}: use only one of the two")
    if model is None and arguments.workdir is None:
      self.error(
        "--model is missing; set it to a Hugging Face folder or hub id, or set --workdir to a run"
      )
    if model is not None and _is_workdir(Path(model)):
      print(f"--model={model} is a run; using --workdir={model}", file=sys.stderr)
      arguments.workdir = model
      arguments.model = None


def _is_workdir(folder: Path) -> bool:
  """Return whether a folder is the workdir of a run, and not a Hugging Face folder."""
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
  """Make the parser of `jaxft.generate`."""
  parser = ModelParser(
    "python -m jaxft.generate",
    description="Complete prompts. Without a prompt, ask for prompts on the terminal.",
  )
  add = parser.add_argument
  add(
    "--prompt",
    nargs="+",
    action="extend",
    default=[],
    metavar="TEXT",
    help="text to complete (default without a terminal: each line of standard input)",
  )
  add(
    "--prompt_file",
    type=expand_user,
    metavar="F",
    help="a file with one prompt per line; empty lines are ignored",
  )
  add(
    "--stop_strings", nargs="+", metavar="TEXT", help="stop after generating one of these strings"
  )
  for name, default in Sampling._field_defaults.items():
    add(
      f"--{name}",
      type=type(default),
      help=f"as in transformers (default: from the model's generation_config.json, or {default})",
    )
  parser.add_bool(
    "--do_sample", "False: same as --temperature=0; True: sample, despite generation_config.json"
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
    help="type of the model; also selects the defaults of run_generation.py for all other flags",
  )
  parser.add_bool("--use_cpu", "compute on the CPU")
  parser.add_bool("--fp16", "no effect: bfloat16 is the default if the device supports it")
  for name, (value, why) in run_generation.FIXED.items():
    parser.add_bool(f"--{name}", f"always {value}: {why}")
  name, about = run_generation.PAD_TOKEN
  add(f"--{name}", type=int, metavar="N", help=about)
  for name, reason in run_generation.UNSUPPORTED.items():
    add(f"--{name}", metavar="X", help=f"refused: {reason}")
  for name, other in run_generation.ALIASES.items():
    if other != "model":
      parser.add_alias(name, other)


@contextlib.contextmanager
def data_flags() -> Generator[None]:
  """Make errors about data name the flags of `_add_data_flags`, not the settings of a run."""
  try:
    yield
  except RequestError as error:
    text = str(error)
    for name in ("encoding", "on_bad_row", "text_column", "label_column"):
      text = re.sub(rf"(?:--)?config\.data\.{name}\b", f"--{name}", text)
    raise RequestError(text) from error


def _add_data_flags(parser: Parser) -> None:
  parser.add_argument("--encoding", help="encoding of text, JSON and CSV files (default: utf-8)")
  parser.add_argument(
    "--on_bad_row",
    choices=BAD_ROW_CHOICES,
    help="error: stop at a row that is not text; skip: leave it out (default: error)",
  )


def evaluate() -> ModelParser:
  """Make the parser of `jaxft.evaluate`."""
  parser = ModelParser(
    "python -m jaxft.evaluate", description="Compute loss and perplexity of a model on a text."
  )
  add = parser.add_argument
  add(
    "--data",
    nargs="+",
    type=expand_user,
    default=[],
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT] (default with --workdir: the run's held-out set)",
  )
  add("--text_column", help="column that holds the text (default: as in the run, or text)")
  add(
    "--label_column",
    help="column that holds the label, for a classifier (default: as in the run, or label)",
  )
  _add_data_flags(parser)
  add(
    "--layout",
    choices=LAYOUTS,
    help="concat: one stream of tokens cut into sequences; pad: one text per sequence, as in "
    "lm-eval; pack: several texts per sequence (default: as in the run, or concat)",
  )
  add(
    "--sequence_length",
    type=int,
    default=0,
    help="tokens per sequence (default: as in the run, or the model's context length)",
  )
  add(
    "--stride",
    type=int,
    default=0,
    help="sliding window: start a sequence every N tokens, so that each token has more context, as "
    "on transformers' page about perplexity (default: no overlap)",
    metavar="N",
  )
  add(
    "--batch_size",
    type=int,
    default=8,
    help="sequences per batch; affects only speed and memory (default: 8)",
  )
  add("--json", action="store_true", help="print one JSON object")
  return parser


def export() -> ModelParser:
  """Make the parser of `jaxft.export`."""
  parser = ModelParser(
    "python -m jaxft.export", description="Write a Hugging Face folder and verify it."
  )
  add = parser.add_argument
  add(
    "--out",
    required=True,
    type=expand_user,
    metavar="DIR",
    help="output folder; an earlier export in it is replaced",
  )
  add(
    "--dtype",
    choices=DTYPES,
    help="dtype of the weights (default: float32 for a run, the stored dtype for --model)",
  )
  add(
    "--max_shard_size",
    default="5GB",
    metavar="SIZE",
    help="size limit of a weight file (default: 5GB)",
  )
  add("--push_to_hub", metavar="REPO", help="upload the folder to this hub repository (OWNER/NAME)")
  return parser


def tokenizer() -> Parser:
  """Make the parser of `jaxft.tokenizer`."""
  parser = Parser(
    "python -m jaxft.tokenizer",
    description="Train a BPE tokenizer on your text, or add tokens to a model.",
  )
  add = parser.add_argument
  begin = parser.add_mutually_exclusive_group(required=True).add_argument
  begin(
    "--data",
    nargs="+",
    type=expand_user,
    metavar="SOURCE",
    help="text to train on: file, glob, folder or hub:NAME[:SPLIT]",
  )
  begin("--model", type=expand_user, metavar="PATH_OR_ID", help="model to add tokens to")
  add("--revision", default="main", help="with --model: branch, tag or commit (default: main)")
  add(
    "--torch_bin",
    action="store_true",
    help="with --model: read pytorch_model*.bin with torch (weights_only=True)",
  )
  add(
    "--add",
    nargs="+",
    metavar="[ROLE=]TOKEN",
    help="with --model: special tokens to add; the prefix bos=, eos= or pad= gives a new or "
    "existing token that role",
  )
  add("--text_column", default="text", help="column that holds the text (default: text)")
  _add_data_flags(parser)
  add("--vocab_size", type=int, default=16384, help="vocabulary size (default: 16384)")
  add("--out", required=True, type=expand_user, metavar="FOLDER", help="output folder; must be new")
  return parser


def report() -> Parser:
  """Make the parser of `jaxft.report`."""
  parser = Parser(
    "python -m jaxft.report",
    description="Write the report page of a run, or a page that compares several runs.",
  )
  add = parser.add_argument
  add("workdirs", nargs="+", type=_path, metavar="WORKDIR", help="the --workdir of a run")
  add(
    "--out",
    type=_path,
    metavar="FILE",
    help="output file (default: WORKDIR/report.html; for several runs: comparison.html)",
  )
  return parser
