"""Programs of real sizes by the GPU and TPU compilers, without a device: memory and collectives."""

import collections
import dataclasses
import math
import re
import runpy
from pathlib import Path

import pytest
import slice_offsets

import jaxft.config
from jaxft.hardware import specs
from jaxft.hf import model_config, trainable_params
from jaxft.hf.known_models import PUBLISHED
from jaxft.model.decoder import parameter_count
from jaxft.plan import aot_compiler, hlo, planner
from jaxft.utils import backend

CONFIGS = Path(__file__).parents[2] / "configs"
# A file in configs/ -> hardware that its docstring names.
HARDWARE = {
  "gpt2_from_scratch": ("rtx4090",),
  "gpt2_jokes": ("rtx3070",),
  "gpt2_medium_recipes": ("rtx3070",),
  "gpt2_question_answer": ("rtx3070",),
  "gpt2_reviews_classification": ("rtx3070",),
  "gpt2_tinystories": ("rtx4090",),
  "gpt2_vader_speak": ("t4",),
  "gpt2xl_shakespeare_16gb": ("t4",),
  "gptj_6b_24gb": ("rtx4090",),
  "gptj_6b_8gb": ("rtx3070",),
  "gptj_6b_lora": ("rtx4080",),
  "gptj_6b_v5e8": ("v5e:2x4", "rtx4090x8"),
  "gptneo_2b7_16gb": ("t4",),
  "quickstart": ("cpu",),
}
# Programs like another's: GPT-2 that fits one card, and GPT-J on one with more memory. Only `make
# torture` compiles these.
LIKE_OTHERS = {
  "gpt2_from_scratch",
  "gpt2_jokes",
  "gpt2_medium_recipes",
  "gpt2_question_answer",
  "gpt2_reviews_classification",
  "gpt2_vader_speak",
  "gptj_6b_24gb",
}
GIB = 2**30
GPTJ = "EleutherAI/gpt-j-6b"
L, D = 28, 4096


def request(model, device, rows, T, dropout=None, **more):
  config = jaxft.config.default()
  config.model.path, config.data.train, config.train.steps = model, ("texts",), 100
  config.data.sequence_length, config.train.batch_size = T, rows
  config.memory.remat, config.memory.loss_chunk = "full", 256
  for name, value in more.items():
    section, key = name.split("__")
    config[section][key] = value
  cfg = model_config.from_hf_config(PUBLISHED[model])
  config.model.dropout = dropout
  cfg = trainable_params.apply_config(cfg, config, PUBLISHED[model]["model_type"])
  return aot_compiler.CompileRequest(
    jaxft.config.to_json(config), dataclasses.asdict(cfg), device, text=True
  )


def whole_stacks(collectives):
  """Collectives that move the weights of all layers at once."""
  is_stack = lambda shape: len(shape) > 2 and shape[0] == L and math.prod(shape) >= L * D * D
  return [it for it in collectives if any(is_stack(shape) for _, shape in it.shapes)]


@pytest.fixture(scope="module")
def compiler():
  with aot_compiler.Compiler() as it:
    yield lambda request: check_slices(request, it(request))


def check_slices(request, answer):
  """Checks the offset of every slice that XLA annotates (openxla/xla #46231)."""
  target = specs.parse_device(request.device)
  offload = jaxft.config.from_json(request.config).memory.offload
  if target.kind not in specs.GPUS or "text" not in answer:
    return answer
  texts = [answer[name] for name in ("text", "eval_text")]
  if backend.has_slice_bug():
    assert not any(map(slice_offsets.count, texts))
    return answer
  slices = [slice_offsets.slices(text) for text in texts]
  counts = [slice_offsets.count(text) for text in texts]
  assert [len({it.name for it in of_text}) for of_text in slices] == counts
  every = sum(slices, [])
  assert not slice_offsets.mismatches(every)
  if offload == "all":  # the gradients of layers, backward, or of adapters alone
    assert any(it.on_host and it.backward for it in every)
  return answer


@pytest.fixture(scope="module")
def h100x8(compiler):
  return compiler(request(GPTJ, "h100x8", 32, 2048))


@pytest.mark.slow
def test_gptj_fits_8_gpus(h100x8):
  """GPT-J takes less than 20 GiB of each of eight H100s."""
  assert h100x8["devices"] == 8 and h100x8["peak_bytes"] < 20 * GIB


