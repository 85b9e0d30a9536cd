"""run_clm.py's flags: what they become, what is rejected, and the page's table."""

import dataclasses
import difflib
import json
import sys
from pathlib import Path

import pytest

import jaxft.config
from jaxft.cli import flags, run_clm
from jaxft.errors import RequestError

# ml_collections (1.1) loads config files with it.
pytestmark = pytest.mark.filterwarnings(
  r"ignore:the load_module\(\) method is deprecated:DeprecationWarning"
)
ROOT = Path(__file__).parents[2]


def parsed(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["train", *words])
  return flags.parse_train()


def test_run_clm_command_is_translated(monkeypatch):
  words = "--model_name_or_path gpt2 --train_file a.txt --validation_file=b.txt --do_train"
  words += " --per_device_train_batch_size 4 --gradient_accumulation_steps 3 --num_train_epochs 2"
  words += " --block_size 512 --learning_rate 1e-4 --bf16 --output_dir out --save_total_limit 3"
  words += " --lr_scheduler_type cosine --warmup_steps 7 --optim adamw_torch --weight_decay 0.1"
  words += " --seed 5"
  words += " --save_strategy steps --save_steps 7"
  words += " --validation_split_percentage 10 --report_to none --gradient_checkpointing"
  words += " --adam_beta2 0.95 --do_eval"
  arguments = parsed(monkeypatch, *words.split())
  found = jaxft.config.flatten(arguments.config)
  arguments.per_device.apply_to(arguments.config, 8)
  assert (arguments.config.train.batch_size, arguments.config.train.micro_batch_size) == (
    4 * 3 * 8,
    4,
  )
  assert arguments.workdir == Path("out")
  wanted = {
    "model.path": "gpt2",
    "data.train": ("a.txt",),
    "data.validation": ("b.txt",),
    "data.sequence_length": 512,
    "train.epochs": 2.0,
    "train.seed": 5,
    "train.keep": 3,
    "train.save_every": 7,
    "optim.name": "adamw",
    "optim.learning_rate": 1e-4,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 7,
    "optim.weight_decay": 0.1,
    "optim.b2": 0.95,
    "model.compute_dtype": "bfloat16",
    "memory.remat": "full",
  }
  assert {name: found[name] for name in wanted} == wanted
  assert not jaxft.config.validate(arguments.config)


def test_max_steps_replaces_epochs(monkeypatch):
  arguments = parsed(
    monkeypatch, "--model_name_or_path=gpt2", "--dataset_name", "wikitext", "--max_steps", "30"
  )
  assert (arguments.config.train.steps, arguments.config.train.epochs) == (30, 0)
  assert arguments.config.data.train == ("hub:wikitext",)


@pytest.mark.parametrize(
  "words, rows",
  [
    ("", 8),
    ("--per_device_train_batch_size 2", 2),
    ("--config.train.batch_size 8", None),
    ("--config=configs/quickstart.py", None),
  ],
)
def test_batch_is_counted_per_device(monkeypatch, words, rows):
  """Unless the config has it."""
  monkeypatch.chdir(ROOT)
  found = parsed(monkeypatch, "--model_name_or_path=gpt2", *words.split())
  assert (found.per_device and found.per_device.micro_batch_size) == rows
  if rows:
    found.per_device.apply_to(found.config, 4)
    assert (found.config.train.batch_size, found.config.train.micro_batch_size) == (4 * rows, rows)


def test_load_best_model_keeps_best_checkpoint(monkeypatch):
  words = "--model_name_or_path=gpt2 --train_file a.txt --eval_strategy steps --eval_steps 50"
  words += " --load_best_model_at_end True"
  for more in ("", "--metric_for_best_model eval_loss"):
    config = parsed(monkeypatch, *words.split(), *more.split()).config
    assert config.train.keep_best_metric == "eval/loss" and not jaxft.config.validate(config)
  alone = parsed(monkeypatch, "--model_name_or_path=gpt2", "--metric_for_best_model=loss").config
  assert not alone.train.keep_best_metric


