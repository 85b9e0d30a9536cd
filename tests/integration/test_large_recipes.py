"""The configs of large models on small stand-ins: streamed, accumulated, sharded, with LoRA."""

import jax
import numpy as np
import processes
import pytest
import tiny
from safetensors.numpy import load_file
from test_recipes import MARKS, fresh, recipe

import jaxft
from jaxft.hf.known_models import PUBLISHED
from jaxft.train import finetune

PROMPT = "once upon a time"
OFFLOADED = ("gpt2xl_shakespeare_16gb", "gptneo_2b7_16gb", "gptj_6b_24gb", "gptj_6b_8gb")


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """A folder of .txt files, as the configs want one: words in an order that can be learned."""
  folder = tmp_path_factory.mktemp("data") / "texts"
  folder.mkdir()
  for i in range(20):
    (folder / f"{i}.txt").write_text(" ".join(tiny.WORDS[(i + k) % 20] for k in range(200)))
  return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models")
  return {it: tiny.write_family(folder / it, it, seed=0, P=71, std=0.05) for it in tiny.FAMILIES}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*OFFLOADED, "gptj_6b_v5e8", "gptj_6b_lora"])
@pytest.mark.wide_for("gptj_6b_24gb", "gptneo_2b7_16gb")
def test_large_model_learns_and_is_exported(name, texts, models, tmp_path):
  wanted, chips = fresh(name), jax.device_count() if name == "gptj_6b_v5e8" else 1
  assert (wanted.memory.offload == "all") == (name in OFFLOADED) and wanted.mesh.fsdp == -1
  folder = models[PUBLISHED[wanted.model.path]["model_type"]]
  more = dict(
    train__steps=30, train__sample_prompts=(PROMPT,), train__sample_tokens=8, mesh__fsdp=chips
  )
  more |= dict(
    train__micro_batch_size=wanted.train.micro_batch_size,
    data__limit_train=0,
    optim__learning_rate=1e-2,
  )
  run = finetune(recipe(name, folder, texts, **more), tmp_path / "run")
  losses = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  less = 0.3 if wanted.lora.rank else 1
  assert losses[-1] < losses[0] - less
  assert [it["when"] for it in run.samples] == ["before", "after"]
  trained = jaxft.pretrained.load_workdir(run.workdir)
  assert trained.evaluate(str(texts), sequence_length=64)["loss"] < losses[0] - less
  (completion,) = jaxft.load(run.export).generate([PROMPT], max_new_tokens=8, temperature=0)
  assert len(completion.token_ids) == 8
  trained.export(tmp_path / "again", dtype="float32")
  before, after = (load_file(it / "model.safetensors") for it in (folder, tmp_path / "again"))
  assert before.keys() == after.keys()
  changed = {key for key in before if before[key].tobytes() != after[key].tobytes()}
  if not wanted.lora.rank:
    assert changed == before.keys()
    return
  # Nothing but what has an adapter; and that by what the adapters, whose B began at zero, come to.
  assert changed == {key for key in before if key.endswith(("q_proj.weight", "v_proj.weight"))}
  adapters = load_file(run.workdir / "adapter" / "adapter_model.safetensors")
  for key in changed:
    A, B = (
      adapters[f"base_model.model.{key.removesuffix('weight')}lora_{it}.weight"] for it in "AB"
    )
    scale = wanted.lora.alpha / wanted.lora.rank
    assert B.any()
    np.testing.assert_allclose(after[key], before[key] + scale * B @ A, atol=1e-6)


def test_added_tokens_use_the_unused_rows_of_gptj(tmp_path):
  folder = tiny.write_family(tmp_path / "model", "gptj", seed=0, P=71, std=0.05, V=300)
  tiny.write_tokenizer(folder, 293)
  processes.run("jaxft.tokenizer", "--model", folder, "--add", *MARKS, "--out", tmp_path / "marked")
  before, after = (load_file(it / "model.safetensors") for it in (folder, tmp_path / "marked"))
  for name in ("transformer.wte.weight", "lm_head.weight", "lm_head.bias"):
    np.testing.assert_allclose(
      after[name][293:295], np.stack([before[name].mean(0)] * 2), atol=1e-6
    )
    after[name][293:295] = before[name][293:295]
  assert all(after[name].tobytes() == before[name].tobytes() for name in before)
