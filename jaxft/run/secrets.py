"""What must not leave a run: names and passwords in addresses."""

import re

LOGIN = re.compile(r"(?<=://)[^/\s@]+@")
WORDS = "token|key|secret|password|passwd|signature|credential"
PARAMETER = re.compile(rf"([?&][^=&\s]*(?:{WORDS})[^=&\s]*=)[^&#\s]+", re.IGNORECASE)


def masked(text: str) -> str:
  """The text with *** for the login of https://user:password@host and for parameters such as ?token=..."""
  return PARAMETER.sub(r"\1***", LOGIN.sub("***@", text))
