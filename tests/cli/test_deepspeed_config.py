"""DeepSpeed configs: what keys become, what is rejected, and the page's table."""

import copy
import json
import math
import random
import re
from pathlib import Path

import pytest

import jaxft.config
from jaxft import config_checks
from jaxft.cli import deepspeed_config, deepspeed_keys, deepspeed_rules, deepspeed_sections
from jaxft.errors import RequestError

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "deepspeed.md"
# The keys and values of ds_config.json and ds_config_gptneo.json of Xirider/finetune-gpt2xl, which
# are the same.
GPT2XL = {
  "fp16": {
    "enabled": "auto",
    "loss_scale": 0,
    "loss_scale_window": 1000,
    "initial_scale_power": 16,
    "hysteresis": 2,
    "min_loss_scale": 1,
  },
  "optimizer": {
    "type": "AdamW",
    "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto"),
  },
  "scheduler": {
    "type": "WarmupLR",
    "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps"), "auto"),
  },
  "zero_optimization": {
    "stage": 2,
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "overlap_comm": True,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
    "contiguous_gradients": True,
    "cpu_offload": True,
  },
  "gradient_accumulation_steps": "auto",
  "gradient_clipping": "auto",
  "steps_per_print": 2000,
  "train_batch_size": "auto",
  "train_micro_batch_size_per_gpu": "auto",
  "wall_clock_breakdown": False,
}
# And of the dictionary in finetune.py of jdwx/gptj-finetune.
GPTJ = GPT2XL | {
  "fp16": GPT2XL["fp16"] | {"initial_scale_power": 12},
  "zero_optimization": {
    "stage": 3,
    "offload_optimizer": {"device": "cpu", "pin_memory": False},
    "offload_param": {"device": "cpu", "pin_memory": False},
    "overlap_comm": True,
    "contiguous_gradients": True,
    "sub_group_size": 1e9,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": "auto",
    "stage3_max_live_parameters": 1e9,
    "stage3_max_reuse_distance": 1e9,
    "gather_16bit_weights_on_model_save": True,
  },
}
ZERO = "zero_optimization"


def translated(config):
  return deepspeed_config.translate(config, "ds.json")


def nested(dotted):
  """{"a.b": 1} as {"a": {"b": 1}}."""
  config = {}
  for key, value in dotted.items():
    *above, last = key.split(".")
    inside = config
    for part in above:
      inside = inside.setdefault(part, {})
    inside[last] = value
  return config


def refused(config):
  with pytest.raises(RequestError) as refusal:
    translated(config)
  return str(refusal.value).splitlines()


@pytest.mark.parametrize("config, stage, offload", [(GPT2XL, 2, "optimizer"), (GPTJ, 3, "all")])
def test_recipe_configs_are_translated(config, stage, offload):
  found = translated(config)
  assert found.settings == {
    "model.compute_dtype": "auto",
    "optim.name": "adamw",
    "optim.schedule": "constant",
    "mesh.zero_stage": stage,
    "memory.offload": offload,
  }
  assert found[1:4] == (None, None, None)
  keys = [entry.key for entry in found.entries]
  assert keys[:2] == ["fp16.enabled", "fp16.loss_scale"] and keys[-1] == "wall_clock_breakdown"
  assert len(keys) == len(set(keys)) == sum(1 for _ in deepspeed_config._leaves(config))
  became = {entry.key: entry.outcome for entry in found.entries}
  assert became["optimizer.params.lr"] == "auto: set by flags or their defaults"
  assert became[f"{ZERO}.overlap_comm"].startswith("no effect: ")
  assert "linear warm-up" in became["scheduler.type"] and "else float32" in became["fp16.enabled"]


ADAMW, DECAYING, COSINE = (
  {"optimizer.type": "AdamW"},
  {"scheduler.type": "WarmupDecayLR"},
  {"scheduler.type": "WarmupCosineLR"},
)


