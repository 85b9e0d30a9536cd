"""Rules for all keys of a DeepSpeed config: each becomes a setting, is ignored, or is refused.

`jaxft.cli.deepspeed_config` uses this table to read a file, and docs/recipes/deepspeed.md shows it.
The keys are those of DeepSpeed 0.19.
"""

import math

from jaxft.cli.deepspeed_rules import (
  AUTO,
  Context,
  Rule,
  as_flag,
  by_key,
  counts,
  ignored,
  is_off,
  maps_to,
  must_be,
  must_be_off,
  to_bool,
  to_count,
  validate,
  when_true,
)
from jaxft.cli.deepspeed_sections import (
  FIRST_MOMENT,
  KERNELS,
  TYPES,
  UNSUPPORTED,
  optimizer_type,
  scheduler_type,
)

ZERO = "zero_optimization"

# ---- The batch. `ParsedConfig` passes these numbers on, as only the run knows its devices.

MICRO_BATCH = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
TRAIN_BATCH = "train_batch_size"


def _batch(ctx: Context, _: str, value: object) -> str:
  batch = to_count(value)
  if batch is None:
    return "no effect: null"
  factors = {}
  for name in (MICRO_BATCH, ACCUMULATION):
    n = ctx.values.get(name)
    if isinstance(n, int) and not isinstance(n, bool) and n > 0:
      factors[name] = n
  if factors and batch % math.prod(factors.values()):
    product = " x ".join(f"{name} ({n})" for name, n in factors.items())
    raise ValueError(f"must be {product} x devices; leave one of them out, or make it a multiple")
  return f"--config.train.batch_size={batch}"


# ---- The dtype: five sections set it together.

DTYPES = tuple(f"{it}.enabled" for it in ("fp16", "bf16", "bfloat16", "amp", "torch_autocast"))
HALF_NOTE = (
  "bfloat16 if the device supports it, else float32; float16 is not supported, so no loss scale is "
  "needed"
)
AMP_LEVELS = {"O0": "float32", "O1": "auto", "O2": "auto"}
BFLOAT16 = ("bfloat16", "bf16", "torch.bfloat16")
FLOAT16 = ("float16", "fp16", "torch.float16", "half")
FLOAT32 = ("float32", "fp32", "torch.float32", "float")


def _dtype_of(ctx: Context, key: str) -> str:
  """Return the value of `model.compute_dtype` if this key is true."""
  if key == "amp.enabled":
    level = ctx.values.get("amp.opt_level")
    return AMP_LEVELS.get(level, "auto") if isinstance(level, str) else "auto"
  if key == "torch_autocast.enabled":
    return "auto" if ctx.values.get("torch_autocast.dtype") in FLOAT16 else "bfloat16"
  return "auto" if key == "fp16.enabled" else "bfloat16"


def _dtype(ctx: Context, key: str, value: object) -> str:
  name = "model.compute_dtype"
  if value != "auto":
    to_bool(value)
  states = {other: ctx.values[other] for other in DTYPES if other in ctx.values}
  on = [other for other in states if states[other] is True]
  if value is True:
    if _dtype_of(ctx, key) != _dtype_of(ctx, on[0]):
      raise ValueError(f"conflicts with {on[0]}, which is true too; set one of them to false")
    dtype = _dtype_of(ctx, key)
    return ctx.set(name, dtype, HALF_NOTE if dtype == "auto" else "")
  if on:
    return f"{'auto' if value == 'auto' else 'no effect'}: {on[0]} is true"
  fp16, *bfloat16 = (states.get(other) for other in DTYPES[:3])
  if key == "fp16.enabled" and value == "auto" and "auto" not in bfloat16:
    return ctx.set(name, "auto", HALF_NOTE)
  if value == "auto":
    return AUTO
  if "auto" in states.values() or all(state is None for state in (fp16, *bfloat16)):
    return "no effect: it is off"
  return ctx.set(name, "float32", "DeepSpeed's dtype if no section is on")


def _dtype_rule(doc: str) -> Rule:
  return Rule(doc, _dtype, handles_auto=True)


