"""Samples side by side: one prompt and seed at several steps or in several runs."""

from typing import NamedTuple, TypeVar

from jaxft.report_page.markup import Html, element
from jaxft.report_page.run_record import RunRecord, get_float

# With these limits a page stays below 3 MB.
MAX_PROMPTS = 30
MAX_SAMPLES = 4
MAX_TEXT_CHARS = 3000
MAX_PROMPT_CHARS = 500

Item = TypeVar("Item")


class Sample(NamedTuple):
  """A sample with its title on the page."""

  title: str
  prompt: str
  text: str
  after: bool = False  # drawn at the end of the run


def by_prompt(record: RunRecord) -> dict[str, list[Sample]]:
  """Return the samples of each prompt, oldest first."""
  groups: dict[str, list[Sample]] = {}
  for it in record.samples:
    prompt = it["prompt"]
    when = it["when"]
    title = f"{when}, step {it['step']:,}" if it["step"] else when
    if (share := get_float(it, "memorised_8grams")) is not None:
      title += f"; {100 * share:.1f} % memorized"
    sample = Sample(title=title, prompt=prompt, text=it["text"], after=when == "after")
    groups.setdefault(prompt, []).append(sample)
  return groups


def evenly_spaced(items: list[Item], max_items: int) -> list[Item]:
  """Return at most `max_items`: the first, the last, and evenly spaced others."""
  if len(items) <= max_items:
    return items
  return [items[round(i * (len(items) - 1) / (max_items - 1))] for i in range(max_items)]


def side_by_side(group: list[Sample], max_chars: int = MAX_TEXT_CHARS) -> Html:
  """Render the texts side by side, or in one column on a narrow screen."""
  return element("div", [_render_sample(it, max_chars) for it in group], class_="sides")


def _render_sample(it: Sample, max_chars: int) -> Html:
  prompt = it.prompt
  if len(prompt) > MAX_PROMPT_CHARS:
    prompt = "… " + prompt[-MAX_PROMPT_CHARS:]
  text = element("div", element("i", prompt), clip_text(it.text, max_chars), dir="auto")
  return element("div", element("b", it.title), text, class_="text after" if it.after else "text")


def clip_text(text: str, max_chars: int) -> str:
  """Truncate text to `max_chars`, after a word if possible, with an ellipsis."""
  if len(text) <= max_chars:
    return text
  words = text[:max_chars].rsplit(maxsplit=1)[0]
  return (words if len(words) > max_chars // 2 else text[:max_chars]) + "…"


def render_all(groups: dict[str, list[Sample]]) -> list[Html]:
  """Render every prompt with its samples, up to the limits of a page."""
  shown = list(groups.values())[:MAX_PROMPTS]
  parts = [side_by_side(evenly_spaced(group, MAX_SAMPLES)) for group in shown]
  hidden = []
  if len(groups) > MAX_PROMPTS:
    hidden.append(f"{len(groups) - MAX_PROMPTS:,} more prompts")
  if between := sum(max(0, len(group) - MAX_SAMPLES) for group in shown):
    hidden.append(f"{between:,} samples of intermediate steps")
  if hidden:
    note = f"Not shown: {' and '.join(hidden)}; they are in samples.jsonl."
    parts.append(element("p", note, class_="note"))
  return parts
