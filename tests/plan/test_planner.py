"""Plans: FLOPs against a hand count, the roofline, results and errors of the command, memory."""

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile

import jax
import numpy as np
import processes
import pytest
from rich.console import Console

import jaxft
import jaxft.config
import jaxft.plan.search
import jaxft.sharding.mesh
from jaxft.errors import RequestError
from jaxft.hardware import flops, roofline, specs
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.metrics.logger import MetricsLogger
from jaxft.metrics.sinks import JsonlSink
from jaxft.plan import aot_compiler, measure, planner, rendering
from jaxft.plan.measure import dummy_row
from jaxft.sharding import rules
from jaxft.training.build import build_train_program
from jaxft.utils import backend
from jaxft.utils.console import ProgressBar

KEYS = {
  "device",
  "devices",
  "fits",
  "peak_bytes",
  "usable_bytes",
  "breakdown",
  "host_bytes",
  "flops",
  "collective_bytes",
  "step_seconds_estimate",
  "compile_seconds",
  "versions",
}


def published(model="gpt2", **more):
  config = jaxft.config.default()
  config.model.path, config.data.train, config.train.steps = model, ("texts",), 100
  for name, value in more.items():
    section, key = name.split("__")
    config[section][key] = value
  return jaxft.config.resolve(config)


def traced(config, cfg):
  mesh = jaxft.sharding.mesh.make_mesh(config.mesh, jax.devices()[:1])
  program = build_train_program(config, cfg, mesh, 100, dummy_row(config, cfg))
  return program.train_step.trace(program.state, program.batch)


# Products of one token and layer: qkv, scores, weighted values, out, up, down.
def forward(cfg, T):
  D, F, NH = cfg.D, cfg.F, cfg.N * cfg.H
  return {
    "qkv": 6 * D * NH,
    "scores": 2 * NH * T,
    "values": 2 * NH * T,
    "out": 2 * NH * D,
    "up": 2 * D * F,
    "down": 2 * D * F,
  }


@pytest.mark.parametrize(
  "remat, again",
  [
    # Attention in chunks makes scores again in its backward pass, with any policy.
    ("none", ("scores",)),
    ("dots", ("scores",)),
    # Nothing in the backward pass needs the output of down.
    ("full", ("scores", "qkv", "scores", "values", "out", "up")),
  ],
)
@pytest.mark.parametrize("chunk, accumulated", [(0, 1), (8, 1), (8, 2)])
def test_jaxpr_flops_match_hand_count(config, remat, again, chunk, accumulated):
  config.memory.remat, config.memory.loss_chunk = remat, chunk
  config.train.micro_batch_size = config.train.batch_size // accumulated
  cfg = planner.resolve_model_config(config)
  T, tokens = config.data.sequence_length, config.train.batch_size * config.data.sequence_length
  products = forward(cfg, T)
  padded_vocab = -(-cfg.V // rules.VOCAB_MULTIPLE) * rules.VOCAB_MULTIPLE
  layer = 3 * sum(products.values()) + sum(products[name] for name in again)
  head = 3 * 2 * cfg.D * padded_vocab  # in chunks too
  step = traced(config, cfg)
  assert flops.jaxpr_flops(step.jaxpr) == tokens * (cfg.L * layer + head)


def test_model_flops_match_step_without_remat(config):
  """A step without remat has the model's FLOPs, and those of attention scores twice."""
  cfg = planner.resolve_model_config(config)
  step = traced(config, cfg)
  B, T = config.train.batch_size, config.data.sequence_length
  padding = 6 * (-cfg.V % rules.VOCAB_MULTIPLE) * cfg.D * B * T
  scores = cfg.L * forward(cfg, T)["scores"] * B * T
  assert flops.jaxpr_flops(step.jaxpr) == flops.model_flops(cfg, B, T) + padding + scores


def test_jaxpr_flops_dead_code_and_branches():
  """Dead code is not counted; of two branches the larger is."""
  x = jax.ShapeDtypeStruct((3, 3), np.float32)
  assert flops.jaxpr_flops(jax.make_jaxpr(lambda a: (a @ a, a)[1])(x)) == 0
  either = lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a @ a @ a)
  assert flops.jaxpr_flops(jax.make_jaxpr(either)(x)) == 2 * 2 * 27