def _amp_level(_: Context, __: str, value: object) -> str:
  if value is not None and value not in tuple(AMP_LEVELS):
    raise ValueError(
      "must be O0, O1 or O2: weights stay float32, or bfloat16 with config.model.param_dtype"
    )
  return "no effect: amp.enabled sets the dtype"


def _autocast_dtype(_: Context, __: str, value: object) -> str:
  if value is not None and value not in BFLOAT16 + FLOAT16:
    raise ValueError("must be bfloat16 or float16")
  return "no effect: torch_autocast.enabled sets the dtype"


def _param_dtype(ctx: Context, _: str, value: object) -> str:
  if value in BFLOAT16:
    return ctx.set("model.param_dtype", "bfloat16")
  if value is not None and value not in FLOAT32:
    raise ValueError("must be fp32 or bf16; float16 is not supported")
  return "no effect: weights are float32"


# ---- ZeRO and offload.

OFFLOAD_LEVELS = {
  f"{ZERO}.offload_optimizer.device": "optimizer",
  f"{ZERO}.cpu_offload": "optimizer",
  f"{ZERO}.offload_param.device": "all",
  f"{ZERO}.cpu_offload_param": "all",
  f"{ZERO}.cpu_offload_params": "all",
}


def _offload(ctx: Context, key: str, value: object) -> str:
  if key.endswith(".device"):
    if value == "nvme":
      raise ValueError('offload to disk is not supported; set it to "cpu" for host memory')
    if value not in (None, "none", "cpu"):
      raise ValueError('must be "none" or "cpu"')
  else:
    to_bool(value)
  levels = {
    level for other, level in OFFLOAD_LEVELS.items() if ctx.values.get(other) in ("cpu", True)
  }
  if levels and value not in ("cpu", True):
    return "no effect: it is off"
  if "all" in levels:
    return ctx.set("memory.offload", "all", "weights, gradients and optimizer state")
  if levels:
    return ctx.set("memory.offload", "optimizer", "weights and optimizer state")
  return ctx.set("memory.offload", "none")


def _zero_switch(ctx: Context, _: str, value: object) -> str:
  if not isinstance(value, bool):
    raise ValueError("must be an object with keys such as stage")
  return ctx.set("mesh.zero_stage", int(value), "as in DeepSpeed for true and false")


def _mics_shard_size(ctx: Context, _: str, value: object) -> str:
  if value in (-1, 0, None) and not isinstance(value, bool):
    return "no effect: it is off"
  return f"{ctx.set('mesh.fsdp', value)} {ctx.set('mesh.data', -1)}"


def _tensor_parallel(ctx: Context, _: str, value: object) -> str:
  return ctx.set("mesh.tensor", 1 if is_off(value) and value is not False else value)