@pytest.mark.parametrize(
  "dotted, wanted",
  [
    ({}, {}),
    ({"gradient_clipping": 0.5}, {"optim.clip_norm": 0.5}),
    ({"gradient_clipping": 0}, {"optim.clip_norm": 0.0}),
    ({ZERO: True}, {"mesh.zero_stage": 1}),
    ({ZERO: False}, {"mesh.zero_stage": 0}),
    ({f"{ZERO}.stage": 0}, {"mesh.zero_stage": 0}),
    ({f"{ZERO}.cpu_offload": False}, {"memory.offload": "none"}),
    ({f"{ZERO}.cpu_offload_params": True}, {"memory.offload": "all"}),
    ({f"{ZERO}.offload_optimizer.device": "none"}, {"memory.offload": "none"}),
    ({f"{ZERO}.offload_optimizer": None, f"{ZERO}.offload_param": False}, {}),
    (
      {f"{ZERO}.offload_param.device": "cpu", f"{ZERO}.offload_optimizer.device": "none"},
      {"memory.offload": "all"},
    ),
    (
      {f"{ZERO}.offload_optimizer.device": "cpu", f"{ZERO}.offload_param.device": "none"},
      {"memory.offload": "optimizer"},
    ),
    ({f"{ZERO}.mics_shard_size": 4}, {"mesh.fsdp": 4, "mesh.data": -1}),
    ({f"{ZERO}.mics_shard_size": -1}, {}),
    ({f"{ZERO}.reduce_bucket_size": "5e8", f"{ZERO}.sub_group_size": 1e12}, {}),
    ({"tensor_parallel.autotp_size": 2}, {"mesh.tensor": 2}),
    ({"tensor_parallel.autotp_size": 0}, {"mesh.tensor": 1}),
    (
      ADAMW | {"optimizer.params.torch_adam": True},
      {"optim.name": "adamw", "optim.weight_decay": 0.01},
    ),
    (
      {
        "optimizer.type": "Adam",
        "optimizer.params.lr": 1e-3,
        "optimizer.params.betas": [0.8, 0.99],
        "optimizer.params.eps": 1e-6,
        "optimizer.params.weight_decay": 3e-7,
        "optimizer.params.adam_w_mode": True,
        "optimizer.params.amsgrad": False,
      },
      {
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "optim.b1": 0.8,
        "optim.b2": 0.99,
        "optim.eps": 1e-6,
        "optim.weight_decay": 3e-7,
      },
    ),
    (
      {
        "optimizer.type": "adam",
        "optimizer.params.adam_w_mode": False,
        "optimizer.params.weight_decay": 0,
      },
      {"optim.name": "adamw", "optim.weight_decay": 0.0},
    ),
    (
      ADAMW | {"optimizer.params.adam_w_mode": False, "optimizer.params.weight_decay": 0.1},
      {"optim.name": "adamw", "optim.weight_decay": 0.1},
    ),
    (
      ADAMW | {"optimizer.params.fp32_optimizer_states": False},
      {"optim.name": "adamw", "optim.state_dtype": "bfloat16"},
    ),
    (
      {"optimizer.type": "Lion", "optimizer.params.lr": 1e-5},
      {"optim.name": "lion", "optim.learning_rate": 1e-5},
    ),
    (
      {
        "optimizer.type": "Muon",
        "optimizer.params.muon_lr": 0.02,
        "optimizer.params.adam_lr": 1e-4,
      },
      {"optim.name": "muon", "optim.b1": 0.95, "optim.learning_rate": 1e-4},
    ),
    (
      {
        "optimizer.type": "Muon",
        "optimizer.params.momentum": 0.8,
        "optimizer.params.betas": [0.9, 0.99],
      },
      {"optim.name": "muon", "optim.b1": 0.8, "optim.b2": 0.99},
    ),
    (
      {"optimizer.type": "SGD", "optimizer.params.lr": 1, "optimizer.params.weight_decay": 0.1},
      {"optim.name": "sgd", "optim.b1": 0.0, "optim.learning_rate": 1.0, "optim.weight_decay": 0.1},
    ),
    (
      {"optimizer.type": "SGD", "optimizer.params.momentum": 0.5},
      {"optim.name": "sgd", "optim.b1": 0.5},
    ),
    (
      DECAYING | {"scheduler.params.total_num_steps": 100, "scheduler.params.warmup_num_steps": 7},
      {
        "optim.schedule": "linear",
        "train.steps": 100,
        "train.epochs": 0.0,
        "optim.warmup_steps": 7,
      },
    ),
    (
      DECAYING | ADAMW | {"scheduler.params.warmup_max_lr": 2e-4, "optimizer.params.lr": 1e-4},
      {"optim.schedule": "linear", "optim.name": "adamw", "optim.learning_rate": 2e-4},
    ),
    (
      {
        "scheduler.type": "WarmupLR",
        "scheduler.params.warmup_min_lr": 1e-4,
        "scheduler.params.warmup_max_lr": 1e-4,
        "scheduler.params.warmup_num_steps": 10,
      },
      {"optim.schedule": "constant", "optim.learning_rate": 1e-4, "optim.warmup_steps": 0},
    ),
    (DECAYING | {"scheduler.params.warmup_min_lr": 1e-8}, {"optim.schedule": "linear"}),
    (
      COSINE | ADAMW | {"optimizer.params.lr": 1e-3, "scheduler.params.cos_min_ratio": 0.5},
      {
        "optim.schedule": "cosine",
        "optim.name": "adamw",
        "optim.learning_rate": 1e-3,
        "optim.end_learning_rate": 5e-4,
      },
    ),
    (
      COSINE | {"scheduler.params.cos_min_ratio": 0},
      {"optim.schedule": "cosine", "optim.end_learning_rate": 0.0},
    ),
    ({"activation_checkpointing.cpu_checkpointing": True}, {"memory.remat": "full"}),
    ({"activation_checkpointing.number_checkpoints": 4}, {"memory.remat": "full"}),
    (
      {
        "activation_checkpointing.partition_activations": False,
        "activation_checkpointing.number_checkpoints": None,
      },
      {},
    ),
    (
      {
        "tensorboard.enabled": True,
        "tensorboard.job_name": "a",
        "csv_monitor.job_name": "b",
        "wandb.enabled": True,
      },
      {"tracking.writers": ("tensorboard", "wandb"), "tracking.run_name": "a"},
    ),
    ({"tensorboard.enabled": False, "tensorboard.job_name": "a"}, {}),
    (
      {"data_types.param_dtype": "bf16", "data_types.grad_accum_dtype": "fp32"},
      {"model.param_dtype": "bfloat16"},
    ),
    (
      {
        "elasticity.enabled": False,
        "curriculum_learning.enabled": False,
        "data_efficiency": {"enabled": False, "data_sampling": {"enabled": True}},
        "compression_training": {
          "row_pruning": {"shared_parameters": {"enabled": False}, "different_groups": {}}
        },
      },
      {},
    ),
    (
      {"sequence_parallel_size": 1, "gradient_allreduce_op": "mean", "fp16": {}, "scheduler": None},
      {},
    ),
    ({"_comment": "a", "//": {"stage": 7}, "zero_optimization": {"# a.b": 1, "comment": [1]}}, {}),
    ({"autotuning": {"enabled": True, "arg_mappings": {}}, "compile": True}, {}),
  ],
)
def test_key_becomes_settings(dotted, wanted):
  found = translated(nested(dotted))
  assert found.settings == wanted
  outcomes = " ".join(entry.outcome for entry in found.entries)
  for name, value in wanted.items():  # nothing is set that no row tells
    for part in value if isinstance(value, tuple) else (value,):
      assert f"--config.{name}={part}" in outcomes