def test_roofline_estimate():
  target = specs.parse_device("h100x8")
  kwargs = dict(dtype="bfloat16", tokens=1000, model_flops=8 * 10**14)
  it = roofline.estimate_step(
    target,
    8,
    flops=8 * 989 * 10**12,
    moved_bytes=3352 * 10**9,
    collective_bytes={"all-reduce": 450 * 10**9},
    **kwargs,
  )
  assert it.compute_seconds == pytest.approx(1 / 0.5)
  assert it.memory_seconds == pytest.approx(1 / 0.8)
  assert it.network_seconds == pytest.approx(2 * 7 / 8 / 0.7)
  assert it.network_seconds == it.step_seconds
  streamed = roofline.estimate_step(
    target, 8, flops=10, moved_bytes=10, collective_bytes={}, bus_bytes=56 * 10**9, **kwargs
  )
  assert streamed.bus_seconds == pytest.approx(1 / 0.8) and streamed.bound_by == "bus"
  # Ten rows take 6 s beside 8 s on the bus: 54 rows take 32.4 s, and the bus is 19.8 % of a step.
  assert streamed._replace(bus_seconds=8, step_seconds=14).rows_to_hide_the_bus(10) == 54
  assert it.bound_by == "network" and it.tokens_per_second == pytest.approx(1000 / 2.5)
  assert it.mfu == pytest.approx(10**14 / (2.5 * 989 * 10**12))
  # Network cards link nodes; a T4's float32 goes through its cores, 2 x 40 x 64 x 1.59 GHz.
  assert specs.parse_device("h100x16").link == 50 * 10**9 and target.link == 450 * 10**9
  assert specs.parse_device("t4").spec.peak_flops("float32") == pytest.approx(8.14e12, rel=1e-3)


def test_specs_have_sources_and_one_way_links():
  """Every device has a public source; those of TPUs give both ways of a link together."""
  assert specs.SOURCES.keys() == specs.GPUS.keys() | specs.TPUS.keys()
  assert all(url.startswith("https://") for url in specs.SOURCES.values())
  both_ways = {"v5e": 400, "v5p": 1200, "v6e": 800, "tpu7x": 1200}  # GB/s a chip
  assert {kind: 2 * it.devices * it.link / 10**9 for kind, it in specs.TPUS.items()} == both_ways
  assert specs.parse_device("tpu7x:2x2x1").count == 8 and specs.parse_device("v5p:2x2x1").count == 4
  # A box with eight GeForce cards is one machine: no network, and a mesh shards over all of them.
  box = specs.parse_device("rtx4090x8")
  assert box.link == box.spec.bus
  cfg = planner.resolve_model_config(published("gpt2"))
  assert {(1, 8, 1), (1, 2, 4)} <= set(jaxft.plan.search.meshes(cfg, box))


def test_logger_has_mfu_if_peak_is_known(config, tmp_path):
  metrics = {"loss": 1.0, "grad_norm": 1.0, "learning_rate": 0.1, "tokens": 8, "bad": False}
  for ideal in (None, 1e-6):
    workdir = tmp_path / str(ideal)
    workdir.mkdir()
    files = JsonlSink(workdir, 0, True)
    logger = MetricsLogger(
      train=config.train,
      sinks=[files],
      total_steps=1,
      num_rows=1,
      device=jax.devices()[0],
      nonfinite_names=lambda bad: [],
      ideal_step_seconds=ideal,
    )
    with ProgressBar("training", 1) as progress:
      logger.log_step(1, metrics, progress)
    (line,) = files.metrics.entries
    assert (line.get("perf/mfu") is None) == (ideal is None)
    if ideal:
      assert 0 < line["perf/mfu"] < 1


