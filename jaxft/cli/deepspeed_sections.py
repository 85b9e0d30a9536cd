"""Types of optimizers and schedulers in a DeepSpeed config, with the rules of their parameters."""

from typing import NamedTuple

from jaxft.cli.deepspeed_rules import (
  AUTO,
  Context,
  Rule,
  by_key,
  ignored,
  is_number,
  is_off,
  maps_to,
  must_be,
  must_be_off,
  to_bool,
  to_count,
  validate,
)


def _lr(ctx: Context, _: str, value: object) -> str:
  validate("optim.learning_rate", value)
  peak = ctx.values.get("scheduler.params.warmup_max_lr")
  has_peak = ctx.type_of("scheduler") in ("warmuplr", "warmupdecaylr") and is_number(peak)
  if has_peak and peak != value:
    return "no effect: scheduler.params.warmup_max_lr is the peak, as in DeepSpeed"
  return ctx.set("optim.learning_rate", value)


def _betas(ctx: Context, _: str, value: object) -> str:
  b1, b2 = _two(value)
  return f"{ctx.set('optim.b1', b1)} {ctx.set('optim.b2', b2)}"


def _muon_beta2(ctx: Context, _: str, value: object) -> str:
  b1, b2 = _two(value)
  validate("optim.b1", b1)
  return ctx.set("optim.b2", b2, "b1 is the momentum")


def _two(value: object) -> list[object]:
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise ValueError("must be a list of two numbers, such as [0.9, 0.999]")
  return list(value)


def _adam_w_mode(ctx: Context, key: str, value: object) -> str:
  if to_bool(value) or value is None:
    return "no effect: always true"
  if ctx.type_of("optimizer") == "adamw":
    return "no effect: DeepSpeed's AdamW does not read it"
  decay = ctx.values.get("optimizer.params.weight_decay")
  if not is_number(decay) or decay:
    raise ValueError(
      "jaxft uses decoupled weight decay, as in AdamW; set it to true, or "
      "optimizer.params.weight_decay to 0"
    )
  return "no effect: no weight decay"


def _torch_adam(ctx: Context, _: str, value: object) -> str:
  if to_bool(value) and "optimizer.params.weight_decay" not in ctx.values:
    why = "torch's default, as weight_decay is not in the file"
    return ctx.set("optim.weight_decay", 0.01, why)
  return "no effect: jaxft has only one Adam"


def _sgd_decay(ctx: Context, _: str, value: object) -> str:
  has_momentum = not is_off(ctx.values.get("optimizer.params.momentum"))
  if value == "auto":
    return AUTO + ("; with decoupled decay" if has_momentum else "")
  if has_momentum and not is_off(value):
    raise ValueError(
      "jaxft's weight decay is decoupled, torch's enters the momentum; set one of the two to 0"
    )
  return ctx.set("optim.weight_decay", value)


def _muon_lr(ctx: Context, _: str, value: object) -> str:
  validate("optim.learning_rate", value)
  if not is_number(ctx.values.get("optimizer.params.adam_lr")):
    raise ValueError(
      "jaxft scales steps of Muon to the size of AdamW's, DeepSpeed does not; give adam_lr, a "
      "learning rate for AdamW"
    )
  return "no effect: adam_lr applies to all weights, as steps of Muon are scaled to AdamW's"


