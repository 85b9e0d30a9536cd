"""Put thirty faults of one line each into a copy of jaxft, and count those that the tests catch.

    python scripts/mutants.py                 # by the tests of `make test`: 27 must be caught
    python scripts/mutants.py --all           # by the slow tests too: all must be caught
    python scripts/mutants.py --only loader   # faults with this word in their line; no table

Needs the dev extra, and torch: faults that only another implementation shows are caught beside
transformers alone. For each fault the tests run that are to catch it, in a copy of the checkout. It
is caught when one of them fails; when all of them pass it has escaped, and anything else is an
error of this file. The same tests must pass without any fault first.

The table goes into docs/reliability.md. A change that rewrites a line of FAULTS rewrites the fault
too: one that can no longer be put in ends the script before it begins.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- mutants -->", "<!-- /mutants -->"
MUST_BE_CAUGHT = 27  # by `make test`
MOST_SECONDS = 3600  # for the tests of one fault
PASSED, FAILED = 0, 1  # pytest's exit codes
# Of pytest's summary: the test, without its parameters.
LINE = re.compile(r"^(?:FAILED|ERROR) (?:tests/(?:\w+/)?)?([\w.]+(?:::\w+)*)", re.MULTILINE)


class Fault(NamedTuple):
  name: str  # what goes wrong
  file: str
  old: str  # occurs once in the file
  new: str
  tests: tuple[str, ...]  # files in tests/ that are to catch it


FAULTS = (
  # ---- The model ---------------------------------------------------------------------------------
  Fault(
    "an attention window is one key too wide",
    "jaxft/model/attention_chunked.py",
    "visible = visible & (distance < self.window)",
    "visible = visible & (distance <= self.window)",
    ("test_attention.py",),
  ),
  Fault(
    "the halves of a rotated pair are swapped",
    "jaxft/model/layers.py",
    "even, odd = pairs[..., 0], pairs[..., 1]",
    "odd, even = pairs[..., 0], pairs[..., 1]",
    ("test_classification.py",),
  ),
  Fault(
    "attention dropout does not scale the remaining probabilities",
    "jaxft/model/dropout.py",
    "return jax.vmap(jax.vmap(of_head))(keys_BN).astype(jnp.float32) / (1 - rate)",
    "return jax.vmap(jax.vmap(of_head))(keys_BN).astype(jnp.float32)",
    ("test_attention.py", "test_decoder.py", "test_train_step.py"),
  ),
  Fault(
    "a merge leaves out the scale of the adapters",
    "jaxft/model/lora.py",
    "np.stack([x + cfg.lora_scale * d for x, d in",
    "np.stack([x + d for x, d in",
    ("test_lora.py",),
  ),
  # ---- A step ------------------------------------------------------------------------------------
  Fault(
    "the gradient is divided by the tokens of the first accumulation step",
    "jaxft/training/train_step.py",
    'tokens = jnp.sum(batch["mask"])',
    'tokens = jnp.sum(batch["mask"][0])',
    ("test_train_step.py",),
  ),
  Fault(
    "Adam's second moment decays as the first does",
    "jaxft/training/optimizer.py",
    "adam = optax.scale_by_adam(optim.b1, optim.b2, optim.eps,",
    "adam = optax.scale_by_adam(optim.b1, optim.b1, optim.eps,",
    ("test_train_step.py",),
  ),
  Fault(
    "the schedule after the warm-up begins a step late",
    "jaxft/training/optimizer.py",
    "optax.linear_schedule(0.0, peak, warmup), after], [warmup])",
    "optax.linear_schedule(0.0, peak, warmup), after], [warmup + 1])",
    ("test_optimizer.py",),
  ),
  Fault(
    "weight decay applies to the scales of norms",
    "jaxft/training/optimizer.py",
    "return name in DECAYED\n",
    'return name != "bias"\n',
    ("test_optimizer.py",),
  ),
  Fault(
    "stochastic rounding mostly rounds towards zero",
    "jaxft/training/stochastic_rounding.py",
    "jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)",
    "jax.random.bits(key, x.shape, jnp.uint8).astype(jnp.uint32)",
    ("test_stochastic_rounding.py",),
  ),
  Fault(
    "weights are replicated in storage and sharded in use",
    "jaxft/sharding/rules.py",
    '"embed": (("fsdp",), ()),',
    '"embed": ((), ("fsdp",)),',
    ("test_rules.py",),
  ),
  Fault(
    "offloaded layers go backward from the first to the last",
    "jaxft/training/offload.py",
    "jax.lax.scan(backward, dx, (inputs, layers), reverse=True)",
    "jax.lax.scan(backward, dx, (inputs, layers))",
    ("test_offload.py",),
  ),
  # ---- Text --------------------------------------------------------------------------------------
  Fault(
    "the first token of a completion is not learned",
    "jaxft/data/packing.py",
    "return at - starts[example] >= self.tokens.prompts_N[example]",
    "return at - starts[example] > self.tokens.prompts_N[example]",
    ("test_dataset.py",),
  ),
  Fault(
    "end tokens are masked like padding",
    "jaxft/data/packing.py",
    "mask[at] = span.stop - n + np.arange(n) - start >= prompt",
    "mask[at] = (span.stop - n + np.arange(n) - start >= prompt) & (values[1:] != self._eos_id)",
    ("test_dataset.py", "test_packing.py"),
  ),
  Fault(
    "the last sequence is dropped if it is not full",
    "jaxft/data/packing.py",
    "rows = np.arange(-(-len(tokens.ids) // T))",
    "rows = np.arange(len(tokens.ids) // T)",
    ("test_dataset.py",),
  ),
  Fault(
    "a resumed run takes its last batch again",
    "jaxft/data/loader.py",
    "grain.MapDataset.source(steps)[start:]",
    "grain.MapDataset.source(steps)[max(start - 1, 0) :]",
    ("test_loader.py",),
  ),
  Fault(
    "held-out sequences are trained on too",
    "jaxft/data/dataset.py",
    "np.flatnonzero(batch_splits == split)",
    "np.flatnonzero(batch_splits >= split)",
    ("test_dataset.py",),
  ),
  Fault(
    "the token cache is reused for another tokenizer of the same size",
    "jaxft/hf/tokenizer.py",
    "return hashlib.sha256(content.encode()).hexdigest()",
    "return hashlib.sha256(str(len(content)).encode()).hexdigest()",
    ("test_token_cache.py", "test_tokenizer.py"),
  ),
  Fault(
    "top_p leaves out the token that reaches it",
    "jaxft/generation/logits_processors.py",
    "cut_BV = (tail_BV <= 1 - top_p)",
    "cut_BV = (jnp.pad(tail_BV, [(0, 0), (1, 0)])[:, :-1] <= 1 - top_p)",
    ("test_sampler.py",),
  ),
  Fault(
    "logits are multiplied by the temperature",
    "jaxft/generation/sampler.py",
    "logits_BV.max(-1, keepdims=True)) / temperature",
    "logits_BV.max(-1, keepdims=True)) * temperature",
    ("test_sampler.py",),
  ),
  # ---- Folders of models -------------------------------------------------------------------------
  Fault(
    "a square matrix of GPT-Neo is read and written transposed",
    "jaxft/hf/weight_map.py",
    'h.{}.attn.attention.out_proj.weight", "blocks.attention.out.kernel", "D (N H) -> N H D")',
    'h.{}.attn.attention.out_proj.weight", "blocks.attention.out.kernel", "(N H) D -> N H D")',
    ("test_classification.py",),
  ),
  Fault(
    "an export has the dtype of its first tensor everywhere",
    "jaxft/hf/export_tensors.py",
    'return lambda name: source.get(short_name(name), EXPORT_DTYPES["float32"])',
    "return lambda name: next(iter(source.values()))",
    ("test_export.py",),
  ),
  # ---- A run -------------------------------------------------------------------------------------
  Fault(
    "a restore does not compare the checksums of a checkpoint",
    "jaxft/checkpoint/manager.py",
    "wrong = [name for name in names if expected.get(name) != actual.get(name)]",
    "wrong = [name for name in names if name not in expected or name not in actual]",
    ("test_manager.py", "test_corruption.py"),
  ),
  Fault(
    "the worst checkpoint counts as the best",
    "jaxft/checkpoint/manager.py",
    'best_mode="min",',
    'best_mode="max",',
    ("test_guards.py", "test_recipes.py"),
  ),
  Fault(
    "a preempted run reports a save that did not happen",
    "jaxft/training/loop.py",
    'if "save" in due or stopping or ended_early:',
    'if "save" in due or ended_early:',
    ("test_guards.py", "test_signals.py"),
  ),
  Fault(
    "a file is overwritten in place, without a temporary file and a rename",
    "jaxft/utils/files.py",
    'partial = file.with_name(file.name + ".partial")',
    "partial = file",
    ("test_guards.py", "test_full_disks.py", "test_kills.py"),
  ),
  Fault(
    "every error ends with exit code 1",
    "jaxft/errors.py",
    "return error.exit_code",
    "return JaxftError.exit_code",
    ("test_run_page.py",),
  ),
  Fault(
    "a hub token is recorded",
    "jaxft/utils/redact.py",
    'return HUB_TOKEN.sub("***", PARAMETER.sub(r"\\1***", LOGIN.sub("***@", text)))',
    'return PARAMETER.sub(r"\\1***", LOGIN.sub("***@", text))',
    ("test_trackers.py",),
  ),
  # ---- Plans and pages ---------------------------------------------------------------------------
  Fault(
    "the search for settings ignores the optimizer state",
    "jaxft/plan/cost_model.py",
    "return int(weights + gradient + moments)",
    "return int(weights + gradient)",
    ("test_search.py",),
  ),
  Fault(
    "sizes of a TPU's compiler are read in powers of ten",
    "jaxft/plan/measure.py",
    'UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}',
    'UNITS = {"K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}',
    ("test_planner.py", "test_aot_compiler.py"),
  ),
  Fault(
    "quotes are not escaped on a page",
    "jaxft/report_page/markup.py",
    'return html.escape(escape_controls(text.encode(errors="backslashreplace").decode()))',
    "return html.escape(escape_controls("
    'text.encode(errors="backslashreplace").decode()), quote=False)',
    ("test_run_page.py",),
  ),
)


def _test_file(folder: Path, name: str) -> str:
  """The path of a test file, wherever it lies below tests/; "" where there is none."""
  return next((str(file.relative_to(folder)) for file in (folder / "tests").rglob(name)), "")


class Outcome(NamedTuple):
  """What became of a fault."""

  fault: Fault
  by: str  # the test that failed; "": none, it has escaped
  error: str  # why the tests did not run; "": they did
  seconds: float


class Copy:
  """A copy of the checkout, in which the tests run as in the checkout itself."""

  def __init__(self, folder: Path, markers: str):
    self._folder, self._markers = folder, markers
    self._environment = os.environ | {"PYTHONPATH": str(folder)}

  def is_what_is_imported(self) -> None:
    """Raises SystemExit where another jaxft would be tested, the one that is installed."""
    command = [sys.executable, "-c", "import jaxft; print(jaxft.__file__)"]
    done = subprocess.run(
      command, cwd=self._folder.parent, env=self._environment, capture_output=True, text=True
    )
    if done.stdout.strip() != str(self._folder / "jaxft" / "__init__.py"):
      raise SystemExit(
        f"error: not the copy in {self._folder} is tested but {done.stdout or done.stderr}"
      )

  def test(
    self, names: Iterable[str], most_seconds: int | None = None
  ) -> subprocess.CompletedProcess:
    """Runs these files of tests/ up to the first test that fails; raises TimeoutExpired."""
    command = [
      sys.executable,
      "-m",
      "pytest",
      "-x",
      "-q",
      "-rfE",
      "-p",
      "no:cacheprovider",
      "-m",
      self._markers,
    ]
    return subprocess.run(
      [*command, *(_test_file(self._folder, name) for name in names)],
      cwd=self._folder,
      env=self._environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      errors="replace",
      timeout=most_seconds,
    )

  def catch(self, fault: Fault) -> Outcome:
    """Puts the fault in, runs its tests, and takes it out again."""
    began, file = time.monotonic(), self._folder / fault.file
    before, times = file.read_text(encoding="utf-8"), file.stat()
    try:
      file.write_text(before.replace(fault.old, fault.new), encoding="utf-8")
      done = self.test(fault.tests, MOST_SECONDS)
    except subprocess.TimeoutExpired:
      return Outcome(fault, "", f"no end after {MOST_SECONDS} s", time.monotonic() - began)
    finally:
      file.write_text(before, encoding="utf-8")
      # Python tells what it has compiled by time and size
      os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    by, error = "", ""
    if done.returncode == FAILED:
      by = first_failure(done.stdout)
    elif done.returncode != PASSED:
      error = f"pytest ended with code {done.returncode}: {last_line(done.stdout)}"
    return Outcome(fault, by, error, time.monotonic() - began)


def first_failure(said: str) -> str:
  """The test that has failed, of pytest's output."""
  found = LINE.search(said)
  return found[1] if found else last_line(said)


