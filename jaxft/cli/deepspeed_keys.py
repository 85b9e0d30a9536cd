"""The keys of a DeepSpeed config: what each is here, why it is nothing here, or why it is refused, and the way out.

`jaxft.cli.deepspeed_config` reads a file by this table, and docs/recipes/deepspeed.md shows it. The keys are those of DeepSpeed 0.19.
"""

import math
from typing import Any

from jaxft.cli.deepspeed_rules import (
  AUTO,
  Reading,
  Rule,
  checked,
  count,
  each,
  given,
  is_off,
  nothing,
  off,
  only,
  sets,
  switch,
  when_true,
)
from jaxft.cli.deepspeed_sections import KERNELS, REFUSED, TYPES, optimizer, scheduler

ZERO = "zero_optimization"

# ---- The batch. `jaxft.cli.deepspeed_config.ParsedConfig` has these numbers, as only the run knows how many devices there are.

MICRO_BATCH, ACCUMULATION, TRAIN_BATCH = (
  "train_micro_batch_size_per_gpu",
  "gradient_accumulation_steps",
  "train_batch_size",
)


def _rows(_: Reading, __: str, value: Any) -> str:
  rows = count(value)
  return "nothing: null" if rows is None else f"--config.train.micro_batch_size={rows}"


def _accumulation(_: Reading, __: str, value: Any) -> str:
  steps = count(value)
  return (
    "nothing: null"
    if steps is None
    else f"--config.train.batch_size is rows a device x {steps} x devices"
  )


def _batch(reading: Reading, _: str, value: Any) -> str:
  batch = count(value)
  if batch is None:
    return "nothing: null"
  others = {name: reading.values.get(name) for name in (MICRO_BATCH, ACCUMULATION)}
  others = {
    name: n
    for name, n in others.items()
    if isinstance(n, int) and not isinstance(n, bool) and n > 0
  }
  if others and batch % math.prod(others.values()):
    product = " x ".join(f"{name} ({n})" for name, n in others.items())
    raise ValueError(
      f"it must be {product} x devices; leave one of them out, or make it a multiple"
    )
  return f"--config.train.batch_size={batch}"


# ---- The dtype: five sections say it together.

DTYPES = (
  "fp16.enabled",
  "bf16.enabled",
  "bfloat16.enabled",
  "amp.enabled",
  "torch_autocast.enabled",
)
HALF = "bfloat16 where the device has it, float32 elsewhere: there is no float16, and nothing needs a loss scale"
LEVELS = {"O0": "float32", "O1": "auto", "O2": "auto"}
BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")
FLOAT16 = ("float16", "fp16", "torch.float16", "half")
FLOAT32 = ("float32", "fp32", "torch.float32", "float")


def _dtype_of(reading: Reading, key: str) -> str:
  """What `model.resolve_dtype` is where this key is true."""
  if key == "amp.enabled":
    level = reading.values.get("amp.opt_level")
    return LEVELS.get(level, "auto") if isinstance(level, str) else "auto"
  if key == "torch_autocast.enabled":
    return "auto" if reading.values.get("torch_autocast.dtype") in FLOAT16 else "bfloat16"
  return "auto" if key == "fp16.enabled" else "bfloat16"


def _dtype(reading: Reading, key: str, value: Any) -> str:
  name = "model.compute_dtype"
  if value != "auto":
    switch(value)
  found = {other: reading.values[other] for other in DTYPES if other in reading.values}
  on = [other for other in found if found[other] is True]
  if value is True:
    if _dtype_of(reading, key) != _dtype_of(reading, on[0]):
      raise ValueError(f"{on[0]} is true too; set one of them to false")
    dtype = _dtype_of(reading, key)
    return reading.set(name, dtype, HALF if dtype == "auto" else "")
  if on:
    return f"{'auto' if value == 'auto' else 'nothing'}: {on[0]} is true"
  half = {other: found.get(other) for other in DTYPES[:3]}
  if (
    key == "fp16.enabled"
    and value == "auto"
    and "auto" not in (half["bf16.enabled"], half["bfloat16.enabled"])
  ):
    return reading.set(name, "auto", HALF)
  if value == "auto":
    return AUTO
  if "auto" in found.values() or all(state is None for state in half.values()):
    return "nothing: it is off"
  return reading.set(name, "float32", "as DeepSpeed computes where nothing is on")


