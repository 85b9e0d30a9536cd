"""Command-line flags of the commands that take a config, and the model that the others open."""

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
from jaxft.cli import commands, run_clm, usage
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
  """Parse the command line of train; see `parse`."""
  int_flags = {
    "num_processes": None,
    "process_id": None,
    "start_timeout": multihost.START_TIMEOUT,
    "peer_timeout": multihost.PEER_TIMEOUT,
  }
  own_flags = (*BOOL_FLAGS, *STR_FLAGS, *int_flags)
  sys.argv[1:], per_device = run_clm.translate(_join_values(sys.argv[1:]), own_flags)
  values = parse(usage.TRAIN, BOOL_FLAGS, STR_FLAGS, int_flags)
  default_workdir = f"runs/{Path(values.config_name).stem}"
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
    config=values.config,
    config_file=values.config_file,
    workdir=Path(expand_user(values.workdir) if values.workdir else default_workdir),
    require=values.require,
    process_info=process_info,
    start_timeout=values.start_timeout,
    peer_timeout=values.peer_timeout,
    per_device=per_device,
    **{name: getattr(values, name) for name in BOOL_FLAGS},
  )


def parse(
  usage_text: str,
  bool_flags: tuple[str, ...] = (),
  str_flags: tuple[str, ...] = (),
  int_flags: Mapping[str, int | None] = MappingProxyType({}),
  list_flags: tuple[str, ...] = (),
) -> SimpleNamespace:
  """Parse `sys.argv`, which ml_collections reads too: the config, its name and file, the flags.

  `--help` prints `usage_text` and ends the process. Flags in `list_flags` may be repeated, and give
  lists. Raises RequestError with every unknown setting, or with the first other error.
  """
  if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) == 1:
    print(commands.as_typed(usage_text))
    sys.exit(0 if len(sys.argv) > 1 else 2)
  argv = _join_values(sys.argv)
  words = [word.removeprefix("--config.") for word in argv[1:] if word.startswith("--config.")]
  if lines := jaxft.config.unknown_settings([word.split("=")[0] for word in words]):
    raise RequestError("\n".join(lines))
  overrides = dict(word.split("=", 1) for word in words if "=" in word)
  argv, config_name = _pop_config_name([_quote_tuple_value(word) for word in argv])
  file, texts = _find_config(config_name) if config_name else (None, [])
  config = _load_config(file, texts) if file else jaxft.config.default()
  _prepare_for_overrides(config, overrides, config_name)

  values = flags.FlagValues()
  try:
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
  except Exception as error:  # a section of the file is not a section
    raise RequestError(f"--config: {_one_line_error(error)}") from error
  for name in str_flags:
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name in list_flags:
    flags.DEFINE_multi_string(name, [], "", flag_values=values)
  for name, default in int_flags.items():
    flags.DEFINE_integer(name, default, "", flag_values=values)
  for name in bool_flags:
    flags.DEFINE_bool(name, False, "", flag_values=values)
  try:
    rest = values(argv)
  except flags.UnrecognizedFlagError as error:
    hint = _suggestion(error.flagname, [*bool_flags, *str_flags, *int_flags])
    raise RequestError(f"--{error.flagname}: no such flag; {hint}") from error
  except Exception as error:  # whatever the parser raises on an override
    raise RequestError(_one_line_error(error)) from error
  if rest[1:]:
    raise RequestError(f"{rest[1]!r}: not a flag; --help shows what there is")
  if not file:
    raise RequestError("--config is missing; name a file, or a shipped config: --config quickstart")
  config = jaxft.config.normalize(config)
  return SimpleNamespace(
    config=config,
    config_file=file,
    config_name=config_name,
    **{name: values[name].value for name in (*bool_flags, *str_flags, *list_flags, *int_flags)},
  )


def _prepare_for_overrides(
  config: ConfigDict, overrides: Mapping[str, str], file: str | None
) -> None:
  """Prepare the config of a file for the settings of the command line.

  A setting replaces its counterpart in the file, and training text brings its own held-out text.
  """
  from_file = jaxft.config.flatten(config)

  def set_value(name: str, value: object) -> None:
    section, key = name.split(".")
    with config.ignore_type():
      config[section][key] = value

  for pair in jaxft.config.EXCLUSIVE_PAIRS:
    for one, other in (pair, pair[::-1]):
      # With 0 steps the epochs count, but 0 steps of warm-up mean no warm-up.
      is_set = one in overrides and (one.startswith("optim.") or overrides[one].strip("0.") != "")
      if is_set and other not in overrides and other in from_file:
        set_value(other, jaxft.config.BY_NAME[other].default)
  held_out = from_file.get("data.validation")
  if "data.train" in overrides and "data.validation" not in overrides and held_out:
    key = "data.validation_fraction"
    fraction = overrides.get(key) or from_file.get(key)
    if not fraction and key in from_file:
      fraction = jaxft.config.BY_NAME[key].default
      set_value(key, fraction)
    print(
      f"{file}: its config.data.validation goes with its own config.data.train; a share of "
      f"{fraction} of the new text is held out instead (to keep it: "
      f"--config.data.validation={held_out[0] if isinstance(held_out, tuple) else held_out})",
      file=sys.stderr,
    )
    set_value("data.validation", ())
  for name in overrides.keys() & from_file.keys() & jaxft.config.BY_NAME.keys():
    # The parser takes the type of the value in the file: text for text, a tuple for a tuple.
    default = jaxft.config.BY_NAME[name].default
    if jaxft.config.BY_NAME[name].literals:
      set_value(name, str(from_file[name]))
    elif isinstance(default, tuple):
      set_value(name, ())
    elif default is not None and type(from_file[name]) is not type(default):
      set_value(name, default)


