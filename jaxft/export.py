"""A verified Hugging Face folder: python -m jaxft.export --workdir DIR [--step N] --out DIR (or --model PATH_OR_ID)"""

import argparse

from jaxft.command_line import add_model_flags, open_model
from jaxft.errors import run_command
from jaxft.hf.save import EXPORT_DTYPES, in_words


def main() -> None:
  parser = argparse.ArgumentParser(
    "python -m jaxft.export", description="Writes a Hugging Face folder and verifies it."
  )
  add_model_flags(parser)
  parser.add_argument("--out", required=True, metavar="DIR", help="folder to write; a model that is there is replaced")
  parser.add_argument(
    "--dtype", choices=list(EXPORT_DTYPES), default="float32", help="of the weights (default: float32)"
  )
  parser.add_argument("--max_shard_size", default="5GB", help="largest weight file (default: 5GB)")
  arguments = parser.parse_args()
  parity = open_model(arguments).export(arguments.out, dtype=arguments.dtype, max_shard_size=arguments.max_shard_size)
  print(f"exported to {arguments.out}: {in_words(parity)}")


if __name__ == "__main__":
  run_command(main)
