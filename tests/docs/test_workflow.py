"""The workflow for contributors runs what `.ci/run` runs: targets of the Makefile."""

import re

import pages
import yaml

WORKFLOWS = sorted((pages.ROOT / ".github" / "workflows").glob("*.yml"))


def commands(file):
  jobs = yaml.safe_load(file.read_text())["jobs"].values()
  return [step["run"] for job in jobs for step in job["steps"] if "run" in step]


def test_workflow_runs_makefile_targets_that_ci_runs():
  targets = re.findall(r"^([\w-]+):", (pages.ROOT / "Makefile").read_text(), re.MULTILINE)
  makefile = (pages.ROOT / "Makefile").read_text()
  ci = (pages.ROOT / ".ci" / "run").read_text()
  for file in WORKFLOWS:
    for command in commands(file):
      (target,) = re.fullmatch(r"make ([\w-]+)", command).groups()
      assert target in targets
      is_in_ci = re.search(rf"make {target}\b", ci)
      assert is_in_ci or f"test-all: {target} " in makefile, f"{file.name}: {command}"


def test_workflow_tests_every_supported_python():
  """One version for each set of package versions in pyproject.toml."""
  (file,) = WORKFLOWS
  matrix = yaml.safe_load(file.read_text())["jobs"]["test"]["strategy"]["matrix"]
  assert matrix["python"] == ["3.11", "3.12"]
  assert "make test" in commands(file)


def test_issue_templates_are_valid():
  """GitHub wants a name, a description and a body of typed fields with unique ids."""
  templates = [
    file
    for file in (pages.ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")
    if file.stem != "config"
  ]
  assert len(templates) == 2
  for file in templates:
    form = yaml.safe_load(file.read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert {field["type"] for field in form["body"]} <= {"textarea", "input", "checkboxes"}


def test_citation_has_the_version_and_authors_of_the_package():
  import jaxft

  citation = yaml.safe_load((pages.ROOT / "CITATION.cff").read_text())
  assert str(citation["version"]) == jaxft.__version__
  assert [it["name"].lower() for it in citation["authors"]] == ["the jaxft developers"]
