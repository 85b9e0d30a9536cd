"""Uploads an exported folder to the Hugging Face hub."""

from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError

from jaxft.errors import RequestError, StorageError, first_line


def validate_push(repo: str) -> list[str]:
  """Checks, without a network, whether an upload to `repo` can begin: at most one line."""
  try:
    huggingface_hub.utils.validate_repo_id(repo)
  except HFValidationError as error:
    return [f"push_to_hub={repo!r}: {first_line(error)}"]
  if not huggingface_hub.get_token():
    return [f"push_to_hub={repo!r}: not logged in to the hub; run `hf auth login`, or set HF_TOKEN"]
  return []


def push_to_hub(folder: Path, repo: str) -> str:
  """Uploads the folder as one commit to `repo` (NAME or OWNER/NAME); returns its address.

  Creates the repository if it does not exist. Raises RequestError for a name or a login that cannot
  work, and StorageError when the hub does not take the upload; the folder stays.
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
      f"push_to_hub={repo!r}: {first_line(error)}; the model is in {folder}: "
      f"`hf upload {repo} {folder}` tries again"
    ) from error
  return str(address)
