"""Loads and exports model folders: exact both ways, and every error of a folder is named."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxft.hf.tokenizer
import jaxft.model.decoder
from jaxft.errors import RequestError, StorageError
from jaxft.hf import export, export_tensors, load_weights, model_config, repo, verify
from jaxft.model.compute import ComputeConfig

HERE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load_folder(folder, shardings=None):
  checkpoint = repo.resolve(str(folder))
  _, shapes, axes = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  return checkpoint, load_weights.load_params(
    checkpoint,
    shapes,
    shardings(shapes, axes) if shardings else jax.tree.map(lambda _: HERE, shapes),
  )


def rewrite(folder, to, change=lambda tensors: tensors, config=lambda config: config):
  shutil.copytree(folder, to)
  save_file(
    change(load_file(folder / "model.safetensors")),
    to / "model.safetensors",
    metadata={"format": "pt"},
  )
  (to / "config.json").write_text(
    json.dumps(config(json.loads((folder / "config.json").read_text())))
  )
  return to


def test_gpt2_export_round_trip_is_byte_identical(folder, tmp_path):
  checkpoint, params = load_folder(folder)
  parity = export.export_model(tmp_path / "out", params, checkpoint)
  before = load_file(folder / "model.safetensors")
  after = load_file(tmp_path / "out" / "model.safetensors")
  assert before.keys() == after.keys()
  for name in before:
    assert (
      before[name].tobytes() == after[name].tobytes() and before[name].shape == after[name].shape
    ), name
  assert json.loads((tmp_path / "out" / "parity.json").read_text()) == parity
  assert parity["logits_max_abs_difference"] <= 1e-4
  assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob("*.old"))


def narrow(name: str, dtype: str) -> np.dtype:
  """`dtype` of a tensor; "mixed": norms in float32, the rest in float16, as some tools write."""
  return export_tensors.EXPORT_DTYPES[
    dtype if dtype != "mixed" else "float32" if ".ln_" in name else "float16"
  ]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "mixed"])
def test_source_dtypes_survive_load_and_export(folder, tmp_path, dtype):
  source = rewrite(
    folder,
    tmp_path / "in",
    lambda ts: {name: t.astype(narrow(name, dtype)) for name, t in ts.items()},
  )
  checkpoint, params = load_folder(source)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"float32"}
  export.export_model(tmp_path / "out", params, checkpoint, dtype="source")
  before, after = load_weights.list_tensors(source), load_weights.list_tensors(tmp_path / "out")
  assert before.keys() == after.keys()
  for name in before:
    assert after[name].dtype == narrow(name, dtype)
    assert before[name].view().tobytes() == after[name].view().tobytes()
  assert (
    json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == narrow("wte", dtype).name
  )


@pytest.mark.slow
def test_vocab_padding_changes_no_logits_or_export(folder, tmp_path):
  """Rows that pad the table have no probability and no gradient, and are in no export."""
  import jaxft.config
  import jaxft.sharding.mesh
  from jaxft.model.loss import cross_entropy_sum

  checkpoint, params = load_folder(folder)
  mesh = jaxft.sharding.mesh.make_mesh(jaxft.config.default().mesh)
  graph, shapes, _ = jaxft.model.decoder.abstract_model(
    checkpoint.cfg, ComputeConfig(vocab_multiple=128)
  )
  # On one device and split over eight: rows 288 ... 383 hold 5 tokens.
  split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
  replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  shardings = jax.tree.map(lambda leaf: split if leaf.shape[0] == 384 else replicated, shapes)
  padded = load_weights.load_params(checkpoint, shapes, shardings)
  table = np.asarray(padded["embed"]["tokens"])
  np.testing.assert_array_equal(table[:293], params["embed"]["tokens"])
  assert table.shape == (384, 40) and not table[293:].any()

  ids = np.random.default_rng(0).integers(293, size=(3, 41)).astype(np.int32)
  np.testing.assert_allclose(
    verify.compute_logits(graph, padded, ids), verify.compute_logits(graph, params, ids), atol=1e-5
  )

  def loss(params, chunk):
    decoder = nnx.merge(graph, params)
    return cross_entropy_sum(
      decoder(ids[:, :-1])[0], decoder.head(), ids[:, 1:], np.ones((3, 40), bool), chunk
    )

  for chunk in (0, 16):
    value, grads = jax.jit(jax.value_and_grad(loss), static_argnums=1)(padded, chunk)
    expected, plain = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, chunk)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    table_grads = np.asarray(grads["embed"]["tokens"])
    np.testing.assert_allclose(table_grads[:293], plain["embed"]["tokens"], atol=1e-4)
    assert not table_grads[293:].any()
  export.export_model(tmp_path / "out", padded, checkpoint)
  before = load_file(folder / "model.safetensors")
  after = load_file(tmp_path / "out" / "model.safetensors")
  assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_load_and_export_on_meshes_and_shards(folder, tmp_path):
  """Meshes and sharded files change nothing."""
  import jaxft.config
  import jaxft.sharding.mesh
  from jaxft.sharding import rules

  mesh = jaxft.sharding.mesh.make_mesh(jaxft.config.default().mesh)
  checkpoint, sharded = load_folder(
    folder, lambda shapes, axes: rules.tree_shardings("parameters", shapes, axes, mesh)
  )
  _, params = load_folder(folder)
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(sharded), jax.device_get(params))
  export.export_model(tmp_path / "out", sharded, checkpoint, max_shard_size="40KB")
  assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 3
  _, again = load_folder(tmp_path / "out")
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(params))


def test_load_names_without_prefix_and_tied_head(folder, tmp_path):
  """Names without prefix, buffers and a tied head are read."""

  def as_first_gpt2(tensors):
    plain = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    masks = {f"h.{i}.attn.bias": np.tril(np.ones((1, 1, 71, 71), np.float32)) for i in range(3)}
    return (
      plain
      | masks
      | {
        "lm_head.weight": plain["wte.weight"].copy(),
        "h.0.attn.masked_bias": np.float32([-1e4]).reshape(()),
      }
    )

  _, params = load_folder(rewrite(folder, tmp_path / "in", as_first_gpt2))
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(params), jax.device_get(load_folder(folder)[1])
  )


def without(name):
  return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
  "change, message",
  [
    (without("transformer.h.1.mlp.c_fc.bias"), "'h.1.mlp.c_fc.bias' is missing"),
    (
      lambda t: t | {"transformer.h.3.ln_1.bias": t["transformer.ln_f.bias"]},
      "a gpt2 model of 3 layers has no tensor 'h.3.ln_1.bias'",
    ),
    (
      lambda t: t | {"transformer.wpe.weight": t["transformer.wpe.weight"][:-1].copy()},
      r"'wpe.weight' has shape \(70, 40\).*\(71, 40\)",
    ),
    (
      lambda t: t | {"lm_head.weight": t["transformer.wte.weight"] + 1},
      "lm_head.weight differs from wte.weight",
    ),
    (
      lambda t: t | {"wte.weight": t["transformer.wte.weight"]},
      "'wte.weight' occurs both with and without",
    ),
    (
      lambda t: t | {"transformer.wte.weight": t["transformer.wte.weight"].astype(np.float64)},
      "wte.weight' has dtype F64",
    ),
  ],
)
def test_mismatched_weights_are_named(folder, tmp_path, change, message):
  with pytest.raises(RequestError, match=message):
    load_folder(rewrite(folder, tmp_path / "in", change))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(model_type="llama"), "model_type='llama'"),
    (dict(add_cross_attention=True), "add_cross_attention"),
    (dict(activation_function="relu"), "activation_function='relu'"),
    (dict(n_layer=10**9), "n_layer=1000000000"),
    (dict(n_embd=0), "n_embd=0 must be an integer"),
    (dict(n_head=5.0), "'n_head': .* expected int"),
    (dict(model_type=[]), "model_type=.. is not supported"),
    (dict(layer_norm_epsilon=-1.0), "layer_norm_epsilon=-1.0"),
    (dict(embd_pdrop=1.5), "embd_pdrop=1.5"),
    (dict(quantization_config={}), "quantization_config={}"),
    (
      dict(model_type="gpt_neo", attention_types=[[["global"], 10**9]]),
      "attention_types has too many layers",
    ),
    (dict(n_head=7), "n_embd=40 is not divisible by n_head=7"),
    (dict(vocab_size="x"), "'vocab_size': .* expected int"),
    (dict(n_embd=None), "'n_embd': .* expected int"),
  ],
)
def test_unsupported_config_json_keys_are_refused(folder, tmp_path, change, message):
  """Keys that change the maths are refused by name."""
  with pytest.raises(RequestError, match=f"config.json: .*{message}"):
    load_folder(rewrite(folder, tmp_path / "in", config=lambda config: config | change))


def test_config_json_attribute_aliases(folder, tmp_path):
  """`hidden_size` is `n_embd`, and so on: transformers reads either, so jaxft does."""
  plain = json.loads((folder / "config.json").read_text())
  renamed = {
    "n_embd": "hidden_size",
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
  }
  config = {renamed.get(key, key): value for key, value in plain.items()}
  assert model_config.from_hf_config(config) == model_config.from_hf_config(plain)
  with pytest.raises(RequestError, match="is missing"):  # a layer more than there are weights
    load_folder(
      rewrite(folder, tmp_path / "in", config=lambda config: config | {"num_hidden_layers": 4})
    )


def test_export_drops_keys_that_name_code(folder, tmp_path):
  hostile = {
    "auto_map": {"AutoModel": "x.y"},
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
  }
  checkpoint, params = load_folder(
    rewrite(folder, tmp_path / "in", config=lambda config: config | hostile)
  )
  export.export_model(tmp_path / "out", params, checkpoint)
  assert not hostile.keys() & json.loads((tmp_path / "out" / "config.json").read_text()).keys()


def test_logits_tolerance_is_relative_when_large(tmp_path):
  checkpoint, params = load_folder(tiny.write_gpt2(tmp_path / "in", seed=0, std=1.0))
  assert export.export_model(tmp_path / "out", params, checkpoint)["tolerance"] > 1e-3


def test_damaged_and_hostile_folders_are_refused(folder, tmp_path):
  def refused(message, to, damage):
    shutil.copytree(folder, tmp_path / to)
    damage(tmp_path / to)
    with pytest.raises(RequestError, match=message):
      load_folder(tmp_path / to)

  weights = (folder / "model.safetensors").read_bytes()
  refused(
    "model.safetensors: not a valid safetensors",
    "short",
    lambda f: (f / "model.safetensors").write_bytes(weights[:-5]),
  )
  refused(
    "model.safetensors: not a valid safetensors",
    "giant",
    lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 64),
  )
  refused("config.json", "no_json", lambda f: (f / "config.json").write_text("{"))
  refused(
    "config.json: not a regular file",
    "pipe",
    lambda f: ((f / "config.json").unlink(), os.mkfifo(f / "config.json")),
  )
  refused("tokenizer.json: too large", "huge", lambda f: os.truncate(f / "tokenizer.json", 2**31))
  refused(
    "merges.txt: a link to a file outside",
    "link",
    lambda f: (f / "merges.txt").symlink_to("/etc/hostname"),
  )
  refused(
    "it has the key 'n_embd' twice",
    "twice",
    lambda f: (f / "config.json").write_text('{"n_embd": 8, "n_embd": 9}'),
  )
  refused("config.json: not a JSON object", "list", lambda f: (f / "config.json").write_text("[]"))
  refused(
    "it has no model.safetensors or flax_model.msgpack",
    "empty",
    lambda f: (f / "model.safetensors").unlink(),
  )

  def index(names):
    def damage(f):
      (f / "model.safetensors").rename(f.parent / "outside.safetensors")
      (f / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))

    return damage

  refused(
    "'../outside.safetensors' is not a file of this folder",
    "up",
    index({"a": "../outside.safetensors"}),
  )
  refused(
    "is not a file of this folder", "absolute", index({"a": str(tmp_path / "outside.safetensors")})
  )
  refused("is not a file of this folder", "gone", index({"a": "model-1.safetensors"}))
  refused("not an index", "map", index(["a"]))
  refused("'x.bin' is not a .safetensors file", "pickle", index({"a": "x.bin"}))


def test_export_replaces_only_earlier_exports(folder, tmp_path):
  checkpoint, params = load_folder(folder)
  (tmp_path / "notes").mkdir()
  (tmp_path / "notes" / "mine.txt").write_text("x")
  # Somebody's model: it has a config.json, and no parity.json.
  mine = shutil.copytree(folder, tmp_path / "mine")
  (tmp_path / "run" / "checkpoints").mkdir(parents=True)
  (tmp_path / "run" / "parity.json").write_text("{}")
  (tmp_path / "file").write_text("x")
  for out in (
    Path(),
    Path("x/../.."),
    tmp_path / "notes",
    mine,
    tmp_path / "run",
    tmp_path / "file",
    tmp_path,
    tmp_path / ("x" * 5000),
  ):
    with pytest.raises(
      RequestError, match="not an earlier export|File name too long|current folder"
    ):
      export.export_model(out, params, checkpoint)
  assert (tmp_path / "notes" / "mine.txt").read_text() == "x"
  neighbours = [tmp_path / f"out{end}" for end in (".old", ".partial")] + [
    tmp_path / ".out.partial"
  ]
  for neighbour in neighbours:
    neighbour.mkdir()
    (neighbour / "thesis.txt").write_text("x")
  before = sorted(tmp_path.rglob("*"))
  for _ in range(2):
    export.export_model(tmp_path / "out", params, checkpoint, card="card")
  assert (tmp_path / "out" / "README.md").read_text() == "card"
  shutil.rmtree(tmp_path / "out")
  assert sorted(tmp_path.rglob("*")) == before


def test_export_that_differs_is_discarded(folder, tmp_path, monkeypatch):
  checkpoint, params = load_folder(folder)
  real = load_weights.list_tensors

  def flip_one_bit(folder):
    file = next(iter(real(folder).values())).file
    content = bytearray(file.read_bytes())
    content[real(folder)["transformer.wpe.weight"].offset + 5] ^= 1
    file.write_bytes(content)
    return real(folder)

  monkeypatch.setattr(load_weights, "list_tensors", flip_one_bit)
  with pytest.raises(StorageError, match="'transformer.wpe.weight' differs when read back"):
    export.export_model(tmp_path / "out", params, checkpoint)
  assert not (tmp_path / "out").exists()


def test_export_recovers_from_kill_between_renames(folder, tmp_path, monkeypatch):
  checkpoint, params = load_folder(folder)
  out = tmp_path / "out"
  export.export_model(out, params, checkpoint, card="first")
  with monkeypatch.context() as ended:
    renames, rename = [], Path.rename

    def first_only(path, to):
      renames.append(to)
      if len(renames) > 1:
        raise KeyboardInterrupt
      return rename(path, to)

    ended.setattr(Path, "rename", first_only)
    with pytest.raises(KeyboardInterrupt):
      export.export_model(out, params, checkpoint, card="second")
  assert not out.exists(), "the moment that is meant"

  def fails(*_):
    raise OSError("no")

  with monkeypatch.context() as failing:
    failing.setattr(export, "_write_safetensors", fails)
    with pytest.raises(StorageError, match="an earlier export is unchanged"):
      export.export_model(out, params, checkpoint, card="third")
  assert (out / "README.md").read_text() == "first" and [
    file.name for file in tmp_path.iterdir()
  ] == ["out"]


def test_exported_folder_loads_in_transformers(folder, tmp_path):
  torch = pytest.importorskip("torch", reason="parity is measured where torch is installed")
  transformers = pytest.importorskip("transformers")
  checkpoint, params = load_folder(folder)
  parity = export.export_model(
    tmp_path / "out", params, checkpoint, tokenizer=jaxft.hf.tokenizer.load_tokenizer(folder, 293)
  )
  assert parity["reference"].startswith("transformers")
  theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
    tmp_path / "out", output_loading_info=True
  )
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  ids = np.random.default_rng(1).integers(293, size=(2, 71))
  graph, _, _ = jaxft.model.decoder.abstract_model(checkpoint.cfg, ComputeConfig())
  with torch.no_grad():
    np.testing.assert_allclose(
      verify.compute_logits(graph, params, ids.astype(np.int32)),
      theirs(torch.from_numpy(ids)).logits,
      atol=1e-4,
    )
  ours, tokenizer = (
    transformers.AutoTokenizer.from_pretrained(at) for at in (folder, tmp_path / "out")
  )
  assert tokenizer("the naïve cat")["input_ids"] == ours("the naïve cat")["input_ids"]


def test_unused_files_of_a_folder_are_ignored(folder, tmp_path):
  """Environments, logs and corpora lie beside models; --model=. is a common way to name one."""
  other = shutil.copytree(folder, tmp_path / "m")
  for name in ("wandb/debug-core.log", ".venv/bin/python", "last"):
    (other / name).parent.mkdir(parents=True, exist_ok=True)
    (other / name).symlink_to("/no/such/file")
  os.mkfifo(other / "pipe")
  with (other / "train.txt").open("wb") as sparse:
    sparse.truncate(repo.MAX_TEXT_BYTES + 1)
  checkpoint, params = load_folder(other)
  export.export_model(tmp_path / "out", params, checkpoint)
  with (other / "merges.txt").open("wb") as sparse:
    sparse.truncate(repo.MAX_TEXT_BYTES + 1)
  with pytest.raises(RequestError, match="merges.txt: too large: .* bytes"):
    load_folder(other)
  (other / "merges.txt").unlink()
  (other / "model.safetensors").rename(tmp_path / "shared")
  (other / "model.safetensors").symlink_to(tmp_path / "shared")
  with pytest.raises(RequestError, match="a link to a file outside this folder; copy .*: cp -rL "):
    load_folder(other)


def test_unread_weight_formats_may_be_broken(folder, tmp_path):
  """As after `git lfs pull --include model.safetensors`; or a Trainer's optimizer elsewhere."""
  other = shutil.copytree(folder, tmp_path / "m")
  pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
  for name in ("pytorch_model.bin", "flax_model.msgpack", "optimizer.bin", "foo.index.json"):
    (other / name).write_text(pointer)
  for name in ("adapter_model.safetensors", "scheduler.bin", "flax_model-00001-of-00002.msgpack"):
    (other / name).symlink_to("/no/such/file")
  os.mkfifo(other / "events.safetensors")
  load_folder(other)
  (other / "model.safetensors").unlink()
  with pytest.raises(RequestError, match="flax_model.msgpack: a git-lfs pointer"):
    load_folder(other)
  (other / "flax_model.msgpack").unlink()
  os.mkfifo(other / "model.safetensors")
  with pytest.raises(RequestError, match="model.safetensors: not a regular file"):
    load_folder(other)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_git_lfs_pointer_is_refused(folder, tmp_path, name):
  other = shutil.copytree(folder, tmp_path / "m")
  (other / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n")
  with pytest.raises(RequestError, match=f"{name}: a git-lfs pointer.*git lfs pull"):
    load_folder(other)


def test_hub_url_error_names_the_id():
  for address in (
    "https://huggingface.co/gpt2",
    "huggingface.co/gpt2/tree/main",
    "https://hf.co/gpt2/",
  ):
    for message in (
      repo.validate_model(address)[0],
      str(pytest.raises(RequestError, repo.resolve, address).value),
    ):
      assert message.endswith("this is a URL; give only the id: gpt2")
  assert repo.validate_model("https://huggingface.co/EleutherAI/gpt-neo-125m")[0].endswith(
    "only the id: EleutherAI/gpt-neo-125m"
  )
  for rest in (
    "?x=1",
    "#model",
    "/resolve/main/model.safetensors",
    "/blob/main/config.json",
    "/tree",
  ):
    assert repo.validate_model(f"https://HuggingFace.co/gpt2{rest}")[0].endswith(
      "only the id: gpt2"
    )
  assert repo.validate_model("hf://gpt2")[0].endswith("only the id: gpt2")
  assert "the URL of a data set" in repo.validate_model("https://huggingface.co/datasets/imdb")[0]


def test_folder_named_like_hub_url_is_local(folder, tmp_path, monkeypatch):
  shutil.copytree(folder, tmp_path / "huggingface.co" / "gpt2")
  monkeypatch.chdir(tmp_path)
  assert (
    not repo.validate_model("huggingface.co/gpt2")
    and repo.resolve("huggingface.co/gpt2").cfg.V == 293
  )


def test_float16_overflow_is_refused_before_writing(folder, tmp_path):
  """The error names the weight."""
  checkpoint, params = load_folder(folder)
  is_up = lambda path: [key.key for key in path[-2:]] == ["up", "kernel"]
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: x.at[1].mul(1e8) if is_up(path) else x, params
  )
  with pytest.raises(
    RequestError,
    match=r"h\.1\.mlp\.c_fc\.weight has a weight of .*, beyond float16's maximum of 65504",
  ):
    export.export_model(tmp_path / "out", params, checkpoint, dtype="float16")
  assert not list(tmp_path.iterdir())
  is_bias = lambda path: [key.key for key in path[-2:]] == ["up", "bias"]
  change = lambda to: jax.tree_util.tree_map_with_path(
    lambda path, x: x.at[1].set(to) if is_bias(path) else x, load_folder(folder)[1]
  )
  # float16 has 65519 as 65504.
  export.export_model(tmp_path / "out", change(65519.0), checkpoint, dtype="float16")
  with pytest.raises(RequestError, match="c_fc.bias has a weight of nan"):
    export.export_model(tmp_path / "out", change(float("nan")), checkpoint, dtype="float16")
  with pytest.raises(
    RequestError, match="logits of the model in memory are not finite: a weight is NaN or infinite"
  ):
    export.export_model(tmp_path / "out", change(float("nan")), checkpoint)


