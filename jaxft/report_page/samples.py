"""Samples side by side: what the same prompt and seed gave at different steps, or in different runs."""

from typing import NamedTuple

from jaxft.report_page.markup import Html, element
from jaxft.report_page.run_record import RunRecord, get_float

MAX_PROMPTS, MAX_SAMPLES, MAX_TEXT_CHARS, MAX_PROMPT_CHARS = (
  30,
  4,
  3000,
  500,
)  # a page stays below 3 MB whatever the samples hold


class Sample(NamedTuple):
  title: str
  prompt: str
  text: str
  after: bool = False  # of the end of a run


def by_prompt(record: RunRecord) -> dict[str, list[Sample]]:
  """The sides of each prompt, oldest first."""
  found = {}
  for it in record.samples:
    after = it["when"] == "after"
    title = f"{it['when']}, step {it['step']:,}" if it["step"] else it["when"]
    if (known := get_float(it, "memorised_8grams")) is not None:
      title += f"; {100 * known:.1f} % by heart"
    found.setdefault(it["prompt"], []).append(Sample(title, it["prompt"], it["text"], after))
  return found


def evenly_spaced(found: list, most: int) -> list:
  """At most `most` of them: the first, the last, and some evenly between."""
  if len(found) <= most:
    return found
  return [found[round(i * (len(found) - 1) / (most - 1))] for i in range(most)]


def side_by_side(shown: list[Sample], most_text: int = MAX_TEXT_CHARS) -> Html:
  """The texts beside each other, or below where the screen is narrow."""
  return element("div", [_render_sample(it, most_text) for it in shown], class_="sides")


def _render_sample(side: Sample, most: int) -> Html:
  prompt = (
    side.prompt if len(side.prompt) <= MAX_PROMPT_CHARS else "… " + side.prompt[-MAX_PROMPT_CHARS:]
  )
  text = element("div", element("i", prompt), clip_text(side.text, most), dir="auto")
  return element(
    "div", element("b", side.title), text, class_="text after" if side.after else "text"
  )


def clip_text(text: str, most: int) -> str:
  """At most `most` letters of it, cut behind a word where there is one, with a sign."""
  if len(text) <= most:
    return text
  words = text[:most].rsplit(maxsplit=1)[0]
  return (words if len(words) > most // 2 else text[:most]) + "…"


def render_all(found: dict[str, list[Sample]]) -> list[Html]:
  """Every prompt with its sides, as far as a page should go."""
  parts, more_sides = [], 0
  for of in list(found.values())[:MAX_PROMPTS]:
    parts.append(side_by_side(evenly_spaced(of, MAX_SAMPLES)))
    more_sides += max(0, len(of) - MAX_SAMPLES)
  left = [f"{len(found) - MAX_PROMPTS:,} more prompts"] if len(found) > MAX_PROMPTS else []
  left += [f"{more_sides:,} samples of steps in between"] if more_sides else []
  if left:
    parts.append(
      element("p", f"Not shown: {' and '.join(left)}; they are in samples.jsonl.", class_="note")
    )
  return parts
