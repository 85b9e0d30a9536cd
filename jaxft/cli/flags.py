"""Flags: --config FILE.py with --config.section.key=value for train, --model or --workdir for the other commands."""

import argparse
import ast
import difflib
import importlib.machinery
import importlib.util
import itertools
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, FrozenConfigDict, config_flags

import jaxft.config
from jaxft import pretrained
from jaxft.cli import run_clm, usage
from jaxft.distributed import multihost, rendezvous
from jaxft.errors import RequestError
from jaxft.utils import backend
from jaxft.utils.files import exists, expand_user

ESCAPED_SETTINGS = ("data.separator", "data.template")
BOOL_FLAGS = ("dry_run", "print_config", "strict", "allow_change", "overwrite_output_dir")
STR_FLAGS = ("workdir", "require", "coordinator")


class TrainArguments(NamedTuple):
  config: ConfigDict
  config_file: Path
  workdir: Path
  dry_run: bool
  print_config: bool
  strict: bool
  allow_change: bool
  overwrite_output_dir: bool
  require: str | None
  process_info: rendezvous.ProcessInfo | None
  start_timeout: int
  peer_timeout: int
  per_device: run_clm.PerDeviceBatch | None


def parse_train() -> TrainArguments:
  """The command line of train; see `parse`."""
  numbers = {
    "num_processes": None,
    "process_id": None,
    "start_timeout": multihost.START_TIMEOUT,
    "peer_timeout": multihost.PEER_TIMEOUT,
  }
  sys.argv[1:], per_device = run_clm.translate(
    _whole_words(sys.argv[1:]), (*BOOL_FLAGS, *STR_FLAGS, *numbers)
  )
  values = parse(usage.TRAIN, BOOL_FLAGS, STR_FLAGS, numbers)
  workdir = (
    Path(expand_user(values.workdir))
    if values.workdir
    else Path("runs") / Path(values.config_file).stem
  )
  for name in ("start_timeout", "peer_timeout"):
    if getattr(values, name) < 1:
      raise RequestError(f"--{name}={getattr(values, name)}: must be at least 1 second")
  backend.validate_require(values.require)
  process_info = None
  if not values.print_config:
    process_info = rendezvous.detect_processes(
      values.coordinator, values.num_processes, values.process_id, values.start_timeout
    )
  return TrainArguments(
    values.config,
    Path(expand_user(values.config_file)),
    workdir,
    *(getattr(values, name) for name in BOOL_FLAGS),
    values.require,
    process_info,
    values.start_timeout,
    values.peer_timeout,
    per_device,
  )


def parse(
  text: str,
  switches: tuple[str, ...] = (),
  texts: tuple[str, ...] = (),
  numbers: Mapping[str, int | None] = MappingProxyType({}),
  list_flags: tuple[str, ...] = (),
) -> SimpleNamespace:
  """`config`, `config_file` and the command's own flags, out of `sys.argv`, which ml_collections reads too.

  Raises RequestError with every unknown setting, or the first other fault. `--help` prints `text` and ends the process. Flags
  in `list_flags` may be repeated, and give lists.
  """
  if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) == 1:
    print(text)
    sys.exit(0 if len(sys.argv) > 1 else 2)
  argv = _whole_words(sys.argv)
  given = dict(
    word.removeprefix("--config.").split("=", 1)
    for word in argv[1:]
    if re.match(r"--config\.[^=]*=", word)
  )
  names = [
    word.removeprefix("--config.").split("=")[0]
    for word in argv[1:]
    if word.startswith("--config.")
  ]
  if lines := jaxft.config.unknown_settings(names):
    raise RequestError("\n".join(lines))
  argv, file = _without_config_file([_quoted(word) for word in argv])
  config = _of_file(file) if file else jaxft.config.default()
  _make_way(given, config, file)

  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
  except Exception as error:  # a section of the file that is none
    raise RequestError(f"--config: {_reason(error)}") from error
  for name in texts:
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name in list_flags:
    flags.DEFINE_multi_string(name, [], "", flag_values=values)
  for name, default in numbers.items():
    flags.DEFINE_integer(name, default, "", flag_values=values)
  for name in switches:
    flags.DEFINE_bool(name, False, "", flag_values=values)
  try:
    rest = values(argv)
  except flags.UnrecognizedFlagError as error:
    raise RequestError(
      f"--{error.flagname}: no such flag; {_meant(error.flagname, [*switches, *texts, *numbers])}"
    ) from error
  except Exception as error:  # whatever the parser raises on an override
    raise RequestError(_reason(error)) from error
  if rest[1:]:
    raise RequestError(f"{rest[1]!r}: not a flag; --help shows what there is")
  if not file:
    raise RequestError("--config is missing; name a file, such as --config configs/quickstart.py")
  config = jaxft.config.normalize(config)
  return SimpleNamespace(
    config=config,
    config_file=file,
    **{name: values[name].value for name in (*switches, *texts, *list_flags, *numbers)},
  )