def test_flags_combine_with_a_config_file(monkeypatch):
  file = str(ROOT / "configs" / "gpt2_tinystories.py")
  arguments = parsed(monkeypatch, "--config", file, "--block_size", "256", "--config.train.seed=3")
  config = arguments.config
  assert (config.data.sequence_length, config.train.seed, config.data.limit_train) == (
    256,
    3,
    100_000,
  )
  assert arguments.workdir == Path("runs/gpt2_tinystories")


def test_unsupported_flags_are_rejected(monkeypatch):
  """With one reason for each."""
  words = (
    "--model_name_or_path gpt2 --fsdp full_shard --lr_scheduler_type polynomial --warmup_steps 1.5"
  )
  with pytest.raises(RequestError) as refusal:
    parsed(monkeypatch, *words.split())
  lines = str(refusal.value).splitlines()
  assert [line.split(":")[0] for line in lines] == [
    "--fsdp=full_shard",
    "--lr_scheduler_type=polynomial",
    "--warmup_steps=1.5",
  ]


# A command's own words -> settings that they come to, and the notes, by their beginnings.
CASES = [
  ("--fp16", {"model.compute_dtype": "auto"}, ["--fp16: float16 is not supported"]),
  ("--bf16 False", {"model.compute_dtype": "float32"}, []),
  (
    "--gradient_checkpointing False --adafactor False --load_best_model_at_end False",
    {"memory.remat": "dots"},
    [],
  ),
  ("--fp16 False", {"model.compute_dtype": "auto"}, []),
  ("--overwrite_cache", {}, []),
  (
    "--use_fast_tokenizer False",
    {},
    ["--use_fast_tokenizer=False: always uses the fast tokenizer"],
  ),
  ("--no_use_fast_tokenizer", {}, ["--use_fast_tokenizer=False"]),
  ("--evaluation_strategy=steps --eval_steps 200", {"train.eval_every": 200}, []),
  ("--eval_strategy steps", {"train.eval_every": 500}, []),
  ("--eval_strategy steps --logging_steps 20", {"train.eval_every": 20, "train.log_every": 20}, []),
  ("--eval_strategy epoch", {"train.eval_every": "epoch"}, []),
  (
    "--eval_strategy epoch --eval_steps 7",
    {"train.eval_every": "epoch"},
    ["--eval_steps=7: ignored with the strategy epoch"],
  ),
  (
    "--save_strategy epoch --logging_strategy epoch",
    {"train.save_every": "epoch", "train.log_every": "epoch"},
    [],
  ),
  (
    "--save_strategy best --eval_strategy epoch",
    {"train.save_every": 0, "train.keep_best_metric": "eval/loss"},
    [],
  ),
  (
    "--logging_strategy no",
    {"train.log_every": 500},
    ["--logging_strategy=no: metrics.jsonl is still written"],
  ),
  ("--warmup_ratio 0.1", {"optim.warmup_ratio": 0.1}, []),
  ("--warmup_steps 0.1", {"optim.warmup_ratio": 0.1, "optim.warmup_steps": 0}, []),
  (
    "--warmup_steps 5 --warmup_ratio 0.1",
    {"optim.warmup_steps": 5, "optim.warmup_ratio": 0.0},
    ["--warmup_ratio=0.1"],
  ),
  (
    "--max_train_samples 9",
    {"data.limit_train": 9},
    ["--max_train_samples=9: uses this many documents"],
  ),
  (
    "--max-eval-samples 9",
    {"data.limit_validation": 9},
    ["--max_eval_samples=9: uses this many documents"],
  ),
  ("--tokenizer_name here", {"model.tokenizer": "here"}, []),
  (
    "--torch_dtype bfloat16",
    {"model.param_dtype": "bfloat16", "model.compute_dtype": "bfloat16"},
    [],
  ),
  (
    "--dtype float16",
    {"model.param_dtype": "bfloat16"},
    ["--torch_dtype=float16: stores weights in bfloat16"],
  ),
  (
    "--torch_dtype auto",
    {"model.param_dtype": "float32"},
    ["--torch_dtype=auto: stores weights in float32"],
  ),
  (
    "--logging_dir logs",
    {"tracking.logging_dir": "logs"},
    ["--logging_dir=logs: only used with"],
  ),
  ("--logging_dir logs --report_to tensorboard", {"tracking.writers": ("tensorboard",)}, []),
  ("--streaming", {}, ["--streaming: downloads the data set"]),
  (
    "--seed 1 --seed 2",
    {"train.seed": 2, "data.shuffle_seed": 2},
    [
      "--seed=1: overridden by --seed=2",
      "--seed=2: also sets the order of sequences and the held-out split",
    ],
  ),
  ("--seed 1 --data_seed 2", {"train.seed": 1, "data.shuffle_seed": 2}, []),
  ("--seed 1 --validation_file v.txt", {"train.seed": 1, "data.shuffle_seed": 1}, []),
  ("--seed 1 --config.data.shuffle_seed 2", {"train.seed": 1, "data.shuffle_seed": 2}, []),
  (
    "--lr_scheduler_type constant --warmup_steps 3",
    {"optim.warmup_steps": 0},
    ["--warmup_steps=3: ignored: the schedule constant has no"],
  ),
  (
    "--warmup_ratio 0.1 --lr_scheduler_type constant",
    {"optim.warmup_ratio": 0},
    ["--warmup_ratio=0.1: ignored: the schedule constant has no"],
  ),
  ("--lr_scheduler_type constant_with_warmup --warmup_steps 3", {"optim.warmup_steps": 3}, []),
  ("--eval_strategy steps --config.train.eval_every=7", {"train.eval_every": 7}, []),
  ("--logging_strategy steps --config.train.log_every 7", {"train.log_every": 7}, []),
  ("--eval_strategy steps --logging_steps 3", {"train.eval_every": 3, "train.log_every": 3}, []),
  ("--eval_strategy steps", {"train.eval_every": 500}, []),
  ("--max_steps 0 --num_train_epochs 2", {"train.epochs": 2.0, "train.steps": 0}, []),
  ("--max_steps -100 --num_train_epochs 2", {"train.epochs": 2.0, "train.steps": 0}, []),
  (
    "--max_steps 1_0 --logging_steps 3.0 --save_total_limit 1e1",
    {"train.steps": 10, "train.keep": 10},
    [],
  ),
  ("--save_total_limit -1", {"train.keep": jaxft.config.MAX_INT}, []),
  ("--bf16 False --fp16", {}, ["--fp16: float16 is not supported"]),
  ("--no_bf16", {"model.compute_dtype": "float32"}, []),
  ("--dtype float16", {"model.compute_dtype": "auto"}, ["--torch_dtype=float16"]),
  ("--report_to mlflow,wandb", {"tracking.writers": ("mlflow", "wandb")}, []),
  ("--report_to none", {"tracking.writers": ()}, []),
  (
    "--logging_first_step",
    {},
    ["--logging_first_step=: a run always evaluates before the first step"],
  ),
  ("--logging_first_step 0 --eval_on_start --disable_tqdm no --log_level passive", {}, []),
  (
    "--bf16_full_eval True --disable_tqdm 1",
    {},
    ["--bf16_full_eval=True: ev", "--disable_tqdm=1: a log"],
  ),
  (
    "--eval_on_start 0 --ddp_timeout 7200",
    {},
    ["--eval_on_start=0: a run always", "--ddp_timeout=7200: --peer_timeout"],
  ),
  (
    "--label_smoothing_factor 0.0 --neftune_noise_alpha None --lr_scheduler_kwargs {} "
    "--hub_strategy every_save",
    {},
    [],
  ),
  (
    "--cache_dir here",
    {"data.cache_dir": "here/tokens"},
    ["--cache_dir=here: used for downloads and the token cache"],
  ),
  ("--adafactor", {"optim.name": "adafactor"}, []),
  ("--local_rank=0 --trust_remote_code False", {}, []),
  (
    "--resume_from_checkpoint --config.train.seed=1 --workdir nowhere",
    {"train.seed": 1},
    ["--resume_from_checkpoint: nowhere has no checkpoint, so this starts a new run"],
  ),
]