def _level(_: Reading, __: str, value: Any) -> str:
  if value is not None and value not in tuple(LEVELS):
    raise ValueError(
      "must be O0, O1 or O2: weights stay float32, or bfloat16 with config.model.param_dtype"
    )
  return "nothing: amp.enabled says the dtype"


def _named_dtype(_: Reading, __: str, value: Any) -> str:
  if value is not None and value not in BFLOAT16 + FLOAT16:
    raise ValueError("must be bfloat16 or float16")
  return "nothing: torch_autocast.enabled says the dtype"


def _param_dtype(reading: Reading, _: str, value: Any) -> str:
  if value in BFLOAT16:
    return reading.set("model.param_dtype", "bfloat16")
  if value is not None and value not in FLOAT32:
    raise ValueError("must be fp32 or bf16, as there is no float16")
  return "nothing: weights are float32"


# ---- ZeRO and offload.

OFFLOADS = {
  f"{ZERO}.offload_optimizer.device": "optimizer",
  f"{ZERO}.cpu_offload": "optimizer",
  f"{ZERO}.offload_param.device": "all",
  f"{ZERO}.cpu_offload_param": "all",
  f"{ZERO}.cpu_offload_params": "all",
}


def _offload(reading: Reading, key: str, value: Any) -> str:
  if key.endswith(".device"):
    if value == "nvme":
      raise ValueError('there is no offload to a disk, only to the host\'s memory: set it to "cpu"')
    if value not in (None, "none", "cpu"):
      raise ValueError('must be "none" or "cpu"')
  else:
    switch(value)
  wanted = {
    OFFLOADS[other]
    for other, device in reading.values.items()
    if other in OFFLOADS and device in ("cpu", True)
  }
  if wanted and value not in ("cpu", True):
    return "nothing: it is off"
  most = "all" if "all" in wanted else "optimizer" if wanted else "none"
  why = {
    "all": "weights, gradient and optimizer state",
    "optimizer": "weights and optimizer state",
    "none": "",
  }[most]
  return reading.set("memory.offload", most, why)


def _stage(reading: Reading, _: str, value: Any) -> str:
  return reading.set("mesh.zero_stage", value)


def _old_zero(reading: Reading, _: str, value: Any) -> str:
  if not isinstance(value, bool):
    raise ValueError("give an object with its keys, such as stage")
  return reading.set("mesh.zero_stage", int(value), "as DeepSpeed reads true and false")


def _shards(reading: Reading, _: str, value: Any) -> str:
  if value in (-1, 0, None) and not isinstance(value, bool):
    return "nothing: it is off"
  return f"{reading.set('mesh.fsdp', value)} {reading.set('mesh.data', -1)}"


def _tensor(reading: Reading, _: str, value: Any) -> str:
  return reading.set("mesh.tensor", 1 if is_off(value) and value is not False else value)


