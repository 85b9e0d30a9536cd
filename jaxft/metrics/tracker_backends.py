"""Writes a run to TensorBoard, MLflow, W&B or Trackio.

Only tracker_worker.py imports this, in a process that serves one of them. A library's environment
variables win over the defaults here, which keep everything in the workdir.
"""

import json
import os
import threading
import time
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from jaxft.utils.types import Json

PROJECT = "jaxft"  # where a variable of the library names no other


class TrackerRun(NamedTuple):
  """The first message to a tracker."""

  id: str  # the same in all pieces of a run that is resumed
  resumed: bool
  workdir: str
  name: str  # empty: not set
  settings: Json  # of the config, by dotted name
  samples: list[Json]  # lines of samples.jsonl that it got before the resume

  @property
  def display_name(self) -> str:
    return self.name or Path(self.workdir).name


Metrics = dict[str, float]


def to_floats(line: Json) -> Metrics:
  """Return the numbers of a line of metrics.jsonl, also of "nan" and "inf", without its step."""
  return {key: float(value) for key, value in line.items() if key != "step"}


class TensorBoard:
  """Event files. A run that begins again hides what was written before (`purge_step`)."""

  def __init__(self, run: TrackerRun):
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    folder = run.settings.get("tracking.logging_dir") or os.environ.get("TENSORBOARD_LOGGING_DIR")
    self.where = str(Path(run.workdir) / "tensorboard")
    if folder:
      self.where = str(Path(folder) / f"{run.display_name}-{run.id[:6]}")
    self._writer = SummaryWriter(
      self.where,
      # A full disk ends tensorboardX's thread, and a bounded queue would then block for ever.
      max_queue=0,
      purge_step=None if run.resumed else 0,
      # Two pieces that start in the same second would have one file name, and one would be lost.
      filename_suffix=f".{time.time_ns()}",
    )
    self._thread_errors: list[BaseException] = []
    threading.excepthook = self._keep_error
    self._prompts: dict[str, int] = {}

    def plain(value: object) -> int | float | str:
      return value if isinstance(value, int | float | str) else str(value)

    settings = {key: plain(value) for key, value in run.settings.items()}
    # The third summary would report that the run has succeeded.
    assert self._writer.file_writer  # as long as it writes to a disk
    for summary in hparams(settings, {"eval/loss": None})[:2]:
      self._writer.file_writer.add_summary(summary)
    table = "".join(f"| {key} | {value} |\n" for key, value in run.settings.items())
    self._writer.add_text("config", f"| setting | value |\n|---|---|\n{table}", 0)

  def _keep_error(self, args: threading.ExceptHookArgs) -> None:
    if args.exc_value:
      self._thread_errors.append(args.exc_value)

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    for step, values in metrics:
      for key, value in values.items():
        self._writer.add_scalar(key, value, step)
    for line in samples:
      number = self._prompts.setdefault(line["prompt"], len(self._prompts) + 1)
      text = f"**{line['prompt']}**{line['text']}"
      self._writer.add_text(f"samples/{number}", text, line["step"])
    self._writer.flush()
    if self._thread_errors:
      raise self._thread_errors[0]

  def finish(self, status: str, why: str, step: int) -> None:
    self._writer.add_text("status", f"{status}: {why}" if why else status, step)
    self._writer.close()
    if self._thread_errors:
      raise self._thread_errors[0]


# Without it MLflow's page (3.17) takes the runs for evaluations of a generative application.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class MLflow:
  """An experiment's run, found again by the tag `jaxft.id`. MLflow's parameters cannot change."""

  STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED", "killed": "KILLED"}

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Param

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    self.where = f"sqlite:///{run.workdir}/mlflow.db" if uri is None else uri
    artifacts = (Path(run.workdir) / "mlartifacts").as_uri() if uri is None else None
    self._client = MlflowClient(self.where)
    self._id = os.environ.get("MLFLOW_RUN_ID") or self._find_or_create(run, artifacts)
    if run.resumed:
      self._client.update_run(self._id, "RUNNING")
    logged = self._client.get_run(self._id).data.params
    params = [Param(key, str(value)) for key, value in run.settings.items() if key not in logged]
    for i in range(0, len(params), 100):  # at most so many a request
      self._client.log_batch(self._id, params=params[i : i + 100])
    self._samples = list(run.samples)

  def _find_or_create(self, run: TrackerRun, artifacts: str | None) -> str:
    client = self._client
    run_filter = f"tags.`jaxft.id` = '{run.id}'"
    experiment_id = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not experiment_id:
      name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
      if experiment := client.get_experiment_by_name(name):
        experiment_id = experiment.experiment_id
      else:
        experiment_id = client.create_experiment(name, artifacts, EXPERIMENT_TAGS)
    if runs := client.search_runs([experiment_id], run_filter, max_results=1):
      return runs[0].info.run_id
    tags = json.loads(os.environ.get("MLFLOW_TAGS") or "{}") | {"jaxft.id": run.id}
    return client.create_run(experiment_id, tags=tags, run_name=run.display_name).info.run_id

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    values = [(step, key, value) for step, entry in metrics for key, value in entry.items()]
    points = [Metric(key=key, value=value, timestamp=now, step=step) for step, key, value in values]
    for i in range(0, len(points), 1000):  # at most so many a request
      self._client.log_batch(self._id, metrics=points[i : i + 1000])
    if samples:
      self._samples += samples
      row = "[{when}, step {step}] {prompt}|{text}\n"
      text = "\n".join(row.format_map(sample) for sample in self._samples)
      self._client.log_text(self._id, text, "samples.txt")

  def finish(self, status: str, why: str, step: int) -> None:
    reason = f": {why}" if why else ""
    self._client.set_tag(self._id, "jaxft.status", f"{status} at step {step}{reason}")
    self._client.set_terminated(self._id, self.STATUS[status])