@pytest.mark.parametrize(
  "fp16, bf16, dtype",
  [
    (None, None, None),
    (True, None, "auto"),
    ("auto", None, "auto"),
    ("auto", False, "auto"),
    ("auto", "auto", None),
    (True, "auto", "auto"),
    ("auto", True, "bfloat16"),
    (False, True, "bfloat16"),
    (None, True, "bfloat16"),
    (None, "auto", None),
    (False, "auto", None),
    (False, False, "float32"),
    (False, None, "float32"),
    (None, False, "float32"),
  ],
)
def test_fp16_and_bf16_choose_compute_dtype(fp16, bf16, dtype):
  given = {"fp16.enabled": fp16, "bf16.enabled": bf16}
  found = translated(nested({key: value for key, value in given.items() if value is not None}))
  assert found.settings.get("model.compute_dtype") == dtype


@pytest.mark.parametrize(
  "dotted, wanted",
  [
    ({"amp.enabled": True}, "auto"),
    ({"amp.enabled": True, "amp.opt_level": "O0"}, "float32"),
    ({"amp.enabled": "auto", "amp.opt_level": "auto"}, None),
    ({"amp.enabled": False}, None),
    ({"torch_autocast.enabled": True}, "bfloat16"),
    ({"torch_autocast.enabled": True, "torch_autocast.dtype": "float16"}, "auto"),
    ({"bfloat16.enabled": True, "torch_autocast.enabled": True, "fp16.enabled": False}, "bfloat16"),
    (
      {
        "bf16.enabled": True,
        "bf16.bf16_master_weights_and_grads": True,
        "bf16.bf16_optimizer_states": True,
      },
      "bfloat16",
    ),
  ],
)
def test_amp_and_autocast_choose_compute_dtype(dotted, wanted):
  found = translated(nested(dotted)).settings
  assert found.get("model.compute_dtype") == wanted
  master = "bf16.bf16_optimizer_states" in dotted
  assert (found.get("model.param_dtype"), found.get("optim.state_dtype")) == (
    ("bfloat16",) * 2 if master else (None, None)
  )