ORDERED = "XLA schedules the transfers, one layer at a time"
WHOLE_MODEL = "the export is always a whole model, in --config.export.dtype"
OWN_MODULES = "applies to DeepSpeed's internal modules and buffers"
QUANTIZED = "collectives are not quantized: more exact, but more bytes"
FOR_DISK = ignored("offload to disk is not supported")
NO_NVME = '; `nvme` is refused, as only host memory (`"cpu"`) is supported'
TRANSFERS = (
  "prefetch_bucket_size param_persistence_threshold model_persistence_threshold "
  "max_live_parameters max_reuse_distance module_granularity_threshold "
  "use_all_reduce_for_fetch_params allgather_sequential"
)
SAVES = " ".join(f"gather_{it}_weights_on_model_save" for it in ("16bit", "fp16"))
STAGE3 = dict.fromkeys(TRANSFERS.split(), ORDERED) | dict.fromkeys(SAVES.split(), WHOLE_MODEL)
ZERO_KEYS = {
  ZERO: Rule(
    "an object with the keys below; `true`: `--config.mesh.zero_stage=1`; `false`: stage 0",
    _zero_switch,
    handles_auto=True,
  ),
  f"{ZERO}.stage": maps_to("mesh.zero_stage")._replace(
    doc="`--config.mesh.zero_stage`, with `--config.mesh.fsdp=-1` (all devices; the default)"
  ),
  **{
    key: Rule(
      f"`{'cpu' if key.endswith('device') else 'true'}`: `--config.memory.offload={level}`"
      + ("" if level == "all" else ", unless a key for weights sets `all`")
      + (NO_NVME if key.endswith("device") else ""),
      _offload,
    )
    for key, level in OFFLOAD_LEVELS.items()
  },
  f"{ZERO}: offload_optimizer offload_param": must_be_off(
    'must be an object such as {"device": "cpu"}'
  ),
  f"{ZERO}: cpu_offload_use_pin_memory offload_optimizer.pin_memory offload_param.pin_memory": (
    ignored("host memory is always pinned")
  ),
  f"{ZERO}.offload_optimizer: nvme_path buffer_count pipeline_read pipeline_write fast_init": (
    FOR_DISK
  ),
  f"{ZERO}.offload_optimizer: ratio super_offload cpuadam_cores_perc": ignored(
    "the host holds the whole state and updates it one layer at a time"
  ),
  f"{ZERO}.offload_param: nvme_path buffer_count buffer_size max_in_cpu": FOR_DISK,
  f"{ZERO}.mics_shard_size": Rule(
    "N: `--config.mesh.fsdp=N` with `--config.mesh.data=-1`", _mics_shard_size
  ),
  f"{ZERO}: allgather_partitions allgather_bucket_size overlap_comm reduce_scatter "
  "reduce_bucket_size contiguous_gradients use_multi_rank_bucket_allreduce round_robin_gradients "
  "grad_hooks legacy_stage1 mics_hierarchical_params_gather memory_efficient_linear": ignored(
    ORDERED
  ),
  **{f"{ZERO}: stage3_{name} {name}": ignored(why) for name, why in STAGE3.items()},
  f"{ZERO}.sub_group_size": ignored("the host updates one layer at a time"),
  f"{ZERO}.zero_hpz_partition_size": ignored(
    "weights are gathered over the whole fsdp axis; use --config.mesh.fsdp=8 with "
    "--config.mesh.data=-1 to stay within a node"
  ),
  f"{ZERO}: zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients": (
    ignored(QUANTIZED)
  ),
  f"{ZERO}: elastic_checkpoint load_from_fp32_weights": ignored(
    "a checkpoint of any mesh loads on every mesh, in float32"
  ),
  f"{ZERO}: ignore_unused_parameters pipeline_loading_checkpoint override_module_apply "
  "log_trace_cache_warnings enable_sanity_checks save_muon_momentum_buffer_in_memory": ignored(
    OWN_MODULES
  ),
}

# ---- Trackers.


def _tracker(name: str) -> Rule:
  def translate(ctx: Context, _: str, value: object) -> str:
    if not to_bool(value):
      return "no effect: it is off"
    others = ctx.settings.get("tracking.writers")
    ctx.set("tracking.writers", (*others, name) if isinstance(others, tuple) else (name,))
    return as_flag("tracking.writers", (name,))

  return Rule(f"`true`: `--config.tracking.writers={name}`", translate)


def _run_name(ctx: Context, key: str, value: object) -> str:
  validate("tracking.run_name", value or "")
  name = ctx.settings.get("tracking.run_name", value)
  if not value or ctx.values.get(f"{key.partition('.')[0]}.enabled") is not True:
    return "no effect: it is off"
  if name != value:
    return f"no effect: the name of the run is {name}"
  return ctx.set("tracking.run_name", value)