ORDERED = "XLA orders the transfers, a layer at a time"
WHOLE = "always so: the export is a whole model in --config.export.dtype"
QUANTIZED = "what devices send is not quantized: the numbers are more exact, and more bytes travel"
STAGE3 = {
  "prefetch_bucket_size": ORDERED,
  "param_persistence_threshold": ORDERED,
  "model_persistence_threshold": ORDERED,
  "max_live_parameters": ORDERED,
  "max_reuse_distance": ORDERED,
  "module_granularity_threshold": ORDERED,
  "use_all_reduce_for_fetch_params": ORDERED,
  "allgather_sequential": ORDERED,
  "gather_16bit_weights_on_model_save": WHOLE,
  "gather_fp16_weights_on_model_save": WHOLE,
}
ZERO_KEYS = {
  ZERO: Rule(
    "an object with the keys below; `true`: `--config.mesh.zero_stage=1`, `false`: 0",
    _old_zero,
    reads_auto=True,
  ),
  f"{ZERO}.stage": Rule(
    "`--config.mesh.zero_stage`, with `--config.mesh.fsdp=-1` (all devices; the default)", _stage
  ),
  **{
    key: Rule(
      f"`{'cpu' if key.endswith('device') else 'true'}`: `--config.memory.offload={level}`"
      + ("" if level == "all" else ", or what a key for weights says")
      + (
        '; refused: `nvme`, as there is only the host\'s memory (`"cpu"`)'
        if key.endswith("device")
        else ""
      ),
      _offload,
    )
    for key, level in OFFLOADS.items()
  },
  **each(ZERO, "offload_optimizer offload_param", off('give an object, such as {"device": "cpu"}')),
  **each(
    ZERO,
    "cpu_offload_use_pin_memory offload_optimizer.pin_memory offload_param.pin_memory",
    nothing("the host's memory is pinned always"),
  ),
  **each(
    f"{ZERO}.offload_optimizer",
    "nvme_path buffer_count pipeline_read pipeline_write fast_init",
    nothing("it is for an offload to a disk"),
  ),
  **each(
    f"{ZERO}.offload_optimizer",
    "ratio super_offload cpuadam_cores_perc",
    nothing("the host has all of the state, and updates it a layer at a time"),
  ),
  **each(
    f"{ZERO}.offload_param",
    "nvme_path buffer_count buffer_size max_in_cpu",
    nothing("it is for an offload to a disk"),
  ),
  f"{ZERO}.mics_shard_size": Rule(
    "N: `--config.mesh.fsdp=N` with `--config.mesh.data=-1`", _shards
  ),
  **each(
    ZERO,
    "allgather_partitions allgather_bucket_size overlap_comm reduce_scatter reduce_bucket_size contiguous_gradients "
    "use_multi_rank_bucket_allreduce round_robin_gradients grad_hooks legacy_stage1 mics_hierarchical_params_gather "
    "memory_efficient_linear",
    nothing(ORDERED),
  ),
  **{
    f"{ZERO}.{alias}{name}": nothing(why)
    for name, why in STAGE3.items()
    for alias in ("stage3_", "")
  },
  f"{ZERO}.sub_group_size": nothing("the update on the host goes a layer at a time"),
  f"{ZERO}.zero_hpz_partition_size": nothing(
    "weights are gathered over all of mesh.fsdp; --config.mesh.fsdp=8 with --config.mesh.data=-1 stays within a node"
  ),
  **each(
    ZERO,
    "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients",
    nothing(QUANTIZED),
  ),
  **each(
    ZERO,
    "elastic_checkpoint load_from_fp32_weights",
    nothing("a checkpoint of one mesh fits all, in float32"),
  ),
  **each(
    ZERO,
    "ignore_unused_parameters pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
    "enable_sanity_checks save_muon_momentum_buffer_in_memory",
    nothing("it is about DeepSpeed's own modules and buffers"),
  ),
}

# ---- Trackers.


def _writer(name: str) -> Rule:
  def read(reading: Reading, _: str, value: Any) -> str:
    if not switch(value):
      return "nothing: it is off"
    reading.set("tracking.writers", (*reading.settings.get("tracking.writers", ()), name))
    return given("tracking.writers", (name,))

  return Rule(f"`true`: `--config.tracking.writers={name}`", read)


def _run_name(reading: Reading, key: str, value: Any) -> str:
  checked("tracking.run_name", value or "")
  taken = reading.settings.get("tracking.run_name", value)
  if not value or reading.values.get(f"{key.partition('.')[0]}.enabled") is not True:
    return "nothing: it is off"
  return (
    reading.set("tracking.run_name", value)
    if taken == value
    else f"nothing: the run is called {taken}"
  )