@pytest.mark.parametrize(
  "rows, accumulation, batch",
  [
    (4, None, None),
    (4, 2, None),
    (4, 2, 32),
    (None, 2, 32),
    (4, None, 12),
    (None, None, 32),
    (None, 3, None),
  ],
)
def test_batch_fields_are_parsed(rows, accumulation, batch):
  """The run counts the devices, and computes the batch."""
  config = {
    deepspeed_keys.MICRO_BATCH: rows or "auto",
    deepspeed_keys.ACCUMULATION: accumulation or "auto",
    deepspeed_keys.TRAIN_BATCH: batch or "auto",
  }
  found = translated(config)
  assert found[:4] == ({}, rows, accumulation, batch)
  assert [entry.outcome.split(":")[0] == "auto" for entry in found.entries] == [
    n is None for n in found[1:4]
  ]


@pytest.mark.parametrize(
  "dotted, key, message",
  [
    (
      {"train_batch_size": 10, "train_micro_batch_size_per_gpu": 4},
      "train_batch_size=10",
      "(4) x devices",
    ),
    (
      {"train_batch_size": 8, "gradient_accumulation_steps": 3},
      "train_batch_size=8",
      "gradient_accumulation_steps (3)",
    ),
    ({"train_batch_size": 0}, "train_batch_size=0", "whole number from 1"),
    ({"gradient_accumulation_steps": 2.0}, "gradient_accumulation_steps=2.0", "whole number"),
    (
      {"train_micro_batch_size_per_gpu": True},
      "train_micro_batch_size_per_gpu=true",
      "whole number",
    ),
    ({"train_batch_size": "8"}, 'train_batch_size="8"', "whole number"),
    ({f"{ZERO}.stage": "2"}, f'{ZERO}.stage="2"', "a whole number"),
    ({f"{ZERO}.stage": 2.0}, f"{ZERO}.stage=2.0", "a whole number"),
    ({f"{ZERO}.stage": True}, f"{ZERO}.stage=true", "a whole number"),
    ({f"{ZERO}.stage": 4}, f"{ZERO}.stage=4", "below 4"),
    ({f"{ZERO}.stage": -1}, f"{ZERO}.stage=-1", "at least 0"),
    ({f"{ZERO}.stage": None}, f"{ZERO}.stage=null", "a whole number"),
    ({f"{ZERO}.stage": {}}, f"{ZERO}.stage={{}}", "not an object"),
    ({f"{ZERO}.stage.x": 1}, f"{ZERO}.stage.x", f"did you mean {ZERO}.stage?"),
    (
      {f"{ZERO}.offload_param.device": "nvme"},
      f'{ZERO}.offload_param.device="nvme"',
      'set it to "cpu"',
    ),
    ({f"{ZERO}.offload_optimizer": "cpu"}, f'{ZERO}.offload_optimizer="cpu"', '{"device": "cpu"}'),
    ({f"{ZERO}.cpu_offload": "true"}, f'{ZERO}.cpu_offload="true"', "true or false"),
    ({f"{ZERO}.zenflow.topk_ratio": 0.1}, f"{ZERO}.zenflow.topk_ratio=0.1", "every step"),
    ({ZERO: 3}, f"{ZERO}=3", "such as stage"),
    ({ZERO: "auto"}, f'{ZERO}="auto"', "such as stage"),
    ({"fp16": True}, "fp16=true", "such as enabled"),
    ({"fp16.enabled": 1}, "fp16.enabled=1", "true or false"),
    (
      {"fp16.enabled": True, "bf16.enabled": True},
      "bf16.enabled=true",
      "conflicts with fp16.enabled",
    ),
    (
      {"fp16.fp16_master_weights_and_grads": True},
      "fp16.fp16_master_weights_and_grads=true",
      "param_dtype=bfloat16",
    ),
    ({"amp.opt_level": "O3"}, 'amp.opt_level="O3"', "O0, O1 or O2"),
    ({"torch_autocast.dtype": "int8"}, 'torch_autocast.dtype="int8"', "bfloat16 or float16"),
    ({"data_types.param_dtype": "fp16"}, 'data_types.param_dtype="fp16"', "fp32 or bf16"),
    ({"gradient_clipping": -1}, "gradient_clipping=-1", "at least 0"),
    ({"gradient_clipping": math.inf}, "gradient_clipping=Infinity", "finite"),
    ({"gradient_clipping": 10**400}, "gradient_clipping=1000", "at most 2,147,483,647"),
    ({f"{ZERO}.reduce_bucket_size": math.nan}, f"{ZERO}.reduce_bucket_size=NaN", "finite"),
    (
      {"optimizer.type": "OneBitAdam", "optimizer.params.freeze_step": 4},
      'optimizer.type="OneBitAdam"',
      "set it to AdamW",
    ),
    ({"optimizer.type": "LAMB"}, 'optimizer.type="LAMB"', "AdamW, Lion, Muon or SGD"),
    ({"optimizer.type": "Adafactor"}, 'optimizer.type="Adafactor"', "config.optim.name=adafactor"),
    ({"optimizer.type": 3}, "optimizer.type=3", "AdamW, Lion, Muon or SGD"),
    ({"optimizer.params.lr": 1e-4}, "optimizer.params.lr=0.0001", "give optimizer.type too"),
    (ADAMW | {"optimizer.params.lr": 0}, "optimizer.params.lr=0", "above 0"),
    (ADAMW | {"optimizer.params.lr": "1e-4"}, 'optimizer.params.lr="1e-4"', "a number"),
    (ADAMW | {"optimizer.params.betas": [0.9]}, "optimizer.params.betas=[0.9]", "two numbers"),
    (ADAMW | {"optimizer.params.betas": [0.9, 1]}, "optimizer.params.betas=[0.9, 1]", "below 1"),
    (
      ADAMW | {"optimizer.params.betas": [math.nan, 0.9]},
      "optimizer.params.betas=[NaN, 0.9]",
      "finite",
    ),
    (
      ADAMW | {"optimizer.params.max_grad_norm": 1},
      "optimizer.params.max_grad_norm=1",
      "gradient_clipping",
    ),
    (ADAMW | {"optimizer.params.amsgrad": True}, "optimizer.params.amsgrad=true", "leave it out"),
    (
      ADAMW | {"optimizer.params.bias_correction": False},
      "optimizer.params.bias_correction=false",
      "corrected",
    ),
    (ADAMW | {"optimizer.params.momentum": 0.9}, "optimizer.params.momentum", "unknown key"),
    (
      {
        "optimizer.type": "Adam",
        "optimizer.params.adam_w_mode": False,
        "optimizer.params.weight_decay": "auto",
      },
      "optimizer.params.adam_w_mode=false",
      "weight_decay to 0",
    ),
    (
      {"optimizer.type": "Muon", "optimizer.params.lr": 0.02},
      "optimizer.params.lr=0.02",
      "give adam_lr",
    ),
    (
      {
        "optimizer.type": "SGD",
        "optimizer.params.momentum": 0.9,
        "optimizer.params.weight_decay": 0.1,
      },
      "optimizer.params.weight_decay=0.1",
      "one of the two to 0",
    ),
    (
      {"scheduler.type": "OneCycle", "scheduler.params.cycle_min_lr": 0},
      'scheduler.type="OneCycle"',
      "WarmupDecayLR",
    ),
    ({"scheduler.type": "LRRangeTest"}, 'scheduler.type="LRRangeTest"', "WarmupLR"),
    (
      DECAYING | {"scheduler.params.warmup_min_lr": 1e-4},
      "scheduler.params.warmup_min_lr=0.0001",
      "begins at 0",
    ),
    (
      DECAYING | {"scheduler.params.warmup_num_steps": 0.1},
      "scheduler.params.warmup_num_steps=0.1",
      "a whole number",
    ),
    (
      DECAYING | {"scheduler.params.warmup_type": "cos"},
      'scheduler.params.warmup_type="cos"',
      '"log"',
    ),
    (
      DECAYING | {"scheduler.params.total_num_steps": 0},
      "scheduler.params.total_num_steps=0",
      "from 1",
    ),
    (
      COSINE | {"scheduler.params.cos_min_ratio": 0.1},
      "scheduler.params.cos_min_ratio=0.1",
      "an unknown learning rate",
    ),
    (
      COSINE | {"scheduler.params.warmup_min_ratio": 0.1},
      "scheduler.params.warmup_min_ratio=0.1",
      "begins at 0",
    ),
    ({"comet.enabled": True}, "comet.enabled=true", "config.tracking.writers"),
    (
      {"elasticity.enabled": True, "elasticity.min_gpus": 1},
      "elasticity.enabled=true",
      "train_batch_size",
    ),
    (
      {"sparse_attention.mode": "fixed", "sparse_attention.block": 16},
      'sparse_attention.mode="fixed"',
      "dense",
    ),
    ({"pipeline.stages": "auto"}, 'pipeline.stages="auto"', "config.mesh.tensor"),
    (
      {"compression_training.row_pruning.shared_parameters.enabled": True},
      "compression_training.row_pruning.shared_parameters.enabled=true",
      "leave it out",
    ),
    ({"gradient_allreduce_op": "sum"}, 'gradient_allreduce_op="sum"', "learning rate"),
    ({"sequence_parallel_size": 2}, "sequence_parallel_size=2", "set it to 1"),
    ({"zero_optimisation.stage": 2}, "zero_optimisation.stage", f"did you mean {ZERO}.stage?"),
    ({f"{ZERO}.overlap_com": True}, f"{ZERO}.overlap_com", f"did you mean {ZERO}.overlap_comm?"),
    ({"weight_dcay": 0.1}, "weight_dcay", "did you mean optimizer.params.weight_decay?"),
    ({"stage": 2}, "stage", f"did you mean {ZERO}.stage?"),
    ({"foo.enabled": 2}, "foo.enabled", "docs/recipes/deepspeed.md"),
  ],
)
def test_unsupported_keys_are_rejected(dotted, key, message):
  """Each message has a way out."""
  (line,) = refused(nested(dotted))
  assert (
    line.startswith(f"ds.json: {key}") and line[len(f"ds.json: {key}")] in ":0" and message in line
  )


