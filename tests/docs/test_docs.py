"""The pages themselves: links resolve, and files, settings, commands and names exist."""

import ast
import importlib.util
import re
import tomllib
from pathlib import Path

import pages
import pytest

import jaxft
import jaxft.config

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
FILES = re.compile(r"\b(?:tests|configs|docs|benchmarks|scripts|assets|examples|jaxft)/[\w./-]*\w")
SETTING = re.compile(r"\bconfig\.([a-z]+\.[a-z_0-9]+)")
SECTIONS = {name.split(".")[0] for name in jaxft.config.BY_NAME}
PROJECT = tomllib.loads((pages.ROOT / "pyproject.toml").read_text())["project"]
# Named, and not here: any config; a folder of transformers.
NOT_HERE = {"configs/X.py", "examples/pytorch/language-modeling"}
# tests/docs/test_site.py compares these with the source.
GENERATED = {"docs/reference/commands.md", "docs/reference/settings.md"}
everywhere = pytest.mark.parametrize(
  "name", [it for it in (*pages.PAGES, *pages.CONFIGS) if it not in GENERATED]
)


def anchors(file):
  """Of each heading, as GitHub makes them."""
  headings = re.findall(r"^#+ +(.+)$", pages.prose(str(file.relative_to(pages.ROOT))), re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_mutants_match_source_lines():
  """Each fault of scripts/mutants.py replaces one line of the source."""
  script = pages.ROOT / "scripts" / "mutants.py"
  assigned = (node for node in ast.parse(script.read_text()).body if isinstance(node, ast.Assign))
  (faults,) = (node for node in assigned if ast.unparse(node.targets[0]) == "FAULTS")
  for call in faults.value.elts:
    _, file, old, new, _ = (ast.literal_eval(argument) for argument in call.args)
    assert (pages.ROOT / file).read_text().count(old) == 1 and old != new, f"{file}: {old}"


@pytest.mark.parametrize("name", pages.PAGES)
def test_links_resolve(name):
  for target in LINK.findall(pages.prose(name)):
    if "://" in target:
      continue
    path, _, anchor = target.partition("#")
    file = (pages.ROOT / name).parent / path if path else pages.ROOT / name
    assert file.exists(), f"{name}: {target}"
    assert not anchor or anchor in anchors(file.resolve()), f"{name}: {target}"


@everywhere
def test_named_files_exist(name):
  for path in set(FILES.findall(pages.text_of(name))) - NOT_HERE:
    assert (pages.ROOT / path).exists(), f"{name}: {path}"


def test_every_page_is_linked():
  """A page without a link to it would not be found."""
  linked = {
    str(((pages.ROOT / name).parent / target.partition("#")[0]).resolve().relative_to(pages.ROOT))
    for name in pages.PAGES
    for target in LINK.findall(pages.prose(name))
    if "://" not in target
  }
  assert {name for name in pages.PAGES if name.startswith("docs/")} <= linked
  readme = pages.text_of("README.md")
  assert [name for name in pages.CONFIGS if Path(name).stem not in readme] == []


@everywhere
def test_named_settings_exist(name):
  text = pages.text_of(name)
  quoted = pages.INLINE.findall(pages.prose(name))
  quoted = [code for code in quoted if code.split(".")[0] in SECTIONS and not code.endswith(".py")]
  named = SETTING.findall(text) + [
    it[0] for code in quoted if (it := re.match(r"[a-z]+\.[a-z_0-9]+", code))
  ]
  assert [setting for setting in named if setting not in jaxft.config.BY_NAME] == [], name


@everywhere
def test_named_commands_and_extras_exist(name):
  """And targets of the Makefile."""
  text = pages.text_of(name)
  for module in set(re.findall(r"python -m (jaxft\.\w+)", text)):
    found = importlib.import_module(module)
    assert hasattr(found, "main") or importlib.import_module(f"{module}.__main__").main, (
      f"{name}: {module}"
    )
  for extra in re.findall(r"\.\[([\w,]+)\]", text):
    assert set(extra.split(",")) <= PROJECT["optional-dependencies"].keys(), f"{name}: {extra}"
  targets = re.findall(r"^([\w-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
  code = [*pages.INLINE.findall(pages.prose(name)), *"\n".join(pages.blocks(name, "")).splitlines()]
  for line in code:
    if (command := re.match(r"(?:\$ )?jaxft ([a-z]+)(?: |$)", line.strip())) and (
      command[1] != "quickstart"
    ):
      assert importlib.util.find_spec(f"jaxft.{command[1]}"), f"{name}: jaxft {command[1]}"
    if target := re.match(r"(?:\$ )?make ([a-z][\w-]*)", line.strip()):
      assert target[1] in targets, f"{name}: make {target[1]}"


@pytest.mark.parametrize("name", pages.PAGES)
def test_python_on_pages_compiles(name):
  for block in pages.steps(name):
    if block.kind == "python":
      for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "jaxft":
          assert hasattr(jaxft, node.attr), f"{name}: jaxft.{node.attr}"