def _join_values(argv: list[str]) -> list[str]:
  """Write each setting as one word, --config.key=value: its value may be the next word."""
  words = []
  rest = iter(argv)
  for word in rest:
    word = "-" + word if word.startswith("-config") else word
    setting = jaxft.config.BY_NAME.get(word.removeprefix("--config."))
    if setting and word.startswith("--config.") and not isinstance(setting.default, bool):
      word = "=".join([word, *itertools.islice(rest, 1)])
    words.append(word)
  return words


def _pop_config_name(words: list[str]) -> tuple[list[str], str | None]:
  """Return the words without --config FILE, and FILE."""
  others = []
  file = None
  rest = iter(words)
  for word in rest:
    if word == "--config":
      file = next(rest, None)
    elif word.startswith("--config="):
      file = word.removeprefix("--config=")
    else:
      others.append(word)
  return others, file


def _find_config(name: str) -> tuple[Path, list[str]]:
  """Find a config file, or a shipped config by its name; NAME:TEXT also returns [TEXT].

  Raises RequestError with the most similar name of a shipped config.
  """
  ends = [len(name), *(i for i in reversed(range(len(name))) if name[i] == ":")]
  for find in (_existing_file, commands.find_config):
    for end in ends:
      if path := find(name[:end]):
        return path, [name[end + 1 :]] if end < len(name) else []
  hint = commands.config_suggestion(name)
  raise RequestError(f"--config: {name!r}: no such file or shipped config; {hint}")


def _existing_file(name: str) -> Path | None:
  path = Path(expand_user(name))
  return path if _is_file(path) else None


def _load_config(path: Path, texts: list[str]) -> ConfigDict:
  """Return what get_config() in a file returns, called with `texts`.

  Raises RequestError whatever goes wrong in the file.
  """
  if path.suffix == ".json":
    raise RequestError(
      f"--config: {str(path)!r}: a config is Python with a get_config(), such as "
      "configs/quickstart.py"
    )
  loader = importlib.machinery.SourceFileLoader("jaxft_config", str(path))
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec  # as there is a loader
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # where dataclasses look for theirs
  try:
    loader.exec_module(module)
    config = module.get_config(*texts)
  except (Exception, SystemExit) as error:  # whatever the file raises while it runs
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    for old, new in jaxft.config.RENAMED.items():
      # ConfigDict's sentence about a key, with the keys that its section has.
      missing = f'AttributeError: \'Key "{old.split(".")[1]}" does not exist'
      if reason.startswith(missing) and new.split(".")[1] in reason:
        reason = f"config.{old}: there is no such setting; here it is {new}"
    raise RequestError(f"--config: the config file does not run: {reason}") from error
  if not isinstance(config, ConfigDict):
    raise RequestError(
      f"--config: get_config() in {path} returned no ConfigDict; start from jaxft.config.default()"
    )
  return config.as_configdict() if isinstance(config, FrozenConfigDict) else config


def _is_file(path: Path) -> bool:
  return exists(path) and path.is_file()


def _quote_tuple_value(word: str) -> str:
  """Quote a text for a tuple setting: a blank or a bracket in it would confuse the parser."""
  name, equals, value = word.partition("=")
  setting = jaxft.config.BY_NAME.get(name.removeprefix("--config."))
  if not equals or setting is None:
    return word
  if setting.name in ESCAPED_SETTINGS:
    return f"{name}={unescape(value, name.removeprefix('--'))}"
  if not isinstance(setting.default, tuple):
    return word
  try:
    literal = ast.literal_eval(value)
  # A text may be any odd Python: {[]} is a TypeError, a thousand dashes a RecursionError.
  except Exception:
    literal = None
  is_tuple = isinstance(literal, tuple) and all(isinstance(it, str) for it in literal)
  return word if is_tuple else f"{name}={value!r}"


def unescape(text: str, name: str) -> str:
  """Replace \\n, \\r and \\t, which no shell does, and print the result if it differs."""
  result = re.sub(r"\\([nrt])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}[match[1]], text)
  if result != text:
    print(f"{name}={text}: read as {result!r}", file=sys.stderr)
  return result


def _suggestion(name: str, own_flags: list[str]) -> str:
  """Suggest a similar flag, or the setting that has this name, here or in another tool."""
  if near := difflib.get_close_matches(name, own_flags, 1):
    return f"did you mean --{near[0]}?"
  setting = jaxft.config.FOREIGN_NAMES.get(name)
  if not setting and name in run_clm.MAPPED:
    setting = run_clm.MAPPED[name].setting
  same_key = (known for known in jaxft.config.BY_NAME if known.split(".")[1] == name)
  setting = setting or next(same_key, None)
  return f"did you mean --config.{setting}?" if setting else "--help shows what there is"


def _one_line_error(error: Exception) -> str:
  """Say what is wrong with a flag, in one line, without the parser's own words around it."""
  text = " ".join(line.strip() for line in str(error).splitlines()).removeprefix("flag ")
  text = re.sub(
    r"\('Non-boolean argument to boolean flag', '?(.*?)'?\)", r"\1 is neither true nor false", text
  )
  text = re.sub(r"invalid literal for int\(\) with base \d+: (.*)", r"\1 is no whole number", text)
  return re.sub(r"could not convert string to float: (.*)", r"\1 is no number", text)


def load_model(arguments: argparse.Namespace) -> pretrained.Pretrained:
  """Open the model that the arguments of a `ModelParser` name."""
  if arguments.step is not None and not arguments.workdir:
    raise RequestError("--step goes with --workdir: a Hugging Face folder has no steps")
  backend.configure_jax()
  backend.require_device(arguments.require)
  if arguments.workdir:
    return pretrained.load_workdir(arguments.workdir, arguments.step)
  return pretrained.load(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