def test_all_errors_are_reported():
  keys = [
    line.split()[1]
    for line in refused(
      nested({f"{ZERO}.stage": 7, "optimizer.type": "Lamb", "stages": 1, "lr": 0})
    )
  ]
  assert keys == [f"{ZERO}.stage=7:", 'optimizer.type="Lamb":', "stages:", "lr:"]
  assert refused({f"{ZERO}.stage": 2}) == [
    f'ds.json: "{ZERO}.stage": unknown key; did you mean {ZERO}.stage?'
  ]
  assert refused({"a\nb": "\ud800"})[0].startswith(r'ds.json: "a\nb": unknown key')


@pytest.mark.parametrize("key", deepspeed_keys.known_keys())
def test_known_keys_are_accepted_or_rejected(key):
  """No known key is reported as unknown."""
  section = key.partition(".params.")[0]
  kinds = deepspeed_sections.TYPES.get(section, {})
  types = [
    name
    for name, kind in kinds.items()
    if key.rpartition(".")[2] in kind.params and ".params." in key
  ]
  for kind in types or [None]:
    for value in ("auto", True, False, None, 1, 0.5, "x", [], {}):
      config = nested({key: value} | ({f"{section}.type": kind} if kind else {}))
      try:
        translated(config)
      except RequestError as refusal:
        assert "unknown key" not in str(refusal) and "\n" not in str(refusal)


