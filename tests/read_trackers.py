"""What is in a tracker's files, as JSON: python tests/read_trackers.py WRITER WORKDIR

{"metrics": {key: [[step, value], ...]}, "settings": {...}, "status": text, "text": all samples, "runs": how many}. A process of
its own: the libraries are slow to import, warn, and keep their folders in globals.
"""

import json
import os
import sqlite3
import struct
import sys
from pathlib import Path


def tensorboard(workdir):
  from tensorboardX.crc32c import crc32c
  from tensorboardX.proto.event_pb2 import Event
  from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

  def masked_crc(data):
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF

  found = {"metrics": {}, "settings": {}, "text": "", "status": "", "runs": 0}
  for file in sorted((workdir / "tensorboard").iterdir()):
    data, at = file.read_bytes(), 0
    while at < len(data):
      (length,), (crc,) = struct.unpack_from("<Q", data, at), struct.unpack_from("<I", data, at + 8)
      record = data[at + 12 : at + 12 + length]
      assert crc == masked_crc(data[at : at + 8])
      assert struct.unpack_from("<I", data, at + 12 + length)[0] == masked_crc(record)
      at += 16 + length
      event = Event.FromString(record)
      if event.HasField("session_log"):  # TensorBoard hides what came before, from this step on
        found["runs"] += event.step == 0
        found["metrics"] = {key: [p for p in it if p[0] < event.step] for key, it in found["metrics"].items()}
      for value in event.summary.value:
        name = value.metadata.plugin_data.plugin_name
        if name == "hparams":
          start = HParamsPluginData.FromString(value.metadata.plugin_data.content).session_start_info
          for key, it in start.hparams.items():
            found["settings"][key] = getattr(it, it.WhichOneof("kind"))
        elif value.tag.startswith("status/"):
          found["status"] = value.tensor.string_val[0].decode()
        elif value.tag.startswith("samples/"):
          found["text"] += value.tensor.string_val[0].decode()
        elif value.WhichOneof("value") == "simple_value":
          found["metrics"].setdefault(value.tag, []).append([event.step, value.simple_value])
  return found


def mlflow(workdir):
  with sqlite3.connect(workdir / "mlflow.db") as db:
    (runs,) = db.execute("select count(*) from runs").fetchone()
    (status,) = db.execute("select status from runs").fetchone()
    tags = dict(db.execute("select key, value from tags"))
    metrics = {}
    for key, step, value, is_nan in db.execute("select key, step, value, is_nan from metrics order by timestamp, step"):
      metrics.setdefault(key, []).append([step, float("nan") if is_nan else value])
    text = "".join(file.read_text() for file in (workdir / "mlartifacts").rglob("samples.txt"))
    settings = dict(db.execute("select key, value from params"))
  said = f"{status} {tags.get('jaxft.status')}"
  return {"metrics": metrics, "settings": settings, "status": said, "text": text, "runs": runs}


def wandb(workdir):
  from wandb.proto.wandb_internal_pb2 import Record

  metrics, settings, status, exits, ids = {}, {}, "", [], set()
  for file in sorted((workdir / "wandb").glob("*run-*/*.wandb"), key=lambda file: file.stat().st_mtime):
    for data in _level_db_log(file.read_bytes()):
      record = Record.FromString(data)
      for item in [*record.run.config.update, *record.config.update]:
        if item.key or item.nested_key:
          settings[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
      ids |= {record.run.run_id} - {""}
      line = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
      for key, value in line.items():
        if key == "samples.path":  # as the history has it: a file alone is one that W&B may have refused
          table = file.parent / "files" / value
        elif not key.startswith(("_", "samples")):
          metrics.setdefault(key, []).append([line["_step"], float(value)])
      for item in record.summary.update:
        status = json.loads(item.value_json) if "status" in (item.key, *item.nested_key) else status
      if record.HasField("exit"):
        exits.append(record.exit.exit_code)
  text = "".join("".join(row[2:4]) for row in json.loads(table.read_text())["data"])
  return {"metrics": metrics, "settings": settings, "status": f"{exits[-1:]} {status}", "text": text, "runs": len(ids)}


def _level_db_log(data):
  """The records of LevelDB's log format, which W&B writes after 7 bytes of its own: blocks of 32 KiB of framed pieces."""
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
    f"{it['level']} {it['title']} {it['text']}" for it in sorted(runs[0].alerts(), key=lambda it: it["timestamp"])
  ]
  return {
    "metrics": metrics,
    "settings": runs[0].config,
    "status": said[-1] if said else "",
    "text": text,
    "runs": len(runs),
  }


if __name__ == "__main__":
  print(json.dumps({it.__name__: it for it in (tensorboard, mlflow, wandb, trackio)}[sys.argv[1]](Path(sys.argv[2]))))