def _make_way(given: Mapping[str, str], config: ConfigDict, file: str | None) -> None:
  """Prepares the config of a file for the settings that are given on the command line.

  A setting beats its counterpart in the file, and training text brings its own held-out text.
  """
  before = jaxft.config.flatten(config)

  def put(name: str, value: object) -> None:
    section, key = name.split(".")
    with config.ignore_type():
      config[section][key] = value

  for pair in jaxft.config.EXCLUSIVE_PAIRS:
    for one, other in (pair, pair[::-1]):
      # 0 steps are no steps at all, and the epochs count; 0 steps of warm-up are none.
      says = one in given and (one.startswith("optim.") or given[one].strip("0.") != "")
      if says and other not in given and other in before:
        put(other, jaxft.config.BY_NAME[other].default)
  if "data.train" in given and "data.validation" not in given and before.get("data.validation"):
    share = given.get("data.validation_fraction") or before.get("data.validation_fraction")
    if not share and "data.validation_fraction" in before:
      share = jaxft.config.BY_NAME["data.validation_fraction"].default
      put("data.validation_fraction", share)
    own = before["data.validation"]
    print(
      f"{file}: its config.data.validation goes with its own config.data.train; a share of {share} of the "
      f"new text is held out instead (to keep it: --config.data.validation={own[0] if isinstance(own, tuple) else own})",
      file=sys.stderr,
    )
    put("data.validation", ())
  for name in given.keys() & before.keys() & jaxft.config.BY_NAME.keys():
    # The parser takes what the value of the file is: text for text, several for several.
    default = jaxft.config.BY_NAME[name].default
    if jaxft.config.BY_NAME[name].literals:
      put(name, str(before[name]))
    elif isinstance(default, tuple):
      put(name, ())
    elif not isinstance(default, type) and type(before[name]) is not type(default):
      put(name, default)


def _whole_words(argv: list[str]) -> list[str]:
  """The words with each --config.key=value in one, however it was written: -config.key, or the value as the next word."""
  words, rest = [], iter(argv)
  for word in rest:
    word = "-" + word if word.startswith("-config") else word
    setting = jaxft.config.BY_NAME.get(word.removeprefix("--config."))
    if setting and word.startswith("--config.") and not isinstance(setting.default, bool):
      word = "=".join([word, *itertools.islice(rest, 1)])
    words.append(word)
  return words


def _without_config_file(words: list[str]) -> tuple[list[str], str | None]:
  """The words but for --config FILE, and FILE."""
  others, file, rest = [], None, iter(words)
  for word in rest:
    if word == "--config":
      file = next(rest, None)
    elif word.startswith("--config="):
      file = word.removeprefix("--config=")
    else:
      others.append(word)
  return others, file