def test_outcome_names_the_deciding_key():
  became = {
    entry.key: entry.outcome
    for entry in translated(
      nested(
        {
          f"{ZERO}.cpu_offload": False,
          f"{ZERO}.offload_param.device": "cpu",
          f"{ZERO}.offload_optimizer.device": "cpu",
          "tensorboard.enabled": True,
          "tensorboard.job_name": "a",
          "csv_monitor.enabled": True,
          "csv_monitor.job_name": "b",
          "bf16.enabled": True,
          "fp16.enabled": "auto",
          "optimizer.type": "AdamW",
          "optimizer.params.lr": 1e-4,
          "scheduler.type": "WarmupLR",
          "scheduler.params.warmup_max_lr": 1e-5,
        }
      )
    ).entries
  }
  assert became[f"{ZERO}.cpu_offload"] == "no effect: it is off"
  assert became[f"{ZERO}.offload_optimizer.device"] == became[f"{ZERO}.offload_param.device"]
  assert became[f"{ZERO}.offload_param.device"].startswith("--config.memory.offload=all ")
  assert became["csv_monitor.job_name"] == "no effect: the name of the run is a"
  assert became["fp16.enabled"] == "auto: bf16.enabled is true"
  assert became["optimizer.params.lr"].startswith(
    "no effect: scheduler.params.warmup_max_lr is the peak"
  )