RUN_NAME = Rule("`--config.tracking.run_name`, if its section is on", _run_name)
NO_COMET = "Comet is not supported"
TRACKERS = {
  "tensorboard.enabled": _tracker("tensorboard"),
  "wandb.enabled": _tracker("wandb"),
  "csv_monitor.enabled": ignored("metrics.jsonl is always written"),
  "comet.enabled": must_be_off(
    f"{NO_COMET}; use tensorboard, mlflow, wandb or trackio in config.tracking.writers"
  ),
  "tensorboard.job_name": RUN_NAME,
  "csv_monitor.job_name": RUN_NAME,
  "tensorboard.output_path": ignored(
    "its files are in the workdir, or in the folder in TENSORBOARD_LOGGING_DIR"
  ),
  "csv_monitor.output_path": ignored("metrics.jsonl is in the workdir"),
  "wandb.project": ignored("set WANDB_PROJECT instead"),
  "wandb.team": ignored("set WANDB_ENTITY instead"),
  "wandb.group": ignored("set WANDB_RUN_GROUP instead"),
  "comet: samples_log_interval project workspace api_key experiment_name experiment_key online "
  "mode": ignored(NO_COMET),
}

# ---- All of them.

FULL_REMAT = ("memory.remat", "full", "with the same results")


def _checkpoints(ctx: Context, _: str, value: object) -> str:
  if value is None:
    return "no effect: null"
  to_count(value)
  return ctx.set(*FULL_REMAT)


