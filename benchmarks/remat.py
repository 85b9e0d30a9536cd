"""Memory against arithmetic.

  python benchmarks/remat.py [--model gpt2] [--device h100] [--rows 8] [--length 1024]

What `memory.remat` costs and gives, by the compiler for a device that need not be there. The table
goes to docs/benchmarks.md.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata

import page

import jaxft.config
from jaxft.hf import model_config
from jaxft.hf.known_models import PUBLISHED
from jaxft.plan.aot_compiler import Compiler, CompileRequest


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument(
    "--model", default="gpt2", help="one of the published sizes (jaxft.hf.known_models)"
  )
  parser.add_argument("--device", default="h100")
  parser.add_argument("--rows", type=int, default=8)
  parser.add_argument("--length", type=int, default=1024)
  args = parser.parse_args()
  cfg = dataclasses.asdict(model_config.from_hf_config(PUBLISHED[args.model]).with_dropout(0.0))
  lines = [
    "| `memory.remat` | peak | on top of weights, optimizer and gradient | computed / needed |",
    "|---|---|---|---|",
  ]
  with Compiler() as compiler:
    for remat, chunk in (("none", -1), ("dots", -1), ("full", -1), ("full", 32)):
      config = jaxft.config.default()
      config.memory.loss_chunk = chunk
      config.model.path, config.memory.remat, config.train.steps = args.model, remat, 100
      config.train.batch_size = args.rows
      config.data.sequence_length = args.length
      config.data.train = ("none",)
      answer = compiler(CompileRequest(jaxft.config.to_json(config), cfg, args.device))
      if "peak_bytes" not in answer:
        raise SystemExit(f"error: {remat}: {answer}")
      gib = lambda nbytes: f"{nbytes / 2**30:.2f} GiB"
      smaller = "" if chunk < 0 else f", `memory.loss_chunk={chunk}`"
      lines.append(
        f"| `{remat}`{smaller} | {gib(answer['peak_bytes'])} | "
        f"{gib(answer['breakdown']['activations'])} | "
        f"{answer['flops'] / answer['model_flops']:.2f} |"
      )
      print(lines[-1], flush=True)
  about = (
    f"{datetime.date.today()}, jax {importlib.metadata.version('jax')}: {args.model} on "
    f"{args.device}, {args.rows} x {args.length} tokens, {answer['compute_dtype']}, AdamW, no "
    "dropout. Needed FLOPs are (6 P + 12 L N H T) x tokens (PaLM, appendix B). They count "
    "attention to later tokens too; computed FLOPs do not."
  )
  page.put(
    f"memory against arithmetic, {args.model}",
    "benchmarks/remat.py",
    "\n".join([about, "", *lines]),
  )


if __name__ == "__main__":
  main()