def test_format_table():
  found = translated(
    nested({f"{ZERO}.stage": 2, "gradient_accumulation_steps": 4, "gradient_clipping": 1})
  )
  lines = deepspeed_config.format_table(
    found.entries,
    {
      "mesh.zero_stage": "--config.mesh.zero_stage=3",
      "gradient_accumulation_steps": "--gradient_accumulation_steps=8",
    },
  ).splitlines()
  assert lines == [
    f"{ZERO}.stage      2  --config.mesh.zero_stage=2; overridden by --config.mesh.zero_stage=3",
    "gradient_accumulation_steps  4  --config.train.batch_size is sequences per device x 4 x "
    "devices; overridden by --gradient_accumulation_steps=8",
    "gradient_clipping            1  --config.optim.clip_norm=1.0",
  ]
  both = translated(nested(ADAMW | {"optimizer.params.betas": [0.8, 0.9]}))
  assert deepspeed_config.format_table(both.entries, {"optim.b2": "--adam_beta2=0.5"}).endswith(
    "--config.optim.b1=0.8 --config.optim.b2=0.9; overridden by --adam_beta2=0.5"
  )
  assert deepspeed_config.format_table([], {}) == ""


def written(folder, content):
  file = folder / "ds.json"
  file.write_bytes(content if isinstance(content, bytes) else content.encode())
  return file


@pytest.mark.parametrize(
  "text",
  [
    '{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
    '\ufeff{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}',
    '// "a"\n{"fp16": {"enabled": true,}, # {\n "zero_optimization": '
    '/* "stage": 1,\n */ {"stage": 2},\n}\n',
    '{"_note": "// # /* ,]", "fp16": {"enabled": true}, '
    '"zero_optimization": {"stage": 2, "_": "\\"//,}"}}',
  ],
)
def test_file_syntax_is_that_of_deepspeed(tmp_path, text):
  found = deepspeed_config.read(written(tmp_path, text))
  assert found.settings == {"model.compute_dtype": "auto", "mesh.zero_stage": 2}
  notes = [entry.value for entry in found.entries if "a comment" in entry.outcome]
  assert notes == (["// # /* ,]", '"//,}'] if "_note" in text else [])


@pytest.mark.parametrize(
  "content, message",
  [
    (b"", "not JSON: Expecting value: line 1"),
    ('{"fp16": {"enabled": true}\n"bf16": 1}', "not JSON: Expecting ',' delimiter: line 2"),
    ("[1]", "[1] is not an object"),
    ("3", "3 is not an object"),
    ('{"zero_optimization": {"stage": 2, "stage": 2}}', "zero_optimization.stage: occurs twice"),
    ('{"fp16": {}, "fp16": {}}', "fp16: occurs twice"),
    ('{"gradient_clipping": NaN}', "gradient_clipping=NaN: not a finite number"),
    ('{"gradient_clipping": -Infinity}', "gradient_clipping=-Infinity: not a finite number"),
    ('{"gradient_clipping": 1e400}', "gradient_clipping=Infinity: not a finite number"),
    ('{"gradient_clipping": 1' + "0" * 5000 + "}", "not JSON: Exceeds the limit"),
    ('{"a":' * 100_000, "too deep"),
    ("[" * 100_000, "too deep"),
    ('{"a":' * 300 + "1" + "}" * 300, "a.a.a.a.a.a.a.a.a.a.a.a: unknown key"),
    ('{"fp16": ' + "[" * 300 + "]" * 300 + "}", "fp16=[["),
    (b'{"a": "\xff"}', "byte 7 is not UTF-8"),
    ('{"fp16": {}}'.encode("utf-16"), "byte 0 is not UTF-8"),
    (b" " * 2**20 + b"{}", "1,048,578 bytes; too large for a DeepSpeed config"),
  ],
)
def test_invalid_file_is_rejected_in_one_line(tmp_path, content, message):
  file = written(tmp_path, content)
  with pytest.raises(RequestError) as refusal:
    deepspeed_config.read(file)
  assert str(refusal.value).startswith(
    f"{file}: {message}" if message != "too deep" else f"{file}: "
  )
  assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_missing_file_is_rejected(tmp_path):
  for file, message in [
    (tmp_path / "x", "no such file"),
    (tmp_path, "not a file"),
    (Path("a\0b"), "no such file"),
  ]:
    with pytest.raises(RequestError, match=message):
      deepspeed_config.read(file)


