"""What must not leave a run: names and passwords in addresses."""

import re

LOGIN = re.compile(r"(?<=://)[^/\s]+@")
SECRET_WORDS = "token|key|secret|password|passwd|sig|auth|credential"
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
PARAMETER = re.compile(rf"([?&][^=&\s]*(?:{SECRET_WORDS})[^=&\s]*=)[^&#\s]+", re.IGNORECASE)


def redact(text: str) -> str:
  """The text with *** for the login of https://user:password@host, for parameters such as ?token=... and for a hub token."""
  return HUB_TOKEN.sub("***", PARAMETER.sub(r"\1***", LOGIN.sub("***@", text)))
