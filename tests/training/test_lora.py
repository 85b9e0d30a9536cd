"""LoRA and frozen weights: only trained weights change, bit for bit, and PEFT reads adapters."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file
from test_offload import ROWS, STEPS, T, batch

import jaxft
import jaxft.config
import jaxft.hf.peft
import jaxft.model.decoder
import jaxft.sharding.mesh
import jaxft.training.build
from jaxft.errors import RequestError
from jaxft.hf import export_tensors, load_weights, model_config, repo, trainable_params
from jaxft.hf.known_models import PUBLISHED
from jaxft.model import lora
from jaxft.model.compute import ComputeConfig
from jaxft.train import finetune
from jaxft.training import trainable
from jaxft.training.init import init_params, merge_params, merged_shapes
from jaxft.training.train_state import TrainState

ADAPTERS = {
  "lora__rank": 3,
  "lora__dropout": 0.2,
  "lora__targets": ("all-linear",),
  "lora__layers": ("0", "2"),
}
LAST_LAYER = {"train__trainable_params": ("transformer.h.2.*", "transformer.ln_f.weight")}
ODD_TARGETS = {
  "gpt2": ("attn.c_proj", "c_fc"),
  "gpt_neo": ("v_proj", "out_proj"),
  "gptj": ("k_proj", "q_proj", "fc_out"),
}


def changed(config, **more):
  for name, value in more.items():
    section, key = name.split("__")
    config[section][key] = value
  return config


def build(family, *, accumulation=1, mesh=(1, 1, 1), stage=3, **more):
  config = changed(jaxft.config.default(), **more)
  config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
  config.mesh.zero_stage, config.train.batch_size = stage, ROWS
  config.train.micro_batch_size = ROWS // accumulation // (mesh[0] * mesh[1])
  config.optim.update(learning_rate=1e-3, weight_decay=0.1, eps=1e-4, clip_norm=0.5)
  vocabulary = {"model_type": family, "vocab_size": 293, "bos_token_id": 0, "eos_token_id": 0}
  cfg = model_config.from_hf_config(vocabulary | tiny.FAMILIES[family]).with_dropout(0.1)
  cfg = trainable_params.apply_config(cfg, config, family)
  row = {"ids": np.zeros(T, np.int32), "targets": np.zeros(T, np.int32), "mask": np.zeros(T, bool)}
  return cfg, jaxft.training.build.build_train_program(
    config, cfg, jaxft.sharding.mesh.make_mesh(config.mesh), STEPS, row
  )


@functools.cache
def weights(family, cfg):
  drawn = jax.device_get(
    nnx.to_pure_dict(
      nnx.state(jaxft.model.decoder.init_model(cfg, ComputeConfig(vocab_multiple=128)))
    )
  )
  # Both matrices of an adapter random: with B at zero A would have no gradient at first.
  rng = np.random.default_rng(0)
  fill = lambda path, x: (
    0.2 * rng.standard_normal(x.shape, np.float32) if path[-1].key == "lora_b" else x
  )
  return jax.tree_util.tree_map_with_path(fill, drawn)


def begin(run, cfg, family):
  trained, frozen = trainable.partition(weights(family, cfg), cfg.trained)
  opt = jax.device_get(run.tx.init(trained))
  return jax.device_put(
    TrainState(step=jnp.int32(0), params=trained, opt_state=opt, frozen=frozen),
    jax.tree.map(lambda leaf: leaf.sharding, run.state),
  )


def train(family, **how):
  cfg, run = build(family, **how)
  state, losses = begin(run, cfg, family), []
  for step in range(STEPS):
    state, numbers = run.train_step(state, batch(run, step))
    assert not numbers["bad"]
    losses.append(float(numbers["loss"]))
  return losses, jax.device_get(state), cfg


@functools.cache
def alone(family, part):
  return train(family, **dict(part))


WAYS = {
  "accumulated": {"accumulation": 4},
  "eight": {"mesh": (2, 2, 2)},
  "zero 1": {"mesh": (1, 8, 1), "stage": 1},
  "all offloaded": {"memory__offload": "all"},
  "all offloaded, accumulated": {"memory__offload": "all", "accumulation": 4},
  "optimizer offloaded": {"memory__offload": "optimizer"},
  "full remat": {"memory__remat": "full"},
}
ALWAYS = [  # the others are wide
  ("gptj", "adapters", "all offloaded, accumulated"),
]
CASES = [
  pytest.param(
    family,
    part,
    way,
    marks=() if (family, name, way) in ALWAYS else pytest.mark.wide,
    id=f"{family}-{name}-{way}",
  )
  for family in tiny.FAMILIES
  for name, part in (("adapters", ADAPTERS), ("only", LAST_LAYER))
  for way in WAYS
]


@pytest.mark.slow
@pytest.mark.parametrize("family, part, way", CASES)
def test_offload_and_meshes_match_for_partial_training(family, part, way):
  """Every way to train a part of the model comes to the same."""
  losses, state, _ = train(family, **part, **WAYS[way])
  wanted, theirs, cfg = alone(family, tuple(part.items()))
  np.testing.assert_allclose(losses, wanted, rtol=1e-5)
  for ours, other in zip(
    jax.tree.leaves(state.params), jax.tree.leaves(theirs.params), strict=True
  ):
    assert np.linalg.norm(ours - other) <= 3e-5 * np.linalg.norm(other)


@pytest.mark.parametrize(
  "family, part",
  [
    ("gpt2", LAST_LAYER),
    pytest.param("gpt_neo", ADAPTERS, marks=pytest.mark.slow),
    pytest.param("gptj", ADAPTERS, marks=pytest.mark.slow),
  ],
)
def test_frozen_parameters_do_not_change(family, part):
  _, state, cfg = alone(family, tuple(part.items()))
  before, layers = weights(family, cfg), dict(cfg.trained)
  for path, leaf in jax.tree_util.tree_flatten_with_path(state.all_params)[0]:
    name, old = (
      trainable.param_name(path),
      functools.reduce(lambda node, key: node[key.key], path, before),
    )
    if name not in layers:
      assert leaf.tobytes() == old.tobytes(), name
    else:
      for i in range(len(leaf)) if layers[name] else ():
        assert (leaf[i].tobytes() == old[i].tobytes()) == (i not in layers[name]), (name, i)
      assert leaf.tobytes() != old.tobytes(), name
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim > 1]
  assert len(moments) == 2 * len([leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1])


@pytest.mark.parametrize("targets", ["all-linear", "odd"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_merged_lora_matches_model_with_adapters(family, targets):
  wanted = ODD_TARGETS[family] if targets == "odd" else (targets,)
  cfg, run = build(family, lora__rank=3, lora__targets=wanted)
  params = begin(run, cfg, family).all_params
  ids = jax.random.randint(jax.random.key(0), (3, T), 0, 293)
  with_adapters = nnx.merge(run.graph, params)
  plain_cfg = dataclasses.replace(cfg, lora_rank=0, lora_targets=(), trained=())
  plain = nnx.merge(
    jaxft.model.decoder.abstract_model(plain_cfg, run.compute)[0], lora.merge(params, cfg)
  )
  logits = [np.asarray(decoder.logits(decoder(ids)[0])) for decoder in (with_adapters, plain)]
  without = nnx.merge(
    jaxft.model.decoder.abstract_model(plain_cfg, run.compute)[0], lora.without_adapters(params)
  )
  assert np.abs(logits[0] - np.asarray(without.logits(without(ids)[0]))).max() > 0.1
  np.testing.assert_allclose(logits[1], logits[0], atol=1e-5 * np.abs(logits[0]).max())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_saved_adapters_equal_the_merged_delta(family, tmp_path):
  lora_config = dict(
    lora__rank=3, lora__alpha=5.0, lora__targets=ODD_TARGETS[family], lora__layers=("0", "2")
  )
  cfg, run = build(family, **lora_config)
  state = begin(run, cfg, family)
  # in the layer that has no adapter
  untrained = lambda path, x: x.at[1].set(0) if path[-1].key == "lora_b" else x
  trained, params = (
    jax.tree_util.tree_map_with_path(untrained, tree) for tree in (state.params, state.all_params)
  )
  (tmp_path / "config.json").write_text(
    json.dumps({"model_type": family, "vocab_size": 293} | tiny.FAMILIES[family])
  )
  source = repo.resolve(str(tmp_path), weights=False)
  named = changed(jaxft.config.default(), model__path="gpt2", **lora_config)
  jaxft.hf.peft.save_adapters(tmp_path / "adapter", trained, cfg, source, named)
  about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  file = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
  scale, layers = about["lora_alpha"] / about["r"], about["layers_to_transform"]
  assert {name.split(".")[4] for name in file} == {str(i) for i in layers} == {"0", "2"}
  tensors = lambda params: {
    it.name: it.to_numpy() for it in export_tensors.hf_tensors(params, source)
  }
  before, merged = tensors(lora.without_adapters(params)), tensors(lora.merge(params, cfg))
  for name, tensor in merged.items():
    module = f"base_model.model.{name.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in file:
      assert tensor.tobytes() == before[name].tobytes(), name
      continue
    change = scale * file.pop(f"{module}.lora_B.weight") @ file.pop(f"{module}.lora_A.weight")
    change = change.T if about["fan_in_fan_out"] else change
    assert np.abs(change).max() > 0.01
    np.testing.assert_allclose(tensor - before[name], change, atol=1e-6, err_msg=name)
  assert not file
  card = (tmp_path / "adapter" / "README.md").read_text()
  assert "base_model: gpt2\n" in card and "Rank 3, alpha 5, on " in card


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_adapter_folder_loads_as_a_model(family, tmp_path):
  """Its base, found by name, merged with them as it is read."""
  base = tmp_path / "base"
  if family == "gpt2":
    tiny.write_gpt2(base, seed=0, **{"P": 17, "D": 40, "F": 88, "L": 3, "N": 8})
  else:
    tiny.write_family(base, family, seed=0, P=17, std=0.2)
  lora_config = dict(
    lora__rank=3, lora__alpha=5.0, lora__targets=ODD_TARGETS[family], lora__layers=("0", "2")
  )
  cfg, run = build(family, **lora_config)
  state, source = begin(run, cfg, family), repo.resolve(str(base))
  untrained = lambda path, x: x.at[1].set(0) if path[-1].key == "lora_b" else x
  trained = jax.tree_util.tree_map_with_path(untrained, state.params)
  folder, named = (
    tmp_path / "adapter",
    changed(jaxft.config.default(), model__path=str(base), **lora_config),
  )
  jaxft.hf.peft.save_adapters(folder, trained, cfg, source, named)
  wanted = merge_params(trained, cfg, source, merged_shapes(run))
  adapted = repo.resolve(str(folder))
  shapes = merged_shapes(run)
  shardings = jax.tree.map(lambda leaf: leaf.sharding, shapes)
  found = load_weights.load_params(adapted, shapes, shardings)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, wanted)
  assert repo.fingerprint(adapted) != repo.fingerprint(source)
  about = json.loads((folder / "adapter_config.json").read_text())
  for change, message in (
    ({"use_dora": True}, "use_dora=True is not supported, only plain LoRA"),
    ({"peft_type": "IA3"}, "peft_type='IA3' is not supported, only plain LoRA"),
    ({"modules_to_save": ["score"]}, "modules_to_save"),
    (
      {"base_model_name_or_path": "no/such/folder/here"},
      "cannot load the adapters' base model 'no/such/folder/here'",
    ),
    ({"base_model_name_or_path": None}, "must name the base model"),
  ):
    (folder / "adapter_config.json").write_text(json.dumps(about | change))
    with pytest.raises(RequestError, match=message):
      repo.resolve(str(folder))
  (folder / "adapter_config.json").write_text(json.dumps(about | {"r": 4}))
  with pytest.raises(RequestError, match="at rank 4"):
    load_weights.load_params(repo.resolve(str(folder)), shapes, shardings)


@pytest.fixture
def finetuned(config, tmp_path):
  """A run with adapters, from its own command's function."""
  changed(config, **(ADAPTERS | {"train__keep": 9, "optim__learning_rate": 1e-2}))
  return finetune(config, tmp_path / "run"), config