@pytest.mark.parametrize("words, wanted, notes", CASES)
def test_flags_become_settings_and_notes(monkeypatch, capsys, words, wanted, notes):
  """Notes say what a flag became, if that is not plain."""
  for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE"):
    monkeypatch.setenv(name, "elsewhere")  # which --cache_dir changes
  config = parsed(
    monkeypatch, "--model_name_or_path=gpt2", "--train_file=a.txt", *words.split()
  ).config
  found = jaxft.config.flatten(config)
  assert {name: found[name] for name in wanted} == wanted and not jaxft.config.validate(config)
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == len(notes) and all(map(str.startswith, lines, notes)), lines


def test_eval_batch_size_is_per_device(monkeypatch):
  words = "--model_name_or_path=gpt2 --train_file=a.txt --per_device_eval_batch_size 16"
  found = parsed(monkeypatch, *words.split())
  found.per_device.apply_to(found.config, 4)
  assert (found.config.train.batch_size, found.config.train.eval_batch_size) == (8 * 4, 16 * 4)
  config = str(ROOT / "configs" / "gpt2_jokes.py")
  found = parsed(monkeypatch, f"--config={config}", "--per_device_eval_batch_size=16")
  found.per_device.apply_to(found.config, 1)
  assert (found.config.train.batch_size, found.config.train.eval_batch_size) == (64, 16)