def test_costs_come_from_price_table(tmp_path):
  target = specs.parse_device("h100x8")
  it = roofline.Estimate(1, 1, 1, 0, 2, 5000, 0.4)
  assert roofline.estimate_cost(None, target, it) == {}
  assert roofline.estimate_cost(2.5, target, it) == {
    "per_hour": 20.0,
    "per_million_tokens": pytest.approx(20 / 3600 * 200),
  }
  assert roofline.estimate_cost(0.1, specs.parse_device("cpu"), None) == {"per_hour": 0.1}
  file = tmp_path / "prices.json"
  file.write_text('{"h100": 2.5, "v5e": 1}')
  assert specs.read_prices(file) == {"h100": 2.5, "v5e": 1}
  for text, message in (
    ('{"h1000": 2.5}', "did you mean 'h100'"),
    ('{"h100": "2.5"}', "'h100' costs '2.5'"),
    ('{"h100": NaN}', "'h100' costs nan"),
    ("[2.5]", "must be a JSON object"),
    ("{", "prices.json': is not JSON: Expecting"),
  ):
    file.write_text(text)
    with pytest.raises(RequestError, match=message):
      specs.read_prices(file)
  with pytest.raises(RequestError, match="no such file"):
    specs.read_prices(tmp_path / "none.json")


def plan(*arguments, check=0):
  return processes.run("jaxft.plan", *arguments, check=check)


@pytest.fixture(scope="module")
def on_cpu(config_file, tmp_path_factory):
  page = tmp_path_factory.mktemp("page") / "plan.html"
  prices = page.with_name("prices.json")
  prices.write_text('{"cpu": 0.25}')
  flags = ("--config.mesh.fsdp=-1", "--prices", prices, "--json", "--html", page)
  return plan("--config", config_file, "--device", "cpu,cpux2", *flags), page


def test_plan_json_has_documented_keys(on_cpu):
  done, _ = on_cpu
  one, two = json.loads(done.stdout)["plans"]
  for found in (one, two):
    assert found.keys() >= KEYS and found["fits"] is True
    assert sum(found["breakdown"].values()) == found["peak_bytes"] <= found["usable_bytes"]
  assert (one["devices"], two["devices"]) == (1, 2)
  assert two["collective_bytes"] and not one["collective_bytes"]
  assert one["flops"] == two["flops"] > one["model_flops"]
  assert one["attention"] == {"kernel": "chunked", "why_not_faster": ""}
  assert one["step_seconds_estimate"] is None  # nothing is known of this CPU's speed
  assert (one["cost"], two["cost"]) == ({"per_hour": 0.25}, {"per_hour": 0.5})


@pytest.mark.slow
def test_refused_device_does_not_stop_others(config_file, tmp_path):
  """One of several devices that refuses the config leaves the others their plans."""
  page, flags = tmp_path / "plan.html", ("--config.mesh.fsdp=2", "--config.mesh.data=1")
  done = plan("--config", config_file, "--device", "cpu,cpux2", *flags, "--json", "--html", page)
  refused, planned = json.loads(done.stdout)["plans"]
  assert refused.keys() >= KEYS and planned.keys() >= KEYS and planned["fits"] is True
  assert "config.mesh.fsdp=2" in refused["refused"]
  assert "does not fit 1 devices" in refused["refused"]
  known = {"device": "cpu", "fits": False, "usable_bytes": refused["usable_bytes"]}
  known["versions"] = planned["versions"]
  assert {key: refused[key] for key in KEYS} == dict.fromkeys(KEYS) | known
  assert "does not fit 1 devices" in page.read_text() and "activations" in page.read_text()
  console = Console(file=io.StringIO(), width=200)
  console.print(rendering.render_plan(refused))
  assert "as given: --device='cpu'" in console.file.getvalue()


def test_plan_page_is_self_contained(on_cpu):
  text = on_cpu[1].read_text()
  assert "prefers-color-scheme: dark" in text and "activations" in text
  assert not re.search(r"(src|href)=|https?://|<script|@import|url\(", text)


