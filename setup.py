"""Adds configs/ and assets/quickstart to a wheel, as jaxft/shipped; pyproject.toml has the rest."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIPPED = ("configs", "assets/quickstart")  # a config finds the assets by the path between them


class BuildWithShipped(build_py):
  """Copy the folders into the build; an editable install reads those of the checkout."""

  def run(self) -> None:
    super().run()
    if self.editable_mode:
      return
    shipped = Path(self.build_lib, "jaxft", "shipped")
    shutil.rmtree(shipped, ignore_errors=True)  # an earlier build's
    for folder in filter(Path.is_dir, map(Path, SHIPPED)):  # the Dockerfile copies them elsewhere
      shutil.copytree(folder, shipped / folder, ignore=shutil.ignore_patterns("__pycache__"))


setup(cmdclass={"build_py": BuildWithShipped})