def test_model_type_trains_from_scratch(monkeypatch, capsys):
  """What run_clm.py does without a checkpoint."""
  words = "--model_type gpt2 --tokenizer_name mine --config_overrides=n_embd=1024,n_layer=48"
  words += " --train_file a.txt"
  model = parsed(monkeypatch, *words.split()).config.model
  assert (model.path, model.init, model.tokenizer) == ("mine", "scratch", "mine")
  assert model.config_overrides == "model_type=gpt2,n_embd=1024,n_layer=48"
  assert "initializes new weights" in capsys.readouterr().err
  model = parsed(
    monkeypatch, *"--config_name sizes --tokenizer_name mine --train_file a.txt".split()
  ).config.model
  assert (model.path, model.init, model.tokenizer) == ("sizes", "scratch", "mine")


def test_hub_dataset_uses_its_validation_split(monkeypatch, tmp_path, capsys):
  """Unless --validation_file names another text."""
  pytest.importorskip("datasets")
  for name in ("train", "validation"):
    (tmp_path / "small" / f"{name}.jsonl").parent.mkdir(exist_ok=True)
    (tmp_path / "small" / f"{name}.jsonl").write_text('{"text": "a"}\n')
  words = ["--model_name_or_path=gpt2", "--dataset_name", str(tmp_path / "small")]
  data = parsed(monkeypatch, *words).config.data
  assert data.train == (f"hub:{tmp_path / 'small'}",) and data.validation == (
    f"hub:{tmp_path / 'small'}:validation",
  )
  assert "evaluates on the split validation" in capsys.readouterr().err
  (tmp_path / "small" / "validation.jsonl").unlink()
  assert parsed(monkeypatch, *words).config.data.validation == ()


def test_resume_accepts_only_the_latest_checkpoint(monkeypatch, tmp_path):
  for name in ("run/checkpoints/3", "run/checkpoints/12", "theirs"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "theirs" / "trainer_state.json").write_text("{}")
  words = ["--model_name_or_path=gpt2", "--train_file=a.txt", f"--output_dir={tmp_path / 'run'}"]
  for fine in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "12"):
    assert (
      parsed(monkeypatch, *words, f"--resume_from_checkpoint={fine}").workdir == tmp_path / "run"
    )
  for wrong, message in (
    (tmp_path / "run" / "checkpoints" / "3", "not the newest checkpoint"),
    (tmp_path / "theirs", "a checkpoint of transformers' Trainer; .*--model_name_or_path"),
    ("False", "use --overwrite_output_dir to start a new one"),
  ):
    with pytest.raises(RequestError, match=message):
      parsed(monkeypatch, *words, f"--resume_from_checkpoint={wrong}")


