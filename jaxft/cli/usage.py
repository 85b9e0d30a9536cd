"""The --help texts of the commands with a config, printed before jax is imported (seconds)."""

import contextlib
import sys

from jaxft.cli import commands

TRAIN = """python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

  --config FILE      a file with get_config(), or the name of a shipped config (jaxft --help)
  --workdir DIR      where the run is written, and found again (default: runs/NAME_OF_CONFIG)
  --config.a.b=VALUE any setting; --print_config lists them all with their meaning. Settings that
                     take several texts, such as data.train, take the flag several times
  --dry_run          compile and report the memory, train nothing
  --print_config     print the settings of this run and end
  --strict           end, with exit code 4, at a damaged checkpoint instead of going back to the one
                     before it
  --allow_change     continue a run although settings that shape what is learned have changed
  --overwrite_output_dir  begin a new run; one that is in the workdir is moved to a folder beside it
  --require gpu      end, with exit code 2, where JAX would compute on anything else; or tpu

The flags of transformers' run_clm.py that mean the same thing are understood:
docs/recipes/run_clm.md.

Several hosts, the same command on each; under SLURM, Open MPI, Kubernetes and on TPU pods these are
found out:
  --coordinator HOST:PORT   of process 0
  --num_processes N         of the run
  --process_id I            of this process, from 0
  --start_timeout SECONDS   to wait for the others (default: 300)
  --peer_timeout SECONDS    of silence after which another process counts as lost (default: 60)
"""

PREPARE = """python -m jaxft.prepare --config configs/X.py [--config.a.b=value ...] [--json]

  --config FILE      a file with get_config(), or the name of a shipped config (jaxft --help)
  --config.a.b=VALUE any setting; those of `data` decide what is read and how
  --json             print the content of data_report.json, and nothing else, on standard output
"""

PLAN = """python -m jaxft.plan --config configs/X.py --device NAME [--config.a.b=value ...]
                     [--fit] [--json] [--html FILE]

  --config FILE      a file with get_config(), or the name of a shipped config. Its data need not
                     exist, and no weights are read
  --device NAME      t4, rtx4090, a100-80gb, h100, h100x8, ..., or a slice of TPUs such as v5e:2x4
                     or tpu7x:2x2x1, or cpux8. Several: the flag several times, or NAME,NAME
  --config.a.b=VALUE any setting
  --fit              look for the fastest settings that fit; without it, only where the config
                     does not fit
  --prices FILE      what a device costs an hour, by your own table: JSON such as
                     {"h100": 2.5, "v5e": 1.2}
  --json             print one JSON object, and nothing else, on standard output
  --html FILE        write a page

Compiles the train step with the compiler of that device, without the device. A plan that does not
fit is an answer too: the exit code is 0.
"""


def print_help(command: list[str]) -> None:
  """Print the usage of `python -m jaxft.X --help` or `jaxft X --help` and end the process.

  Return if no help is asked for, or if the command is unknown.

  Args:
    command: `sys.orig_argv`.
  """
  if not {*commands.HELP} & {*command}:
    return
  if command[0] == commands.SCRIPT:
    command = [f"jaxft.{command[1]}"]
  texts = {"jaxft.train": TRAIN, "jaxft.prepare": PREPARE, "jaxft.plan": PLAN}
  text = next((texts[word] for word in command if word in texts), None)
  if text:
    text = commands.as_typed(text)
  else:
    from jaxft.cli import parsers

    names = ("generate", "evaluate", "export", "tokenizer", "report")
    makers = {f"jaxft.{name}": getattr(parsers, name) for name in names}
    make_parser = next((makers[word] for word in command if word in makers), None)
    text = make_parser and make_parser().format_help().rstrip()
  if text:
    with contextlib.suppress(BrokenPipeError):
      print(text, flush=True)
    sys.exit()