@pytest.mark.parametrize(
  "family, more",
  [
    ("gpt2", {"activation_function": "gelu"}),  # Cerebras-GPT
    pytest.param(
      "gpt2",
      {
        "scale_attn_weights": False,
        "reorder_and_upcast_attn": True,
        "activation_function": "gelu_fast",
      },
      marks=pytest.mark.slow,
    ),
    # stanford-crfm's
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True}),
    pytest.param("gpt_neo", {"activation_function": "gelu_accurate"}, marks=pytest.mark.slow),
    ("gptj", {"activation_function": "gelu_pytorch_tanh"}),
    pytest.param("gptj", {"activation_function": "gelu_python"}, marks=pytest.mark.slow),
  ],
)
def test_activations_and_scales_match_transformers(family, more, tmp_path):
  """An export compares its logits with transformers'; those of the other gelu differ more."""
  pytest.importorskip("torch")
  tiny.write_family(tmp_path / "m", family, seed=3, P=17, std=0.5)
  about = json.loads((tmp_path / "m" / "config.json").read_text())
  (tmp_path / "m" / "config.json").write_text(json.dumps(about | more))
  checkpoint, params = load_folder(tmp_path / "m")
  report = export.export_model(tmp_path / "out", params, checkpoint)
  assert (
    "transformers" in report["reference"]
    and report["logits_max_abs_difference"] < report["tolerance"]
  )
  written = json.loads((tmp_path / "out" / "config.json").read_text())
  assert {key: written[key] for key in more} == more
  change = (
    {"divided_by_depth": False}
    if checkpoint.cfg.divided_by_depth
    else {"exact_gelu": not checkpoint.cfg.exact_gelu}
  )
  plain = dataclasses.replace(checkpoint.cfg, **change)
  ids = np.arange(13)[None] % checkpoint.cfg.V
  ours, other = (
    verify.compute_logits(jaxft.model.decoder.abstract_model(cfg, ComputeConfig())[0], params, ids)
    for cfg in (checkpoint.cfg, plain)
  )
  assert np.abs(ours - other).max() > 5 * report["logits_max_abs_difference"]