def last_line(said: str) -> str:
  return (said.strip().splitlines() or ["nothing was said"])[-1]


def must_go_in(faults: Iterable[Fault], folder: Path) -> None:
  """Raises SystemExit with a line for each fault that cannot be put into the files as they are."""
  lines = []
  for fault in faults:
    text = (folder / fault.file).read_text(encoding="utf-8")
    if (count := text.count(fault.old)) != 1:
      lines.append(f"error: {fault.name!r}: {count} times in {fault.file}: {fault.old!r}")
      continue
    compile(text.replace(fault.old, fault.new), fault.file, "exec")
    missing = [name for name in fault.tests if not _test_file(folder, name)]
    lines += [f"error: {fault.name!r}: there is no {name} in tests/" for name in missing]
  if lines:
    raise SystemExit("\n".join(lines))


def must_pass(faults: Iterable[Fault], copies: list[Copy]) -> None:
  """Raises SystemExit where a test fails without any fault."""
  names = sorted({name for fault in faults for name in fault.tests})
  with ThreadPoolExecutor(len(copies)) as pool:
    parts = [names[i :: len(copies)] for i in range(len(copies))]
    for done in pool.map(lambda copy, part: copy.test(part) if part else None, copies, parts):
      if done and done.returncode != PASSED:
        print(done.stdout, file=sys.stderr)
        raise SystemExit(f"error: without any fault: {first_failure(done.stdout)}")
  print(f"without any fault all pass: {', '.join(names)}", flush=True)


