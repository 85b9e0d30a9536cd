"""Types of optimizers and schedulers of a DeepSpeed config, each with its parameters."""

from typing import Any, NamedTuple

from jaxft.cli.deepspeed_rules import (
  AUTO,
  Reading,
  Rule,
  checked,
  count,
  each,
  is_number,
  is_off,
  nothing,
  off,
  only,
  sets,
  switch,
)


def _lr(reading: Reading, _: str, value: Any) -> str:
  checked("optim.learning_rate", value)
  peak = reading.values.get("scheduler.params.warmup_max_lr")
  if (
    reading.kind("scheduler") in ("warmuplr", "warmupdecaylr") and is_number(peak) and peak != value
  ):
    return "nothing: scheduler.params.warmup_max_lr is the peak, as in DeepSpeed"
  return reading.set("optim.learning_rate", value)


def _betas(reading: Reading, _: str, value: Any) -> str:
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise ValueError("must be a list of two numbers, such as [0.9, 0.999]")
  return f"{reading.set('optim.b1', value[0])} {reading.set('optim.b2', value[1])}"


def _second_beta(reading: Reading, _: str, value: Any) -> str:
  if not isinstance(value, list | tuple) or len(value) != 2:
    raise ValueError("must be a list of two numbers, such as [0.9, 0.999]")
  checked("optim.b1", value[0])
  return reading.set("optim.b2", value[1], "b1 is the momentum")


def _decoupled(reading: Reading, key: str, value: Any) -> str:
  if switch(value) or value is None:
    return "nothing: always so"
  if reading.kind("optimizer") == "adamw":
    return "nothing: DeepSpeed's AdamW does not read it"
  decay = reading.values.get("optimizer.params.weight_decay")
  if not is_number(decay) or decay:
    raise ValueError(
      "the decay is decoupled here, as in AdamW: set it to true, or optimizer.params.weight_decay to 0"
    )
  return "nothing: there is no decay"


def _torch_adam(reading: Reading, _: str, value: Any) -> str:
  if switch(value) and "optimizer.params.weight_decay" not in reading.values:
    return reading.set(
      "optim.weight_decay", 0.01, "torch's default, as weight_decay is not in the file"
    )
  return "nothing: there is one Adam"


def _sgd_decay(reading: Reading, _: str, value: Any) -> str:
  momentum = not is_off(reading.values.get("optimizer.params.momentum"))
  if value == "auto":
    return AUTO + ("; decoupled here" if momentum else "")
  if momentum and not is_off(value):
    raise ValueError(
      "the decay is decoupled here, and torch's goes through the momentum: set one of the two to 0"
    )
  return reading.set("optim.weight_decay", value)


def _muon_lr(reading: Reading, _: str, value: Any) -> str:
  checked("optim.learning_rate", value)
  if not is_number(reading.values.get("optimizer.params.adam_lr")):
    raise ValueError(
      "a step of Muon has the size of AdamW's here, and another one in DeepSpeed: give adam_lr, a learning rate for AdamW"
    )
  return "nothing: adam_lr is for all weights, as a step of Muon has the size of AdamW's here"


LR = Rule(
  "`--config.optim.learning_rate`, unless `scheduler.params.warmup_max_lr` is the peak", _lr
)
BETAS = Rule("`--config.optim.b1` and `--config.optim.b2`", _betas)
DECAY = sets("optim.weight_decay")
EPS = sets("optim.eps")
MOMENTUM = sets("optim.b1")
KERNELS = nothing("it says which kernel computes the same")
VARIANT = off("there is no such variant: leave it out")
ADAM = {
  "lr": LR,
  "betas": BETAS,
  "eps": EPS,
  "weight_decay": DECAY,
  **each(
    "",
    "adam_w_mode adamw_mode",
    Rule(
      "`true`: always so; `false`: refused where weights decay, and the optimizer is not `AdamW`",
      _decoupled,
    ),
  ),
  "torch_adam": Rule(
    "nothing; `true` without a `weight_decay`: `--config.optim.weight_decay=0.01`", _torch_adam
  ),
  "fp32_optimizer_states": Rule(
    "`false`: `--config.optim.state_dtype=bfloat16` (the first moment)",
    lambda reading, _, value: (
      "nothing: always so"
      if value is None or switch(value)
      else reading.set(
        "optim.state_dtype", "bfloat16", "the first moment; the second stays float32"
      )
    ),
  ),
  "bias_correction": only(True, "moments are always corrected for their start"),
  **each("", "amsgrad maximize", VARIANT),
  **each("", "set_grad_none fused foreach capturable differentiable", KERNELS),
  "max_grad_norm": off("DeepSpeed refuses it too: give gradient_clipping"),
}
LION = {
  "lr": LR,
  "betas": BETAS,
  "weight_decay": DECAY,
  "fp32_optimizer_states": ADAM["fp32_optimizer_states"],
  "set_grad_none": KERNELS,
}
MUON_LR = Rule(
  "nothing, beside `adam_lr`; refused without it: a step of Muon has the size of AdamW's here",
  _muon_lr,
)
MUON = {
  "lr": MUON_LR,
  "muon_lr": MUON_LR,
  "adam_lr": sets("optim.learning_rate"),
  "momentum": MOMENTUM,
  "betas": Rule("the second is `--config.optim.b2`; the first is the momentum", _second_beta),
  "eps": EPS,
  "weight_decay": DECAY,
  "ns_method": KERNELS,
}
SGD = {
  "lr": LR,
  "momentum": MOMENTUM,
  "weight_decay": Rule(
    "`--config.optim.weight_decay`; refused beside a momentum", _sgd_decay, reads_auto=True
  ),
  **each("", "dampening nesterov maximize", VARIANT),
  **each("", "fused foreach differentiable", KERNELS),
}


