"""Will it fit, how full, how fast, what to change: python -m jaxft.plan --config configs/X.py --device NAME [--fit] [--json]"""

import json
import sys
from pathlib import Path

from jaxft import command_line
from jaxft.errors import RequestError, run_command
from jaxft.files import write_whole
from jaxft.plan import show, targets
from jaxft.plan.answer import plans_for
from jaxft.run.tracking import console

USAGE = """python -m jaxft.plan --config configs/X.py --device NAME [--config.a.b=value ...] [--fit] [--json] [--html FILE]

  --config FILE      a file with get_config(); see configs/. Its data need not be there, and no weights are read
  --device NAME      t4, rtx4090, a100-80gb, h100, h100x8, ..., or a slice of TPUs such as v5e:2x4 or tpu7x:2x2x1, or cpux8.
                     Several: the flag several times, or NAME,NAME
  --config.a.b=VALUE any setting
  --fit              look for the fastest settings that fit; where the config does not fit, one that does is looked for anyway
  --prices FILE      what a device costs an hour, by your own table: JSON such as {"h100": 2.5, "v5e": 1.2}
  --json             print one JSON object, and nothing else, on standard output
  --html FILE        write a page

Compiles the train step with the compiler of that device, which need not be there. A plan that does not fit is an answer too:
the exit code is 0.
"""


def main() -> None:
  arguments = command_line.parse(USAGE, ("fit", "json"), ("html", "prices"), several=("device",))
  devices = [name for text in arguments.device for name in text.split(",")]
  if not devices:
    raise RequestError("--device is missing; name one, such as h100x8, rtx4090 or v5e:2x4")
  tell = lambda line: print(line, file=sys.stderr, flush=True)
  prices = targets.read_prices(Path(arguments.prices)) if arguments.prices else {}
  plans = plans_for(arguments.config, devices, search=arguments.fit, prices=prices, tell=tell)
  if arguments.html:
    write_whole(Path(arguments.html), show.page(plans))
  if arguments.json:
    print(json.dumps(plans[0] if len(plans) == 1 else {"plans": plans}))
    return
  for plan in plans:
    console.print(show.table(plan))


if __name__ == "__main__":
  run_command(main)