def copy_checkout(to: Path) -> None:
  """The files that git knows or does not ignore, as they are now."""
  command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
  listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
  for name in filter(None, listed.split("\0")):
    if (ROOT / name).is_file():
      (to / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, to / name)


def catch_all(faults: list[Fault], copies: list[Copy]) -> list[Outcome]:
  """Tells of each fault as it comes; returns them in their order."""
  free = queue.SimpleQueue()
  for copy in copies:
    free.put(copy)

  def catch(fault: Fault) -> Outcome:
    copy = free.get()
    try:
      return copy.catch(fault)
    finally:
      free.put(copy)

  with ThreadPoolExecutor(len(copies)) as pool:
    begun = [pool.submit(catch, fault) for fault in faults]
    for done in as_completed(begun):
      it = done.result()
      print(f"{it.fault.name}: {it.error or it.by or 'ESCAPED'} ({it.seconds:.0f} s)", flush=True)
  return [it.result() for it in begun]


def table(outcomes: list[Outcome], what: str) -> str:
  """The faults in Markdown, and a line on how they were looked for."""
  lines = ["| fault | file | caught by |", "|---|---|---|"]
  for it in outcomes:
    by = "**error**" if it.error else f"`{it.by}`" if it.by else "**escaped**"
    lines.append(f"| {it.fault.name} | `{it.fault.file}` | {by} |")
  versions = ", ".join(
    f"{name} {importlib.metadata.version(name)}" for name in ("jax", "flax", "torch")
  )
  count = sum(bool(it.by) for it in outcomes)
  today = f"{datetime.date.today()}, Python {platform.python_version()}, {versions}"
  return "\n".join([*lines, "", f"{count} of {len(outcomes)} caught by {what}; {today}."])