def test_all_transformers_flags_are_known():
  transformers = pytest.importorskip("transformers")
  names = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
  assert not names - run_clm.KNOWN_FLAGS


# A flag with a letter less, with two letters swapped, and with a blank of another kind, each of
# another flag.
MISTYPED = sorted(name for name in run_clm.KNOWN_FLAGS if len(name) > 7)


def swap_letters(name):
  if name[3] == name[4]:
    return name[:2] + name[3:]
  return name[:3] + name[4] + name[3] + name[5:]


@pytest.mark.parametrize(
  "spell", [lambda name: name[:4] + name[5:], lambda name: name[:-1], swap_letters]
)
def test_mistyped_flag_gets_the_nearest_hint(monkeypatch, spell):
  wrong = [name for name in MISTYPED if spell(name) not in run_clm.KNOWN_FLAGS]
  hints = []
  assert len(wrong) > 100
  for name in wrong:
    with pytest.raises(RequestError) as refusal:
      parsed(monkeypatch, "--model_name_or_path=gpt2", "--train_file=a.txt", f"--{spell(name)}=1")
    line = str(refusal.value)
    assert "\n" not in line and line.startswith(
      f"--{spell(name)}: unknown flag; did you mean --"
    ), line
    hints.append(line.split("mean --")[1].rstrip("?"))
    assert difflib.SequenceMatcher(None, hints[-1], name).ratio() > 0.8, line
  # Few flags are as near to another one: per_device_train_batch_size without a letter is not among
  # them.
  assert sum(map(str.__eq__, hints, wrong)) > 0.97 * len(wrong)


@pytest.mark.parametrize(
  "typed, meant",
  [
    ("lr", "learning_rate"),
    ("model", "model_name_or_path"),
    ("resume", "resume_from_checkpoint"),
    ("batch_size", "per_device_train_batch_size"),
    ("overwrite", "overwrite_output_dir"),
    ("epochs", "num_train_epochs"),
  ],
)
def test_common_names_suggest_run_clm_flags(monkeypatch, typed, meant):
  with pytest.raises(RequestError, match=f"--{typed}: unknown flag; did you mean --{meant}"):
    parsed(monkeypatch, "--model_name_or_path=gpt2", f"--{typed}=1")


@pytest.mark.parametrize("devices, fine", [(1, False), (4, True)])
def test_deepspeed_batch_must_match_devices(monkeypatch, tmp_path, devices, fine):
  batch = {
    "train_batch_size": 32,
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 2,
  }
  (tmp_path / "ds.json").write_text(json.dumps(batch))
  found = parsed(
    monkeypatch,
    "--model_name_or_path=gpt2",
    "--train_file=a.txt",
    f"--deepspeed={tmp_path / 'ds.json'}",
  )
  if fine:
    found.per_device.apply_to(found.config, devices)
    assert (found.config.train.batch_size, found.config.train.micro_batch_size) == (32, 4)
  else:
    with pytest.raises(
      RequestError,
      match="train_batch_size=32 is not 4 sequences x 2 accumulation steps x 1 devices",
    ):
      found.per_device.apply_to(found.config, devices)