MEGATRON = "heads, feed-forward layers and vocabulary are split as in Megatron"
COUNTED = "use jaxft.plan to count operations and bytes, --config.train.profile_steps to trace"
STORED = "checkpoints are in --workdir, which all hosts must share"
# Keys are in the notation of `by_key`.
TABLE = {
  TRAIN_BATCH: Rule(
    "`--config.train.batch_size` (sequences per optimizer step, over all devices)", _batch
  ),
  MICRO_BATCH: counts(
    "`--config.train.micro_batch_size`; multiplied by accumulation steps and devices: "
    "`--config.train.batch_size`",
    "--config.train.micro_batch_size={}",
  ),
  ACCUMULATION: counts(
    "multiplied by sequences per device and devices: `--config.train.batch_size`",
    "--config.train.batch_size is sequences per device x {} x devices",
  ),
  "gradient_clipping": maps_to("optim.clip_norm"),
  "optimizer.type": Rule("", optimizer_type),
  "optimizer.legacy_fusion": KERNELS,
  "scheduler.type": Rule("", scheduler_type),
  "fp16.enabled": _dtype_rule(
    f"`true`: `--config.model.compute_dtype=auto` ({HALF_NOTE}); see below the table"
  ),
  "fp16: auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
  "consecutive_hysteresis min_loss_scale": ignored("no float16, so no loss scale"),
  "fp16.fp16_master_weights_and_grads": must_be_off(
    "float16 is not supported; --config.model.param_dtype=bfloat16 needs the same memory"
  ),
  **{
    f"{name}: {keys}": rule
    for name in ("bf16", "bfloat16")
    for keys, rule in {
      "enabled": _dtype_rule(
        "`true`: `--config.model.compute_dtype=bfloat16`; see below the table"
      ),
      "bf16_master_weights_and_grads": when_true("model.param_dtype", "bfloat16"),
      "bf16_optimizer_states": when_true(*FIRST_MOMENT),
      "check_overflow check_grad_overflow immediate_grad_update": ignored(
        "a non-finite step never changes weights"
      ),
    }.items()
  },
  "amp.enabled": _dtype_rule(
    "`true`: same as `fp16`; with `opt_level` `O0`: `--config.model.compute_dtype=float32`"
  ),
  "amp.opt_level": Rule("see `amp.enabled`; `O3` is refused", _amp_level),
  "amp: cast_model_type patch_torch_functions keep_batchnorm_fp32 master_weights loss_scale "
  "cast_model_outputs num_losses verbosity min_loss_scale max_loss_scale": ignored(
    "no loss scale is needed, and weights stay float32"
  ),
  "torch_autocast.enabled": _dtype_rule(
    "`true`: same as `bf16`; with the dtype `float16`: same as `fp16`"
  ),
  "torch_autocast.dtype": Rule("see `torch_autocast.enabled`", _autocast_dtype),
  "torch_autocast.lower_precision_safe_modules": ignored(
    "matrix products are in the compute dtype, norms in float32"
  ),
  "data_types: grad_accum_dtype buffer_dtype": ignored("micro-batches are summed in float32"),
  "data_types.param_dtype": Rule(
    "`bf16`: `--config.model.param_dtype=bfloat16`; `fp16` is refused", _param_dtype
  ),
  **ZERO_KEYS,
  "tensor_parallel: autotp_size tp.tp_size tensor_parallel.tp_size": Rule(
    "`--config.mesh.tensor`", _tensor_parallel
  ),
  "tensor_parallel: dtype tp_overlap_comm injection_policy_tuple preset_model "
  "keep_module_on_host replace_with_kernel_inject kernel_inject tp.tp_grain_size "
  "tensor_parallel.tp_grain_size": ignored(MEGATRON),
  "activation_checkpointing: partition_activations cpu_checkpointing": when_true(*FULL_REMAT),
  "activation_checkpointing.number_checkpoints": Rule(
    "a number: `--config.memory.remat=full`", _checkpoints
  ),
  "activation_checkpointing: contiguous_memory_optimization synchronize_checkpoint_boundary "
  "profile": ignored("XLA chooses the memory layout of activations"),
  **TRACKERS,
  "steps_per_print": ignored("Trainer disables these lines of DeepSpeed; use --logging_steps"),
  "wall_clock_breakdown memory_breakdown": ignored(COUNTED),
  "dump_state log_level": ignored("see metrics.jsonl, report.html and --print_config"),
  "vocabulary_size": ignored("embedding tables are padded automatically"),
  "flops_profiler: enabled recompute_fwd_factor profile_step module_depth top_modules detailed "
  "output_file": ignored(COUNTED),
  "comms_logger: enabled verbose prof_all debug prof_ops": ignored(COUNTED),
  "timers.throughput: enabled synchronized": ignored("metrics.jsonl has tokens per second"),
  "communication_data_type seq_parallel_communication_data_type prescale_gradients "
  "gradient_predivide_factor sparse_gradients disable_allgather allgather_size": ignored(
    "gradients are averaged over tokens and summed in the compute dtype"
  ),
  "gradient_allreduce_op": must_be(
    "mean", "a sum grows with the number of devices; scale the learning rate instead"
  ),
  "managed_gradient_accumulation dataloader_drop_last use_data_before_expert_parallelism": (
    ignored("a step always reads the same sequences, on a mesh of any shape, and drops none")
  ),
  "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": ignored(
    "every optimizer works with every stage"
  ),
  "graph_harvesting": ignored("every step is compiled"),
  "sequence_parallel_size": must_be(
    1, "sequences are not split; set it to 1, and use --config.memory.remat=full to save memory"
  ),
  "checkpoint: tag_validation load_universal use_node_local_storage "
  "parallel_write.pipeline_stage checkpoint_serialization": ignored(STORED),
  "checkpoint.writer: type io_buffer_size io_buffer_double io_multiplier show_statistics "
  "data_parallel decoupled": ignored(STORED),
  "nebula: enabled enable_nebula_load load_path nebula_load_path persistent_storage_path "
  "persistent_time_interval num_of_version_in_retention": ignored(STORED),
  "aio: block_size queue_depth intra_op_parallelism thread_count single_submit overlap_events "
  "use_gds": FOR_DISK,
}
RULES = by_key(TABLE)
# Ignored sections, with many keys or free ones.
IGNORED_SECTIONS = {
  "compile": "every step is compiled",
  "autotuning": "use jaxft.plan --fit to find the fastest settings that fit",
  "datastates_ckpt": STORED,
  "tensor_parallel.partition_config": MEGATRON,
  f"{ZERO}.leaf_module": OWN_MODULES,
  f"{ZERO}.zeropp_loco_param": QUANTIZED,
}
CURRICULUM = "sequences have one length and a random order from data.shuffle_seed; leave it out"
NOT_QUANTIZED = "quantized training is not supported; leave it out"
COMPRESS = "and compress the exported model"
# Sections that are refused if on: by `enabled` or, without such a key, by their presence.
UNSUPPORTED_SECTIONS = {
  "sparse_attention": "attention is dense, except in the local layers of GPT-Neo's config.json; "
  "leave it out",
  "elasticity": f"a run has the same batch on any number of devices; give {TRAIN_BATCH}, and leave "
  "elasticity out",
  "curriculum_learning": CURRICULUM,
  "data_efficiency": CURRICULUM,
  "progressive_layer_drop": "every step runs all layers; leave it out, or use "
  "config.train.trainable_params to freeze some",
  "compression_training": "pruned or quantized training is not supported; leave it out, "
  f"{COMPRESS}",
  "quantize_training": f"{NOT_QUANTIZED}, {COMPRESS}",
  "weight_quantization": f"{NOT_QUANTIZED}, {COMPRESS}",
  "eigenvalue": NOT_QUANTIZED,
  "hybrid_engine": "RLHF is not supported; leave it out",
  "expert_parallel": "these models have no experts; leave it out",
  "pipeline": "pipeline parallelism is not supported; use config.mesh.fsdp and config.mesh.tensor",
  f"{ZERO}.zenflow": "every step updates all weights; leave it out",
}