class WandB:
  """Online with an API key, else offline, for `wandb sync`.

  Pieces of a resumed offline run are folders with the same id.
  """

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    is_set = lambda name: bool(os.environ.get(f"WANDB_{name}"))
    mode = None if is_set("MODE") else "online" if wandb.login(prompt=False) else "offline"
    self._wandb = wandb
    self._run = wandb.init(
      id=None if is_set("RUN_ID") else run.id,
      dir=None if is_set("DIR") else run.workdir,
      project=None if is_set("PROJECT") else PROJECT,
      resume=None if is_set("RESUME") else "allow",
      name=run.display_name if run.name or not is_set("NAME") else None,
      mode=mode,
      # By default the library uploads the console, the code, the command line, the git remote and
      # readings of the host.
      settings=wandb.Settings(
        console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True
      ),
    )
    self._run.config.update(run.settings, allow_val_change=True)
    self.where = self._run.url or self._run.dir
    self._samples = list(run.samples)
    self._last_step = self._run.step

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    for step, values in metrics:
      self._run.log(values, step=step)
      self._last_step = max(self._last_step, step)
    if samples:
      self._samples += samples
      self._last_step = max(self._last_step, samples[-1]["step"])
      columns = ("step", "when", "prompt", "text")
      rows: list[Iterable] = [[line[column] for column in columns] for line in self._samples]
      table = self._wandb.Table(columns=[*columns], data=rows)
      self._run.log({"samples": table}, step=self._last_step)  # W&B drops an earlier step

  def finish(self, status: str, why: str, step: int) -> None:
    self._run.summary["status"] = f"{status}: {why}" if why else status
    if status == "preempted":
      self._run.mark_preempting()
    self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
  """A run in Trackio's SQLite file, or on its server; its end is an alert, for want of a status."""

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("TRACKIO_DIR", str(Path(run.workdir) / "trackio"))
    import trackio

    self._trackio = trackio
    # It swallows its own errors and warns of them, from its threads too: `write` raises them.
    self._errors: list[str] = []
    warnings.simplefilter("always")

    def keep_warning(message: Warning | str, *_: object, **__: object) -> None:
      self._errors.append(str(message))

    warnings.showwarning = keep_warning
    self._run = trackio.init(
      os.environ.get("TRACKIO_PROJECT") or PROJECT,
      # Trackio identifies runs by name: the id separates two workdirs of one name.
      f"{run.display_name}-{run.id[:6]}",
      config=run.settings,
      resume="allow",
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
    self.where = self._run.url or str(trackio.utils.TRACKIO_DIR)
    self._prompts: dict[str, int] = {}

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    for step, values in metrics:
      self._run.log(values, step)
    for line in samples:
      number = self._prompts.setdefault(line["prompt"], len(self._prompts) + 1)
      text = self._trackio.Markdown(f"**{line['prompt']}**{line['text']}")
      self._run.log({f"samples/{number}": text}, line["step"])
    self._raise_errors()

  def finish(self, status: str, why: str, step: int) -> None:
    levels = {"finished": self._trackio.AlertLevel.INFO, "failed": self._trackio.AlertLevel.ERROR}
    self._run.alert(status, why or None, levels.get(status, self._trackio.AlertLevel.WARN), step)
    self._run.finish()
    self._raise_errors()

  def _raise_errors(self) -> None:
    errors, self._errors = self._errors, []
    if errors:
      raise RuntimeError(errors[0])


Backend = TensorBoard | MLflow | WandB | Trackio
BACKENDS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio}