@pytest.mark.parametrize(
  "batch, words, wanted, message",
  [
    (
      (None, 4, 2),
      ["--config.train.batch_size=32"],
      (32, 0),
      "overridden by --config.train.batch_size=32",
    ),
    (
      (16, 4, 2),
      ["--config.train.batch_size", "32"],
      (32, 0),
      "overridden by --config.train.batch_size=32",
    ),
    ((16, None, None), ["--config.train.micro_batch_size=2"], (16, 2), ""),
    (
      (16, 8, None),
      ["--config.train.micro_batch_size=2"],
      (16, 2),
      "overridden by --config.train.micro_batch_size=2",
    ),
    (
      (16, None, None),
      ["--gradient_accumulation_steps=4"],
      (32, 8),
      "overridden by --gradient_accumulation_steps=4",
    ),
    ((None, None, 2), ["--per_device_train_batch_size=4"], (8, 4), ""),
    (
      (None, None, 2),
      ["--config={config}"],
      None,
      "--deepspeed=.*: 2 accumulation steps need a batch size",
    ),
  ],
)
def test_flags_override_deepspeed_batch(
  monkeypatch, tmp_path, capsys, batch, words, wanted, message
):
  names = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
  (tmp_path / "ds.json").write_text(
    json.dumps({name: it for name, it in zip(names, batch, strict=True) if it})
  )
  words = [word.format(config=ROOT / "configs" / "quickstart.py") for word in words]
  words += [
    "--model_name_or_path=gpt2",
    "--train_file=a.txt",
    f"--deepspeed={tmp_path / 'ds.json'}",
  ]
  if wanted is None:
    with pytest.raises(RequestError, match=message):
      parsed(monkeypatch, *words)
    return
  found = parsed(monkeypatch, *words)
  if found.per_device:
    found.per_device.apply_to(found.config, 1)
  assert (found.config.train.batch_size, found.config.train.micro_batch_size) == wanted
  assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
  "word", ["--config.optim.learning_rate=3e-5", "--config.optim.learning_rate 3e-5", "--fp16"]
)
def test_flags_override_deepspeed_settings(monkeypatch, tmp_path, capsys, word):
  optimizer = {"type": "AdamW", "params": {"lr": 1e-4}}
  (tmp_path / "ds.json").write_text(json.dumps({"bf16": {"enabled": True}, "optimizer": optimizer}))
  words = [
    "--model_name_or_path=gpt2",
    "--train_file=a.txt",
    f"--deepspeed={tmp_path / 'ds.json'}",
    *word.split(),
  ]
  config = parsed(monkeypatch, *words).config
  rate, dtype = (1e-4, "auto") if word == "--fp16" else (3e-5, "bfloat16")
  assert (config.optim.learning_rate, config.model.compute_dtype) == (rate, dtype)
  assert "overridden by" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
  "words, wanted",
  [
    ("--load_best_model_at_end False", {"train.keep_best_metric": ""}),
    ("--gradient_checkpointing False", {"memory.remat": "dots"}),
    ("--warmup_steps 0", {"optim.warmup_steps": 0, "optim.warmup_ratio": 0.0}),
    ("--lr_scheduler_type constant", {"optim.warmup_steps": 0, "optim.warmup_ratio": 0.0}),
    ("--config.optim.warmup_steps 0", {"optim.warmup_ratio": 0.0}),
    ("--adafactor False", {"optim.name": "lion"}),
    ("--save_strategy no", {"train.save_every": 0}),
  ],
)
def test_false_flags_override_a_config_file(monkeypatch, tmp_path, words, wanted):
  file = tmp_path / "c.py"
  lines = [
    "c.train.keep_best_metric, c.train.eval_every = 'eval/loss', 4",
    "c.memory.remat = 'full'",
  ]
  lines += ["c.optim.warmup_ratio, c.train.save_every, c.optim.name = 0.2, 'epoch', 'lion'"]
  text = "\n  ".join(
    ["from jaxft import config\ndef get_config():", "c = config.default()", *lines, "return c"]
  )
  file.write_text(text)
  found = jaxft.config.flatten(
    parsed(monkeypatch, "-config", str(file), "--train_file=a.txt", *words.split()).config
  )
  assert {name: found[name] for name in wanted} == wanted and found["train.batch_size"] == 8


def test_mapped_settings_exist():
  assert {same.setting for same in run_clm.MAPPED.values()} <= jaxft.config.BY_NAME.keys()
  groups = [
    set(run_clm.MAPPED),
    set(run_clm.NO_OPS),
    set(run_clm.UNSUPPORTED),
    set(run_clm.ALIASES),
  ]
  assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize(
  "words", ["--max_steps 30 --num_train_epochs 3", "--num_train_epochs 3 --max_steps 30"]
)
def test_flag_order_does_not_matter(monkeypatch, words):
  config = parsed(
    monkeypatch, "--model_name_or_path=gpt2", *words.split(), "--eval_steps=5", "--eval_strategy=no"
  ).config
  assert (config.train.steps, config.train.epochs, config.train.eval_every) == (30, 0, 0)


