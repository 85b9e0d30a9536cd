"""A verified Hugging Face folder: python -m jaxft.export --workdir DIR [--step N] --out DIR (or --model PATH_OR_ID)"""

import argparse
from pathlib import Path

from jaxft.command_line import add_model_flags, open_model
from jaxft.errors import RequestError, run_command
from jaxft.hf import push, save
from jaxft.hf.unload import EXPORT_DTYPES
from jaxft.hf.verify import in_words


def main() -> None:
  parser = argparse.ArgumentParser(
    "python -m jaxft.export", description="Writes a Hugging Face folder and verifies it."
  )
  add_model_flags(parser)
  parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; an earlier export is replaced")
  parser.add_argument(
    "--dtype",
    choices=list(EXPORT_DTYPES),
    help="of the weights (default: float32 for a run, what the weights are stored in for a --model)",
  )
  parser.add_argument("--max_shard_size", default="5GB", metavar="SIZE", help="largest weight file (default: 5GB)")
  parser.add_argument("--push_to_hub", metavar="REPO", help="upload the folder to this hub repository (OWNER/NAME)")
  arguments = parser.parse_args()
  lines = save.faults(Path(arguments.out))
  lines += push.faults(arguments.push_to_hub) if arguments.push_to_hub is not None else []
  if lines:
    raise RequestError("\n".join(lines))
  parity = open_model(arguments).export(arguments.out, dtype=arguments.dtype, max_shard_size=arguments.max_shard_size)
  print(f"exported to {arguments.out}: {in_words(parity)}")
  if arguments.push_to_hub:
    print(f"uploaded to {push.push(Path(arguments.out), arguments.push_to_hub)}")


if __name__ == "__main__":
  run_command(main)