def write_into_page(text: str) -> None:
  """Between the marks, or at the end where the page has none."""
  page = PAGE.read_text(encoding="utf-8")
  if BEGIN not in page:
    page += (
      "\n## Faults that the tests catch\n\n`scripts/mutants.py` puts each of these faults into a "
      f"copy of jaxft, one at a time, and writes this table:\n\n{BEGIN}\n{END}\n"
    )
  before, _, rest = page.partition(BEGIN)
  PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.partition(END)[2]}", encoding="utf-8")


def main() -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--all", action="store_true", help="run slow tests too")
  parser.add_argument(
    "--only", default="", metavar="WORD", help="faults with this in their name, file or tests"
  )
  parser.add_argument(
    "-n", type=int, default=2, metavar="WORKERS", help="faults at a time (default: 2)"
  )
  arguments = parser.parse_args()
  chosen = [it for it in FAULTS if arguments.only in " ".join((it.name, it.file, *it.tests))]
  if not chosen or arguments.n < 1:
    parser.error(
      f"no fault has {arguments.only!r} in its line" if not chosen else "-n: give 1 or more"
    )
  if not importlib.util.find_spec("torch"):
    parser.error("torch is not installed here, and some faults show only beside transformers")
  markers = "not wide" if arguments.all else "not slow and not wide"
  with tempfile.TemporaryDirectory(prefix="jaxft-mutants-") as parent:
    folders = [Path(parent).resolve() / str(i) for i in range(min(arguments.n, len(chosen)))]
    copy_checkout(folders[0])
    for folder in folders[1:]:
      shutil.copytree(folders[0], folder)
    must_go_in(FAULTS, folders[0])
    copies = [Copy(folder, markers) for folder in folders]
    for copy in copies:
      copy.is_what_is_imported()
    must_pass(chosen, copies)
    outcomes = catch_all(chosen, copies)
  text = table(outcomes, "all tests but the wide ones" if arguments.all else "`make test`")
  print(f"\n{text}")
  if len(chosen) == len(FAULTS):
    write_into_page(text)
  if any(it.error for it in outcomes):
    return 1
  needed = MUST_BE_CAUGHT if len(chosen) == len(FAULTS) and not arguments.all else len(chosen)
  return 0 if sum(bool(it.by) for it in outcomes) >= needed else 1


if __name__ == "__main__":
  sys.exit(main())