@pytest.mark.slow
def test_lora_run_resumes_and_exports_merged_model(finetuned, folder, tmp_path):
  """It goes on bit for bit."""
  run, config = finetuned
  base, exported = (load_file(at / "model.safetensors") for at in (folder, run.export))
  adapted = {
    name for name in base if name.endswith(".weight") and ("c_" in name) and ".h.1." not in name
  }
  assert base.keys() == exported.keys() and len(adapted) == 8
  for name in base:
    assert (base[name].tobytes() == exported[name].tobytes()) == (name not in adapted), name
  losses = [line["eval/loss"] for line in run.metrics if "eval/loss" in line]
  assert losses[-1] < losses[0] - 0.1
  # From the checkpoint in the middle, in another folder: the same adapters.
  again = tmp_path / "again"
  shutil.copytree(run.workdir, again)
  for rest in ("checkpoints/12", "checkpoints/10", "adapter", "export"):
    shutil.rmtree(again / rest)
  finetune(config, again)
  name = "adapter/adapter_model.safetensors"
  assert (again / name).read_bytes() == (run.workdir / name).read_bytes()
  # No checkpoint has the frozen weights in it, and the model of a workdir is the export.
  largest = max(
    file.stat().st_size for file in (run.workdir / "checkpoints").rglob("*") if file.is_file()
  )
  assert largest < (folder / "model.safetensors").stat().st_size / 2
  read = jaxft.pretrained.load_workdir(run.workdir)
  assert read.generate(["Once"], temperature=0) == jaxft.load(run.export).generate(
    ["Once"], temperature=0
  )