@pytest.mark.parametrize(
  "words, message",
  [
    ("--do_train False", "this command always trains"),
    ("--do_eval", "this command always trains"),
    ("--push_to_hub", "--push_to_hub: give --hub_model_id OWNER/NAME too"),
    ("--eval_strategy epochs", "must be no, steps or epoch"),
    ("--model_type gpt2 --config_name x", "pretrained weights have their own config.json"),
    ("--fp16 --bf16", "conflicts with --bf16"),
    (
      "--learning_rate 1e-4 --config.optim.learning_rate=2e-4",
      "conflicts with --config.optim.learning_rate=2e-4",
    ),
    (
      "--num_train_epochs 3 --config.train.steps=5",
      "--num_train_epochs=3: conflicts with --config.train.steps=5",
    ),
    (
      "--max_steps 5 --config.train.epochs=2",
      "--max_steps=5: conflicts with --config.train.epochs=2",
    ),
    ("--workdir=a --output_dir b", "--output_dir=b: conflicts with --workdir=a"),
    ("--output_dir --do_train", "--output_dir: needs a value"),
    ("--learning_rate --do_train", "--learning_rate: needs a value"),
    ("--learning_rate fast", "--learning_rate=fast: must be a number"),
    ("--deepspeed nowhere.json", "nowhere.json: no such file; give a ds_config.json"),
    ("--optim rmsprop", "must be one of adamw_torch"),
    ("--optim sgd", "--config.optim.name=sgd --config.optim.b1=0 for torch's SGD"),
    (
      "--learning_rate 1e-4 --config.optim.learning_rate 2e-4",
      "conflicts with --config.optim.learning_rate=2e-4",
    ),
    ("--train_file a.txt --config.data.train v.txt", "conflicts with --config.data.train=v.txt"),
    ("--seed 5 -config.train.seed 3", "conflicts with --config.train.seed=3"),
    ("--train_file a.txt --dataset_name a/b", "conflicts with --train_file=a.txt"),
    ("--optim lion_32bit --adafactor", "conflicts with --optim=lion_32bit"),
    ("--bf16 ture", "--bf16=ture: must be True or False"),
    ("--overwrite_cache banana", "--overwrite_cache=banana: must be True or False"),
    ("--do_train yess", "--do_train=yess: must be True or False"),
    (
      "--eval_steps 0.1",
      "--eval_steps=0.1: a share of all steps is not supported; set a number of steps",
    ),
    ("--eval_strategy steps --eval_steps 0", "--eval_steps=0: must be at least 1"),
    ("--max_train_samples 0", "--max_train_samples=0: must be at least 1"),
    (
      "--config x.py --eval_strategy steps",
      "--eval_strategy=steps: needs a number of steps; give --eval_steps too",
    ),
    ("--group_by_length", "leaves no padding"),
    ("-seed 5", "-seed: unknown flag; did you mean --seed"),
    ("--deepspeed", "--deepspeed: needs a value"),
    ("--config= --seed 3", "--config is missing"),
    (
      "--load_best_model_at_end --metric_for_best_model accuracy",
      "--metric_for_best_model=accuracy: must be eval_loss",
    ),
    ("--config x.py --gradient_accumulation_steps 2", "2 accumulation steps need a batch size"),
    (
      "--per_device_train_batch_size 2 --config.train.batch_size=8",
      "conflicts with a batch per device",
    ),
    ("--per_device_train_batch_size two", "must be a whole number"),
  ],
)
def test_incomplete_requests_are_rejected(monkeypatch, words, message):
  with pytest.raises(RequestError, match=message):
    parsed(monkeypatch, "--model_name_or_path=gpt2", *words.split())


def test_docs_have_the_generated_table():
  assert run_clm.markdown_table() in (ROOT / "docs" / "recipes" / "run_clm.md").read_text()