LR = Rule(
  "`--config.optim.learning_rate`, unless `scheduler.params.warmup_max_lr` is the peak", _lr
)
BETAS = Rule("`--config.optim.b1` and `--config.optim.b2`", _betas)
DECAY = maps_to("optim.weight_decay")
EPS = maps_to("optim.eps")
MOMENTUM = maps_to("optim.b1")
KERNELS = ignored("selects another kernel with the same result")
VARIANT = must_be_off("this variant is not supported; leave it out")
FIRST_MOMENT = ("optim.state_dtype", "bfloat16", "the first moment; the second stays float32")
FLOAT32_STATES = Rule(
  "`false`: `--config.optim.state_dtype=bfloat16` (the first moment)",
  lambda ctx, _, value: (
    "no effect: always true" if value is None or to_bool(value) else ctx.set(*FIRST_MOMENT)
  ),
)
ADAM = by_key(
  {
    "lr": LR,
    "betas": BETAS,
    "eps": EPS,
    "weight_decay": DECAY,
    "adam_w_mode adamw_mode": Rule(
      "`true`: no effect; `false` is refused with weight decay, except for `AdamW`",
      _adam_w_mode,
    ),
    "torch_adam": Rule(
      "no effect; `true` without `weight_decay`: `--config.optim.weight_decay=0.01`", _torch_adam
    ),
    "fp32_optimizer_states": FLOAT32_STATES,
    "bias_correction": must_be(True, "moments are always bias-corrected; set it to true"),
    "amsgrad maximize": VARIANT,
    "set_grad_none fused foreach capturable differentiable": KERNELS,
    "max_grad_norm": must_be_off("DeepSpeed refuses it too; use gradient_clipping"),
  }
)
LION = {
  "lr": LR,
  "betas": BETAS,
  "weight_decay": DECAY,
  "fp32_optimizer_states": FLOAT32_STATES,
  "set_grad_none": KERNELS,
}
MUON_LR = Rule(
  "no effect with `adam_lr`, else refused: steps of Muon are scaled to the size of AdamW's",
  _muon_lr,
)
MUON = {
  "lr": MUON_LR,
  "muon_lr": MUON_LR,
  "adam_lr": maps_to("optim.learning_rate"),
  "momentum": MOMENTUM,
  "betas": Rule("the second is `--config.optim.b2`; the first is the momentum", _muon_beta2),
  "eps": EPS,
  "weight_decay": DECAY,
  "ns_method": KERNELS,
}
SGD_DECAY = Rule("`--config.optim.weight_decay`; refused with a momentum", _sgd_decay, True)
SGD = by_key(
  {
    "lr": LR,
    "momentum": MOMENTUM,
    "weight_decay": SGD_DECAY,
    "dampening nesterov maximize": VARIANT,
    "fused foreach differentiable": KERNELS,
  }
)


class TypeRule(NamedTuple):
  """A type of optimizer or scheduler: the value of its setting, and rules by parameter."""

  setting: str
  params: dict[str, Rule]


OPTIMIZERS = {
  **dict.fromkeys("Adam AdamW FusedAdam CPUAdam DeepSpeedCPUAdam".split(), TypeRule("adamw", ADAM)),
  **dict.fromkeys("Lion FusedLion CPULion DeepSpeedCPULion".split(), TypeRule("lion", LION)),
  "Muon": TypeRule("muon", MUON),
  "SGD": TypeRule("sgd", SGD),
}
ONE_BIT = "compressed gradients are not supported; set it to AdamW"
OTHER_OPTIMIZER = "not supported; set it to AdamW, Lion, Muon or SGD"
OTHER_OPTIMIZERS = (
  "Lamb FusedLamb Adagrad DeepSpeedCPUAdagrad MuAdam MuAdamW MuSGD Adadelta Adamax ASGD LBFGS "
  "NAdam RAdam RMSprop Rprop SparseAdam"
)
UNSUPPORTED_OPTIMIZERS = {
  **dict.fromkeys(("OneBitAdam", "ZeroOneAdam", "OneBitLamb"), ONE_BIT),
  **dict.fromkeys(OTHER_OPTIMIZERS.split(), OTHER_OPTIMIZER),
  "Adafactor": "torch's Adafactor scales the learning rate by the weights; set it to AdamW, or "
  "leave the optimizer out and use --config.optim.name=adafactor",
}


def optimizer_type(ctx: Context, _: str, value: object) -> str:
  """Translate optimizer.type."""
  name, rule = _find_type(value, OPTIMIZERS, UNSUPPORTED_OPTIMIZERS, OTHER_OPTIMIZER)
  momentum = ctx.values.get("optimizer.params.momentum")
  rates = ("optimizer.params.lr", "optimizer.params.adam_lr", "scheduler.params.warmup_max_lr")
  outcomes = [ctx.set("optim.name", rule.setting)]
  if name == "SGD" and momentum is None:
    outcomes.append(ctx.set("optim.b1", 0.0, "the file sets no momentum"))
  if name == "Muon" and momentum is None:
    outcomes.append(ctx.set("optim.b1", 0.95, "DeepSpeed's default momentum"))
  if all(ctx.values.get(rate) is None for rate in rates):
    outcomes.append(
      "(the file sets no lr: set by flags or their defaults; DeepSpeed's default is 0.001)"
    )
  return " ".join(outcomes)


def _find_type(
  value: object, types: dict[str, TypeRule], unsupported: dict[str, str], default: str
) -> tuple[str, TypeRule]:
  """Return a type's name as DeepSpeed spells it, and its rule; raises ValueError if unsupported."""
  lower = value.lower() if isinstance(value, str) else ""
  for name, rule in types.items():
    if name.lower() == lower:
      return name, rule
  reasons = (why for name, why in unsupported.items() if name.lower() == lower)
  raise ValueError(next(reasons, default))


