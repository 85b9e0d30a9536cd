"""run_clm.py's flags: what they come to, what is refused, and that the page says the same as the code."""

import sys
from pathlib import Path

import pytest

from jaxft import command_line, run_clm
from jaxft import config as settings
from jaxft.errors import RequestError

# ml_collections (1.1) loads config files with it.
pytestmark = pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
ROOT = Path(__file__).parent.parent


def parsed(monkeypatch, *words):
  monkeypatch.setattr(sys, "argv", ["train", *words])
  return command_line.parse_train()


def test_a_command_of_run_clm_is_understood(monkeypatch):
  words = (
    "--model_name_or_path gpt2 --train_file a.txt --validation_file=b.txt --per_device_train_batch_size 4 --do_train"
  )
  words += " --gradient_accumulation_steps 3 --num_train_epochs 2 --block_size 512 --learning_rate 1e-4 --bf16 --output_dir out"
  words += (
    " --lr_scheduler_type cosine --warmup_steps 7 --optim adamw_torch --weight_decay 0.1 --seed 5 --save_total_limit 3"
  )
  words += " --save_strategy steps --save_steps 7"
  words += " --validation_split_percentage 10 --report_to none --gradient_checkpointing --adam_beta2 0.95 --do_eval"
  arguments = parsed(monkeypatch, *words.split())
  found = settings.flatten(arguments.config)
  arguments.per_device.into(arguments.config, 8)
  assert (arguments.config.train.batch_size, arguments.config.train.micro_batch_size) == (4 * 3 * 8, 4)
  assert arguments.workdir == Path("out")
  wanted = {
    "model.path": "gpt2",
    "data.train": ("a.txt",),
    "data.validation": ("b.txt",),
    "data.validation_fraction": 0.1,
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
  assert not settings.faults(arguments.config)


def test_steps_take_the_place_of_epochs(monkeypatch):
  arguments = parsed(monkeypatch, "--model_name_or_path=gpt2", "--dataset_name", "wikitext", "--max_steps", "30")
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
def test_a_batch_is_counted_by_device_unless_the_config_says_it(monkeypatch, words, rows):
  monkeypatch.chdir(ROOT)
  found = parsed(monkeypatch, "--model_name_or_path=gpt2", *words.split())
  assert (found.per_device and found.per_device.rows) == rows
  if rows:
    found.per_device.into(found.config, 4)
    assert (found.config.train.batch_size, found.config.train.micro_batch_size) == (4 * rows, rows)


def test_the_best_checkpoint_is_what_goes_out(monkeypatch):
  words = (
    "--model_name_or_path=gpt2 --train_file a.txt --eval_strategy steps --eval_steps 50 --load_best_model_at_end True"
  )
  for more in ("", "--metric_for_best_model eval_loss"):
    config = parsed(monkeypatch, *words.split(), *more.split()).config
    assert config.train.keep_best_metric == "eval/loss" and not settings.faults(config)
  alone = parsed(monkeypatch, "--model_name_or_path=gpt2", "--metric_for_best_model=loss").config
  assert not alone.train.keep_best_metric


def test_flags_go_with_a_config_file_and_with_its_settings(monkeypatch):
  file = str(ROOT / "configs" / "gpt2_tinystories.py")
  arguments = parsed(monkeypatch, "--config", file, "--block_size", "256", "--config.train.seed=3")
  config = arguments.config
  assert (config.data.sequence_length, config.train.seed, config.data.limit_train) == (256, 3, 100_000)
  assert arguments.workdir == Path("runs/gpt2_tinystories")


def test_what_means_nothing_here_is_refused_with_every_reason(monkeypatch):
  words = "--model_name_or_path gpt2 --fp16 --deepspeed ds.json --lr_scheduler_type polynomial --warmup_steps 0.1 --bf16 False"
  with pytest.raises(RequestError) as refusal:
    parsed(monkeypatch, *words.split())
  lines = str(refusal.value).splitlines()
  assert [line.split(":")[0] for line in lines] == [
    "--fp16",
    "--deepspeed=ds.json",
    "--lr_scheduler_type=polynomial",
    "--warmup_steps=0.1",
    "--bf16=False",
  ]
  with pytest.raises(RequestError, match="lerning_rate"):
    parsed(monkeypatch, "--model_name_or_path=gpt2", "--lerning_rate=1")


def test_every_setting_named_is_one():
  assert {same.setting for same in run_clm.SAME.values()} <= settings.BY_NAME.keys()
  groups = [set(run_clm.SAME), {*run_clm.ALWAYS}, set(run_clm.REFUSED)]
  assert sum(map(len, groups)) == len(set.union(*groups))


@pytest.mark.parametrize("words", ["--max_steps 30 --num_train_epochs 3", "--num_train_epochs 3 --max_steps 30"])
def test_the_order_of_flags_is_of_no_account(monkeypatch, words):
  config = parsed(
    monkeypatch, "--model_name_or_path=gpt2", *words.split(), "--eval_steps=5", "--eval_strategy=no"
  ).config
  assert (config.train.steps, config.train.epochs, config.train.eval_every) == (30, 0, 0)


@pytest.mark.parametrize(
  "words, message",
  [
    ("--do_train False", "this command trains"),
    ("--do_eval", "this command trains"),
    ("--push_to_hub", "--push_to_hub: give --hub_model_id OWNER/NAME too"),
    ("--eval_strategy epoch", "there is only no, and steps, here"),
    ("--eval_strategy steps", "--eval_strategy=steps: give --eval_steps too"),
    ("--optim sgd", "there is only adamw_torch"),
    (
      "--load_best_model_at_end --metric_for_best_model accuracy",
      "--metric_for_best_model=accuracy: there is only eval_loss",
    ),
    ("--config x.py --gradient_accumulation_steps 2", "of how many rows"),
    ("--per_device_train_batch_size 2 --config.train.batch_size=8", "a batch by device is given too"),
    ("--per_device_train_batch_size two", "give a whole number"),
  ],
)
def test_halves_of_a_request_are_refused(monkeypatch, words, message):
  with pytest.raises(RequestError, match=message):
    parsed(monkeypatch, "--model_name_or_path=gpt2", *words.split())


def test_the_page_has_the_table_of_the_code():
  assert run_clm.table() in (ROOT / "docs" / "recipes" / "run_clm.md").read_text()