NAME = Rule("`--config.tracking.run_name`, where its section is on", _run_name)
TRACKERS = {
  "tensorboard.enabled": _writer("tensorboard"),
  "wandb.enabled": _writer("wandb"),
  "csv_monitor.enabled": nothing("metrics.jsonl is written always"),
  "comet.enabled": off(
    "there is no writer for Comet: name tensorboard, mlflow, wandb or trackio in config.tracking.writers"
  ),
  "tensorboard.job_name": NAME,
  "csv_monitor.job_name": NAME,
  "tensorboard.output_path": nothing(
    "the workdir has its files, or the folder in TENSORBOARD_LOGGING_DIR"
  ),
  "csv_monitor.output_path": nothing("the workdir has metrics.jsonl"),
  "wandb.project": nothing("WANDB_PROJECT names the project"),
  "wandb.team": nothing("WANDB_ENTITY names the team"),
  "wandb.group": nothing("WANDB_RUN_GROUP names the group"),
  **each(
    "comet",
    "samples_log_interval project workspace api_key experiment_name experiment_key online mode",
    nothing("there is no writer for Comet"),
  ),
}

# ---- All of them.

RECOMPUTED = ("memory.remat", "full", "the numbers stay the same")


def _checkpoints(reading: Reading, _: str, value: Any) -> str:
  if value is None:
    return "nothing: null"
  count(value)
  return reading.set(*RECOMPUTED)