@pytest.mark.slow
def test_changed_base_model_is_refused(finetuned, folder, tmp_path):
  run, config = finetuned
  other = shutil.copytree(folder, tmp_path / "other")
  data = bytearray((other / "model.safetensors").read_bytes())
  data[-1] ^= 1
  (other / "model.safetensors").write_bytes(data)
  config.model.path = str(other)
  with pytest.raises(RequestError, match="its weights, some of them frozen, have changed"):
    finetune(config, run.workdir)
  written = json.loads((run.workdir / "config.json").read_text())
  written["model"]["path"] = str(other)
  (run.workdir / "config.json").write_text(json.dumps(written))
  with pytest.raises(
    RequestError, match="these weights have changed since the run of .* trained only a part"
  ):
    jaxft.pretrained.load_workdir(run.workdir)


def test_position_embeddings_alone_train_offloaded():
  _, run = build("gpt2", memory__offload="all", train__trainable_params=("transformer.wpe.weight",))
  assert [path[-1].key for path, _ in jax.tree_util.tree_flatten_with_path(run.grad_shapes)[0]] == [
    "positions"
  ]
  run.train_step.lower(run.state, run.batch)


@pytest.mark.parametrize(
  "more, message",
  [
    (
      {"lora__rank": 2, "lora__targets": ("q_proj",)},
      "a gpt2 layer has no matrix 'q_proj'; choose from attn.c_attn",
    ),
    (
      {"lora__rank": 2, "lora__layers": ("1-3",)},
      "config.lora.layers: '1-3' must be a layer or FIRST-LAST, from 0 to 2",
    ),
    ({"lora__rank": 2, "lora__layers": ("last",)}, "config.lora.layers: 'last' must be"),
    ({"lora__rank": 2, "lora__layers": ("2-",)}, "config.lora.layers: '2-' must be"),
    (
      {"lora__targets": ("c_attn",)},
      "config.lora.targets=.* no adapters with config.lora.rank=0",
    ),
    (
      {"train__trainable_params": ("h.2.*",)},
      r"config.train.trainable_params: 'h.2.\*' matches no weight; the names are transformer",
    ),
    (
      {"train__trainable_params": ("transformer.*",), "lora__rank": 2},
      "config.train.trainable_params=.* set only one",
    ),
    (
      {"model__init": "scratch", "lora__rank": 2},
      "config.lora.rank=2: adapters need pretrained weights",
    ),
    ({"lora__rank": 2, "lora__alpha": 0.0}, "config.lora.alpha=0.0: must be above 0"),
  ],
)
def test_unknown_trainable_params_are_refused(config, tmp_path, more, message):
  with pytest.raises(RequestError, match=message):
    finetune(changed(config, **more), tmp_path / "run")
  assert not (tmp_path / "run" / "checkpoints").exists()