@pytest.mark.slow
def test_fsdp_gathers_layers_and_scatters_grads(h100x8):
  """Layers are gathered one at a time, and gradients are reduce-scattered."""
  found = hlo.collectives(h100x8["text"])
  gathered = [it for it in found if it.kind == "all-gather" and it.times == L]
  # Twice, forward and backward: qkv, out, up and down of one layer.
  for shape in ((D, 3, 16, 256), (16, 256, D), (D, 4 * D), (4 * D, D)):
    assert sum(shape in [s for _, s in it.shapes] for it in gathered) == 2, shape
  scattered = [it for it in found if it.kind == "reduce-scatter" and it.times == L]
  sizes = [math.prod(shape) for it in scattered for _, shape in it.shapes]
  assert sum(size for size in sizes if size >= D * D) == 12 * D * D
  assert not whole_stacks(found)
  # Nothing large is all-reduced: that would be a gradient that no device shards.
  assert all(it.nbytes < 10 * 2**20 for it in found if it.kind == "all-reduce")


@pytest.mark.slow
@pytest.mark.wide
def test_muon_gathers_one_layer_at_a_time(compiler):
  answer = compiler(request(GPTJ, "h100x8", 32, 2048, optim__name="muon"))
  assert answer["peak_bytes"] < 14 * GIB and not whole_stacks(hlo.collectives(answer["text"]))


@pytest.mark.slow
@pytest.mark.parametrize(
  "name, device",
  [
    pytest.param(
      name, device, marks=pytest.mark.wide if name in LIKE_OTHERS or device != devices[0] else ()
    )
    for name, devices in HARDWARE.items()
    for device in devices
  ],
)
def test_shipped_config_fits_its_hardware(compiler, name, device):
  """Every config in configs/ fits the hardware that its docstring names."""
  file = runpy.run_path(str(CONFIGS / f"{name}.py"))
  assert device in file["__doc__"].lower(), "the docstring names it"
  config = file["get_config"]()
  planned_as = re.search(r"jaxft\.plan (?:.*\\\n)?.*--config\.model\.path=(\S+)", file["__doc__"])
  config.model.path = planned_as[1] if planned_as else config.model.path
  cfg = dataclasses.asdict(planner.resolve_model_config(config))
  answer = compiler(
    aot_compiler.CompileRequest(jaxft.config.to_json(config), cfg, device, text=True)
  )
  assert "refused" not in answer and "needs_bytes" not in answer, answer
  if config.memory.offload != "none" and specs.parse_device(device).kind in specs.GPUS:
    pinned = planner._to_plan(config, specs.parse_device(device), answer)["pinned_bytes"]
    assert (
      pinned == int(backend.PINNED_HEADROOM * answer["bytes_on_every_host"]) > answer["host_bytes"]
    )
  usable = specs.parse_device(device).usable_bytes
  assert max(answer["peak_bytes"], answer["eval_peak_bytes"]) <= usable
  if answer["devices"] > 1:
    found = hlo.collectives(answer["text"])
    assert not whole_stacks(found)
    assert {"all-gather", "reduce-scatter"} <= {it.kind for it in found} | fused_scatter(answer)


def test_hardware_table_has_every_config():
  assert HARDWARE.keys() == {file.stem for file in CONFIGS.glob("*.py")}


@pytest.mark.slow
@pytest.mark.wide
def test_tpu_memory_per_chip_shrinks_with_slice_size(compiler):
  slices = {"v5e:2x4": 14, "v5e:4x4": 14, "v5e:8x8": 14, "v5e:16x16": 2.5}
  answers = [
    compiler(request(GPTJ, name, math.prod(map(int, name[4:].split("x"))), 2048)) for name in slices
  ]
  assert not any("refused" in answer for answer in answers), answers
  peaks = [answer["peak_bytes"] / GIB for answer in answers]
  assert all(peak < most for peak, most in zip(peaks, slices.values(), strict=True)), peaks
  assert all(after < before for before, after in zip(peaks, peaks[1:])), peaks
  assert not any(whole_stacks(hlo.collectives(answer["text"])) for answer in answers)


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, T, most",
  [
    pytest.param("gpt2-xl", 1024, 2.5, marks=pytest.mark.wide),
    pytest.param("EleutherAI/gpt-neo-2.7B", 2048, 4, marks=pytest.mark.wide),
    (GPTJ, 2048, 5),
  ],
)
def test_offload_all_leaves_one_layer_on_device(compiler, model, T, most):
  """With weights and state on the host, a device has memory for about one layer."""
  answer = compiler(request(model, "h100", 1, T, memory__offload="all"))
  assert answer["peak_bytes"] < most * GIB
  # Weights, two moments and the gradient, which waits there for its norm; beside them nothing as
  # large as a layer's state.
  cfg = model_config.from_hf_config(PUBLISHED[model])
  layer = 12 * (4 * cfg.D * cfg.N * cfg.H + 2 * cfg.D * cfg.F)
  print(answer["host_bytes"] / GIB, answer["host_temporary_bytes"] / GIB, layer / GIB)
  assert answer["host_temporary_bytes"] < layer
  assert answer["host_bytes"] - answer["host_temporary_bytes"] < 16.1 * parameter_count(cfg)


