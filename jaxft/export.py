"""Export a model or a run as a verified Hugging Face folder.

    python -m jaxft.export --workdir DIR --out DIR

--step N exports that checkpoint of the run. --model PATH_OR_ID exports another model.
"""

from pathlib import Path

from jaxft.cli import parsers
from jaxft.cli.flags import load_model
from jaxft.errors import RequestError, run_command
from jaxft.hf import export, push
from jaxft.hf.verify import format_parity


def main() -> None:
  """Run the command."""
  arguments = parsers.export().parse_args()
  lines = export.validate_export(Path(arguments.out))
  if arguments.push_to_hub is not None:
    lines += push.validate_push(arguments.push_to_hub)
  if lines:
    raise RequestError("\n".join(lines))
  parity = load_model(arguments).export(
    arguments.out, dtype=arguments.dtype, max_shard_size=arguments.max_shard_size
  )
  print(f"exported to {arguments.out}: {format_parity(parity)}")
  if arguments.push_to_hub:
    print(f"uploaded to {push.push_to_hub(Path(arguments.out), arguments.push_to_hub)}")


if __name__ == "__main__":
  run_command(main)