def _of_file(file: str) -> ConfigDict:
  """What get_config() in a file returns; FILE:TEXT gives it the text. Raises RequestError whatever goes wrong in the file."""
  ends = [len(file), *(i for i in reversed(range(len(file))) if file[i] == ":")]
  end = next((end for end in ends if _is_file(Path(expand_user(file[:end])))), None)
  if end is None:
    raise RequestError(f"--config: {file!r}: no such file; name one such as configs/quickstart.py")
  path, arguments = Path(expand_user(file[:end])), [file[end + 1 :]] if end < len(file) else []
  if path.suffix == ".json":
    raise RequestError(
      f"--config: {file!r}: a config is Python with a get_config(), such as configs/quickstart.py"
    )
  loader = importlib.machinery.SourceFileLoader("jaxft_config", str(path))
  module = importlib.util.module_from_spec(importlib.util.spec_from_loader(loader.name, loader))
  sys.modules[loader.name] = module  # where dataclasses look for theirs
  try:
    loader.exec_module(module)
    config = module.get_config(*arguments)
  except (Exception, SystemExit) as error:  # whatever the file raises while it runs
    text = " ".join(str(error).split())
    raise RequestError(
      f"--config: the config file does not run: {type(error).__name__}: {text}"
    ) from error
  if not isinstance(config, ConfigDict):
    raise RequestError(
      f"--config: get_config() in {path} returned no ConfigDict; start from jaxft.config.default()"
    )
  return config.as_configdict() if isinstance(config, FrozenConfigDict) else config


def _is_file(path: Path) -> bool:
  return exists(path) and path.is_file()


def _quoted(word: str) -> str:
  """A text for a setting that takes several, as the parser wants it: in quotes, or a blank or a bracket would confuse it."""
  name, equals, value = word.partition("=")
  setting = jaxft.config.BY_NAME.get(name.removeprefix("--config."))
  if not equals or setting is None:
    return word
  if setting.name in ESCAPED_SETTINGS:
    return f"{name}={unescape(value, name.removeprefix('--'))}"
  if not isinstance(setting.default, tuple):
    return word
  try:
    found = ast.literal_eval(value)
  except (
    Exception
  ):  # a text, which may be any odd Python: {[]} is a TypeError, a thousand dashes a RecursionError
    found = None
  texts = isinstance(found, tuple) and all(isinstance(it, str) for it in found)
  return word if texts else f"{name}={value!r}"


def unescape(text: str, name: str) -> str:
  """A text of the command line with line ends and tabs for \\n, \\r and \\t, which no shell makes of them; says so."""
  found = re.sub(r"\\([nrt])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}[match[1]], text)
  if found != text:
    print(f"{name}={text}: read as {found!r}", file=sys.stderr)
  return found


def _meant(name: str, own: list[str]) -> str:
  """The flag that was meant, or the setting that has this name, or another one elsewhere."""
  if near := difflib.get_close_matches(name, own, 1):
    return f"did you mean --{near[0]}?"
  setting = jaxft.config.FOREIGN_NAMES.get(name) or (
    run_clm.MAPPED[name].setting if name in run_clm.MAPPED else None
  )
  setting = setting or next(
    (known for known in jaxft.config.BY_NAME if known.split(".")[1] == name), None
  )
  return f"did you mean --config.{setting}?" if setting else "--help shows what there is"


def _reason(error: Exception) -> str:
  """What is wrong with a flag, in one line, without the parser's own words around it."""
  text = " ".join(line.strip() for line in str(error).splitlines()).removeprefix("flag ")
  text = re.sub(
    r"\('Non-boolean argument to boolean flag', '?(.*?)'?\)", r"\1 is neither true nor false", text
  )
  text = re.sub(r"invalid literal for int\(\) with base \d+: (.*)", r"\1 is no whole number", text)
  return re.sub(r"could not convert string to float: (.*)", r"\1 is no number", text)


def load_model(arguments: argparse.Namespace) -> pretrained.Pretrained:
  if arguments.step is not None and not arguments.workdir:
    raise RequestError("--step goes with --workdir: a Hugging Face folder has no steps")
  backend.configure_jax()
  backend.require_device(arguments.require)
  if arguments.workdir:
    return pretrained.load_workdir(arguments.workdir, arguments.step)
  return pretrained.load(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
