"""Uploads an exported folder to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from jaxft.errors import RequestError, StorageError, first_line


def validate_push(repo: str) -> list[str]:
  """Check offline whether an upload to `repo` can start; return at most one error."""
  try:
    huggingface_hub.utils.validate_repo_id(repo)
  except HFValidationError as error:
    return [f"push_to_hub={repo!r}: {first_line(error)}"]
  if not huggingface_hub.get_token():
    return [f"push_to_hub={repo!r}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN"]
  return []


def push_to_hub(folder: Path, repo: str) -> str:
  """Upload the folder as one commit; return the repository's URL.

  `repo` is NAME or OWNER/NAME. It is created if it does not exist. The folder is never deleted.

  Raises:
    RequestError: the name is invalid, or no one is logged in.
    StorageError: the upload failed.
  """
  if lines := validate_push(repo):
    raise RequestError("\n".join(lines))
  try:
    address = huggingface_hub.create_repo(repo, exist_ok=True)
    huggingface_hub.upload_folder(
      repo_id=address.repo_id, folder_path=folder, commit_message="Upload model"
    )
  except Exception as error:  # hub and network errors share no class
    raise StorageError(
      f"push_to_hub={repo!r}: {first_line(error)}; the model is still in {folder}; "
      f"retry with `hf upload {repo} {folder}`"
    ) from error
  return str(address)
