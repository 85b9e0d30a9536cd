"""Will it fit, how full, how fast, what to change: python -m jaxft.plan --config configs/X.py --device NAME [--fit] [--json]"""

import json
import sys
from pathlib import Path

from jaxft import command_line, usage
from jaxft.errors import RequestError, run_command
from jaxft.files import atomic_write, expand_user
from jaxft.plan import show, targets
from jaxft.plan.answer import plans_for
from jaxft.run.tracking import console


def main() -> None:
  arguments = command_line.parse(usage.PLAN, ("fit", "json"), ("html", "prices"), list_flags=("device",))
  devices = [name for text in arguments.device for name in text.split(",")]
  if not devices:
    raise RequestError("--device is missing; name one, such as h100x8, rtx4090 or v5e:2x4")
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  prices = targets.read_prices(Path(expand_user(arguments.prices))) if arguments.prices else {}
  plans = plans_for(arguments.config, devices, search=arguments.fit, prices=prices, tell=tell)
  if arguments.html:
    atomic_write(Path(expand_user(arguments.html)), show.html_page(plans))
  if arguments.json:
    print(json.dumps(plans[0] if len(plans) == 1 else {"plans": plans}))
    return
  for plan in plans:
    console.print(show.render_plan(plan))


if __name__ == "__main__":
  run_command(main)
