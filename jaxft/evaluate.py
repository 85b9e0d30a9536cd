"""What a model makes of a text, or of labels: python -m jaxft.evaluate --model PATH_OR_ID --data SOURCE [--json]"""

import argparse
import json
from pathlib import Path

from jaxft import config as settings
from jaxft.command_line import add_model_flags, open_model
from jaxft.errors import RequestError, run_command


def main() -> None:
  parser = argparse.ArgumentParser("python -m jaxft.evaluate", description="Loss and perplexity of a model on a text.")
  add_model_flags(parser)
  parser.add_argument(
    "--data",
    nargs="+",
    default=[],
    metavar="SOURCE",
    help="file, glob, folder or hub:NAME[:SPLIT]; default with --workdir: the run's own validation data",
  )
  parser.add_argument("--text_column", default="text", help="column that holds the text (default: text)")
  parser.add_argument(
    "--label_column", default="label", help="column that holds the label, for a model that classifies (default: label)"
  )
  parser.add_argument("--sequence_length", type=int, default=0, help="tokens a row (default: the model's positions)")
  parser.add_argument(
    "--batch_size", type=int, default=8, help="rows at once; changes speed and memory only (default: 8)"
  )
  parser.add_argument("--json", action="store_true", help="print one JSON object")
  arguments = parser.parse_args()

  data, length, like = arguments.data, arguments.sequence_length, None
  if not data and arguments.workdir and (file := Path(arguments.workdir) / "config.json").is_file():
    config = settings.read(file)
    data, like = list(config.data.validation), config.data
    length = length or config.data.sequence_length
  if not data:
    raise RequestError("--data is missing: name a file, a glob, a folder or hub:NAME")

  ready = open_model(arguments)
  column = {} if like else {"text_column": arguments.text_column, "label_column": arguments.label_column}
  result = ready.evaluate(*data, sequence_length=length, batch_size=arguments.batch_size, like=like, **column)
  if arguments.json:
    print(json.dumps(result))
  else:
    told = f"loss {result['loss']:.4f}"
    if "accuracy" in result:
      told = f"accuracy {result['accuracy']:.1%}, F1 {result['f1']:.3f}, {told}, over {result['tokens']:,} texts"
    else:
      told += f" nats a token, perplexity {result['perplexity']:.2f}, "
      told += f"{result['bits_per_byte']:.4f} bits a byte, " if "bits_per_byte" in result else ""
      told += f"over {result['tokens']:,} tokens"
    print(told)


if __name__ == "__main__":
  run_command(main)
