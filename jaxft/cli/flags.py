"""Command-line flags of commands with a config, and the model that other commands open."""

import argparse
import ast
import dataclasses
import difflib
import importlib.machinery
import importlib.util
import itertools
import re
import sys
import traceback
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
  """The parsed command line of train: its config and the values of its flags."""

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
  if values.workdir == "":
    raise RequestError("--workdir is empty; name a folder, or leave the flag out for the default")
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
  """Parse `sys.argv`: the config file, its overrides and the flags of the command.

  Args:
    usage_text: printed for `--help`, which ends the process.
    bool_flags: names of flags that are true or false.
    str_flags: names of flags with a text.
    int_flags: names and defaults of flags with a whole number.
    list_flags: names of flags that may be repeated; their values are lists.

  Returns:
    `config`, `config_file` and the value of each flag.

  Raises:
    RequestError: one line for each unknown setting, or the first other error.
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
  except Exception as error:  # the file has replaced a section by another value
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
    raise RequestError(f"--{error.flagname}: unknown flag; {hint}") from error
  except Exception as error:  # an invalid override: the parser raises errors of many types
    raise RequestError(_one_line_error(error)) from error
  if rest[1:]:
    raise RequestError(f"{rest[1]!r}: unexpected argument; --help lists all flags")
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
  """Prepare the config of a file for the overrides on the command line.

  An override also resets its counterpart in `EXCLUSIVE_PAIRS`. New training data also resets the
  file's held-out set.
  """
  from_file = jaxft.config.flatten(config)

  def set_value(name: str, value: object) -> None:
    section, key = name.split(".")
    with config.ignore_type():
      config[section][key] = value

  for pair in jaxft.config.EXCLUSIVE_PAIRS:
    for one, other in (pair, pair[::-1]):
      # train.steps=0 means "use train.epochs", but optim.warmup_steps=0 means "no warm-up".
      is_set = one in overrides and (one.startswith("optim.") or overrides[one].strip("0.") != "")
      if is_set and other not in overrides and other in from_file:
        set_value(other, jaxft.config.BY_NAME[other].default)
  nats_column = "data.nats_column"
  if "data.train" in overrides and nats_column in from_file.keys() - overrides.keys():
    set_value(nats_column, "")  # the column of the config's data
  held_out = from_file.get("data.validation")
  if "data.train" in overrides and "data.validation" not in overrides and held_out:
    key = "data.validation_fraction"
    fraction = overrides.get(key) or from_file.get(key)
    if not fraction and key in from_file:
      fraction = jaxft.config.BY_NAME[key].default
      set_value(key, fraction)
    print(
      f"{file}: config.data.validation is ignored, because the command line sets "
      f"config.data.train; a share of {fraction} of the new text is held out instead (to keep it: "
      f"--config.data.validation={held_out[0] if isinstance(held_out, tuple) else held_out})",
      file=sys.stderr,
    )
    set_value("data.validation", ())
  for name in overrides.keys() & from_file.keys() & jaxft.config.BY_NAME.keys():
    # The parser derives the type of an override from the file's value: give that the right type.
    default = jaxft.config.BY_NAME[name].default
    if jaxft.config.BY_NAME[name].literals:
      set_value(name, str(from_file[name]))
    elif isinstance(default, tuple):
      set_value(name, ())
    elif default is not None and type(from_file[name]) is not type(default):
      set_value(name, default)


def _join_values(argv: list[str]) -> list[str]:
  """Join each `--config.key value` to one word, `--config.key=value`."""
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


def load_config(name: str) -> ConfigDict:
  """Load a config to change and train with, as `--config NAME` does.

  Args:
    name: a Python file with get_config(), or the name of a shipped config such as
      "gpt2_tinystories"; "NAME:TEXT" calls get_config(TEXT).

  Raises:
    RequestError: no such config, or its file fails.
  """
  return _load_config(*_find_config(name))


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
  """Return the result of get_config(*texts) in a file.

  Raises RequestError for every error in the file.
  """
  if path.suffix == ".json":
    raise RequestError(
      f"--config: {str(path)!r}: must be a Python file with get_config(), such as "
      "configs/quickstart.py"
    )
  loader = importlib.machinery.SourceFileLoader("jaxft_config", str(path))
  spec = importlib.util.spec_from_loader(loader.name, loader)
  assert spec  # never None with a loader
  module = importlib.util.module_from_spec(spec)
  sys.modules[loader.name] = module  # dataclasses look up their module here
  try:
    loader.exec_module(module)
    if not hasattr(module, "get_config"):
      raise RequestError("has no get_config(); define one that returns a ConfigDict")
    config = module.get_config(*texts)
  except RequestError as error:  # of jaxft.config.resolve, with a line for each setting
    lines = str(error).splitlines()
    raise RequestError("\n".join(f"--config: {path}: {line}" for line in lines)) from error
  except (Exception, SystemExit) as error:  # the file may raise anything
    if line := _unknown_setting(error):
      raise RequestError(f"--config: {path}: {line}") from error
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
    raise RequestError(f"--config: {path} failed: {reason}") from error
  if not isinstance(config, ConfigDict):
    raise RequestError(
      f"--config: get_config() in {path} must return a ConfigDict; start from "
      "jaxft.config.default()"
    )
  return config.as_configdict() if isinstance(config, FrozenConfigDict) else config


def _unknown_setting(error: BaseException) -> str | None:
  """Return a line about the setting or section that a config does not have, or None.

  The message of ml_collections lists all other settings but not the section, so look at the call
  that raised the error: `ConfigDict.__setattr__(self, attribute, value)`, or `__getitem__`, ...
  """
  frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
  values = frames[-1].f_locals
  config = values.get("self")
  key = values.get("attribute", values.get("key"))
  if not isinstance(config, ConfigDict) or not isinstance(key, str) or key in config:
    return None
  keys = {*config}
  if {*jaxft.config.SECTIONS} <= keys:  # the whole config
    near = difflib.get_close_matches(key, jaxft.config.SECTIONS, 1)
    if near and key not in jaxft.config.FOREIGN_NAMES:
      return f"config.{key}: unknown section; did you mean config.{near[0]}?"
    return jaxft.config.unknown_settings([key])[0]
  for section, fields in jaxft.config.SECTIONS.items():
    if {field.name for field in dataclasses.fields(fields)} <= keys:
      return jaxft.config.unknown_settings([f"{section}.{key}"])[0]
  return None


def _is_file(path: Path) -> bool:
  return exists(path) and path.is_file()


def _quote_tuple_value(word: str) -> str:
  """Quote the value of a tuple setting: the parser misreads spaces and brackets."""
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
  # Any text may come: {[]} raises TypeError, a thousand dashes raise RecursionError.
  except Exception:
    literal = None
  is_tuple = isinstance(literal, tuple) and all(isinstance(it, str) for it in literal)
  return word if is_tuple else f"{name}={value!r}"


def unescape(text: str, name: str) -> str:
  r"""Replace \n, \r and \t, as shells do not, and print the result if it differs.

  Args:
    text: the text from the command line.
    name: the flag, for the printed line.
  """
  result = re.sub(r"\\([nrt])", lambda match: {"n": "\n", "r": "\r", "t": "\t"}[match[1]], text)
  if result != text:
    print(f"{name}={text}: read as {result!r}", file=sys.stderr)
  return result


def _suggestion(name: str, own_flags: list[str]) -> str:
  """Suggest a similar flag, or the setting with this name in jaxft or in another tool."""
  if near := difflib.get_close_matches(name, own_flags, 1):
    return f"did you mean --{near[0]}?"
  setting = jaxft.config.FOREIGN_NAMES.get(name)
  if not setting and name in run_clm.MAPPED:
    setting = run_clm.MAPPED[name].setting
  same_key = (known for known in jaxft.config.BY_NAME if known.split(".")[1] == name)
  setting = setting or next(same_key, None)
  return f"did you mean --config.{setting}?" if setting else "--help lists all flags"


def _one_line_error(error: Exception) -> str:
  """Rewrite an error of the absl or ml_collections parser as one plain line."""
  text = " ".join(line.strip() for line in str(error).splitlines()).removeprefix("flag ")
  text = re.sub(
    r"\('Non-boolean argument to boolean flag', '?(.*?)'?\)", r"\1 is not true or false", text
  )
  text = re.sub(
    r"invalid literal for int\(\) with base \d+: (.*)", r"\1 is not a whole number", text
  )
  return re.sub(r"could not convert string to float: (.*)", r"\1 is not a number", text)


def load_model(arguments: argparse.Namespace) -> pretrained.Pretrained:
  """Load the model that a command line names.

  Args:
    arguments: parsed by a `ModelParser`.

  Raises:
    RequestError: --step without --workdir, or no such model.
  """
  if arguments.step is not None and not arguments.workdir:
    raise RequestError("--step needs --workdir: a Hugging Face folder has no steps")
  backend.configure_jax()
  backend.require_device(arguments.require)
  if arguments.workdir:
    return pretrained.load_workdir(arguments.workdir, arguments.step)
  return pretrained.load(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