@pytest.mark.slow
@pytest.mark.wide
def test_offload_optimizer_copy_slices(compiler):
  """And updated in accumulation steps; `compiler` looks at the slices."""
  answer = compiler(
    request("gpt2", "h100", 4, 512, memory__offload="optimizer", train__micro_batch_size=2)
  )
  assert answer["accumulation_steps"] == 2 and answer["host_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("fsdp, tensor", [(2, 1), pytest.param(1, 2, marks=pytest.mark.wide)])
def test_offload_keeps_collectives_and_shards_host(compiler, fsdp, tensor):
  """Devices offload their own shards, and exchange what they would without offload."""
  found = {}
  mesh = dict(mesh__fsdp=fsdp, mesh__tensor=tensor)
  for offload in ("none", "all"):
    answer = compiler(request("gpt2", "h100x2", 2, 512, 0.0, memory__offload=offload, **mesh))
    large = [it for it in hlo.collectives(answer["text"]) if it.nbytes > 2**20]
    found[offload] = collections.Counter((it.kind, it.times, it.nbytes) for it in large)
  assert found["all"] == found["none"]
  # The table, too, travels as it is computed with.
  assert not [it for it in large if it.kind == "all-gather" and ("f32", (50304, 768)) in it.shapes]
  cfg = model_config.from_hf_config(PUBLISHED["gpt2"])
  assert answer["host_bytes"] < 16.2 * parameter_count(cfg) / 2


@pytest.mark.slow
def test_offload_unsupported_on_tpu_is_refused(compiler):
  """Cases in which the TPU compiler cannot offload end with an error."""
  for model, T, more in (
    ("gpt2-xl", 1024, {}),
    (GPTJ, 2048, {"lora__rank": 16}),
    (GPTJ, 2048, {"optim__name": "adafactor"}),
  ):
    answer = compiler(request(model, "v5e:1x1", 1, T, memory__offload="all", **more))
    assert "config.memory.offload=all: on a TPU this model" in answer["refused"], answer


@pytest.mark.slow
@pytest.mark.parametrize("offload, most", [("none", 14), ("all", 5)])
@pytest.mark.wide
def test_gptj_lora_memory(compiler, offload, most):
  """LoRA on GPT-J takes little more memory than its weights."""
  answer = compiler(request(GPTJ, "h100", 1, 2048, memory__offload=offload, lora__rank=16))
  print(offload, answer["peak_bytes"] / GIB, answer["host_bytes"] / GIB)
  assert answer["peak_bytes"] < most * GIB
  assert answer["host_bytes"] < 12 * GIB if offload == "all" else not answer["host_bytes"]


@pytest.mark.slow
@pytest.mark.wide
def test_gptj_offload_fits_one_tpu_chip(compiler):
  answer = compiler(request(GPTJ, "v5e:1x1", 1, 2048, memory__offload="all"))
  assert answer["peak_bytes"] < specs.parse_device("v5e:1x1").usable_bytes


def shapes_in(text):
  """Of every array in a compiled program."""
  found = re.findall(r"\b(?:pred|[suf]\d+|bf16)\[([\d,]+)\]", text)
  return {tuple(map(int, shape.split(","))) for shape in found}


@pytest.fixture(scope="module")
def gpt2(compiler):
  return compiler(request("gpt2", "h100", 8, 1024, dropout=0.0, memory__loss_chunk=-1))


def check_no_giants(answer, B=8, T=1024, V=50304, D=768, N=12):
  """No array has all attention probabilities or all logits, of any shape.

  The inputs of all layers, and the table, are smaller.
  """
  shapes = shapes_in(answer["text"])
  assert (V, D) in shapes and not [shape for shape in shapes if shape.count(T) > 1]
  largest = max(shapes, key=math.prod)
  assert math.prod(largest) < B * N * T * T < B * T * V, largest


@pytest.mark.slow
def test_gpt2_on_gpu_uses_cudnn_attention(gpt2):
  """No array has all attention probabilities or all logits."""
  assert "__cudnn$fmhaSoftmaxBackward" in gpt2["text"]
  check_no_giants(gpt2)


@pytest.mark.slow
@pytest.mark.parametrize(
  "model, device, rows, kernel",
  [
    # With eight rows libtpu 0.0.42 takes twice as long, and with four still four minutes.
    pytest.param("gpt2", "v5e:1x1", 4, "splash_mha_dkv", marks=pytest.mark.wide),
    # Every other layer has a window.
    pytest.param(
      "EleutherAI/gpt-neo-125m", "h100", 8, "__cudnn$fmhaSoftmaxBackward", marks=pytest.mark.wide
    ),
    pytest.param("gpt2", "t4", 8, "", marks=pytest.mark.wide),
  ],
)
def test_no_program_has_full_scores_or_logits(compiler, model, device, rows, kernel):
  answer = compiler(request(model, device, rows, 1024, dropout=0.0, memory__loss_chunk=-1))
  assert kernel in answer["text"]
  check_no_giants(answer, B=rows)


@pytest.mark.slow
@pytest.mark.wide
def test_attention_dropout_has_no_full_scores(compiler):
  check_no_giants(compiler(request("gpt2", "h100", 8, 1024, memory__loss_chunk=-1)))


@pytest.mark.slow
@pytest.mark.wide
def test_full_remat_memory_and_flops(compiler, gpt2):
  # With the default chunk of the loss, 128 MiB of logits: a little more memory than with one of 32
  # positions a row, and faster.
  """Full remat takes little memory and computes little more."""
  assert gpt2["peak_bytes"] < 2.35 * GIB and gpt2["flops"] < 1.4 * gpt2["model_flops"]
  small = compiler(request("gpt2", "h100", 8, 1024, dropout=0.0, memory__loss_chunk=32))
  print(gpt2["peak_bytes"] / GIB, small["peak_bytes"] / GIB)
  assert small["peak_bytes"] <= 2.3 * GIB and small["flops"] < 1.4 * small["model_flops"]


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize("remat", ["none", "dots"])
def test_partial_remat_flops(compiler, remat):
  """Without full remat, little is computed twice."""
  answer = compiler(
    request("gpt2", "h100", 8, 1024, dropout=0.0, memory__loss_chunk=-1, memory__remat=remat)
  )
  print(remat, answer["peak_bytes"] / GIB, answer["flops"] / answer["model_flops"])
  assert answer["flops"] < 1.15 * answer["model_flops"]


@pytest.mark.slow
@pytest.mark.wide
def test_gpt2_dropout_compiles_for_tpu(compiler):
  """Four rows at once need a deeper stack than libtpu gives its threads."""
  answer = compiler(request("gpt2", "v5e:2x4", 32, 1024))
  assert answer["peak_bytes"] < 2 * GIB


def fused_scatter(answer):
  """libtpu fuses a reduce-scatter with what makes its operand: then only its name is left."""
  return {"reduce-scatter"} if "reduce-scatter" in answer["text"] else set()


@pytest.mark.slow
@pytest.mark.wide
def test_zero_stage_collectives_match_docs(compiler):
  """Eight GPUs: gradients are all-reduced up to stage 1, and reduce-scattered from stage 2 on.

  The token table's are summed in two parts (0.31 of the weights). Weights are gathered once, or
  layer by layer.
  """
  flags = dict(memory__remat="none", memory__loss_chunk=0, model__compute_dtype="float32")
  stages = [request("gpt2", "h100x8", 8, 64, mesh__zero_stage=stage, **flags) for stage in range(4)]
  kinds = [collections.Counter(answer["collective_bytes"]) for answer in map(compiler, stages)]
  weights = 4 * 124_439_808
  gathered, summed, scattered = (
    [kind[name] / weights for kind in kinds]
    for name in ("all-gather", "all-reduce", "reduce-scatter")
  )
  print(gathered, summed, scattered)
  assert gathered[1] == pytest.approx(1, abs=0.1) == gathered[2]
  assert gathered[0] < 0.05 and gathered[3] > 1.6
  assert summed[0] == pytest.approx(1.31, abs=0.03) == summed[1]
  assert summed[2] < 0.1 and summed[3] < 0.1
  assert scattered[0] < 0.05 and scattered[2] == pytest.approx(1, abs=0.2) == scattered[3]