@pytest.mark.parametrize(
  "arguments, message",
  [
    (("--device", "h1000"), r"error: --device='h1000': unknown; choose cpu, t4, .*v5e:2x4"),
    (("--device", "v100"), r"error: --device='v100': CUDA 13.*7\.0"),
    ((), r"error: --device is missing; name one"),
    (
      ("--device", "cpu", "--config.train.batch_sise=3"),
      r"error: config.train.batch_sise: .*did you mean train.batch_size",
    ),
    (
      ("--device", "cpu", "--config.mesh.fsdp=3"),
      r"error: --device='cpu': .*config.mesh.fsdp=3.*does not fit 1 devices",
    ),
  ],
)
def test_plan_errors_are_one_line_and_exit_code_2(config_file, arguments, message):
  done = plan("--config", config_file, *arguments, check=2)
  lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
  assert len(lines) == 1 and re.search(message, lines[0]), done.stderr
  assert not done.stdout


@pytest.mark.parametrize("search", [False, True])
def test_missing_compiler_names_install_command(monkeypatch, search):
  monkeypatch.setattr(aot_compiler, "_installed", lambda module: False)
  with pytest.raises(RequestError, match=r'compiler is not installed; pip install "jaxft\[plan\]"'):
    jaxft.plan_for(published(), "h100", search=search)


def test_compiler_env_keeps_user_flags(monkeypatch):
  """Autotuning needs the device; the last of two settings of a flag counts."""
  monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_autotune_level=4 --xla_gpu_enable_triton_gemm=false")
  monkeypatch.setenv("LIBTPU_INIT_ARGS", "--xla_enable_async_all_gather=true")
  monkeypatch.setenv("JAX_PLATFORMS", "cuda")
  it = aot_compiler.compiler_env()
  ours = [
    "--xla_gpu_autotune_level=0",
    *backend.disable_slice_pass("").split() * backend.has_slice_bug(),
  ]
  assert it["XLA_FLAGS"].split() == [*os.environ["XLA_FLAGS"].split(), *ours]
  assert it["LIBTPU_INIT_ARGS"].split() == [
    os.environ["LIBTPU_INIT_ARGS"],
    backend.LIBTPU_STACK_FLAG,
  ]
  assert it["JAX_PLATFORMS"] == "cpu" and it["PATH"] == os.environ["PATH"]
  monkeypatch.delenv("XLA_FLAGS")
  assert aot_compiler.compiler_env()["XLA_FLAGS"].split() == ours


@pytest.mark.parametrize(
  "message",
  [
    "Ran out of memory in memory space hbm. Used 21.26G of 15.75G hbm. Exceeded hbm capacity by "
    "5.51G.",
    "Ran out of memory on HBM, the total memory required for HLO temporaries (21.26G) exceeds "
    "available HBM (15.75G).",
  ],
)
def test_out_of_memory_messages_of_libtpu(message):
  """Both of libtpu's messages about a lack of memory are parsed."""
  assert measure.OUT_OF_MEMORY.search(message).groups() == ("21.26", "G", "15.75", "G")


def test_dead_compiler_is_one_line_error(monkeypatch):
  def quits(command, **pipes):
    return subprocess.Popen([sys.executable, "-c", "import os; os.abort()"], **pipes)

  with aot_compiler.Compiler() as compiler:
    request = aot_compiler.CompileRequest(jaxft.config.to_json(published()), {}, "cpu")
    monkeypatch.setattr(compiler, "_start", lambda cpus: _start_with(compiler, quits))
    with pytest.raises(RequestError, match="--device='cpu': the compiler ended with code -6"):
      compiler(request)


def _start_with(compiler, start):
  compiler._stderr = tempfile.TemporaryFile("w+")
  pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=compiler._stderr, text=True)
  compiler._process = start(None, **pipes)
  return compiler._process


def test_published_models_need_no_network(monkeypatch, tmp_path):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.chdir(tmp_path)
  for name, hf_config in PUBLISHED.items():
    assert planner.resolve_model_config(published(name)) == model_config.from_hf_config(hf_config)
  cfg = planner.resolve_model_config(published("gpt2"))
  assert planner.resolve_model_config(published("openai-community/gpt2")) == cfg
  with pytest.raises(RequestError, match="2048: must be at most 1024"):
    planner.resolve_model_config(published("gpt2", data__sequence_length=2048))


