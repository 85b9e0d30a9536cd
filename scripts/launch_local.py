"""Start a command as several processes on this machine.

python scripts/launch_local.py N [--devices D] -- python -m jaxft.train --config configs/X.py

Each gets --coordinator, --num_processes and --process_id, and with --devices so many fake CPU
devices. Ctrl-C and SIGTERM go to all of them. The exit code is the largest of theirs.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("processes", type=int)
  parser.add_argument(
    "--devices",
    type=int,
    default=0,
    help="fake CPU devices a process (0: the real ones, all for each)",
  )
  cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
  arguments, command = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1 :]
  if arguments.processes < 1 or not command:
    parser.error("give a number of processes, --, and a command")
  environment = dict(os.environ)
  if arguments.devices:
    environment |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(arguments.devices)}
  coordinator = f"127.0.0.1:{free_port()}"
  started = []
  for i in range(arguments.processes):
    process_flags = [
      f"--coordinator={coordinator}",
      f"--num_processes={arguments.processes}",
      f"--process_id={i}",
    ]
    started.append(
      subprocess.Popen([*command, *process_flags], env=environment, start_new_session=True)
    )

  def forward(number, _):
    for process in started:
      if process.poll() is None:
        process.send_signal(number)

  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    signal.signal(number, forward)
  codes = [process.wait() for process in started]
  print("exit codes:", *codes, file=sys.stderr)
  return max(code if code >= 0 else 128 - code for code in codes)


def free_port() -> int:
  with socket.create_server(("127.0.0.1", 0)) as server:
    return server.getsockname()[1]


if __name__ == "__main__":
  sys.exit(main())
