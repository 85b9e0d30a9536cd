"""The rules of all keys of a DeepSpeed config: a setting, ignored and why, or refused and why.

`jaxft.cli.deepspeed_config` reads a file by this table, and docs/recipes/deepspeed.md shows it. The
keys are those of DeepSpeed 0.19.
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

# ---- The batch. `ParsedConfig` has these numbers, as only the run knows its devices.

MICRO_BATCH = "train_micro_batch_size_per_gpu"
ACCUMULATION = "gradient_accumulation_steps"
TRAIN_BATCH = "train_batch_size"


def _batch(ctx: Context, _: str, value: object) -> str:
  batch = to_count(value)
  if batch is None:
    return "nothing: null"
  factors = {}
  for name in (MICRO_BATCH, ACCUMULATION):
    n = ctx.values.get(name)
    if isinstance(n, int) and not isinstance(n, bool) and n > 0:
      factors[name] = n
  if factors and batch % math.prod(factors.values()):
    product = " x ".join(f"{name} ({n})" for name, n in factors.items())
    raise ValueError(
      f"it must be {product} x devices; leave one of them out, or make it a multiple"
    )
  return f"--config.train.batch_size={batch}"


# ---- The dtype: five sections decide it together.

DTYPES = tuple(f"{it}.enabled" for it in ("fp16", "bf16", "bfloat16", "amp", "torch_autocast"))
HALF_NOTE = (
  "bfloat16 where the device has it, float32 elsewhere: there is no float16, and nothing needs a "
  "loss scale"
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
      raise ValueError(f"{on[0]} is true too; set one of them to false")
    dtype = _dtype_of(ctx, key)
    return ctx.set(name, dtype, HALF_NOTE if dtype == "auto" else "")
  if on:
    return f"{'auto' if value == 'auto' else 'nothing'}: {on[0]} is true"
  fp16, *bfloat16 = (states.get(other) for other in DTYPES[:3])
  if key == "fp16.enabled" and value == "auto" and "auto" not in bfloat16:
    return ctx.set(name, "auto", HALF_NOTE)
  if value == "auto":
    return AUTO
  if "auto" in states.values() or all(state is None for state in (fp16, *bfloat16)):
    return "nothing: it is off"
  return ctx.set(name, "float32", "as DeepSpeed computes where nothing is on")


def _dtype_rule(doc: str) -> Rule:
  return Rule(doc, _dtype, handles_auto=True)


def _amp_level(_: Context, __: str, value: object) -> str:
  if value is not None and value not in tuple(AMP_LEVELS):
    raise ValueError(
      "must be O0, O1 or O2: weights stay float32, or bfloat16 with config.model.param_dtype"
    )
  return "nothing: amp.enabled says the dtype"


def _autocast_dtype(_: Context, __: str, value: object) -> str:
  if value is not None and value not in BFLOAT16 + FLOAT16:
    raise ValueError("must be bfloat16 or float16")
  return "nothing: torch_autocast.enabled says the dtype"


def _param_dtype(ctx: Context, _: str, value: object) -> str:
  if value in BFLOAT16:
    return ctx.set("model.param_dtype", "bfloat16")
  if value is not None and value not in FLOAT32:
    raise ValueError("must be fp32 or bf16, as there is no float16")
  return "nothing: weights are float32"


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
      raise ValueError('there is no offload to a disk, only to the host\'s memory: set it to "cpu"')
    if value not in (None, "none", "cpu"):
      raise ValueError('must be "none" or "cpu"')
  else:
    to_bool(value)
  levels = {
    level for other, level in OFFLOAD_LEVELS.items() if ctx.values.get(other) in ("cpu", True)
  }
  if levels and value not in ("cpu", True):
    return "nothing: it is off"
  if "all" in levels:
    return ctx.set("memory.offload", "all", "weights, gradient and optimizer state")
  if levels:
    return ctx.set("memory.offload", "optimizer", "weights and optimizer state")
  return ctx.set("memory.offload", "none")


def _zero_switch(ctx: Context, _: str, value: object) -> str:
  if not isinstance(value, bool):
    raise ValueError("give an object with its keys, such as stage")
  return ctx.set("mesh.zero_stage", int(value), "as DeepSpeed reads true and false")


def _mics_shard_size(ctx: Context, _: str, value: object) -> str:
  if value in (-1, 0, None) and not isinstance(value, bool):
    return "nothing: it is off"
  return f"{ctx.set('mesh.fsdp', value)} {ctx.set('mesh.data', -1)}"


def _tensor_parallel(ctx: Context, _: str, value: object) -> str:
  return ctx.set("mesh.tensor", 1 if is_off(value) and value is not False else value)


ORDERED = "XLA orders the transfers, a layer at a time"
WHOLE_MODEL = "always so: the export is a whole model in --config.export.dtype"
OWN_MODULES = "it is about DeepSpeed's own modules and buffers"
QUANTIZED = "what devices send is not quantized: the numbers are more exact, and more bytes travel"
FOR_DISK = ignored("it is for an offload to a disk")
NO_NVME = '; refused: `nvme`, as there is only the host\'s memory (`"cpu"`)'
TRANSFERS = (
  "prefetch_bucket_size param_persistence_threshold model_persistence_threshold "
  "max_live_parameters max_reuse_distance module_granularity_threshold "
  "use_all_reduce_for_fetch_params allgather_sequential"
)
SAVES = " ".join(f"gather_{it}_weights_on_model_save" for it in ("16bit", "fp16"))
STAGE3 = dict.fromkeys(TRANSFERS.split(), ORDERED) | dict.fromkeys(SAVES.split(), WHOLE_MODEL)
ZERO_KEYS = {
  ZERO: Rule(
    "an object with the keys below; `true`: `--config.mesh.zero_stage=1`, `false`: 0",
    _zero_switch,
    handles_auto=True,
  ),
  f"{ZERO}.stage": maps_to("mesh.zero_stage")._replace(
    doc="`--config.mesh.zero_stage`, with `--config.mesh.fsdp=-1` (all devices; the default)"
  ),
  **{
    key: Rule(
      f"`{'cpu' if key.endswith('device') else 'true'}`: `--config.memory.offload={level}`"
      + ("" if level == "all" else ", or what a key for weights says")
      + (NO_NVME if key.endswith("device") else ""),
      _offload,
    )
    for key, level in OFFLOAD_LEVELS.items()
  },
  f"{ZERO}: offload_optimizer offload_param": must_be_off(
    'give an object, such as {"device": "cpu"}'
  ),
  f"{ZERO}: cpu_offload_use_pin_memory offload_optimizer.pin_memory offload_param.pin_memory": (
    ignored("the host's memory is pinned always")
  ),
  f"{ZERO}.offload_optimizer: nvme_path buffer_count pipeline_read pipeline_write fast_init": (
    FOR_DISK
  ),
  f"{ZERO}.offload_optimizer: ratio super_offload cpuadam_cores_perc": ignored(
    "the host has all of the state, and updates it a layer at a time"
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
  f"{ZERO}.sub_group_size": ignored("the update on the host goes a layer at a time"),
  f"{ZERO}.zero_hpz_partition_size": ignored(
    "weights are gathered over all of mesh.fsdp; --config.mesh.fsdp=8 with --config.mesh.data=-1 "
    "stays within a node"
  ),
  f"{ZERO}: zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients": (
    ignored(QUANTIZED)
  ),
  f"{ZERO}: elastic_checkpoint load_from_fp32_weights": ignored(
    "a checkpoint of one mesh fits all, in float32"
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
      return "nothing: it is off"
    others = ctx.settings.get("tracking.writers")
    ctx.set("tracking.writers", (*others, name) if isinstance(others, tuple) else (name,))
    return as_flag("tracking.writers", (name,))

  return Rule(f"`true`: `--config.tracking.writers={name}`", translate)


def _run_name(ctx: Context, key: str, value: object) -> str:
  validate("tracking.run_name", value or "")
  name = ctx.settings.get("tracking.run_name", value)
  if not value or ctx.values.get(f"{key.partition('.')[0]}.enabled") is not True:
    return "nothing: it is off"
  if name != value:
    return f"nothing: the run is called {name}"
  return ctx.set("tracking.run_name", value)


RUN_NAME = Rule("`--config.tracking.run_name`, where its section is on", _run_name)
NO_COMET = "there is no writer for Comet"
TRACKERS = {
  "tensorboard.enabled": _tracker("tensorboard"),
  "wandb.enabled": _tracker("wandb"),
  "csv_monitor.enabled": ignored("metrics.jsonl is written always"),
  "comet.enabled": must_be_off(
    f"{NO_COMET}: name tensorboard, mlflow, wandb or trackio in config.tracking.writers"
  ),
  "tensorboard.job_name": RUN_NAME,
  "csv_monitor.job_name": RUN_NAME,
  "tensorboard.output_path": ignored(
    "the workdir has its files, or the folder in TENSORBOARD_LOGGING_DIR"
  ),
  "csv_monitor.output_path": ignored("the workdir has metrics.jsonl"),
  "wandb.project": ignored("WANDB_PROJECT names the project"),
  "wandb.team": ignored("WANDB_ENTITY names the team"),
  "wandb.group": ignored("WANDB_RUN_GROUP names the group"),
  "comet: samples_log_interval project workspace api_key experiment_name experiment_key online "
  "mode": ignored(NO_COMET),
}

# ---- All of them.

FULL_REMAT = ("memory.remat", "full", "the numbers stay the same")


def _checkpoints(ctx: Context, _: str, value: object) -> str:
  if value is None:
    return "nothing: null"
  to_count(value)
  return ctx.set(*FULL_REMAT)


MEGATRON = "heads, feed-forward and vocabulary are split as Megatron does"
COUNTED = "jaxft.plan counts operations and bytes; --config.train.profile_steps traces steps"
STORED = "checkpoints are in --workdir, which all hosts must see"
# By the names of `by_key`.
TABLE = {
  TRAIN_BATCH: Rule(
    "`--config.train.batch_size` (rows per optimizer step, over all devices)", _batch
  ),
  MICRO_BATCH: counts(
    "`--config.train.micro_batch_size`; times accumulation and devices `--config.train.batch_size`",
    "--config.train.micro_batch_size={}",
  ),
  ACCUMULATION: counts(
    "times rows and devices `--config.train.batch_size`",
    "--config.train.batch_size is rows a device x {} x devices",
  ),
  "gradient_clipping": maps_to("optim.clip_norm"),
  "optimizer.type": Rule("", optimizer_type),
  "optimizer.legacy_fusion": KERNELS,
  "scheduler.type": Rule("", scheduler_type),
  "fp16.enabled": _dtype_rule(
    f"`true`: `--config.model.compute_dtype=auto` ({HALF_NOTE}); see below the table"
  ),
  "fp16: auto_cast loss_scale initial_scale_power loss_scale_window hysteresis "
  "consecutive_hysteresis min_loss_scale": ignored("without float16 there is no loss scale"),
  "fp16.fp16_master_weights_and_grads": must_be_off(
    "there is no float16: --config.model.param_dtype=bfloat16 takes as much"
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
        "a step that is not finite changes no weight"
      ),
    }.items()
  },
  "amp.enabled": _dtype_rule(
    "`true`: as `fp16`; with `opt_level` `O0` `--config.model.compute_dtype=float32`"
  ),
  "amp.opt_level": Rule("`amp.enabled` has it; refused: `O3`", _amp_level),
  "amp: cast_model_type patch_torch_functions keep_batchnorm_fp32 master_weights loss_scale "
  "cast_model_outputs num_losses verbosity min_loss_scale max_loss_scale": ignored(
    "there is no loss scale, and weights stay float32"
  ),
  "torch_autocast.enabled": _dtype_rule("`true`: as `bf16`; with the dtype `float16` as `fp16`"),
  "torch_autocast.dtype": Rule("`torch_autocast.enabled` has it", _autocast_dtype),
  "torch_autocast.lower_precision_safe_modules": ignored(
    "matrix products are in the compute dtype, norms in float32"
  ),
  "data_types: grad_accum_dtype buffer_dtype": ignored("micro-batches are summed in float32"),
  "data_types.param_dtype": Rule(
    "`bf16`: `--config.model.param_dtype=bfloat16`; refused: `fp16`", _param_dtype
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
  "profile": ignored("XLA lays activations out"),
  **TRACKERS,
  "steps_per_print": ignored(
    "Trainer turns DeepSpeed's own lines off; --logging_steps says how often there is one"
  ),
  "wall_clock_breakdown memory_breakdown": ignored(COUNTED),
  "dump_state log_level": ignored(
    "metrics.jsonl, report.html and --print_config say what a run does"
  ),
  "vocabulary_size": ignored("the tables of the vocabulary are padded"),
  "flops_profiler: enabled recompute_fwd_factor profile_step module_depth top_modules detailed "
  "output_file": ignored(COUNTED),
  "comms_logger: enabled verbose prof_all debug prof_ops": ignored(COUNTED),
  "timers.throughput: enabled synchronized": ignored("metrics.jsonl has tokens a second"),
  "communication_data_type seq_parallel_communication_data_type prescale_gradients "
  "gradient_predivide_factor sparse_gradients disable_allgather allgather_size": ignored(
    "gradients are averaged over tokens, and summed in the compute dtype"
  ),
  "gradient_allreduce_op": must_be(
    "mean", "a sum would grow with the devices: multiply the learning rate instead"
  ),
  "managed_gradient_accumulation dataloader_drop_last use_data_before_expert_parallelism": (
    ignored("rows are counted by step: none is dropped, and a mesh of another shape reads the same")
  ),
  "zero_allow_untested_optimizer zero_force_ds_cpu_optimizer": ignored(
    "every optimizer is for every stage"
  ),
  "graph_harvesting": ignored("every step is compiled"),
  "sequence_parallel_size": must_be(
    1, "rows are not split: set it to 1; --config.memory.remat=full saves memory"
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
# Sections whose keys are many or free, none of which has a meaning here.
IGNORED_SECTIONS = {
  "compile": "every step is compiled",
  "autotuning": "jaxft.plan --fit looks for the fastest settings that fit",
  "datastates_ckpt": STORED,
  "tensor_parallel.partition_config": MEGATRON,
  f"{ZERO}.leaf_module": OWN_MODULES,
  f"{ZERO}.zeropp_loco_param": QUANTIZED,
}
CURRICULUM = "rows are drawn by data.shuffle_seed, in one length: leave it out"
NOT_QUANTIZED = "nothing is quantized in training: leave it out"
COMPRESS = "and compress the exported model"
# Sections that are refused if they are on, by `enabled` or by their presence.
UNSUPPORTED_SECTIONS = {
  "sparse_attention": "attention is dense: leave it out; GPT-Neo's local layers are as its "
  "config.json has them",
  "elasticity": f"a run keeps its batch on any number of devices: give {TRAIN_BATCH}, and leave "
  "elasticity out",
  "curriculum_learning": CURRICULUM,
  "data_efficiency": CURRICULUM,
  "progressive_layer_drop": "all layers are trained: leave it out; "
  "config.train.trainable_params freezes some",
  "compression_training": f"nothing is pruned or quantized in training: leave it out, {COMPRESS}",
  "quantize_training": f"{NOT_QUANTIZED}, {COMPRESS}",
  "weight_quantization": f"{NOT_QUANTIZED}, {COMPRESS}",
  "eigenvalue": NOT_QUANTIZED,
  "hybrid_engine": "this is no RLHF: leave it out",
  "expert_parallel": "these models have no experts: leave it out",
  "pipeline": "there are no pipeline stages: leave it out; config.mesh.fsdp and config.mesh.tensor "
  "split a model",
  f"{ZERO}.zenflow": "every weight is updated at every step: leave it out",
}


def sections() -> set[str]:
  """Return the dotted names of everything that has keys."""
  names = [
    *RULES,
    *(f"{name}.x" for name in IGNORED_SECTIONS | UNSUPPORTED_SECTIONS),
    *(f"{section}.params.x" for section in TYPES),
  ]
  return {name[:i] for name in names for i in range(len(name)) if name[i] == "."}


def known_keys() -> list[str]:
  """Return the dotted name of every key, or of the section if its keys are free."""
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
  rows |= {(name, f"nothing: {why}"): ["*"] for name, why in IGNORED_SECTIONS.items()}
  for name, way_out in UNSUPPORTED_SECTIONS.items():
    rows[name, f"refused, unless it is off: {way_out}"] = ["*"]
  lines = [f"| {_format_keys(section, names)} | {doc} |" for (section, doc), names in rows.items()]
  return "\n".join(["| DeepSpeed | jaxft |", "|---|---|", *lines])


def _add_types(rows: dict[tuple[str, str], list[str]], section: str) -> None:
  """Add rows of the types of the optimizer or the scheduler, and of their parameters."""
  setting = {"optimizer": "optim.name", "scheduler": "optim.schedule"}[section]
  types = TYPES[section]
  for name, type_rule in types.items():
    doc = f"`--config.{setting}={type_rule.setting}`"
    rows.setdefault((f"{section}.type=", doc), []).append(name)
  for name, why in UNSUPPORTED[section].items():
    rows.setdefault((f"{section}.type=", f"refused: {why}"), []).append(name)
  # One name for all types with the same parameters.
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
