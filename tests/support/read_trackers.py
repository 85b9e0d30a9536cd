"""What is in a tracker's files, as JSON: python tests/support/read_trackers.py WRITER WORKDIR

{"metrics": {key: [[step, value], ...]}, "settings": {...}, "status": text, "text": all samples,
"runs": how many}. A process of its own: the libraries are slow to import, warn, and keep their
folders in globals.
"""

import json
import os
import struct
import sys
from pathlib import Path


def tensorboard(workdir):
  from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
  from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

  events = EventAccumulator(
    str(workdir / "tensorboard"), size_guidance={"scalars": 0, "tensors": 0}
  ).Reload()
  texts = {
    tag: [it.tensor_proto.string_val[0].decode() for it in events.Tensors(tag)]
    for tag in events.Tags()["tensors"]
  }
  start = HParamsPluginData.FromString(
    events.PluginTagToContent("hparams")["_hparams_/session_start_info"]
  )
  return {
    "metrics": {
      tag: [[it.step, it.value] for it in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    },
    "settings": {
      key: getattr(it, it.WhichOneof("kind"))
      for key, it in start.session_start_info.hparams.items()
    },
    "status": texts["status/text_summary"][-1],
    "text": "".join(
      text for tag, found in texts.items() if tag.startswith("samples/") for text in found
    ),
    # TensorBoard calls a folder a run
    "runs": len({file.parent for file in (workdir / "tensorboard").rglob("events*")}),
  }


def mlflow(workdir):
  from mlflow import MlflowClient

  client = MlflowClient(f"sqlite:///{workdir}/mlflow.db")
  experiments = client.search_experiments()
  runs = client.search_runs([experiment.experiment_id for experiment in experiments])
  (kind,) = {
    experiment.tags.get("mlflow.experimentKind")
    for experiment in experiments
    if experiment.name != "Default"
  }
  run = runs[0]
  histories = {key: client.get_metric_history(run.info.run_id, key) for key in run.data.metrics}
  return {
    "metrics": {
      key: [[it.step, it.value] for it in sorted(of, key=lambda it: it.step)]
      for key, of in histories.items()
    },
    "settings": run.data.params,
    "status": f"{run.info.status} {run.data.tags.get('jaxft.status')}",
    "kind": kind,
    "text": "".join(file.read_text() for file in (workdir / "mlartifacts").rglob("samples.txt")),
    "runs": len(runs),
  }


def wandb(workdir):
  from wandb.proto.wandb_internal_pb2 import Record

  metrics, settings, status, exits, ids = {}, {}, "", [], set()
  for file in sorted(
    (workdir / "wandb").glob("*run-*/*.wandb"), key=lambda file: file.stat().st_mtime
  ):
    for data in _level_db_log(file.read_bytes()):
      record = Record.FromString(data)
      for item in [*record.run.config.update, *record.config.update]:
        if item.key or item.nested_key:
          settings[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
      ids |= {record.run.run_id} - {""}
      line = {
        item.key or ".".join(item.nested_key): json.loads(item.value_json)
        for item in record.history.item
      }
      for key, value in line.items():
        # as the history has it: a file alone is one that W&B may have refused
        if key == "samples.path":
          table = file.parent / "files" / value
        elif not key.startswith(("_", "samples")):
          metrics.setdefault(key, []).append([line["_step"], float(value)])
      for item in record.summary.update:
        status = json.loads(item.value_json) if "status" in (item.key, *item.nested_key) else status
      if record.HasField("exit"):
        exits.append(record.exit.exit_code)
  text = "".join("".join(row[2:4]) for row in json.loads(table.read_text())["data"])
  return {
    "metrics": metrics,
    "settings": settings,
    "status": f"{exits[-1:]} {status}",
    "text": text,
    "runs": len(ids),
  }


def _level_db_log(data):
  """Yield the records of LevelDB's log format, which W&B writes after 7 bytes of its own.

  It has blocks of 32 KiB of framed pieces.
  """
  at, record = 7, b""
  while at + 7 <= len(data):
    if (left := 32768 - at % 32768) < 7:
      at += left
      continue
    _, length, kind = struct.unpack_from("<IHB", data, at)
    record += data[at + 7 : at + 7 + length]
    at += 7 + length
    if kind in (1, 4):  # whole, or its last piece
      yield record
      record = b""


def trackio(workdir):
  os.environ["TRACKIO_DIR"] = str(workdir / "trackio")
  import trackio
  from trackio.sqlite_storage import SQLiteStorage

  runs = list(trackio.Api().runs("jaxft"))
  metrics, text = {}, ""
  for line in SQLiteStorage.get_logs("jaxft", runs[0].name, run_id=runs[0].id):
    for key, value in line.items():
      if isinstance(value, dict):
        text += value["_value"]
      elif isinstance(value, int | float) and key != "step":
        metrics.setdefault(key, []).append([line["step"], value])
  said = [
    f"{it['level']} {it['title']} {it['text']}"
    for it in sorted(runs[0].alerts(), key=lambda it: it["timestamp"])
  ]
  return {
    "metrics": metrics,
    "settings": runs[0].config,
    "status": said[-1] if said else "",
    "text": text,
    "runs": len(runs),
  }


if __name__ == "__main__":
  print(
    json.dumps(
      {it.__name__: it for it in (tensorboard, mlflow, wandb, trackio)}[sys.argv[1]](
        Path(sys.argv[2])
      )
    )
  )