def test_fused_qkv_is_trained_as_a_whole():
  """Query, key and value that share an array are trained together."""
  config = jaxft.config.default()
  config.train.trainable_params = ("transformer.h.0.attn.q_proj.weight",)
  with pytest.raises(
    RequestError,
    match="h.0.attn.q_proj.weight and .*k_proj.weight and .* name all of them, or none",
  ):
    trainable_params.apply_config(
      model_config.from_hf_config(PUBLISHED["EleutherAI/gpt-j-6b"]), config, "gptj"
    )


@pytest.mark.slow
# PEFT 0.21 asks for it
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.wide_for("gpt_neo", "gptj")
def test_peft_logits_match_saved_adapters(family, stories, tmp_path):
  torch = pytest.importorskip("torch", reason="PEFT is for torch")
  peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
  sizes = {"vocab_size": 293, "bos_token_id": 0, "eos_token_id": 0} | tiny.FAMILIES[family]
  length = {"max_position_embeddings" if family == "gpt_neo" else "n_positions": 71}
  torch.manual_seed(0)
  base = transformers.AutoModelForCausalLM.from_config(
    transformers.AutoConfig.for_model(family, **sizes | length), attn_implementation="eager"
  )
  base.save_pretrained(tmp_path / "base")
  tiny.write_tokenizer(tmp_path / "base", 293)
  config = changed(
    tiny.config(tmp_path / "base", stories), **ADAPTERS | {"optim__learning_rate": 1e-2}
  )
  config.lora.targets = ODD_TARGETS[family]
  run = finetune(config, tmp_path / "run")
  base = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "base", dtype=torch.float32, attn_implementation="eager"
  )
  adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run" / "adapter").eval()
  about = json.loads((tmp_path / "run" / "adapter" / "adapter_config.json").read_text())
  assert about["layers_to_transform"] == [0, 2] and about["r"] == 3
  ours = transformers.AutoModelForCausalLM.from_pretrained(
    run.export, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  ids = torch.arange(60).reshape(2, 30)
  with torch.no_grad():
    with adapted.disable_adapter():
      before = adapted(ids).logits
    wanted, found = adapted(ids).logits, ours(ids).logits
  assert float((wanted - before).abs().max()) > 1e-2
  np.testing.assert_allclose(found.numpy(), wanted.numpy(), atol=1e-5 * float(wanted.abs().max()))
  # Every tensor of the file found its parameter: PEFT leaves out what it does not know.
  state = peft.get_peft_model_state_dict(adapted)
  written = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
  assert state.keys() == written.keys()
  for name, tensor in state.items():
    assert np.array_equal(tensor.numpy(), written[name]), name


def test_new_lora_adapter_changes_no_logits():
  cfg, run = build("gpt2", lora__rank=2)
  drawn = init_params(run, cfg, 0, lora.select_adapters(run.state.params))
  leaves = {
    path[-1].key: np.asarray(x) for path, x in jax.tree_util.tree_flatten_with_path(drawn)[0]
  }
  assert not leaves["lora_b"].any()
  bound = 40**-0.5  # of the model's width
  assert bound * 0.9 < np.abs(leaves["lora_a"]).max() <= bound
