"""transformers' Trainer and `finetune` on the same rows in the same order: losses and weights.

Only the order of the rows is asked of jaxft. What is in them is made here, with the tokenizer of
transformers.
"""

import dataclasses
import importlib.util
import json
import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

import jaxft.config
from jaxft.data import loader
from jaxft.hf import export_tensors, repo
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import abstract_model
from jaxft.train import finetune
from jaxft.training import optimizer

torch = pytest.importorskip("torch", reason="Trainer is for torch")
transformers = pytest.importorskip("transformers")
# Not imported here: that would take a second of each worker.
if not importlib.util.find_spec("accelerate"):
  pytest.skip("Trainer needs accelerate", allow_module_level=True)

T, B, STEPS, WARMUP = 29, 8, 24, 0.2  # the last one is a share of the steps
END = 0  # of the tiny tokenizer; padding too
LABELS = ["bad", "good", "so so"]
KEYS = dict(zip(LABELS, ("cat", "dog", "door"), strict=True))  # the word that tells each
NOT_LEARNED = -100  # what transformers leaves out of the loss
Rows = list[dict[str, Any]]


class Both(NamedTuple):
  """Rows as Trainer takes them."""

  train: Rows
  held_out: Rows


class Theirs(NamedTuple):
  """What Trainer made of a recipe."""

  model: Any
  log: list[dict[str, float]]  # of each step
  evals: list[dict[str, float]]  # what Trainer.evaluate says, before and after
  losses: list[float]  # nats per target of the held-out rows, before and after
  accuracies: list[float]  # of a model that classifies


# ---- Rows as transformers wants them: it shifts labels itself ------------------------------------


def block(ids: list[int], learned: int, length: int) -> dict[str, Any]:
  """A row of a language model: tokens from `learned` on are targets, and padding is none."""
  ids, padding = ids[:length], max(0, length - len(ids))
  return {
    "input_ids": ids + [END] * padding,
    "attention_mask": [1] * len(ids) + [0] * padding,
    "labels": [NOT_LEARNED] * learned + ids[learned:] + [NOT_LEARNED] * padding,
  }


def blocks(texts: list[str], tokenizer: Any) -> Rows:
  """One stream, an end token first and after each text; a block's last token begins the next."""
  ids = [END, *(i for text in texts for i in [*tokenizer(text)["input_ids"], END])]
  return [block(ids[start : start + T + 1], 1, T + 1) for start in range(0, len(ids) - 1, T)]


def pairs(rows: Rows, tokenizer: Any) -> Rows:
  """A prompt and its completion a row, if there is room; the completion and its end are learned."""
  both = [[tokenizer(row[part])["input_ids"] for part in ("prompt", "completion")] for row in rows]
  fits = [(before, after) for before, after in both if len(before) <= T]
  return [block([*before, *after, END], len(before), T + 1) for before, after in fits]


def labelled(rows: Rows, tokenizer: Any) -> Rows:
  """One text a row, and the number of its class."""
  tokenizer.pad_token = tokenizer.eos_token
  how = dict(truncation=True, padding="max_length", max_length=T)
  return [{**tokenizer(row["text"], **how), "labels": LABELS.index(row["label"])} for row in rows]


# ---- Both of them --------------------------------------------------------------------------------


def recipe(folder: Path, tmp_path: Path, train: Rows, held_out: Rows, **data: Any) -> ConfigDict:
  """AdamW with decay, warm-up, a linear course to zero and clipping."""
  files = {"train": train, "held_out": held_out}
  for name, rows in files.items():
    (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
  config = tiny.config(folder, tmp_path / "train.jsonl")
  config.data.update(validation=(str(tmp_path / "held_out.jsonl"),), sequence_length=T, **data)
  config.train.update(steps=STEPS, batch_size=B, save_every=0, sample_prompts=())
  config.optim.update(learning_rate=3e-3, warmup_steps=0, warmup_ratio=WARMUP)
  config.optim.update(weight_decay=1.0, b2=0.98, eps=1e-6)
  return config


class Numbers:
  """Rows that say which they are."""

  def __init__(self, count: int):
    self._count = count

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    return {"row": np.array([i]), "mask": np.ones(1, bool)}


def in_order(rows: Rows, config: ConfigDict) -> Rows:
  """The rows as the run takes them: several epochs, each in an order of its own."""
  how = dict(batch_size=B, accumulation=1, total_rows=STEPS * B, local_rows=np.arange(B))
  steps = loader.BatchSource(Numbers(len(rows)), seed=config.data.shuffle_seed, **how)
  return [rows[i] for step in range(STEPS) for i in steps[step]["row"].reshape(-1)]


def arguments(out: Path, **more: Any) -> Any:
  """Trainer's, for a CPU, without a word and without checkpoints."""
  quiet = dict(report_to="none", disable_tqdm=True, save_strategy="no", logging_steps=1)
  how = quiet | dict(use_cpu=True, dataloader_pin_memory=False, lr_scheduler_type="linear") | more
  known = {field.name for field in dataclasses.fields(transformers.TrainingArguments)}
  if "warmup_ratio" not in known:
    how["warmup_steps"] = how.pop("warmup_ratio", 0)  # since transformers 5, where it is below 1
  return transformers.TrainingArguments(str(out), **how)


def trainer(their: Any, config: ConfigDict, out: Path, rows: Both, micro: int) -> Any:
  """A Trainer of the same recipe, which takes the rows in our order, `micro` at a time."""

  class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *_: Any) -> Any:
      return torch.utils.data.SequentialSampler(self.train_dataset)

  how = arguments(
    out,
    max_steps=STEPS,
    per_device_train_batch_size=micro,
    gradient_accumulation_steps=B // micro,
    per_device_eval_batch_size=B,
    learning_rate=config.optim.learning_rate,
    warmup_ratio=config.optim.warmup_ratio,
    weight_decay=config.optim.weight_decay,
    adam_beta1=config.optim.b1,
    adam_beta2=config.optim.b2,
    adam_epsilon=config.optim.eps,
    max_grad_norm=config.optim.clip_norm,
  )
  train = in_order(rows.train, config)
  return InOrder(their, how, train_dataset=train, eval_dataset=rows.held_out)


