"""Removal of secrets from text: logins in URLs, parameters, and hub tokens."""

import re

LOGIN = re.compile(r"(?<=://)[^/\s]+@")
SECRET_WORDS = "token|key|secret|password|passwd|sig|auth|credential"
HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
PARAMETER = re.compile(rf"([?&][^=&\s]*(?:{SECRET_WORDS})[^=&\s]*=)[^&#\s]+", re.IGNORECASE)


def redact(text: str) -> str:
  """Replace secrets by ***.

  These are logins (https://user:password@host), parameters (?token=...) and hub tokens.
  """
  return HUB_TOKEN.sub("***", PARAMETER.sub(r"\1***", LOGIN.sub("***@", text)))
