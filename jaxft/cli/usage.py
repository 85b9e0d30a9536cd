"""The --help texts of commands with a config; printing them does not import jax (seconds)."""

import contextlib
import sys

from jaxft.cli import commands

TRAIN = """python -m jaxft.train --config configs/X.py [--workdir DIR] [--config.a.b=value ...]

Fine-tune a model and export it to Hugging Face format.

  --config FILE      a Python file with get_config(), or the name of a shipped config
                     (jaxft --help lists them)
  --workdir DIR      folder of the run; the same command resumes it (default: runs/NAME_OF_CONFIG)
  --config.a.b=VALUE override a setting; --print_config describes all settings. Repeat the flag for
                     settings with several values, such as data.train
  --dry_run          compile and report memory use, without training
  --print_config     print all settings of this run and exit
  --strict           fail with exit code 4 on a damaged checkpoint, instead of resuming from the one
                     before it
  --allow_change     resume a run although settings that affect the training have changed
  --overwrite_output_dir  start a new run; an existing run is moved to a folder next to the workdir
  --require gpu      fail with exit code 2 if JAX does not run on a GPU; or tpu

Many flags of transformers' run_clm.py work too: docs/recipes/run_clm.md.

To train on several hosts, run the same command on each. SLURM, Open MPI, Kubernetes and TPU pods
are detected; elsewhere set:
  --coordinator HOST:PORT   address of process 0
  --num_processes N         number of processes in the run
  --process_id I            index of this process, from 0
  --start_timeout SECONDS   how long to wait for the other processes (default: 300)
  --peer_timeout SECONDS    silence after which a process counts as lost (default: 60)
"""

PREPARE = """python -m jaxft.prepare --config configs/X.py [--config.a.b=value ...] [--json]

Read and tokenize the data of a run, and report on it.

  --config FILE      a Python file with get_config(), or the name of a shipped config
                     (jaxft --help lists them)
  --config.a.b=VALUE override a setting; those of `data` select the input
  --json             print only the content of data_report.json, on standard output
"""

PLAN = """python -m jaxft.plan --config configs/X.py --device NAME [--config.a.b=value ...]
                     [--fit] [--json] [--html FILE]

Compile the train step for a device that need not exist here, and report its memory and speed. The
exit code is 0 even if the run does not fit.

  --config FILE      a Python file with get_config(), or the name of a shipped config
                     (jaxft --help lists them). Neither its data nor weights are read
  --device NAME      t4, rtx4090, a100-80gb, h100, h100x8, ..., a TPU slice such as v5e:2x4 or
                     tpu7x:2x2x1, or cpux8. For several, repeat the flag or write NAME,NAME
  --config.a.b=VALUE override a setting
  --fit              search for the fastest settings that fit; without --fit, search only if the
                     config does not fit
  --prices FILE      prices per device and hour, as JSON: {"h100": 2.5, "v5e": 1.2}
  --json             print only one JSON object, on standard output
  --html FILE        write a report page to this file
"""


def print_help(command: list[str]) -> None:
  """Print the usage of `python -m jaxft.X --help` or `jaxft X --help` and end the process.

  Return if --help is not given, or if the command is unknown.

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