class Kind(NamedTuple):
  """A type of optimizer or scheduler."""

  setting: str
  params: dict[str, Rule]


OPTIMIZERS = {
  "Adam": Kind("adamw", ADAM),
  "AdamW": Kind("adamw", ADAM),
  "FusedAdam": Kind("adamw", ADAM),
  "CPUAdam": Kind("adamw", ADAM),
  "DeepSpeedCPUAdam": Kind("adamw", ADAM),
  "Lion": Kind("lion", LION),
  "FusedLion": Kind("lion", LION),
  "CPULion": Kind("lion", LION),
  "DeepSpeedCPULion": Kind("lion", LION),
  "Muon": Kind("muon", MUON),
  "SGD": Kind("sgd", SGD),
}
ONE_BIT = "devices send whole gradients here, not their signs: set it to AdamW"
OTHER_OPTIMIZER = "there is no such optimizer: set it to AdamW, Lion, Muon or SGD"
REFUSED_OPTIMIZERS = {
  **dict.fromkeys(("OneBitAdam", "ZeroOneAdam", "OneBitLamb"), ONE_BIT),
  **dict.fromkeys(
    "Lamb FusedLamb Adagrad DeepSpeedCPUAdagrad MuAdam MuAdamW MuSGD Adadelta Adamax ASGD LBFGS NAdam RAdam RMSprop "
    "Rprop SparseAdam".split(),
    OTHER_OPTIMIZER,
  ),
  "Adafactor": "the learning rate of torch's Adafactor is a share of the weights: set it to AdamW, or leave the optimizer "
  "out and give --config.optim.name=adafactor",
}


def optimizer(reading: Reading, _: str, value: Any) -> str:
  """Reads optimizer.type."""
  name, kind = _kind_of(value, OPTIMIZERS, REFUSED_OPTIMIZERS, OTHER_OPTIMIZER)
  momentum = reading.values.get("optimizer.params.momentum")
  rates = ("optimizer.params.lr", "optimizer.params.adam_lr", "scheduler.params.warmup_max_lr")
  rows = [reading.set("optim.name", kind.setting)]
  if name == "SGD" and momentum is None:
    rows.append(reading.set("optim.b1", 0.0, "it has no momentum in the file"))
  if name == "Muon" and momentum is None:
    rows.append(reading.set("optim.b1", 0.95, "DeepSpeed's default momentum"))
  if all(reading.values.get(rate) is None for rate in rates):
    rows.append("(it has no lr in the file: the flags or their defaults say, 0.001 in DeepSpeed)")
  return " ".join(rows)


def _kind_of(
  value: Any, kinds: dict[str, Kind], refused: dict[str, str], other: str
) -> tuple[str, Kind]:
  """The name of a type as DeepSpeed spells it, and what it is here; raises ValueError where it is nothing."""
  lower = value.lower() if isinstance(value, str) else ""
  for name, kind in kinds.items():
    if name.lower() == lower:
      return name, kind
  raise ValueError(next((why for name, why in refused.items() if name.lower() == lower), other))