def _warmup_start(ctx: Context, _: str, value: object) -> str:
  if not is_number(value) or value < 0:
    raise ValueError("must be a number, at least 0")
  if value and value == ctx.values.get("scheduler.params.warmup_max_lr"):
    return "no effect: equals the peak, so no warm-up"
  if value > 1e-6:
    raise ValueError("the warm-up begins at 0; set it to 0, or to warmup_max_lr for no warm-up")
  return "no effect: the warm-up begins at 0"


def _warmup_steps(ctx: Context, _: str, value: object) -> str:
  validate("optim.warmup_steps", value)
  low, peak = (ctx.values.get(f"scheduler.params.warmup_{name}_lr") for name in ("min", "max"))
  if is_number(low) and low and low == peak:
    return ctx.set("optim.warmup_steps", 0, "as warmup_min_lr is the peak")
  return ctx.set("optim.warmup_steps", value)


def _warmup_type(_: Context, __: str, value: object) -> str:
  if value not in (None, "linear", "log"):
    raise ValueError('must be "linear" or "log"')
  if value == "linear":
    return "no effect: always linear"
  return "no effect: the warm-up is always linear; log rises faster at first"


def _total_steps(ctx: Context, _: str, value: object) -> str:
  to_count(value)
  if value is None:
    return "no effect: null"
  epochs = ctx.set("train.epochs", 0.0, "a schedule ends with the run")
  return f"{ctx.set('train.steps', value)} {epochs}"


def _end_learning_rate(ctx: Context, _: str, value: object) -> str:
  if not is_number(value) or not 0 <= value <= 1:
    raise ValueError("must be a number from 0 to 1")
  why = "this share of optimizer.params.lr"
  if not value:
    return ctx.set("optim.end_learning_rate", 0.0, why)
  peak = ctx.values.get("optimizer.params.lr")
  if not is_number(peak):
    raise ValueError(
      "a share of an unknown learning rate; give optimizer.params.lr, or use "
      "--config.optim.end_learning_rate"
    )
  validate("optim.learning_rate", peak)
  return ctx.set("optim.end_learning_rate", value * peak, why)


WARMUP = {
  "warmup_num_steps": Rule("`--config.optim.warmup_steps`", _warmup_steps),
  "warmup_type": Rule(
    "no effect: the warm-up is always linear; DeepSpeed's default `log` rises faster at first",
    _warmup_type,
  ),
  "last_batch_iteration": must_be(-1, "a run resumes from its own checkpoints; leave it out"),
}
WARMUP_RATES = {
  "warmup_min_lr": Rule(
    "up to 1e-6: no effect, the warm-up begins at 0; `warmup_max_lr`: no warm-up; other values are "
    "refused",
    _warmup_start,
  ),
  "warmup_max_lr": maps_to("optim.learning_rate"),
}
TOTAL_STEPS = {
  "total_num_steps": Rule("`--config.train.steps`: a schedule ends with the run", _total_steps)
}
RATIOS = {
  "warmup_min_ratio": must_be_off("the warm-up begins at 0; set it to 0"),
  "cos_min_ratio": Rule(
    "`--config.optim.end_learning_rate`: this share of `optimizer.params.lr`", _end_learning_rate
  ),
}
SCHEDULERS = {
  "WarmupLR": TypeRule("constant", WARMUP_RATES | WARMUP),
  "WarmupDecayLR": TypeRule("linear", WARMUP_RATES | WARMUP | TOTAL_STEPS),
  "WarmupCosineLR": TypeRule("cosine", WARMUP | TOTAL_STEPS | RATIOS),
}
OTHER_SCHEDULER = "not supported; set it to WarmupLR, WarmupDecayLR or WarmupCosineLR"
UNSUPPORTED_SCHEDULERS = {
  "LRRangeTest": "to test learning rates, start several runs with WarmupLR and compare them with "
  "jaxft.report",
  "OneCycle": OTHER_SCHEDULER,
}


def scheduler_type(ctx: Context, _: str, value: object) -> str:
  """Translate scheduler.type."""
  name, rule = _find_type(value, SCHEDULERS, UNSUPPORTED_SCHEDULERS, OTHER_SCHEDULER)
  notes = ["constant after the warm-up"] if name == "WarmupLR" else []
  if "scheduler.params.warmup_type" not in ctx.values:
    notes.append("linear warm-up; DeepSpeed's default, log, rises faster at first")
  if "scheduler.params.warmup_num_steps" not in ctx.values:
    notes.append("flags or their defaults set its length; DeepSpeed's default is 1,000 steps")
  return ctx.set("optim.schedule", rule.setting, "; ".join(notes))


TYPES = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
UNSUPPORTED = {"optimizer": UNSUPPORTED_OPTIMIZERS, "scheduler": UNSUPPORTED_SCHEDULERS}
