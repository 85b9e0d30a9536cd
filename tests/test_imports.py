"""Who may import whom (docs/architecture.md), and what no part of jaxft may do."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "jaxft"
FILES = {
  ".".join(("jaxft", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
  for file in ROOT.rglob("*.py")
}
COMMANDS = {"jaxft.train", "jaxft.prepare", "jaxft.evaluate", "jaxft.generate", "jaxft.export", "jaxft.doctor"}
COMMANDS |= {"jaxft.plan.__main__", "jaxft.report"}
# The only imports of jaxft that each leaf has. A new leaf module goes here, with as few as it can.
LEAVES = {
  "jaxft.errors": set(),
  "jaxft.surroundings": set(),
  "jaxft.units": set(),
  "jaxft.usage": {"jaxft.parsers"},
  "jaxft.backend": {"jaxft.errors", "jaxft.files"},
  "jaxft.files": {"jaxft.errors"},
  "jaxft.dropout": set(),
  "jaxft.attention": {"jaxft.attention_chunked", "jaxft.dropout"},
  "jaxft.attention_chunked": {"jaxft.dropout"},
  "jaxft.loss": set(),
  "jaxft.optim": {"jaxft.parts"},
  "jaxft.checks": {"jaxft.files"},
  "jaxft.config": {"jaxft.checks", "jaxft.errors", "jaxft.files"},
  "jaxft.sharding": {"jaxft.backend", "jaxft.errors"},
  "jaxft.architecture": set(),
  "jaxft.lora": {"jaxft.architecture", "jaxft.dropout"},
  "jaxft.parts": set(),
  "jaxft.layers": {"jaxft.architecture", "jaxft.attention", "jaxft.dropout", "jaxft.lora"},
  "jaxft.model": {"jaxft.architecture", "jaxft.attention", "jaxft.dropout", "jaxft.layers", "jaxft.loss"},
  "jaxft.step": {"jaxft.dropout", "jaxft.loss", "jaxft.parts", "jaxft.rounding"},
  "jaxft.rounding": set(),
  "jaxft.filters": set(),
  "jaxft.beams": set(),
  "jaxft.views": set(),
  "jaxft.sample": {
    "jaxft.beams",
    "jaxft.errors",
    "jaxft.filters",
    "jaxft.model",
    "jaxft.sampling",
    "jaxft.views",
  },
  "jaxft.sampling": {"jaxft.errors"},
  "jaxft.parsers": {"jaxft.errors", "jaxft.files", "jaxft.run_generation", "jaxft.sampling"},
  "jaxft.run_generation": set(),
  "jaxft.data.readers": {"jaxft.errors", "jaxft.files"},
  "jaxft.data.sources": {"jaxft.data.readers", "jaxft.errors", "jaxft.files"},
  "jaxft.data.formats": {"jaxft.checks", "jaxft.data.readers", "jaxft.errors", "jaxft.files"},
  "jaxft.data.tokens": {"jaxft.data.formats"},
  "jaxft.data.pack": {"jaxft.data.tokens"},
  "jaxft.data.loader": set(),
  "jaxft.data.cache": {"jaxft.data.tokens", "jaxft.errors", "jaxft.files"},
  "jaxft.hf.tables": set(),
  "jaxft.hf.tokenizer": {"jaxft.errors", "jaxft.files"},
  "jaxft.hf.flax_msgpack": set(),
  "jaxft.hf.torch_pickle": set(),
  "jaxft.hf.push": {"jaxft.errors"},
  "jaxft.run.guards": {"jaxft.errors", "jaxft.files"},
  "jaxft.run.roll_call": {"jaxft.errors", "jaxft.run.tracking"},
  "jaxft.run.secrets": set(),
  "jaxft.run.system": set(),
  "jaxft.run.trackers": set(),
  "jaxft.run.tracker_process": {"jaxft.errors", "jaxft.run.secrets", "jaxft.run.trackers"},
  "jaxft.run.profile": {"jaxft.errors", "jaxft.run.tracking"},
  "jaxft.run.watchdog": {"jaxft.errors", "jaxft.run.roll_call"},
  "jaxft.plan.hlo": set(),
  "jaxft.plan.flops": set(),
  "jaxft.plan.estimate": {"jaxft.plan.targets"},
  "jaxft.plan.show": {"jaxft.backend", "jaxft.run.tracking"},
  "jaxft.plan.targets": {"jaxft.errors"},
  "jaxft.page.style": {"jaxft.plan.show"},
  "jaxft.page.markup": {"jaxft.page.style", "jaxft.run.tracking"},
  "jaxft.page.charts": {"jaxft.page.markup", "jaxft.page.style"},
  "jaxft.page.record": {"jaxft.config", "jaxft.errors"},
  "jaxft.page.samples": {"jaxft.page.markup", "jaxft.page.record"},
  "jaxft.page.words": {"jaxft.page.record", "jaxft.run.secrets"},
  "jaxft.run.checkpoint": {"jaxft.errors", "jaxft.files", "jaxft.run.checksums"},
  "jaxft.run.checksums": {"jaxft.sharding"},
}


def imports(file):
  """The modules a file imports, those inside functions too."""
  found = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {name if (name := f"{node.module}.{alias.name}") in FILES else node.module for alias in node.names}
  return found


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_import_only_what_is_below_them(name):
  assert {module for module in imports(FILES[name]) if module.split(".")[0] == "jaxft"} == LEAVES[name]


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
  assert name in ("jaxft.plan.compile", "jaxft.run.writers") or "subprocess" not in imports(FILES[name])
  for node in ast.walk(ast.parse(FILES[name].read_text())):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("eval", "exec", "compile", "os.system"), f"{name}: {called}"
      assert called != "torch.load" or "weights_only=True" in map(ast.unparse, node.keywords), name
      assert not any(word.arg == "trust_remote_code" and ast.unparse(word.value) != "False" for word in node.keywords)
