"""Flags: --config FILE.py with --config.section.key=value for train, --model or --workdir for the other commands."""

import argparse
import ast
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import NamedTuple

from absl import flags
from ml_collections import ConfigDict, config_flags

from jaxft import backend, pretrained, run_clm, usage
from jaxft import config as settings
from jaxft.errors import RequestError
from jaxft.run import hosts, roll_call

SWITCHES = ("dry_run", "print_config", "strict", "allow_change")


class TrainArguments(NamedTuple):
  config: ConfigDict
  workdir: Path
  dry_run: bool
  print_config: bool
  strict: bool
  allow_change: bool
  require: str | None
  place: roll_call.Place | None
  start_timeout: int
  peer_timeout: int
  per_device: run_clm.PerDevice | None


def parse_train() -> TrainArguments:
  """The command line of train; see `parse`."""
  numbers = {
    "num_processes": None,
    "process_id": None,
    "start_timeout": hosts.START_TIMEOUT,
    "peer_timeout": hosts.PEER_TIMEOUT,
  }
  sys.argv[1:], per_device = run_clm.translate(sys.argv[1:])
  values = parse(usage.TRAIN, SWITCHES, ("workdir", "require", "coordinator"), numbers)
  workdir = Path(values.workdir) if values.workdir else Path("runs") / Path(values.config_file).stem
  for name in ("start_timeout", "peer_timeout"):
    if getattr(values, name) < 1:
      raise RequestError(f"--{name}={getattr(values, name)}: must be at least 1 second")
  backend.must_be_known(values.require)
  place = None
  if not values.print_config:
    place = roll_call.find(values.coordinator, values.num_processes, values.process_id, values.start_timeout)
  return TrainArguments(
    values.config,
    workdir,
    *(getattr(values, name) for name in SWITCHES),
    values.require,
    place,
    values.start_timeout,
    values.peer_timeout,
    per_device,
  )


def parse(
  text: str,
  switches: tuple[str, ...] = (),
  texts: tuple[str, ...] = (),
  numbers: Mapping[str, int | None] = MappingProxyType({}),
  several: tuple[str, ...] = (),
) -> SimpleNamespace:
  """`config`, `config_file` and the command's own flags, out of `sys.argv`, which ml_collections reads too.

  Raises RequestError with every unknown setting, or the first other fault. `--help` prints `text` and ends the process. Flags
  in `several` may be repeated, and give lists.
  """
  if {"-h", "--help"} & set(sys.argv[1:]) or len(sys.argv) == 1:
    print(text)
    sys.exit(0 if len(sys.argv) > 1 else 2)
  argv = [_quoted("-" + word if word.startswith("-config.") else word) for word in sys.argv]
  names = [word.removeprefix("--config.").split("=")[0] for word in argv[1:] if word.startswith("--config.")]
  if lines := settings.unknown(names):
    raise RequestError("\n".join(lines))

  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", flag_values=values)
  for name in texts:
    flags.DEFINE_string(name, None, "", flag_values=values)
  for name in several:
    flags.DEFINE_multi_string(name, [], "", flag_values=values)
  for name, default in numbers.items():
    flags.DEFINE_integer(name, default, "", flag_values=values)
  for name in switches:
    flags.DEFINE_bool(name, False, "", flag_values=values)
  try:
    rest = values(argv)
    file = values["config"].config_filename if values["config"].present else None
    if file and not Path(file).is_file():
      raise RequestError(f"--config: {file!r}: no such file; name one such as configs/quickstart.py")
    config = values.config
    if file and not isinstance(config, ConfigDict):
      raise RequestError(f"--config: get_config() in {file} returned no ConfigDict; start from jaxft.config.default()")
  except RequestError:
    raise
  except (
    Exception,
    SystemExit,
  ) as error:  # whatever the config file raises while it runs, or the parser on an override
    raise RequestError(_reason(error)) from error
  if rest[1:]:
    raise RequestError(f"{rest[1]!r}: not a flag; --help shows what there is")
  if config is None:
    raise RequestError("--config is missing; name a file, such as --config configs/quickstart.py")
  for name, value in settings.flatten(config).items():
    if value == ("",):  # --config.data.validation= says: none
      section, key = name.split(".")
      config[section][key] = ()
  return SimpleNamespace(
    config=config, config_file=file, **{name: values[name].value for name in (*switches, *texts, *several, *numbers)}
  )


def _quoted(word: str) -> str:
  """A text for a setting that takes several, as the parser wants it: in quotes, or a blank or a bracket would confuse it."""
  name, equals, value = word.partition("=")
  setting = settings.BY_NAME.get(name.removeprefix("--config."))
  if not equals or setting is None or not isinstance(setting.default, tuple):
    return word
  try:
    return word if isinstance(ast.literal_eval(value), tuple) else f"{name}={value!r}"
  except (ValueError, SyntaxError):
    return f"{name}={value!r}"


def _reason(error: Exception) -> str:
  """What went wrong, in one line, without the parser's own words around it."""
  text = " ".join(line.strip() for line in str(error).splitlines())
  if "Traceback" in text:  # config_flags has put one into its message; its last line says what went wrong
    text = [line.strip() for line in str(error).splitlines() if line.strip()][-1]
    return f"--config: the config file does not run: {text}"
  if isinstance(error, flags.Error):
    return text.removeprefix("flag ")
  return f"--config: the config file does not run: {type(error).__name__}: {text}"


def open_model(arguments: argparse.Namespace) -> pretrained.Pretrained:
  if arguments.step is not None and not arguments.workdir:
    raise RequestError("--step goes with --workdir: a Hugging Face folder has no steps")
  backend.prepare_backend()
  backend.must_run_on(arguments.require)
  if arguments.workdir:
    return pretrained.load_workdir(arguments.workdir, arguments.step)
  return pretrained.load(arguments.model, arguments.revision, torch_bin=arguments.torch_bin)
