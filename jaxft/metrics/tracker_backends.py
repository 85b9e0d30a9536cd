"""TensorBoard, MLflow, W&B and Trackio, each told of a run in its own way.

Only tracker_process.py imports this, in a process that serves one of them. Where a library has environment variables, they win
over the defaults here, which keep everything in the workdir.
"""

import json
import os
import threading
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = "jaxft"  # where a variable of the library names no other


class TrackerRun(NamedTuple):
  """What a tracker is told first."""

  id: str  # the same in all pieces of a run that is resumed
  resumed: bool
  workdir: str
  name: str  # empty: not set
  settings: dict[str, Any]  # of the config, by dotted name
  samples: list[dict[str, Any]]  # lines of samples.jsonl that it has been given before the resume

  @property
  def display_name(self) -> str:
    return self.name or Path(self.workdir).name


Metrics = dict[str, float]


def to_floats(line: dict[str, Any]) -> Metrics:
  """A line of metrics.jsonl without its step, "nan" and "inf" as the numbers they stand for."""
  return {key: float(value) for key, value in line.items() if key != "step"}


class TensorBoard:
  """Event files. A run that begins again hides what its lost beginning had written there (`purge_step`)."""

  def __init__(self, run: TrackerRun):
    from tensorboardX import SummaryWriter
    from tensorboardX.summary import hparams

    folder = run.settings.get("tracking.logging_dir") or os.environ.get("TENSORBOARD_LOGGING_DIR")
    self.where = str(
      Path(folder) / f"{run.display_name}-{run.id[:6]}"
      if folder
      else Path(run.workdir) / "tensorboard"
    )
    # Two pieces that start in the same second would have one file name: the second would replace the first.
    # A full disk ends tensorboardX's thread, and a bounded queue that nobody empties would be waited for for ever.
    self._writer = SummaryWriter(
      self.where,
      max_queue=0,
      purge_step=None if run.resumed else 0,
      filename_suffix=f".{time.time_ns()}",
    )
    self._died: list[BaseException] = []
    threading.excepthook = lambda ended: self._died.append(ended.exc_value)
    self._prompts: dict[str, int] = {}
    values = {
      key: value if isinstance(value, int | float | str) else str(value)
      for key, value in run.settings.items()
    }
    for summary in hparams(values, {"eval/loss": None})[
      :2
    ]:  # the third would say that the run has succeeded
      self._writer.file_writer.add_summary(summary)
    table = "".join(f"| {key} | {value} |\n" for key, value in run.settings.items())
    self._writer.add_text("config", f"| setting | value |\n|---|---|\n{table}", 0)

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[dict[str, Any]]) -> None:
    for step, values in metrics:
      for key, value in values.items():
        self._writer.add_scalar(key, value, step)
    for line in samples:
      number = self._prompts.setdefault(line["prompt"], len(self._prompts) + 1)
      self._writer.add_text(
        f"samples/{number}", f"**{line['prompt']}**{line['text']}", line["step"]
      )
    self._writer.flush()
    if self._died:
      raise self._died[0]

  def finish(self, status: str, why: str, step: int) -> None:
    self._writer.add_text("status", f"{status}: {why}" if why else status, step)
    self._writer.close()
    if self._died:
      raise self._died[0]


# Without it MLflow's page (3.17) takes the runs for evaluations of a generative application.
EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}


class MLflow:
  """An experiment's run, found again by the tag `jaxft.id`. Parameters cannot change there: those of the beginning stay."""

  STATUS = {"finished": "FINISHED", "failed": "FAILED", "preempted": "KILLED", "killed": "KILLED"}

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Param

    here = "MLFLOW_TRACKING_URI" not in os.environ
    self.where = f"sqlite:///{run.workdir}/mlflow.db" if here else os.environ["MLFLOW_TRACKING_URI"]
    artifacts = (Path(run.workdir) / "mlartifacts").as_uri() if here else None
    self._client = MlflowClient(self.where)
    self._id = os.environ.get("MLFLOW_RUN_ID") or self._find_or_create(run, artifacts)
    if run.resumed:
      self._client.update_run(self._id, "RUNNING")
    there = self._client.get_run(self._id).data.params
    params = [Param(key, str(value)) for key, value in run.settings.items() if key not in there]
    for i in range(0, len(params), 100):  # at most so many a request
      self._client.log_batch(self._id, params=params[i : i + 100])
    self._samples = list(run.samples)

  def _find_or_create(self, run: TrackerRun, artifacts: str | None) -> str:
    experiment = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not experiment:
      name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or PROJECT
      there = self._client.get_experiment_by_name(name)
      experiment = (
        there.experiment_id
        if there
        else self._client.create_experiment(name, artifacts, EXPERIMENT_TAGS)
      )
    found = self._client.search_runs([experiment], f"tags.`jaxft.id` = '{run.id}'", max_results=1)
    if found:
      return found[0].info.run_id
    tags = json.loads(os.environ.get("MLFLOW_TAGS") or "{}") | {"jaxft.id": run.id}
    return self._client.create_run(experiment, tags=tags, run_name=run.display_name).info.run_id

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[dict[str, Any]]) -> None:
    from mlflow.entities import Metric

    now = time.time_ns() // 1_000_000
    points = [
      Metric(key, value, now, step) for step, values in metrics for key, value in values.items()
    ]
    for i in range(0, len(points), 1000):  # at most so many a request
      self._client.log_batch(self._id, metrics=points[i : i + 1000])
    if samples:
      self._samples += samples
      lines = (
        f"[{it['when']}, step {it['step']}] {it['prompt']}|{it['text']}\n" for it in self._samples
      )
      self._client.log_text(self._id, "\n".join(lines), "samples.txt")

  def finish(self, status: str, why: str, step: int) -> None:
    self._client.set_tag(
      self._id, "jaxft.status", f"{status} at step {step}" + (f": {why}" if why else "")
    )
    self._client.set_terminated(self._id, self.STATUS[status])