SUMMED = "gradients are averaged over tokens, and summed in the compute dtype"
COUNTED = "jaxft.plan counts operations and bytes; --config.train.profile_steps traces steps"
STORED = "checkpoints are in --workdir, which all hosts must see"
LOADED = "rows are counted by step: none is dropped, and a mesh of another shape reads the same"
RULES = {
  TRAIN_BATCH: Rule(
    "`--config.train.batch_size` (rows per optimizer step, over all devices)", _batch
  ),
  MICRO_BATCH: Rule(
    "`--config.train.micro_batch_size`; times accumulation and devices `--config.train.batch_size`",
    _rows,
  ),
  ACCUMULATION: Rule("times rows and devices `--config.train.batch_size`", _accumulation),
  "gradient_clipping": sets("optim.clip_norm"),
  "optimizer.type": Rule("", optimizer),
  "optimizer.legacy_fusion": KERNELS,
  "scheduler.type": Rule("", scheduler),
  "fp16.enabled": Rule(
    f"`true`: `--config.model.compute_dtype=auto` ({HALF}); see below the table",
    _dtype,
    reads_auto=True,
  ),
  **each(
    "fp16",
    "auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis min_loss_scale",
    nothing("without float16 there is no loss scale"),
  ),
  "fp16.fp16_master_weights_and_grads": off(
    "there is no float16: --config.model.param_dtype=bfloat16 takes as much"
  ),
  **{
    f"{name}.{key}": rule
    for name in ("bf16", "bfloat16")
    for key, rule in {
      "enabled": Rule(
        "`true`: `--config.model.compute_dtype=bfloat16`; see below the table",
        _dtype,
        reads_auto=True,
      ),
      "bf16_master_weights_and_grads": when_true("model.param_dtype", "bfloat16"),
      "bf16_optimizer_states": when_true(
        "optim.state_dtype", "bfloat16", "the first moment; the second stays float32"
      ),
      **each(
        "",
        "check_overflow check_grad_overflow immediate_grad_update",
        nothing("a step that is not finite changes no weight"),
      ),
    }.items()
  },
  "amp.enabled": Rule(
    "`true`: as `fp16`; with `opt_level` `O0` `--config.model.compute_dtype=float32`", _dtype, True
  ),
  "amp.opt_level": Rule("`amp.enabled` has it; refused: `O3`", _level),
  **each(
    "amp",
    "cast_model_type patch_torch_functions keep_batchnorm_fp32 master_weights loss_scale cast_model_outputs num_losses "
    "verbosity min_loss_scale max_loss_scale",
    nothing("there is no loss scale, and weights stay float32"),
  ),
  "torch_autocast.enabled": Rule(
    "`true`: as `bf16`; with the dtype `float16` as `fp16`", _dtype, reads_auto=True
  ),
  "torch_autocast.dtype": Rule("`torch_autocast.enabled` has it", _named_dtype),
  "torch_autocast.lower_precision_safe_modules": nothing(
    "matrix products are in the compute dtype, norms in float32"
  ),
  **each(
    "data_types", "grad_accum_dtype buffer_dtype", nothing("micro-batches are summed in float32")
  ),
  "data_types.param_dtype": Rule(
    "`bf16`: `--config.model.param_dtype=bfloat16`; refused: `fp16`", _param_dtype
  ),
  **ZERO_KEYS,
  **each(
    "tensor_parallel",
    "autotp_size tp.tp_size tensor_parallel.tp_size",
    Rule("`--config.mesh.tensor`", _tensor),
  ),
  **each(
    "tensor_parallel",
    "dtype tp_overlap_comm injection_policy_tuple preset_model keep_module_on_host replace_with_kernel_inject "
    "kernel_inject tp.tp_grain_size tensor_parallel.tp_grain_size",
    nothing("heads, feed-forward and vocabulary are split as Megatron does"),
  ),
  **each(
    "activation_checkpointing",
    "partition_activations cpu_checkpointing",
    when_true(*RECOMPUTED),
  ),
  "activation_checkpointing.number_checkpoints": Rule(
    "a number: `--config.memory.remat=full`", _checkpoints
  ),
  **each(
    "activation_checkpointing",
    "contiguous_memory_optimization synchronize_checkpoint_boundary profile",
    nothing("XLA lays activations out"),
  ),
  **TRACKERS,
  "steps_per_print": nothing(
    "Trainer turns DeepSpeed's own lines off; --logging_steps says how often there is one"
  ),
  **each("", "wall_clock_breakdown memory_breakdown", nothing(COUNTED)),
  **each(
    "",
    "dump_state log_level",
    nothing("metrics.jsonl, report.html and --print_config say what a run does"),
  ),
  "vocabulary_size": nothing("the tables of the vocabulary are padded"),
  **each(
    "flops_profiler",
    "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    nothing(COUNTED),
  ),
  **each("comms_logger", "enabled verbose prof_all debug prof_ops", nothing(COUNTED)),
  **each("timers.throughput", "enabled synchronized", nothing("metrics.jsonl has tokens a second")),
  **each(
    "",
    "communication_data_type seq_parallel_communication_data_type prescale_gradients gradient_predivide_factor "
    "sparse_gradients disable_allgather allgather_size",
    nothing(SUMMED),
  ),
  "gradient_allreduce_op": only(
    "mean", "a sum would grow with the devices: multiply the learning rate instead"
  ),
  **each(
    "",
    "managed_gradient_accumulation dataloader_drop_last use_data_before_expert_parallelism",
    nothing(LOADED),
  ),
  **each(
    "",
    "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer",
    nothing("every optimizer is for every stage"),
  ),
  "graph_harvesting": nothing("every step is compiled"),
  "sequence_parallel_size": only(
    1, "rows are not split: set it to 1; --config.memory.remat=full saves memory"
  ),
  **each(
    "checkpoint",
    "tag_validation load_universal use_node_local_storage parallel_write.pipeline_stage checkpoint_serialization",
    nothing(STORED),
  ),
  **each(
    "checkpoint.writer",
    "type io_buffer_size io_buffer_double io_multiplier show_statistics data_parallel decoupled",
    nothing(STORED),
  ),
  **each(
    "nebula",
    "enabled enable_nebula_load load_path nebula_load_path persistent_storage_path persistent_time_interval "
    "num_of_version_in_retention",
    nothing(STORED),
  ),
  **each(
    "aio",
    "block_size queue_depth intra_op_parallelism thread_count single_submit overlap_events use_gds",
    nothing("it is for an offload to a disk"),
  ),
}
# Sections whose keys are many or free, none of which means anything here.
FREE = {
  "compile": "every step is compiled",
  "autotuning": "jaxft.plan --fit looks for the fastest settings that fit",
  "datastates_ckpt": STORED,
  "tensor_parallel.partition_config": "heads, feed-forward and vocabulary are split as Megatron does",
  f"{ZERO}.leaf_module": "it is about DeepSpeed's own modules and buffers",
  f"{ZERO}.zeropp_loco_param": QUANTIZED,
}
CURRICULUM = "rows are drawn by data.shuffle_seed, in one length: leave it out"
# Sections that are refused where they are on, by `enabled` or by being there.
SWITCHED = {
  "sparse_attention": "attention is dense: leave it out; GPT-Neo's local layers are as its config.json has them",
  "elasticity": f"a run keeps its batch on any number of devices: give {TRAIN_BATCH}, and leave elasticity out",
  "curriculum_learning": CURRICULUM,
  "data_efficiency": CURRICULUM,
  "progressive_layer_drop": "all layers are trained: leave it out; config.train.only freezes some",
  "compression_training": "nothing is pruned or quantized in training: leave it out, and compress the exported model",
  "quantize_training": "nothing is quantized in training: leave it out, and compress the exported model",
  "weight_quantization": "nothing is quantized in training: leave it out, and compress the exported model",
  "eigenvalue": "nothing is quantized in training: leave it out",
  "hybrid_engine": "this is no RLHF: leave it out",
  "expert_parallel": "these models have no experts: leave it out",
  "pipeline": "there are no pipeline stages: leave it out; config.mesh.fsdp and config.mesh.tensor split a model",
  f"{ZERO}.zenflow": "every weight is updated at every step: leave it out",
}


