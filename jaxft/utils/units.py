"""Numbers with their units, in messages and on pages."""


def format_count(number: float, noun: str) -> str:
  """1 document, 2,000 documents."""
  return f"{number:,} {noun}" + ("" if number == 1 else "s")
