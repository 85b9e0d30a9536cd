"""Numbers with nouns, for messages and pages."""


def format_count(number: float, noun: str) -> str:
  """Return `1 document` or `2,000 documents`."""
  return f"{number:,} {noun}" + ("" if number == 1 else "s")
