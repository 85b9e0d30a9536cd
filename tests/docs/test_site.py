"""The documentation site: it builds strictly and offline; its generated pages are current."""

import importlib.util
import os
import re
import subprocess
import sys

import pages
import pytest

sys.path.append(str(pages.ROOT / "scripts"))

import make_figures
import make_reference

# What a browser fetches without being asked: scripts, styles, pictures and fonts.
FETCHED = re.compile(
  r"""<(?:script|img|iframe|source)\b[^>]*?\bsrc="?((?:https?:)?//[^"\s>]+)"""
  r"""|<link\b(?![^>]*rel="?(?:canonical|next|prev))[^>]*?\bhref="?((?:https?:)?//[^"\s>]+)"""
  r"""|url\(["']?((?:https?:)?//[^"')]+)"""
)


def test_reference_is_current():
  for file, text in make_reference.pages().items():
    assert file.read_text() == text, f"{file.name}: run python scripts/make_reference.py"


def test_figures_are_current():
  figures = make_figures.figures()
  for file, text in figures.items():
    assert file.read_text() == text, f"{file.name}: run python scripts/make_figures.py"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
  if not importlib.util.find_spec("mkdocs"):
    pytest.skip("needs the docs extra")
  folder = tmp_path_factory.mktemp("site")
  command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder]
  environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
  done = subprocess.run(
    command, cwd=pages.ROOT, env=environment, capture_output=True, text=True, timeout=300
  )
  assert done.returncode == 0, done.stderr
  return folder


def test_every_page_is_built(site):
  for name in pages.PAGES:
    if name.startswith("docs/"):
      assert (site / name.removeprefix("docs/")).with_suffix(".html").exists(), name
  assert (site / "changelog.html").exists() and (site / "contributing.html").exists()


def test_pages_fetch_nothing_from_other_hosts(site):
  for file in [*site.rglob("*.html"), *site.rglob("*.css"), *site.rglob("*.svg")]:
    text = file.read_text()
    found = [address for match in FETCHED.findall(text) for address in match if address]
    assert not found, f"{file.relative_to(site)}: {found}"
    # The theme would load Mermaid from another host.
    assert 'class="mermaid"' not in text, file.relative_to(site)


def test_python_reference_has_signatures_and_arguments(site):
  text = re.sub(r"<[^>]+>", "", (site / "reference" / "python.html").read_text())
  for words in (
    "jaxft.finetune",
    "finetune(",
    "workdir",
    "jaxft.load",
    "plan_for(",
    "RequestError",
  ):
    assert words in text, words
