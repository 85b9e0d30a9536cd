"""A process that has imported jaxft and forks for each command, as imports take most of its time.

`Popen` is `subprocess.Popen` of `sys.executable` but for how the process begins. The child is a
real process with a JAX of its own, and a child of the caller: it can be signalled, killed and
waited for. It starts afresh wherever its environment differs in what Python and the libraries read
at import; with FRESH_PROCESSES=1, which `--torture` sets, every process does. Forked ones share a
seed of hashes, and what is imported.
"""

import array
import atexit
import ctypes
import functools
import gc
import importlib
import importlib.util
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import warnings

READ_AT_IMPORT = (
  "JAX_",
  "HF_",
  "PYTHON",
  "TRANSFORMERS_",
  "XDG_",
  "HOME",
  "TMPDIR",
  "LC_",
  "LANG",
  "TOKENIZERS_",
)
NUM_DEVICES = "JAX_NUM_CPU_DEVICES"  # the one of them that is set again in the child
COMMANDS = (
  "train",
  "evaluate",
  "generate",
  "export",
  "prepare",
  "plan.planner",
  "doctor",
  "report",
  "tokenizer",
)
LIBRARIES = (
  "orbax.checkpoint",
  "grain",
  "transformers.models",
  "transformers.models.gpt2.configuration_gpt2",
)
PR_SET_CHILD_SUBREAPER = 36


class Popen(subprocess.Popen):
  """A process that runs `sys.executable` with these arguments."""

  def __init__(self, arguments, **how):
    super().__init__([sys.executable, *map(str, arguments)], **how)

  def _execute_child(self, args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more):
    env = dict(os.environ if env is None else env)
    fresh = os.environ.get("FRESH_PROCESSES") or sys.platform != "linux"
    if fresh or preexec_fn or pass_fds or _read_at_import(env) != _read_at_import(os.environ):
      return super()._execute_child(
        args, executable, preexec_fn, close_fds, pass_fds, cwd, env, *more
      )
    pipes = p2cread, _, _, c2pwrite, _, errwrite = more[3:9]
    streams = [
      own if given == -1 else given for own, given in enumerate((p2cread, c2pwrite, errwrite))
    ]
    request = {"arguments": args[1:], "cwd": str(cwd or os.getcwd()), "env": env}
    self.pid, self._child_created = _ask(request, streams), True
    self._close_pipe_fds(*pipes)


def run(arguments, *, input=None, capture_output=False, timeout=None, check=False, **how):
  """As `subprocess.run`."""
  if input is not None:
    how["stdin"] = subprocess.PIPE
  if capture_output:
    how |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
  with Popen(arguments, **how) as process:
    try:
      said, errors = process.communicate(input, timeout=timeout)
    except BaseException:
      process.kill()
      raise
  done = subprocess.CompletedProcess(process.args, process.returncode, said, errors)
  if check:
    done.check_returncode()
  return done


def _read_at_import(env):
  return {
    name: it for name, it in env.items() if name.startswith(READ_AT_IMPORT) and name != NUM_DEVICES
  }


def _ask(request, streams):
  """The process id of the new process."""
  server = _server()
  fds = array.array("i", streams)
  server.sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
  return int(server.recv(64))


@functools.cache
def _server():
  """Our end of the socket to the process that forks."""
  prctl = ctypes.CDLL(None, use_errno=True).prctl
  if prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):  # the server's grandchildren become our children
    raise OSError(ctypes.get_errno(), "prctl")
  ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
  ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**20)
  with theirs:
    process = subprocess.Popen(
      [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()]
    )
  atexit.register(lambda: (ours.close(), process.wait()))
  return ours


# ---- In the process that forks -------------------------------------------------------------------


def _preload():
  for module in (*(f"jaxft.{command}" for command in COMMANDS), *LIBRARIES):
    importlib.import_module(module)
  if importlib.util.find_spec("torch"):
    importlib.import_module("transformers.models.gpt2.modeling_gpt2")
  gc.collect()
  gc.freeze()  # a collection in the child would copy every page


def _serve(server):
  """Fork for each request; return in the new process alone, with its interpreter's arguments."""
  while True:
    text, ancillary, *_ = server.recvmsg(2**20, socket.CMSG_LEN(12))
    if not text:
      os._exit(0)
    streams = array.array("i", ancillary[0][2])
    reading, writing = os.pipe()
    if intermediate := os.fork():
      os.waitpid(intermediate, 0)  # only then is the new process the caller's child
      server.send(os.read(reading, 64))
    elif child := os.fork():
      os.write(writing, str(child).encode())
      os._exit(0)
    for number in (reading, writing):
      os.close(number)
    if not intermediate:
      server.close()
      return _become(json.loads(text), streams)
    for stream in streams:
      os.close(stream)


def _become(request, streams):
  for number, stream in enumerate(streams):
    os.dup2(stream, number)
    os.close(stream)
  for number, name in enumerate(("stdin", "stdout", "stderr")):
    how = (
      {"mode": "r"},
      {"mode": "w"},
      {"mode": "w", "buffering": 1, "errors": "backslashreplace"},
    )[number]
    stream = open(number, closefd=False, **how)
    setattr(sys, name, stream)
    setattr(sys, f"__{name}__", stream)
  os.chdir(request["cwd"])
  os.environ.clear()
  os.environ.update(request["env"])
  if count := os.environ.get(NUM_DEVICES):
    sys.modules["jax"].config.update(NUM_DEVICES.lower(), int(count))
  return request["arguments"]


def _run(first, *rest):
  """As the interpreter would."""
  sys.orig_argv = [sys.executable, first, *rest]
  of_jaxft = first == "-m" and rest[0].startswith("jaxft.")
  # as cli/startup.py does
  signal.signal(signal.SIGINT, signal.SIG_DFL if of_jaxft else signal.default_int_handler)
  if first == "-c":
    sys.argv, sys.path[0] = ["-c", *rest[1:]], ""
    exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
  elif first == "-m":
    sys.argv, sys.path[0] = list(rest), os.getcwd()
    sys.modules.pop(rest[0], None)  # it is run, not imported
    runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
  else:
    sys.argv, sys.path[0] = [first, *rest], os.path.dirname(os.path.abspath(first))
    runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
  _preload()
  with warnings.catch_warnings():
    # numpy's threads, which wait for work and know of forks.
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    command = _serve(socket.socket(fileno=int(sys.argv[1])))
  _run(*command)