def _begins(reading: Reading, _: str, value: Any) -> str:
  if not is_number(value) or value < 0:
    raise ValueError("must be a number, at least 0")
  if value and value == reading.values.get("scheduler.params.warmup_max_lr"):
    return "nothing: it is the peak, so there is no warm-up"
  if value > 1e-6:
    raise ValueError("the warm-up begins at 0: set it to 0, or to warmup_max_lr for no warm-up")
  return "nothing: the warm-up begins at 0"


def _warmup(reading: Reading, _: str, value: Any) -> str:
  checked("optim.warmup_steps", value)
  low, peak = (reading.values.get(f"scheduler.params.warmup_{name}_lr") for name in ("min", "max"))
  if is_number(low) and low and low == peak:
    return reading.set("optim.warmup_steps", 0, "as warmup_min_lr is the peak")
  return reading.set("optim.warmup_steps", value)


def _rises(_: Reading, __: str, value: Any) -> str:
  if value not in (None, "linear", "log"):
    raise ValueError('must be "linear" or "log"')
  return (
    "nothing: always so"
    if value == "linear"
    else "nothing: the warm-up rises in a line; the log is faster at first"
  )


def _total(reading: Reading, _: str, value: Any) -> str:
  count(value)
  if value is None:
    return "nothing: null"
  epochs = reading.set("train.epochs", 0.0, "a schedule ends where the run does")
  return f"{reading.set('train.steps', value)} {epochs}"


def _cosine_end(reading: Reading, _: str, value: Any) -> str:
  if not is_number(value) or not 0 <= value <= 1:
    raise ValueError("must be a number from 0 to 1")
  peak = reading.values.get("optimizer.params.lr")
  if value and not is_number(peak):
    raise ValueError(
      "a share of which learning rate? give optimizer.params.lr, or --config.optim.end_learning_rate instead"
    )
  checked("optim.learning_rate", peak if value else 1)
  return reading.set(
    "optim.end_learning_rate", value * peak if value else 0.0, "this share of optimizer.params.lr"
  )


WARMUP = {
  "warmup_num_steps": Rule("`--config.optim.warmup_steps`", _warmup),
  "warmup_type": Rule(
    "nothing: the warm-up rises in a line; DeepSpeed's default `log` is faster at first", _rises
  ),
  "last_batch_iteration": only(-1, "a run is continued from its own checkpoints: leave it out"),
}
PEAK = {
  "warmup_min_lr": Rule(
    "nothing up to 1e-6: the warm-up begins at 0; `warmup_max_lr`: no warm-up; refused: others",
    _begins,
  ),
  "warmup_max_lr": sets("optim.learning_rate"),
}
TOTAL = {
  "total_num_steps": Rule("`--config.train.steps`: a schedule ends where the run does", _total)
}
SCHEDULERS = {
  "WarmupLR": Kind("constant", PEAK | WARMUP),
  "WarmupDecayLR": Kind("linear", PEAK | WARMUP | TOTAL),
  "WarmupCosineLR": Kind(
    "cosine",
    WARMUP
    | TOTAL
    | {
      "warmup_min_ratio": off("the warm-up begins at 0: set it to 0"),
      "cos_min_ratio": Rule(
        "`--config.optim.end_learning_rate`: this share of `optimizer.params.lr`", _cosine_end
      ),
    },
  ),
}
OTHER_SCHEDULER = "there is no such schedule: set it to WarmupLR, WarmupDecayLR or WarmupCosineLR"
REFUSED_SCHEDULERS = {
  "LRRangeTest": "a test of learning rates is several runs here: set it to WarmupLR, and compare runs with jaxft.report",
  "OneCycle": OTHER_SCHEDULER,
}


def scheduler(reading: Reading, _: str, value: Any) -> str:
  """Reads scheduler.type."""
  name, kind = _kind_of(value, SCHEDULERS, REFUSED_SCHEDULERS, OTHER_SCHEDULER)
  said = ["constant after the warm-up"] if name == "WarmupLR" else []
  if "scheduler.params.warmup_type" not in reading.values:
    said.append("the warm-up rises in a line; the log, DeepSpeed's default, is faster at first")
  if "scheduler.params.warmup_num_steps" not in reading.values:
    said.append("the flags or their defaults say how long it is; 1,000 steps in DeepSpeed")
  return reading.set("optim.schedule", kind.setting, "; ".join(said))


TYPES = {"optimizer": OPTIMIZERS, "scheduler": SCHEDULERS}
REFUSED = {"optimizer": REFUSED_OPTIMIZERS, "scheduler": REFUSED_SCHEDULERS}
