"""Runs parts of benchmarks/gpu_parts.py, each with its own limit. The standard library only."""

import collections
import contextlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import children
import page
from children import ROOT


class Part(NamedTuple):
  name: str
  phase: int  # 3: only without a deadline
  limit: int  # seconds
  least: int  # seconds that must be left for it to begin
  # After `python`; {out}, {work}, {caches}, {turns}, {require}, and {N} for a limit of N seconds.
  command: str
  tiny: str  # flags that are added to try the command on a CPU: of two the last one counts
  group: str = ""  # parts that follow each other with the same group run beside each other
  share: float = 0.0  # of the card's memory for XLA, if others run beside it; 0: JAX's default
  environment: dict[str, str] = {}
  instead_of: str = ""  # runs only where that part did not end well


# Of what a part says, that its line in the summary does not end with: XLA's log, warnings, and what
# JAX adds to a traceback.
NO_NEWS = re.compile(
  r"\s*$|[A-Z]\d{4} |.*WARNING|-+$|For simplicity, JAX has removed|.*JAX_TRACEBACK_FILTERING"
)
HEAD, TAIL, LINE = 60_000, 40_000, 2_000  # characters: of a part's log, and of a line


class Log:
  """What a part says, into the one log as it comes: its beginning, and where it is long its end."""

  def __init__(self, file: Path, name: str):
    self._file, self._name, self._written = file, name, 0
    self._tail, self._left_out, self.last = collections.deque(), 0, ""

  def take(self, lines: Any) -> None:
    for line in lines:
      line = line.rstrip("\n")[:LINE]
      self.last = self.last if NO_NEWS.match(line) else line
      if self._written < HEAD:
        self._write(line)
        continue
      self._tail.append(line)
      self._left_out += len(line)
      while self._left_out > TAIL:
        self._left_out -= len(self._tail.popleft())

  def end(self) -> None:
    if self._tail:
      self._write("[...]")
    while self._tail:
      self._write(self._tail.popleft())

  def _write(self, line: str) -> None:
    self._written += len(line)
    append(self._file, f"{self._name} | {line}")


