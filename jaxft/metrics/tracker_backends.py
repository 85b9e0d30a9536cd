"""Backends that write a run to TensorBoard, MLflow, W&B or Trackio.

Only tracker_worker.py imports this module, in a separate process for each tracker. By default all
data stays in the workdir. A library's environment variables override these defaults.
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

PROJECT = "jaxft"  # unless an environment variable of the library sets another


class TrackerRun(NamedTuple):
  """The first message to a tracker."""

  id: str  # stays the same when the run is resumed
  resumed: bool
  workdir: str
  name: str  # empty: not set
  settings: Json  # values of the config, by dotted name
  samples: list[Json]  # lines of samples.jsonl that the tracker got before the resume

  @property
  def display_name(self) -> str:
    """The run's name, or the name of its workdir."""
    return self.name or Path(self.workdir).name


Metrics = dict[str, float]


def to_floats(line: Json) -> Metrics:
  """Return the numbers of a line of metrics.jsonl, without its step.

  The texts "nan" and "inf" become numbers, too.
  """
  return {key: float(value) for key, value in line.items() if key != "step"}


class TensorBoard:
  """Writes event files. A new run hides older events there (`purge_step`)."""

  def __init__(self, run: TrackerRun):
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    folder = run.settings.get("tracking.logging_dir") or os.environ.get("TENSORBOARD_LOGGING_DIR")
    self.where = str(Path(run.workdir) / "tensorboard")
    if folder:
      self.where = str(Path(folder) / f"{run.display_name}-{run.id[:6]}")
    self._writer = SummaryWriter(
      self.where,
      # A full disk ends tensorboardX's thread; a bounded queue would then block forever.
      max_queue=0,
      purge_step=None if run.resumed else 0,
      # Otherwise two starts in the same second would share a file name, and one would be lost.
      filename_suffix=f".{time.time_ns()}",
    )
    self._thread_errors: list[BaseException] = []
    threading.excepthook = self._keep_error
    self._prompts: dict[str, int] = {}

    def plain(value: object) -> int | float | str:
      return value if isinstance(value, int | float | str) else str(value)

    settings = {key: plain(value) for key, value in run.settings.items()}
    # The third summary would mark the run as successful.
    assert self._writer.file_writer  # set if it writes to a disk
    for summary in hparams(settings, {"eval/loss": None})[:2]:
      self._writer.file_writer.add_summary(summary)
    table = "".join(f"| {key} | {value} |\n" for key, value in run.settings.items())
    self._writer.add_text("config", f"| setting | value |\n|---|---|\n{table}", 0)

  def _keep_error(self, args: threading.ExceptHookArgs) -> None:
    if args.exc_value:
      self._thread_errors.append(args.exc_value)

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    """Write (step, values) pairs and lines of samples.jsonl."""
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
    """Record how the run ended: finished, failed, preempted or killed."""
    self._writer.add_text("status", f"{status}: {why}" if why else status, step)
    self._writer.close()
    if self._thread_errors:
      raise self._thread_errors[0]


# Without this tag MLflow's page (3.17) shows the runs as evaluations of a generative application.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class MLflow:
  """Writes an MLflow run. A resume finds it by its tag `jaxft.id`."""

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
    # MLflow does not allow a parameter to change: log only the new ones.
    logged = self._client.get_run(self._id).data.params
    params = [Param(key, str(value)) for key, value in run.settings.items() if key not in logged]
    for i in range(0, len(params), 100):  # the limit of one request
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
    """Write (step, values) pairs and lines of samples.jsonl."""
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    values = [(step, key, value) for step, entry in metrics for key, value in entry.items()]
    points = [Metric(key=key, value=value, timestamp=now, step=step) for step, key, value in values]
    for i in range(0, len(points), 1000):  # the limit of one request
      self._client.log_batch(self._id, metrics=points[i : i + 1000])
    if samples:
      self._samples += samples
      row = "[{when}, step {step}] {prompt}|{text}\n"
      text = "\n".join(row.format_map(sample) for sample in self._samples)
      self._client.log_text(self._id, text, "samples.txt")

  def finish(self, status: str, why: str, step: int) -> None:
    """Record how the run ended: finished, failed, preempted or killed."""
    reason = f": {why}" if why else ""
    self._client.set_tag(self._id, "jaxft.status", f"{status} at step {step}{reason}")
    self._client.set_terminated(self._id, self.STATUS[status])


class WandB:
  """Writes a W&B run: online with an API key, else offline, for `wandb sync`.

  Each start of an offline run makes a folder; all have the same run id.
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
      # By default the library uploads console output, code, command line, git remote and host
      # metrics.
      settings=wandb.Settings(
        console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True
      ),
    )
    self._run.config.update(run.settings, allow_val_change=True)
    self.where = self._run.url or self._run.dir
    self._samples = list(run.samples)
    self._last_step = self._run.step

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[Json]) -> None:
    """Write (step, values) pairs and lines of samples.jsonl."""
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
    """Record how the run ended: finished, failed, preempted or killed."""
    self._run.summary["status"] = f"{status}: {why}" if why else status
    if status == "preempted":
      self._run.mark_preempting()
    self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
  """Writes to Trackio's SQLite file or server; the end of the run is an alert."""

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("TRACKIO_DIR", str(Path(run.workdir) / "trackio"))
    import trackio

    self._trackio = trackio
    # Trackio turns its errors into warnings, also in its threads. `write` raises them.
    self._errors: list[str] = []
    warnings.simplefilter("always")

    def keep_warning(message: Warning | str, *_: object, **__: object) -> None:
      self._errors.append(str(message))

    warnings.showwarning = keep_warning
    self._run = trackio.init(
      os.environ.get("TRACKIO_PROJECT") or PROJECT,
      # Trackio identifies runs by name. The id distinguishes two workdirs with the same name.
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
    """Write (step, values) pairs and lines of samples.jsonl."""
    for step, values in metrics:
      self._run.log(values, step)
    for line in samples:
      number = self._prompts.setdefault(line["prompt"], len(self._prompts) + 1)
      text = self._trackio.Markdown(f"**{line['prompt']}**{line['text']}")
      self._run.log({f"samples/{number}": text}, line["step"])
    self._raise_errors()

  def finish(self, status: str, why: str, step: int) -> None:
    """Record how the run ended: finished, failed, preempted or killed."""
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