# Values of any kind, for any key.
JUNK = [
  None,
  True,
  False,
  0,
  -1,
  2.0,
  3,
  1e9,
  math.nan,
  math.inf,
  10**30,
  "",
  "auto",
  "cpu",
  "2",
  "AdamW",
  "WarmupLR",
]
JUNK += [
  [],
  [1],
  [0.9, 0.99],
  ["a", {}],
  {},
  {"enabled": True},
  {"stage": {"x": []}},
  "\ud800\n",
  2**31,
  {"type": "SGD"},
]


def spoiled(config, rng):
  """The config with some of its parts changed, taken away, put elsewhere or called otherwise."""
  config = copy.deepcopy(config)
  for _ in range(rng.randrange(1, 5)):
    inside, key = config, rng.choice(list(config) or ["fp16"])
    while isinstance(inside.get(key), dict) and inside[key] and rng.random() < 0.8:
      inside = inside[key]
      key = rng.choice(list(inside))
    match rng.randrange(5):
      case 0 | 1:
        inside[key] = copy.deepcopy(rng.choice(JUNK))
      case 2:
        inside.pop(key, None)
      case 3:
        inside[rng.choice(deepspeed_keys.known_keys()).rpartition(".")[2]] = copy.deepcopy(
          rng.choice(JUNK)
        )
      case 4:
        config |= nested({rng.choice(deepspeed_keys.known_keys()): copy.deepcopy(rng.choice(JUNK))})
  return config


def is_right(name, value):
  setting = jaxft.config.BY_NAME[name]
  finite = not isinstance(value, float) or math.isfinite(value)
  return finite and not config_checks.type_error(setting.kind, value) and not setting.check(value)


def test_fuzzed_configs_raise_only_request_errors(tmp_path):
  rng, outcomes = random.Random(0), {True: 0, False: 0}
  for i in range(800):
    config = spoiled((GPT2XL, GPTJ)[i % 2], rng)
    try:
      found = translated(config)
    except RequestError as refusal:
      assert all(
        line.startswith("ds.json: ") and ": " in line[9:] for line in str(refusal).splitlines()
      ), config
      outcomes[False] += 1
    else:
      assert all(is_right(name, value) for name, value in found.settings.items()), config
      assert deepspeed_config.format_table(found.entries, {}).count("\n") == len(found.entries) - 1
      outcomes[True] += 1
  assert min(outcomes.values()) > 100


def test_fuzzed_files_raise_only_request_errors(tmp_path):
  rng, text = random.Random(0), json.dumps(GPTJ).encode()
  for _ in range(300):
    spoilt = bytearray(text)
    for _ in range(rng.randrange(1, 4)):
      at = rng.randrange(len(spoilt))
      spoilt[at : at + rng.randrange(20)] = rng.choice(
        (b"", b'"', b"{", b"}", b"[", b",", b"//", b"/*", b"\xff", b"\0", b"1e999")
      )
    file = written(tmp_path, bytes(spoilt))
    try:
      deepspeed_config.read(file)
    except RequestError as refusal:
      assert all(line.startswith(f"{file}: ") for line in str(refusal).splitlines())


def test_large_file_is_rejected_quickly(tmp_path):
  many = {
    "elasticity": {f"a{i}": i for i in range(20_000)},
    ZERO: {f"overlap_com{i}": i for i in range(20_000)},
  }
  with pytest.raises(RequestError) as refusal:
    deepspeed_config.read(written(tmp_path, json.dumps(many)))
  lines = str(refusal.value).splitlines()
  hint = f"did you mean {ZERO}.overlap_comm?"
  assert len(lines) == 20_001 and hint in lines[1] and hint not in lines[-1]


def test_docs_have_the_generated_table():
  assert deepspeed_keys.markdown_table() in PAGE.read_text()


def test_settings_on_the_page_exist():
  text = PAGE.read_text()
  names = set(re.findall(r"config\.([a-z_]+\.[a-z_0-9]+)", text))
  assert (
    {"mesh.zero_stage", "memory.offload", "optim.end_learning_rate"}
    <= names
    <= jaxft.config.BY_NAME.keys()
  )
  assert f"`{deepspeed_rules.AUTO}`" in text
