"""Who may import whom (docs/architecture.md), and what no part of jaxft may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxft"
FILES = {
  ".".join(("jaxft", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
  for file in ROOT.rglob("*.py")
}
COMMANDS = {
  "jaxft.train",
  "jaxft.prepare",
  "jaxft.evaluate",
  "jaxft.generate",
  "jaxft.export",
  "jaxft.doctor",
}
COMMANDS |= {"jaxft.plan.__main__", "jaxft.report"}
# The only imports of jaxft that each leaf has. A new leaf module goes here, with as few as it can.
LEAVES = {
  "jaxft.errors": set(),
  "jaxft.utils.environment": set(),
  "jaxft.utils.units": set(),
  "jaxft.cli.usage": {"jaxft.cli.parsers"},
  "jaxft.utils.backend": {"jaxft.errors", "jaxft.utils.files"},
  "jaxft.utils.files": {"jaxft.errors"},
  "jaxft.model.dropout": set(),
  "jaxft.model.attention": {"jaxft.model.attention_chunked", "jaxft.model.dropout"},
  "jaxft.model.attention_chunked": {"jaxft.model.dropout"},
  "jaxft.model.loss": set(),
  "jaxft.training.optimizer": {"jaxft.training.trainable"},
  "jaxft.config_checks": {"jaxft.utils.files"},
  "jaxft.config": {"jaxft.config_checks", "jaxft.errors", "jaxft.utils.files"},
  "jaxft.sharding.rules": {"jaxft.utils.backend", "jaxft.errors"},
  "jaxft.model.config": set(),
  "jaxft.model.lora": {"jaxft.model.config", "jaxft.model.dropout"},
  "jaxft.training.trainable": set(),
  "jaxft.model.layers": {
    "jaxft.model.config",
    "jaxft.model.attention",
    "jaxft.model.dropout",
    "jaxft.model.lora",
  },
  "jaxft.model.decoder": {
    "jaxft.model.config",
    "jaxft.model.attention",
    "jaxft.model.dropout",
    "jaxft.model.layers",
    "jaxft.model.loss",
  },
  "jaxft.training.train_step": {
    "jaxft.model.dropout",
    "jaxft.model.loss",
    "jaxft.training.trainable",
    "jaxft.training.stochastic_rounding",
  },
  "jaxft.training.stochastic_rounding": set(),
  "jaxft.generation.logits_processors": set(),
  "jaxft.generation.beam_search": set(),
  "jaxft.generation.layer_views": set(),
  "jaxft.generation.sampler": {
    "jaxft.generation.beam_search",
    "jaxft.errors",
    "jaxft.generation.logits_processors",
    "jaxft.model.decoder",
    "jaxft.generation.sampling",
    "jaxft.generation.layer_views",
  },
  "jaxft.generation.sampling": {"jaxft.errors"},
  "jaxft.cli.parsers": {
    "jaxft.errors",
    "jaxft.utils.files",
    "jaxft.cli.run_generation",
    "jaxft.generation.sampling",
  },
  "jaxft.cli.run_generation": set(),
  "jaxft.data.readers": {"jaxft.errors", "jaxft.utils.files"},
  "jaxft.data.sources": {"jaxft.data.readers", "jaxft.errors", "jaxft.utils.files"},
  "jaxft.data.formats": {
    "jaxft.config_checks",
    "jaxft.data.readers",
    "jaxft.errors",
    "jaxft.utils.files",
  },
  "jaxft.data.tokenize": {"jaxft.data.formats"},
  "jaxft.data.packing": {"jaxft.data.tokenize"},
  "jaxft.data.loader": set(),
  "jaxft.data.token_cache": {"jaxft.data.tokenize", "jaxft.errors", "jaxft.utils.files"},
  "jaxft.hf.weight_map": set(),
  "jaxft.hf.tokenizer": {"jaxft.errors", "jaxft.utils.files"},
  "jaxft.hf.flax_msgpack": set(),
  "jaxft.hf.torch_pickle": set(),
  "jaxft.hf.push": {"jaxft.errors"},
  "jaxft.training.workdir": {"jaxft.errors", "jaxft.utils.files"},
  "jaxft.distributed.rendezvous": {"jaxft.errors", "jaxft.metrics.reporter"},
  "jaxft.utils.redact": set(),
  "jaxft.metrics.system": set(),
  "jaxft.metrics.tracker_backends": set(),
  "jaxft.metrics.tracker_worker": {
    "jaxft.errors",
    "jaxft.utils.redact",
    "jaxft.metrics.tracker_backends",
  },
  "jaxft.training.profiler": {"jaxft.errors", "jaxft.metrics.reporter"},
  "jaxft.distributed.watchdog": {"jaxft.errors", "jaxft.distributed.rendezvous"},
  "jaxft.plan.hlo": set(),
  "jaxft.hardware.flops": set(),
  "jaxft.hardware.roofline": {"jaxft.hardware.specs"},
  "jaxft.plan.rendering": {"jaxft.utils.backend", "jaxft.metrics.reporter"},
  "jaxft.hardware.specs": {"jaxft.errors"},
  "jaxft.report_page.style": {"jaxft.plan.rendering"},
  "jaxft.report_page.markup": {"jaxft.report_page.style", "jaxft.metrics.reporter"},
  "jaxft.report_page.charts": {"jaxft.report_page.markup", "jaxft.report_page.style"},
  "jaxft.report_page.run_record": {"jaxft.config", "jaxft.errors"},
  "jaxft.report_page.samples": {"jaxft.report_page.markup", "jaxft.report_page.run_record"},
  "jaxft.report_page.formatting": {"jaxft.report_page.run_record", "jaxft.utils.redact"},
  "jaxft.checkpoint.manager": {"jaxft.errors", "jaxft.utils.files", "jaxft.checkpoint.checksums"},
  "jaxft.checkpoint.checksums": {"jaxft.sharding.rules"},
}


def imports(file):
  """The modules a file imports, those inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {
        name if (name := f"{node.module}.{alias.name}") in FILES else node.module
        for alias in node.names
      }
  return found


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_only_what_is_below_them(name):
  assert {module for module in imports(FILES[name]) if module.split(".")[0] == "jaxft"} == LEAVES[
    name
  ]


@pytest.mark.parametrize("name", FILES)
def test_nothing_imports_a_command_and_torch_stays_in_two_rooms(name):
  modules = imports(FILES[name])
  assert not modules & COMMANDS
  # Where it happens to be installed it checks an export; where a user asks for it, it reads a .bin.
  assert name in ("jaxft.hf.verify", "jaxft.hf.torch_pickle") or "torch" not in {
    module.split(".")[0] for module in modules
  }


@pytest.mark.parametrize("name", FILES)
def test_no_code_is_run_from_data(name):
  assert not imports(FILES[name]) & {"pickle", "dill", "cloudpickle", "marshal"}
  # The compilers and the trackers run in processes of their own, which are jaxft again.
  assert name in (
    "jaxft.plan.aot_compiler",
    "jaxft.metrics.trackers",
  ) or "subprocess" not in imports(FILES[name])
  for node in ast.walk(ast.parse(FILES[name].read_text())):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("eval", "exec", "compile", "os.system"), f"{name}: {called}"
      assert called != "torch.load" or "weights_only=True" in map(ast.unparse, node.keywords), name
      assert not any(
        word.arg == "trust_remote_code" and ast.unparse(word.value) != "False"
        for word in node.keywords
      )
