"""Samples side by side: what the same prompt and seed gave at different steps, or in different runs."""

from typing import NamedTuple

from jaxft.page.markup import Html, tag
from jaxft.page.record import Record, number

MOST_PROMPTS, MOST_SIDES, MOST_TEXT, MOST_PROMPT = 30, 4, 3000, 500  # a page stays below 3 MB whatever the samples hold


class Side(NamedTuple):
  title: str
  prompt: str
  text: str
  after: bool = False  # of the end of a run


def by_prompt(record: Record) -> dict[str, list[Side]]:
  """The sides of each prompt, oldest first."""
  found = {}
  for it in record.samples:
    after = it["when"] == "after"
    title = f"{it['when']}, step {it['step']:,}" if it["step"] else it["when"]
    if (known := number(it, "memorised_8grams")) is not None:
      title += f"; {100 * known:.1f} % by heart"
    found.setdefault(it["prompt"], []).append(Side(title, it["prompt"], it["text"], after))
  return found


def spread(found: list, most: int) -> list:
  """At most `most` of them: the first, the last, and some evenly between."""
  if len(found) <= most:
    return found
  return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def sides(shown: list[Side], most_text: int = MOST_TEXT) -> Html:
  """The texts beside each other, or below where the screen is narrow."""
  return tag("div", [_side(it, most_text) for it in shown], class_="sides")


def _side(side: Side, most: int) -> Html:
  prompt = side.prompt if len(side.prompt) <= MOST_PROMPT else "… " + side.prompt[-MOST_PROMPT:]
  text = tag("div", tag("i", prompt), beginning(side.text, most), dir="auto")
  return tag("div", tag("b", side.title), text, class_="text after" if side.after else "text")


def beginning(text: str, most: int) -> str:
  """At most `most` letters of it, cut behind a word where there is one, with a sign."""
  if len(text) <= most:
    return text
  words = text[:most].rsplit(maxsplit=1)[0]
  return (words if len(words) > most // 2 else text[:most]) + "…"


def all_of(found: dict[str, list[Side]]) -> list[Html]:
  """Every prompt with its sides, as far as a page should go."""
  parts, more_sides = [], 0
  for of in list(found.values())[:MOST_PROMPTS]:
    parts.append(sides(spread(of, MOST_SIDES)))
    more_sides += max(0, len(of) - MOST_SIDES)
  left = [f"{len(found) - MOST_PROMPTS:,} more prompts"] if len(found) > MOST_PROMPTS else []
  left += [f"{more_sides:,} samples of steps in between"] if more_sides else []
  if left:
    parts.append(tag("p", f"Not shown: {' and '.join(left)}; they are in samples.jsonl.", class_="note"))
  return parts