class WandB:
  """Online with an API key, else offline, for `wandb sync`. Pieces of a resumed offline run are folders with the same id."""

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    chosen = {
      "id": ("WANDB_RUN_ID", run.id),
      "dir": ("WANDB_DIR", run.workdir),
      "project": ("WANDB_PROJECT", PROJECT),
    }
    chosen |= {"resume": ("WANDB_RESUME", "allow")}
    given = {
      name: value for name, (variable, value) in chosen.items() if not os.environ.get(variable)
    }
    if run.name or not os.environ.get("WANDB_NAME"):
      given["name"] = run.display_name
    if not os.environ.get("WANDB_MODE"):
      given["mode"] = "online" if wandb.login(prompt=False) else "offline"
    self._wandb = wandb
    self._run = wandb.init(
      **given,
      # By itself the library takes the console, the code, the command line, the git remote and readings of the host.
      settings=wandb.Settings(
        console="off", save_code=False, disable_git=True, x_disable_meta=True, x_disable_stats=True
      ),
    )
    self._run.config.update(run.settings, allow_val_change=True)
    self.where = self._run.url or self._run.dir
    self._samples, self._newest = list(run.samples), self._run.step

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[dict[str, Any]]) -> None:
    for step, values in metrics:
      self._run.log(values, step=step)
      self._newest = max(self._newest, step)
    if samples:
      self._samples += samples
      self._newest = max(self._newest, samples[-1]["step"])
      columns = ["step", "when", "prompt", "text"]
      rows = [[line[column] for column in columns] for line in self._samples]
      self._run.log(
        {"samples": self._wandb.Table(columns=columns, data=rows)}, step=self._newest
      )  # one before is dropped

  def finish(self, status: str, why: str, step: int) -> None:
    self._run.summary["status"] = f"{status}: {why}" if why else status
    if status == "preempted":
      self._run.mark_preempting()
    self._run.finish(exit_code=0 if status == "finished" else 1)


class Trackio:
  """A run in Trackio's SQLite file, or on its server; how it ended is an alert, as Trackio has no status."""

  def __init__(self, run: TrackerRun):
    os.environ.setdefault("TRACKIO_DIR", str(Path(run.workdir) / "trackio"))
    import trackio

    self._trackio = trackio
    # It swallows its own faults and warns of them, from threads of its own too: they are raised by `write`.
    self._faults: list[str] = []
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: self._faults.append(str(message))
    self._run = trackio.init(
      os.environ.get("TRACKIO_PROJECT") or PROJECT,
      # Runs are told apart by their names: the id keeps two workdirs of one name apart.
      f"{run.display_name}-{run.id[:6]}",
      config=run.settings,
      resume="allow",
      embed=False,
      auto_log_gpu=False,
      auto_log_cpu=False,
    )
    self.where = self._run.url or str(trackio.utils.TRACKIO_DIR)
    self._prompts: dict[str, int] = {}

  def write(self, metrics: list[tuple[int, Metrics]], samples: list[dict[str, Any]]) -> None:
    for step, values in metrics:
      self._run.log(values, step)
    for line in samples:
      number = self._prompts.setdefault(line["prompt"], len(self._prompts) + 1)
      text = self._trackio.Markdown(f"**{line['prompt']}**{line['text']}")
      self._run.log({f"samples/{number}": text}, line["step"])
    self._raise_faults()

  def finish(self, status: str, why: str, step: int) -> None:
    levels = {"finished": self._trackio.AlertLevel.INFO, "failed": self._trackio.AlertLevel.ERROR}
    self._run.alert(status, why or None, levels.get(status, self._trackio.AlertLevel.WARN), step)
    self._run.finish()
    self._raise_faults()

  def _raise_faults(self) -> None:
    faults, self._faults = self._faults, []
    if faults:
      raise RuntimeError(faults[0])


BACKENDS = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB, "trackio": Trackio}