def sections() -> set[str]:
  """Return the dotted names of all sections."""
  names = [
    *RULES,
    *(f"{name}.x" for name in IGNORED_SECTIONS | UNSUPPORTED_SECTIONS),
    *(f"{section}.params.x" for section in TYPES),
  ]
  return {name[:i] for name in names for i in range(len(name)) if name[i] == "."}


def known_keys() -> list[str]:
  """Return the dotted names of all keys, and of sections with free keys."""
  params = [
    f"{section}.params.{name}"
    for section, types in TYPES.items()
    for rule in types.values()
    for name in rule.params
  ]
  return [*RULES, *dict.fromkeys(params), *IGNORED_SECTIONS, *UNSUPPORTED_SECTIONS]


def markdown_table() -> str:
  """Return all keys as a Markdown table, for docs/recipes/deepspeed.md."""
  rows = {}  # (section, doc) -> the last parts of its keys
  for key, rule in RULES.items():
    section, _, name = key.rpartition(".")
    if name == "type" and section in TYPES:
      _add_types(rows, section)
    else:
      rows.setdefault((section, rule.doc), []).append(name)
  rows |= {(name, f"no effect: {why}"): ["*"] for name, why in IGNORED_SECTIONS.items()}
  for name, way_out in UNSUPPORTED_SECTIONS.items():
    rows[name, f"refused unless off: {way_out}"] = ["*"]
  lines = [f"| {_format_keys(section, names)} | {doc} |" for (section, doc), names in rows.items()]
  return "\n".join(["| DeepSpeed | jaxft |", "|---|---|", *lines])


def _add_types(rows: dict[tuple[str, str], list[str]], section: str) -> None:
  """Add the rows of all types of optimizers or schedulers, and of their parameters."""
  setting = {"optimizer": "optim.name", "scheduler": "optim.schedule"}[section]
  types = TYPES[section]
  for name, type_rule in types.items():
    doc = f"`--config.{setting}={type_rule.setting}`"
    rows.setdefault((f"{section}.type=", doc), []).append(name)
  for name, why in UNSUPPORTED[section].items():
    rows.setdefault((f"{section}.type=", f"refused: {why}"), []).append(name)
  # Types with the same parameters appear under the name of the first.
  first = {id(type_rule.params): name for name, type_rule in reversed(types.items())}
  for type_rule in types.values():
    for param, rule in type_rule.params.items():
      having = [name for name in first.values() if param in types[name].params]
      same = [name for name in having if types[name].params[param] == rule]
      owners = ", ".join(f"`{name}`" for name in reversed(same))
      owners = f" of {owners}" if len(same) < len(having) else ""
      names = rows.setdefault((f"{section}.params{owners}", rule.doc), [])
      names.extend([param] if param not in names else [])


def _format_keys(section: str, names: list[str]) -> str:
  """Format the first cell of a row."""
  listed = ", ".join(f"`{name}`" for name in names)
  if section.endswith("=") or not section:
    return f"`{section[:-1]}` {listed}" if section else listed
  section, of, owners = section.partition(" of ")
  keys = f"`{section}.{names[0]}`" if len(names) == 1 else f"`{section}`: {listed}"
  return keys + of + owners