def test_plan_table_shows_missing_memory():
  plan = {
    "fits": False,
    "peak_bytes": 3 * 2**30,
    "usable_bytes": 2 * 2**30,
    "breakdown": {"parameters": 3 * 2**30},
  }
  assert (
    rendering.fit_summary(plan)
    == "does not fit: needs 3.00 GiB of 2.00 GiB per device, 1.00 GiB too much"
  )
  bar = rendering._memory_bar(plan).plain
  assert len(bar) == rendering.BAR_WIDTH and bar.index("│") == 2 * rendering.BAR_WIDTH // 3


BY_HAND = """
import sys
import jaxft.config
from jaxft.hardware import specs
from jaxft.plan import planner
from jaxft.plan.measure import dummy_row, mark_host_arguments
from jaxft.sharding.mesh import make_mesh
from jaxft.training.build import build_train_program
config = jaxft.config.from_json(sys.stdin.read())
cfg = planner.resolve_model_config(config)
mesh = make_mesh(config.mesh, specs.compile_devices(specs.parse_device(sys.argv[1])))
program = build_train_program(config, cfg, mesh, 100, dummy_row(config, cfg))
lowered = program.train_step.lower(program.state, program.batch)
lowered = mark_host_arguments(lowered, program, program.host_mask)
memory = lowered.compile().memory_analysis()
peak = memory.argument_size_in_bytes + memory.temp_size_in_bytes
print("peak", memory.peak_memory_in_bytes if sys.argv[1].startswith("v") else peak)
"""


@pytest.mark.slow
@pytest.mark.wide
@pytest.mark.parametrize(
  "device, offload", [("v5e:2x4", "none"), ("h100x8", "none"), ("rtx4090", "all"), ("t4", "all")]
)
def test_peak_matches_compiling_by_hand(device, offload):
  config = runpy.run_path(str(processes.ROOT / "configs" / "gptj_6b_v5e8.py"))["get_config"]()
  config.memory.offload = offload
  config.train.micro_batch_size = 1 if offload == "all" else 0
  found = jaxft.plan_for(config, device)
  done = subprocess.run(
    [sys.executable, "-c", BY_HAND, device],
    input=jaxft.config.to_json(config),
    capture_output=True,
    text=True,
    check=True,
    env=aot_compiler.compiler_env(),
  )
  by_hand = int(done.stdout.split("peak ")[1])
  peaks = f"{found['peak_bytes'] / 2**30:.2f} GiB planned, {by_hand / 2**30:.2f} by hand"
  print(f"{device}: {peaks}, fits: {found['fits']}")
  assert found["peak_bytes"] == pytest.approx(by_hand, rel=0.02)


@pytest.mark.slow
@pytest.mark.wide
def test_plan_that_does_not_fit_advises_flags(tmp_path):
  """Its advice are flags that do fit."""
  file = tmp_path / "large.py"
  file.write_text(
    "from jaxft import config\n\ndef get_config():\n  c = config.default()\n"
    "  c.model.path, c.data.train, c.train.steps = 'gpt2-large', ('texts',), 10\n"
    "  c.data.sequence_length = 1024\n  return c\n"
  )
  found = json.loads(plan("--config", file, "--device", "t4", "--json").stdout)
  assert found["fits"] is False and found["peak_bytes"] > found["usable_bytes"]
  assert found["compute_dtype"] == "float32"  # a T4 has no bfloat16
  flags = found["advice"]["best"][0]["overrides"]
  again = json.loads(plan("--config", file, "--device", "t4", "--json", *flags).stdout)
  assert again["fits"] is True and again["peak_bytes"] == found["advice"]["best"][0]["peak_bytes"]


def test_libtpu_out_of_memory_units(config, monkeypatch):
  """libtpu's G is a GiB."""

  def short(*_, **__):
    raise jax.errors.JaxRuntimeError(
      "Ran out of memory in memory space hbm. Used 21.26G of 15.75G hbm."
    )

  monkeypatch.setattr(jax.stages.Lowered, "compile", short)
  found = measure.measure_step(
    config, planner.resolve_model_config(config), specs.parse_device("cpu")
  )
  assert (found["needs_bytes"], found["has_bytes"]) == (int(21.26 * 2**30), int(15.75 * 2**30))