@torch.no_grad()
def judged(their: Any, rows: Rows) -> tuple[float, float]:
  """Nats per target, each weighing the same, and the share of targets that are the likeliest."""
  batch = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
  labels = batch.pop("labels")
  logits = their.eval()(**batch).logits
  if labels.ndim == 2:
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
  right = (logits.argmax(-1) == labels)[labels != NOT_LEARNED]
  loss = torch.nn.functional.cross_entropy(logits, labels)
  return loss.item(), right.float().mean().item()


def with_trainer(their: Any, config: ConfigDict, out: Path, rows: Both, micro: int) -> Theirs:
  run = trainer(their, config, out, rows, micro)
  evals, found = [run.evaluate()], [judged(their, rows.held_out)]
  run.train()
  evals.append(run.evaluate())
  found.append(judged(their, rows.held_out))
  log = [line for line in run.state.log_history if "grad_norm" in line]
  return Theirs(their, log, evals, *map(list, zip(*found, strict=True)))


def must_agree(run: Any, theirs: Theirs) -> None:
  """Losses of every step, gradients before they are clipped, both evaluations and all weights."""
  steps = [line for line in run.metrics if "train/loss" in line]
  evals = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  assert len(steps) == len(theirs.log) == STEPS and len(evals) == 2
  of = lambda lines, key: np.array([line[key] for line in lines])
  norms = of(steps, "train/grad_norm")
  assert norms.max() > 2 * max(1, norms.min())  # clipped to 1, and some more than others
  assert evals[1] < evals[0] - 0.1  # something was learned
  np.testing.assert_allclose(evals, theirs.losses, atol=1e-5)
  np.testing.assert_allclose(of(steps, "train/loss"), of(theirs.log, "loss"), atol=1e-5)
  np.testing.assert_allclose(norms, of(theirs.log, "grad_norm"), rtol=1e-4)
  ours = load_file(run.export / "model.safetensors")
  for name, theirs_of_it in theirs.model.named_parameters():
    far = np.abs(ours[name] - theirs_of_it.numpy(force=True))
    if name.endswith("attn.c_attn.bias"):  # that of keys moves no softmax: its gradient is rounding
      far = np.delete(far, np.s_[len(far) // 3 : 2 * len(far) // 3])
    assert far.max() < 1e-4, name


# ---- The optimizer's rules, without a run --------------------------------------------------------


def language_model(folder: Path) -> Any:
  return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_weight_decay_mask_matches_trainer(family, tmp_path):
  folder = tiny.write_family(tmp_path / "model", family, seed=0, P=17, std=0.2)
  source = repo.resolve(str(folder))
  _, shapes, _ = abstract_model(source.cfg, ComputeConfig())
  mark = lambda path, leaf: jnp.full(leaf.shape, optimizer.has_weight_decay(path))
  marks = jax.tree_util.tree_map_with_path(mark, shapes)
  ours = {
    tensor.name: bool(tensor.to_numpy().all())
    for tensor in export_tensors.hf_tensors(marks, source)
  }
  their = language_model(folder)
  run = transformers.Trainer(their, arguments(tmp_path / "theirs", weight_decay=0.1))
  groups = run.create_optimizer().param_groups
  decay = {id(p): group["weight_decay"] > 0 for group in groups for p in group["params"]}
  assert ours == {name: decay[id(p)] for name, p in their.named_parameters()}


@pytest.mark.parametrize("steps, share", [(24, 0.2), (7, 0.03), (100, 0.07), (1, 0.5), (20, 0.0)])
def test_warmup_ratio_matches_trainer(steps, share, tmp_path):
  config = jaxft.config.default()
  config.optim.update(learning_rate=1e-3, warmup_ratio=share, schedule="linear")
  weight = torch.nn.Parameter(torch.zeros(1))
  how = arguments(tmp_path, learning_rate=1e-3, warmup_ratio=share)
  run = transformers.Trainer(torch.nn.Module(), how)
  run.optimizer = torch.optim.SGD([weight], lr=1e-3)
  run.create_scheduler(steps)
  rates = []
  for _ in range(steps):
    rates.append(run.optimizer.param_groups[0]["lr"])
    run.optimizer.step()
    run.lr_scheduler.step()
  course = optimizer.make_schedule(config.optim, steps)
  np.testing.assert_allclose([course(step) for step in range(steps)], rates, rtol=1e-5, atol=1e-12)


# ---- Recipes -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_concat_layout_matches_trainer(folder, tmp_path):
  rng = random.Random(0)
  texts = [[{"text": tiny.story(rng)} for _ in range(count)] for count in (20, 7)]
  config = recipe(folder, tmp_path, *texts)
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  rows = Both(*(blocks([row["text"] for row in some], tokenizer) for some in texts))
  assert all(some[-1]["attention_mask"][-1] == 0 for some in rows)  # the last one is filled up
  assert len(rows.train) < STEPS * B / 2  # more than two epochs
  theirs = with_trainer(language_model(folder), config, tmp_path / "theirs", rows, micro=2)
  must_agree(finetune(config, tmp_path / "ours"), theirs)


@pytest.mark.slow
def test_prompt_masking_matches_trainer(folder, tmp_path):
  rng = random.Random(1)
  words = lambda most: " ".join(rng.choices(tiny.WORDS, k=rng.randint(1, most)))
  pair = lambda: {"prompt": words(9), "completion": f" {words(15)}."}
  some = [[pair() for _ in range(count)] for count in (70, 19)]
  config = recipe(folder, tmp_path, *some, format="prompt_completion", layout="pad")
  config.train.micro_batch_size = 4
  tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
  rows = Both(*(pairs(them, tokenizer) for them in some))
  assert len(rows.train) < 70  # a prompt leaves no room
  assert {row["attention_mask"][-1] for row in rows.train} == {0, 1}  # some are padded, some cut
  assert len({row["labels"].count(NOT_LEARNED) for row in rows.train}) > 9
  theirs = with_trainer(language_model(folder), config, tmp_path / "theirs", rows, micro=2)
  must_agree(finetune(config, tmp_path / "ours"), theirs)


@pytest.fixture(scope="module")
def classifier(folder, tmp_path_factory):
  """The same GPT-2 with a head of three classes."""
  out = shutil.copytree(folder, tmp_path_factory.mktemp("models") / "classifier")
  about = json.loads((out / "config.json").read_text())
  about |= {"architectures": ["GPT2ForSequenceClassification"], "pad_token_id": END}
  about |= {"id2label": dict(enumerate(LABELS))}
  about |= {"label2id": {label: i for i, label in enumerate(LABELS)}}
  (out / "config.json").write_text(json.dumps(about))
  score = 0.2 * np.random.default_rng(0).standard_normal((3, about["n_embd"]), np.float32)
  tensors = load_file(out / "model.safetensors") | {"score.weight": score}
  save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
  return out


def test_classification_matches_trainer(classifier, tmp_path):
  rng = random.Random(2)
  text = lambda label: " ".join(rng.choices(tiny.WORDS, k=rng.randint(0, 20)) + [KEYS[label]])
  row = lambda label: {"text": text(label), "label": label}
  some = [[row(label) for label in rng.choices(LABELS, k=count)] for count in (70, 21)]
  config = recipe(classifier, tmp_path, *some, format="classification")
  config.model.head, config.train.micro_batch_size = "classification", 4
  tokenizer = transformers.AutoTokenizer.from_pretrained(classifier)
  rows = Both(*(labelled(them, tokenizer) for them in some))
  assert {row["attention_mask"][-1] for row in rows.train} == {0, 1}  # some are padded, some cut
  head = transformers.AutoModelForSequenceClassification
  their = head.from_pretrained(classifier, dtype=torch.float32)
  # In one piece: of a classifier Trainer adds up micro-batches' means, and does not divide (5.24).
  theirs = with_trainer(their, config, tmp_path / "theirs", rows, micro=B)
  run = finetune(config, tmp_path / "ours")
  must_agree(run, theirs)
  evals = [line for line in run.metrics if "eval/loss" in line]
  assert [line["eval/accuracy"] for line in evals] == pytest.approx(theirs.accuracies)
  assert theirs.accuracies[0] < theirs.accuracies[1]
  # Here each row has one target, so that Trainer's mean over rows is one over targets.
  wanted = [line["eval_loss"] for line in theirs.evals]
  np.testing.assert_allclose([line["eval/loss"] for line in evals], wanted, atol=1e-5)