class Runner:
  """Runs parts, and writes what came of them into `out`.

  Args:
    seconds: that it may take; infinity where there is no deadline.
    patience: what limits of parts are multiplied with.
  """

  def __init__(
    self,
    out: Path,
    seconds: float = math.inf,
    tiny: bool = False,
    turns: int = 1,
    patience: float = 1,
  ):
    self.out, self.tiny, self.turns, self.patience = out.absolute(), tiny, turns, patience
    self.states: dict[str, str] = {}
    self.id = f"{time.time():.3f}"  # of later runs it is larger
    self._began = time.monotonic()
    self._deadline, self._stopped = self._began + seconds, False
    self._lock, self._running = threading.Lock(), {}
    self.out.mkdir(parents=True, exist_ok=True)

  @property
  def left(self) -> float:
    return self._deadline - time.monotonic()

  def run(self, parts: tuple[Part, ...]) -> None:
    """One group after the other; two parts at once for tiny shapes, of which nothing is timed."""
    with tempfile.TemporaryDirectory(prefix="jaxft-gpu-", ignore_cleanup_errors=True) as work:
      while parts:
        beside = 1
        while parts[0].group and beside < len(parts) and parts[beside].group == parts[0].group:
          beside += 1
        beside = 2 if self.tiny else beside
        threads = [
          threading.Thread(target=self._tried, args=(part, Path(work)), daemon=True)
          for part in parts[:beside]
        ]
        for thread in threads:
          thread.start()
        for thread in threads:
          thread.join()
        parts = parts[beside:]

  def stop(self) -> None:
    """Kills what runs, and lets nothing begin."""
    with self._lock:
      self._stopped = True
      running = list(self._running.values())
    for thread, child in running:
      kill_session(child.pid)
      thread.join(5)

  def say(self, line: str) -> None:
    line = f"[{time.monotonic() - self._began:.0f} s] {line}"
    append(self.out / "summary.txt", line)
    with contextlib.suppress(OSError):  # nobody may listen any more
      print(line, flush=True)

  def note(self, benchmark: str, **found: Any) -> None:
    append(
      self.out / "results.jsonl",
      json.dumps({"benchmark": benchmark, "at": round(time.time()), **found}),
    )

  def _tried(self, part: Part, work: Path) -> None:
    """Runs a part; one that cannot be started, or noted, has failed."""
    try:
      self._run(part, work)
    except Exception as error:
      with self._lock:
        self.states[part.name] = f"{type(error).__name__}: {error}"
        self._running.pop(part.name, None)
      self.say(f"{part.name}: {self.states[part.name]}")

  def _run(self, part: Part, work: Path) -> None:
    seconds = min(part.limit * self.patience, self.left - 4)
    if part.instead_of and not self.tiny and self.states.get(part.instead_of) == "ok":
      return self._ended(part, "not needed", f"{part.instead_of} ended well")
    if seconds < part.least:
      return self._ended(part, "skipped", f"{self.left:.0f} s are left")
    log, began = Log(self.out / "logs.txt", part.name), time.time()
    child = self._start(part, work)
    if not child:
      return
    reader = threading.Thread(target=log.take, args=(child.stdout,), daemon=True)
    reader.start()
    state = ""
    try:
      child.wait(seconds)
    except subprocess.TimeoutExpired:
      state = f"killed after {seconds:.0f} s"
    kill_session(child.pid)  # workers that it left behind too
    code = child.wait()
    reader.join(5)
    if not reader.is_alive():  # a process that left the session may hold the pipe
      child.stdout.close()
    log.end()
    with self._lock:
      del self._running[part.name]
    state = "interrupted" if self._stopped else state or ("ok" if code == 0 else f"code {code}")
    self._ended(part, self._checked(part, state, began), log.last, code, time.time() - began)

  def _start(self, part: Part, work: Path) -> subprocess.Popen | None:
    with self._lock:
      if self._stopped:
        return None
      child = subprocess.Popen(
        [sys.executable, *self.command(part, work)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        env=self.environment(part),
        cwd=ROOT,
        start_new_session=True,
      )
      self._running[part.name] = threading.current_thread(), child
    return child

  def command(self, part: Part, work: Path) -> list[str]:
    text = f"{part.command} {part.tiny if self.tiny else ''}"
    text = re.sub(r"{(\d+)}", lambda limit: f"{int(limit[1]) * self.patience:g}", text)
    caches = os.environ.get("XDG_CACHE_HOME") or work / "caches"
    for name, value in {"out": self.out, "work": work, "caches": caches}.items():
      text = text.replace(f"{{{name}}}", shlex.quote(str(value)))
    text = text.replace("{require}", "" if self.tiny else "--require gpu")
    return shlex.split(text.replace("{turns}", str(self.turns)))

  def environment(self, part: Part) -> dict[str, str]:
    """No part computes on the CPU in silence, whatever JAX falls back to."""
    where = {
      "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cuda,cpu"),
      "BENCHMARKS_REQUIRE": "gpu",
    }
    if self.tiny:  # XLA's CPU compiler takes most of the time, and least at level 0
      where = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
      }
    if part.share:
      where["XLA_CLIENT_MEM_FRACTION"] = str(part.share)
    about = {
      "BENCHMARKS_OUT": str(self.out),
      "BENCHMARKS_RUN": self.id,
      "BENCHMARKS_PART": part.name,
    }
    about["PYTHONUNBUFFERED"] = "1"
    of_part = {name: os.environ.get(name, value) for name, value in part.environment.items()}
    return children.environment(**(of_part | where), **about)

  def _checked(self, part: Part, state: str, began: float) -> str:
    """The state, if the part's figures are of a GPU."""
    lines = page.read(self.out / "results.jsonl")
    of_part = [line for line in lines if line.get("part") == part.name and line["at"] >= int(began)]
    on_cpu = any(line.get("device") == "cpu" for line in of_part)
    return "computed on the CPU" if on_cpu and not self.tiny else state

  def _ended(
    self, part: Part, state: str, detail: str, code: int | None = None, seconds: float = 0
  ) -> None:
    with self._lock:
      self.states[part.name] = state
      self.say(f"{part.name}: {state}, {seconds:.0f} s | {detail[:600]}")
      self.note(
        "part", name=part.name, state=state, code=code, seconds=round(seconds, 1), told=detail
      )
      self._write_page()

  def _write_page(self) -> None:
    text = page.with_sections(
      page.PAGE.read_text(encoding="utf-8"), page.read(self.out / "results.jsonl")
    )
    if self.tiny:
      head = "**Tiny shapes on a CPU, to try the commands: what is new here is no measurement.**"
      text = f"{head}\n\n{text}"
    whole = self.out / "benchmarks.md.part"
    with contextlib.suppress(OSError):
      whole.write_text(text, encoding="utf-8")
      whole.replace(self.out / "benchmarks.md")

  def end(self) -> int:
    """Names what did not run, and returns the exit code."""
    failed = [
      f"{name} ({it})"
      for name, it in self.states.items()
      if it not in ("ok", "skipped", "not needed")
    ]
    skipped = [name for name, it in self.states.items() if it == "skipped"]
    if skipped:
      self.say(f"skipped, no time was left: {', '.join(skipped)}")
    self.say(f"failed: {', '.join(failed)}" if failed else "no part failed")
    return 1 if failed else 0


def append(file: Path, line: str) -> None:
  """Adds a line. On a full disk it is lost, and nothing else is: what is printed stays."""
  with contextlib.suppress(OSError), file.open("a", encoding="utf-8") as stream:
    stream.write(line + "\n")


def kill_session(session: int) -> None:
  """Kills all processes of a session, whatever their groups; without /proc, its first group."""
  for _ in range(3):  # one may be about to start another
    members = session_members(session)
    for pid in members:
      with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not members:
      break
  with contextlib.suppress(ProcessLookupError, PermissionError):
    os.killpg(session, signal.SIGKILL)


def session_members(session: int) -> list[int]:
  """Processes that are alive."""
  found = []
  for file in Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):  # it has ended
      state, _, _, its_session = file.read_text(errors="replace").rpartition(")")[2].split()[:4]
      if int(its_session) == session and state != "Z":
        found.append(int(file.parent.name))
  return found
