"""The commands as a user runs them: real processes, their files, and their ends when killed."""

import json
import os
import shutil
import signal
import subprocess
import time

import preloaded
import pytest
from processes import ROOT, lines, losses, run, train


def test_train_writes_the_documented_files(finished):
  workdir, done = finished
  config = json.loads((workdir / "config.json").read_text())
  assert config["train"]["steps"] == 12 and config["optim"]["b1"] == 0.9
  report = json.loads((workdir / "data_report.json").read_text())
  assert report["rows"]["read"] == 120 == report["rows"]["trained"] + report["rows"]["held_out"]
  assert report["steps_per_epoch"] == -(-report["sequences"]["trained"] // 8)
  metrics = lines(workdir / "metrics.jsonl")
  steps = [line for line in metrics if "train/loss" in line]
  assert [line["step"] for line in steps] == list(range(1, 13))
  assert {
    "train/loss",
    "train/learning_rate",
    "train/grad_norm",
    "train/tokens",
    "perf/tokens_per_second",
    "perf/step_seconds",
    "memory/peak_bytes",
  } <= steps[0].keys()
  assert [line["step"] for line in metrics if "eval/loss" in line] == [0, 12]
  assert (
    metrics[-1]["eval/loss"] < metrics[0]["eval/loss"] and {"eval/perplexity"} <= metrics[0].keys()
  )
  samples = lines(workdir / "samples.jsonl")
  assert [(s["when"], s["prompt"], s["seed"]) for s in samples] == [
    ("before", "Once upon", 0),
    ("after", "Once upon", 0),
  ]
  assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["10", "12"]
  exported = {p.name for p in (workdir / "export").iterdir()}
  assert {
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "README.md",
    "parity.json",
  } <= exported
  assert (
    json.loads((workdir / "export" / "parity.json").read_text())["logits_max_abs_difference"]
    <= 1e-4
  )
  assert "eval loss" in done.stdout and "continuing" not in done.stdout


@pytest.mark.slow
def test_rerunning_a_finished_run_changes_nothing(finished, config_file, tmp_path):
  # other files' tests read the run's own record of its starts
  workdir = shutil.copytree(finished[0], tmp_path / "w")
  before = losses(workdir), (workdir / "export" / "model.safetensors").read_bytes()
  assert "continuing at step 12 of 12" in train(config_file, workdir).stdout
  assert (losses(workdir), (workdir / "export" / "model.safetensors").read_bytes()) == before


def wait_for(condition, process, seconds=120):
  deadline = time.monotonic() + seconds
  while not condition():
    assert process.poll() is None and time.monotonic() < deadline, (
      "the run ended, or never came so far"
    )
    time.sleep(0.02)


def start(config_file, workdir, *more):
  return preloaded.Popen(
    ["-m", "jaxft.train", "--config", config_file, "--workdir", workdir, *more],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@pytest.mark.slow
def test_sigterm_saves_and_same_command_resumes(config_file, tmp_path):
  long = "--config.train.steps=4000"
  process = start(config_file, tmp_path, long)
  wait_for(
    lambda: (tmp_path / "metrics.jsonl").exists() and len(lines(tmp_path / "metrics.jsonl")) > 3,
    process,
  )
  process.send_signal(signal.SIGTERM)
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 75 and "Traceback" not in errors
  step = int(errors.split("saved at step ")[1].split()[0])
  assert (tmp_path / "checkpoints" / str(step)).is_dir() and errors.startswith(
    f"stopped: SIGTERM: saved at step {step}"
  )
  process = start(config_file, tmp_path, long)
  wait_for(
    lambda: (
      (tmp_path / "metrics.jsonl").exists() and lines(tmp_path / "metrics.jsonl")[-1]["step"] > step
    ),
    process,
  )
  process.kill()
  output, _ = process.communicate()
  assert f"continuing at step {step} of 4000" in output


@pytest.mark.slow
def test_resume_falls_back_from_damaged_checkpoint(config_file, finished, tmp_path):
  """It is named, and the one before it used."""
  shutil.copytree(finished[0], tmp_path / "w")
  newest = tmp_path / "w" / "checkpoints" / "12"
  data = max(
    (file for file in newest.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size
  )
  content = bytearray(data.read_bytes())
  content[len(content) // 2] ^= 4
  data.write_bytes(content)
  done = train(config_file, tmp_path / "w")
  assert "checkpoints/12: damaged" in done.stdout and "continuing at step 10" in done.stdout
  # The step that was damaged is saved again, and the damaged files are out of the way.
  assert {path.name for path in (tmp_path / "w" / "checkpoints").iterdir()} == {
    "10",
    "12",
    "damaged-12",
  }
  again = train(config_file, tmp_path / "w")
  assert ": damaged" not in again.stdout and "continuing at step 12" in again.stdout
  assert losses(tmp_path / "w") == losses(finished[0])


def test_changed_setting_on_resume_is_refused_by_key(finished, config_file):
  before = losses(finished[0])
  done = train(config_file, finished[0], "--config.optim.learning_rate=1e-4", check=2)
  assert "config.optim.learning_rate=0.0001: the run was started with 0.001" in done.stderr
  done = train(config_file, finished[0], "--config.train.steps=11", check=2)
  assert (
    "config.train.steps=11: the run was started with 12" in done.stderr
    and losses(finished[0]) == before
  )


@pytest.mark.slow
def test_nonfinite_loss_exits_with_code_3(config_file, tmp_path):
  done = train(
    config_file,
    tmp_path,
    "--config.optim.learning_rate=1e30",
    "--config.optim.warmup_steps=0",
    check=3,
  )
  assert "error: step" in done.stderr and "learning_rate" in done.stderr
  bad = [
    line for line in lines(tmp_path / "metrics.jsonl") if line.get("train/loss") in ("nan", "inf")
  ]
  assert bad and not (tmp_path / "export").exists()


@pytest.mark.slow
def test_dry_run_and_print_config_write_nothing(config_file, tmp_path):
  assert "MiB" in train(config_file, tmp_path / "w", "--dry_run").stdout
  assert (
    "config.optim.learning_rate = 0.001"
    in train(config_file, tmp_path / "w", "--print_config").stdout
  )
  assert not (tmp_path / "w").exists()


def test_evaluate_generate_and_export_commands(finished, stories, tmp_path):
  workdir, _ = finished
  from_run = json.loads(
    run(
      "jaxft.evaluate", "--workdir", workdir, "--data", stories, "--json", "--sequence_length", 32
    ).stdout
  )
  from_export = json.loads(
    run(
      "jaxft.evaluate",
      "--model",
      workdir / "export",
      "--data",
      stories,
      "--json",
      "--sequence_length",
      32,
      "--batch_size",
      3,
    ).stdout
  )
  assert (
    from_run.keys() == {"loss", "perplexity", "tokens", "bits_per_byte"}
    and from_run["tokens"] == from_export["tokens"]
  )
  assert from_run["loss"] == pytest.approx(from_export["loss"], rel=1e-6)
  prompts = tmp_path / "prompts.txt"
  prompts.write_text("a cat\n")
  out = json.loads(
    run(
      "jaxft.generate",
      "--model",
      workdir / "export",
      "--prompt",
      "Once upon",
      "the dog",
      "--prompt_file",
      prompts,
      "--max_new_tokens",
      5,
      "--temperature",
      0,
      "--json",
    ).stdout
  )
  assert [c["prompt"] for c in out["completions"]] == ["Once upon", "the dog", "a cat"]
  assert all(len(c["token_ids"]) <= 5 for c in out["completions"])
  prompts.write_text("a cat\n\nthe dog\n")
  with prompts.open() as piped:
    done = run("jaxft.generate", workdir, "--max-new-tokens", 2, "--json", stdin=piped)
  assert [c["prompt"] for c in json.loads(done.stdout)["completions"]] == ["a cat", "the dog"]
  assert f"--model={workdir} is a run; using --workdir={workdir}" in done.stderr.splitlines()
  run(
    "jaxft.export",
    "--workdir",
    workdir,
    "--step",
    10,
    "--out",
    tmp_path / "ten",
    "--dtype",
    "bfloat16",
    "--max_shard_size",
    "30KB",
  )
  assert len(list((tmp_path / "ten").glob("model-*.safetensors"))) > 1
  run("jaxft.generate", "--model", tmp_path / "ten", "--prompt", "a", "--max_new_tokens", 2)


@pytest.mark.parametrize(
  "block",
  [
    "checkpoints",
    *(pytest.param(it, marks=pytest.mark.slow) for it in ("config.json", "metrics.jsonl")),
  ],
)
def test_unwritable_workdir_exits_with_code_4(config_file, tmp_path, block):
  if block == "checkpoints":
    (tmp_path / block).write_text("a file where a folder must be")
  else:
    (tmp_path / block).mkdir()
  done = train(config_file, tmp_path, check=4)
  assert len(done.stderr.splitlines()) == 1 and block in done.stderr


@pytest.mark.slow
def test_finished_run_survives_lost_metrics(config_file, finished, tmp_path):
  shutil.copytree(finished[0], tmp_path / "w")
  (tmp_path / "w" / "metrics.jsonl").write_bytes(b"\xff\xfe garbage")
  (tmp_path / "w" / "data_report.json").unlink()
  assert "no eval loss" in train(config_file, tmp_path / "w").stdout
  (tmp_path / "w" / "metrics.jsonl").unlink()
  run("jaxft.export", "--workdir", tmp_path / "w", "--out", tmp_path / "out")
  assert (
    "| steps | 12 of 8 sequences of 32 tokens |" in (tmp_path / "out" / "README.md").read_text()
  )
  for garbage in ("garbage", "[]", "null", '{"train": {"steps": -1}}', '{"x": 1}'):
    (tmp_path / "w" / "config.json").write_text(garbage)
    done = run("jaxft.export", "--workdir", tmp_path / "w", "--out", tmp_path / "other", check=2)
    assert "config" in done.stderr


def test_repeated_flags_are_several_sources(config_file, stories, tmp_path):
  shutil.copy(stories, tmp_path / "more (1), or less.jsonl")
  flags = [
    f"--config.data.train={file}" for file in (stories, tmp_path / "more (1), or less.jsonl")
  ]
  done = train(config_file, tmp_path / "w", *flags, "--print_config")
  assert (
    f"config.data.train = ({str(stories)!r}, {str(tmp_path / 'more (1), or less.jsonl')!r})"
    in done.stdout
  )


def test_prepare_reports_the_data_of_a_run(config_file, finished, tmp_path):
  done = run("jaxft.prepare", "--config", config_file)
  assert (
    "read 120, trained 108, held out 12" in done.stdout
    and "sequence 0, learned in green" in done.stdout
  )
  found = json.loads(run("jaxft.prepare", "--config", config_file, "--json").stdout)
  assert found == json.loads((finished[0] / "data_report.json").read_text())
  done = run(
    "jaxft.prepare", "--config", config_file, "--config.data.sequence_length=99999", check=2
  )
  assert "must be at most 71, the model's positions" in done.stderr
  done = run(
    "jaxft.prepare",
    "--config",
    config_file,
    "--config.data.template=x",
    "--config.data.layuot=pad",
    check=2,
  )
  assert "did you mean data.layout?" in done.stderr


def test_doctor_passes_on_this_machine():
  out = run("jaxft.doctor").stdout
  assert "jaxlib" in out and "device 0" in out and 'pip install "jaxft[cuda]"' in out


@pytest.mark.slow
def test_python_api_matches_the_commands(folder, stories, tmp_path):
  """In a process of its own: jax there sees one device."""
  script = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
import tiny, jaxft
from pathlib import Path
c = tiny.config(Path({str(folder)!r}), Path({str(stories)!r}))
run = jaxft.finetune(c, {str(tmp_path / "w")!r})
first, last = run.metrics[0]["eval/loss"], run.metrics[-1]["eval/loss"]
assert last < first and run.samples[0]["when"] == "before"
model = jaxft.load(run.export)
print(model.generate(["a cat"], max_new_tokens=3)[0])
assert abs(model.evaluate({str(stories)!r}, sequence_length=32)["loss"] - last) < 0.5
model.export({str(tmp_path / "again")!r})
"""
  done = preloaded.run(["-c", script], capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert (tmp_path / "again" / "model.safetensors").read_bytes() == (
    tmp_path / "w" / "export" / "model.safetensors"
  ).read_bytes()


@pytest.mark.slow
@pytest.mark.wide
def test_one_and_eight_devices_train_the_same(config_file, finished, tmp_path):
  eight = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8")
  done = train(config_file, tmp_path, "--config.mesh.fsdp=8", env=eight)
  assert "mesh data=1 x fsdp=8" in done.stdout
  one, other = losses(finished[0]), losses(tmp_path)
  assert one.keys() == other.keys()
  for key, value in one.items():
    assert other[key] == pytest.approx(value, rel=1e-5), key


@pytest.mark.slow
def test_broken_pipe_on_stdout_is_no_error(config_file, tmp_path):
  """A reader of the output may go away."""
  command = ["-m", "jaxft.train", "--config", config_file, "--workdir", tmp_path / "run"]
  process = preloaded.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  process.stdout.readline()
  process.stdout.close()
  _, said = process.communicate(timeout=240)
  assert process.returncode == 0 and "Traceback" not in said and "BrokenPipe" not in said
  assert (tmp_path / "run" / "export" / "parity.json").exists()
