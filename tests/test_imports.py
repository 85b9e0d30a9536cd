"""Who may import whom, as docs/architecture.md says it, and what no part of jaxft may do."""

import ast
import re
from pathlib import Path

import pytest

import jaxft

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
# In the order of the page: each imports only packages further down.
PACKAGES = re.findall(r"^\| `(\w+)` \|", PAGE.split("```mermaid")[0], re.MULTILINE)
ARROWS = {(above, below) for below, above in re.findall(r"^  (\w+) --> (\w+)$", PAGE, re.MULTILINE)}
COMMANDS = set(re.findall(r"`(\w+)`", PAGE.split("| `commands` |")[1].split("\n")[0])) - {"plan"}
FILES = {
  ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
  for file in (ROOT / "jaxft").rglob("*.py")
}


LAZY = {name: f"jaxft.{path}" for name, path in (("finetune", "train"), ("load", "pretrained"))}
LAZY |= {"load_config": "jaxft.cli.flags", "plan_for": "jaxft.plan.planner"}


def imports(file):
  """The modules that a file imports or names: inside functions, by attributes, by import_module."""
  modules = set()
  for node in ast.walk(ast.parse(file.read_text())):
    if isinstance(node, ast.Import):
      modules |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f"{file}:{node.lineno}: a relative import"
      modules |= {_module_of(f"{node.module}.{alias.name}") for alias in node.names}
    elif isinstance(node, ast.Attribute) and (name := ast.unparse(node)).startswith("jaxft."):
      modules.add(_module_of(name))
    elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
      modules |= {it.value for it in node.args if isinstance(it, ast.Constant)}
  return modules


def _module_of(name):
  """The module that a dotted name is in, or is."""
  package, _, member = name.rpartition(".")
  if package == "jaxft" and member in LAZY:
    return LAZY[member]
  if not name.startswith("jaxft."):
    return name if package == "jax" else package
  return name if name in FILES or not package else _module_of(package)


def package(module):
  _, name, *_ = module.split(".")
  if name in COMMANDS or module.endswith(".__main__"):
    return "commands"
  return "config" if name == "config_checks" else name


IMPORTS = {
  (package(name), package(other))
  for name, file in FILES.items()
  for other in imports(file)
  if name != "jaxft" and other.startswith("jaxft.") and package(name) != package(other)
}


def test_page_lists_every_package():
  assert set(PACKAGES) == {package(name) for name in FILES if name != "jaxft"}
  assert len(PACKAGES) == len(set(PACKAGES))


@pytest.mark.parametrize("name", PACKAGES)
def test_packages_import_only_packages_below(name):
  below = PACKAGES[PACKAGES.index(name) + 1 :]
  assert {other for mine, other in IMPORTS if mine == name} <= set(below)


def test_arrows_of_the_page_are_the_imports():
  """Each arrow is an import, and each import follows from the arrows."""
  assert ARROWS <= IMPORTS
  implied = set(ARROWS)
  while new := {(a, d) for a, b in implied for c, d in implied if b == c} - implied:
    implied |= new
  assert IMPORTS <= implied


def test_lazy_names_of_jaxft_are_those_of_the_test():
  assert jaxft._MODULES == LAZY


def test_modules_import_each_other_in_no_circle():
  below = {name: imports(file) & FILES.keys() - {"jaxft", name} for name, file in FILES.items()}
  del below["jaxft"]
  while leaves := [name for name, others in below.items() if not others & below.keys()]:
    for name in leaves:
      del below[name]
  assert not below


def test_root_holds_what_a_user_types_or_imports():
  assert len(list((ROOT / "jaxft").glob("*.py"))) <= 15


def test_files_of_the_page_exist():
  named = set(re.findall(r"\b(\w+(?:/\w+)*\.py)\b", PAGE)) - {"run_clm.py", "run_generation.py"}
  missing = {
    file for file in named if not any((ROOT / home / file).exists() for home in ("jaxft", ""))
  }
  assert named and not missing


@pytest.mark.parametrize("name", FILES)
def test_no_module_imports_a_command_or_torch(name):
  modules = imports(FILES[name])
  commands = {f"jaxft.{command}" for command in COMMANDS} | {"jaxft.plan.__main__"}
  assert not modules & commands
  # Where it happens to be installed it checks an export; where a user asks for it, it reads a .bin.
  assert name in ("jaxft.hf.verify", "jaxft.hf.torch_pickle") or "torch" not in {
    module.split(".")[0] for module in modules
  }


@pytest.mark.parametrize("name", FILES)
def test_private_jax_stays_in_one_module(name):
  private = {module for module in imports(FILES[name]) if module.startswith("jax._src")}
  assert name == "jaxft.utils.jax_private" or not private


def test_own_modules_have_no_aliases():
  others = ("tests", "benchmarks", "scripts", "configs", "examples")
  for file in [*FILES.values(), *(it for name in others for it in (ROOT / name).rglob("*.py"))]:
    for node in ast.walk(ast.parse(file.read_text())):
      own = isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jaxft"
      own |= isinstance(node, ast.Import) and any(it.name.startswith("jaxft") for it in node.names)
      assert not own or not any(it.asname for it in node.names), f"{file}:{node.lineno}"


@pytest.mark.parametrize("name", FILES)
def test_no_code_is_run_from_data(name):
  assert not imports(FILES[name]) & {"pickle", "dill", "cloudpickle", "marshal"}
  # The compilers and the trackers run in processes of their own, which are jaxft again.
  processes = ("jaxft.plan.aot_compiler", "jaxft.metrics.trackers")
  assert name in processes or "subprocess" not in imports(FILES[name])
  for node in ast.walk(ast.parse(FILES[name].read_text())):
    if isinstance(node, ast.Call):
      called = ast.unparse(node.func)
      assert called not in ("eval", "exec", "compile", "os.system"), f"{name}: {called}"
      assert called != "torch.load" or "weights_only=True" in map(ast.unparse, node.keywords), name
      trusting = (it for it in node.keywords if it.arg == "trust_remote_code")
      assert not any(ast.unparse(it.value) != "False" for it in trusting)