def sections() -> set[str]:
  """Everything that holds keys."""
  names = [
    *RULES,
    *(f"{name}.x" for name in FREE | SWITCHED),
    *(f"{section}.params.x" for section in TYPES),
  ]
  return {name[:i] for name in names for i in range(len(name)) if name[i] == "."}


def known_keys() -> list[str]:
  """Every key by its dotted name; of sections with free keys the section."""
  params = [
    f"{section}.params.{name}"
    for section, kinds in TYPES.items()
    for it in kinds.values()
    for name in it.params
  ]
  return [*RULES, *dict.fromkeys(params), *FREE, *SWITCHED]


def markdown_table() -> str:
  """All of them in a table, for docs/recipes/deepspeed.md."""
  rows = {}  # (the section, what is said) -> the last parts of its keys
  for key, rule in RULES.items():
    section, _, name = key.rpartition(".")
    if name == "type" and section in TYPES:
      _add_kinds(rows, section)
    else:
      rows.setdefault((section, rule.says), []).append(name)
  rows |= {(name, f"nothing: {why}"): ["*"] for name, why in FREE.items()}
  rows |= {
    (name, f"refused, unless it is off: {way_out}"): ["*"] for name, way_out in SWITCHED.items()
  }
  lines = [f"| {_keys_of(section, names)} | {says} |" for (section, says), names in rows.items()]
  return "\n".join(["| DeepSpeed | jaxft |", "|---|---|", *lines])


def _add_kinds(rows: dict[tuple[str, str], list[str]], section: str) -> None:
  """Rows of the types of the optimizer or the scheduler, and of their parameters."""
  setting, kinds = (
    {"optimizer": "optim.name", "scheduler": "optim.schedule"}[section],
    TYPES[section],
  )
  for name, kind in kinds.items():
    rows.setdefault((f"{section}.type=", f"`--config.{setting}={kind.setting}`"), []).append(name)
  for name, why in REFUSED[section].items():
    rows.setdefault((f"{section}.type=", f"refused: {why}"), []).append(name)
  first = {
    id(kind.params): name for name, kind in reversed(kinds.items())
  }  # one name for all that have the same
  for kind in kinds.values():
    for param, rule in kind.params.items():
      those = [name for name in first.values() if param in kinds[name].params]
      like = [name for name in those if kinds[name].params[param] == rule]
      whose = (
        ""
        if len(like) == len(those)
        else " of " + ", ".join(f"`{name}`" for name in reversed(like))
      )
      names = rows.setdefault((f"{section}.params{whose}", rule.says), [])
      names.extend([param] if param not in names else [])


def _keys_of(section: str, names: list[str]) -> str:
  """The first cell of a row."""
  listed = ", ".join(f"`{name}`" for name in names)
  if section.endswith("=") or not section:
    return f"`{section[:-1]}` {listed}" if section else listed
  section, of, whose = section.partition(" of ")
  return (f"`{section}.{names[0]}`" if len(names) == 1 else f"`{section}`: {listed}") + of + whose
