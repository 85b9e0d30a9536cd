"""Report memory, speed and better settings of a run, without its hardware.

python -m jaxft.plan --config configs/X.py --device NAME [--fit] [--json]
"""

import json
import sys
from pathlib import Path

from jaxft.cli import flags, usage
from jaxft.errors import RequestError, run_command
from jaxft.hardware import specs
from jaxft.plan import rendering
from jaxft.plan.planner import plans_for
from jaxft.report_page import plan_page
from jaxft.utils.console import console
from jaxft.utils.files import atomic_write, expand_user


def main() -> None:
  """Print a plan for each device, as text or JSON."""
  arguments = flags.parse(usage.PLAN, ("fit", "json"), ("html", "prices"), list_flags=("device",))
  devices = [name for text in arguments.device for name in text.split(",")]
  if not devices:
    raise RequestError("--device is missing; name one, such as h100x8, rtx4090 or v5e:2x4")
  progress = lambda line: print(line, file=sys.stderr, flush=True)
  prices = specs.read_prices(Path(expand_user(arguments.prices))) if arguments.prices else {}
  plans = plans_for(
    arguments.config, devices, search=arguments.fit, prices=prices, on_progress=progress
  )
  if arguments.html:
    atomic_write(Path(expand_user(arguments.html)), plan_page.render(plans))
  if arguments.json:
    print(json.dumps(plans[0] if len(plans) == 1 else {"plans": plans}))
    return
  for plan in plans:
    console.print(rendering.render_plan(plan))


if __name__ == "__main__":
  run_command(main)
