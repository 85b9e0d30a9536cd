"""Verifies an export: read back, compared with the model tensor by tensor, and by its logits."""

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxft
from jaxft.errors import RequestError, StorageError, first_line
from jaxft.hf import load_weights, repo
from jaxft.hf.export_tensors import DtypeFn, hf_tensors, round_to_dtype
from jaxft.hf.tokenizer import verify_tokenizer
from jaxft.hf.weight_map import EMBEDDING, full_name
from jaxft.model.compute import ComputeConfig
from jaxft.model.decoder import Decoder, abstract_model, parameter_count
from jaxft.utils.types import Json, Params

if TYPE_CHECKING:
  from transformers import PreTrainedTokenizerFast

# Larger models are compared tensor by tensor alone, which needs no second copy.
MAX_LOGITS_PARAMS = 500_000_000
# Largest difference of two float32 logits that an export may show, the one the docs promise; and
# relative to the largest logit, for models whose logits are large (those of the published GPT-2 are
# around -100, where float32 has steps of 8e-6).
ATOL, RTOL = 1e-4, 1e-4


def verify_export(
  folder: Path,
  params: Params,
  checkpoint: repo.HFCheckpoint,
  dtype_of: DtypeFn,
  tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> Json:
  """Reads the folder back and compares every tensor bit for bit, and logits in float32.

  The folder's logits are transformers' own where torch is installed, else those of jaxft's model
  with the weights read back; `reference` says which. Raises StorageError on any difference above
  `ATOL` and `RTOL` (for a narrower dtype than float32, against the weights as written).
  """
  written = load_weights.list_tensors(folder)
  for tensor in hf_tensors(params, checkpoint, dtype_of):
    ref = written.pop(tensor.name)
    is_ref = isinstance(ref, load_weights.TensorRef)
    if not is_ref or ref.shape != tensor.shape or not ref.bytes_equal(tensor.chunks()):
      raise StorageError(
        f"{folder}: tensor {tensor.name!r} read back differs from what was written; "
        "the disk is not to be trusted"
      )
  if written:
    raise StorageError(f"{folder}: tensors {sorted(written)} were not meant to be written")
  saved = repo.resolve(str(folder))
  if saved.cfg != checkpoint.cfg:
    raise StorageError(
      f"{folder}: config.json read back describes another model: {saved.cfg}, not {checkpoint.cfg}"
    )
  if tokenizer:
    verify_tokenizer(folder, tokenizer, checkpoint.tokenizer_folder)
  report = {"tensors": "bit for bit", "dtype": dtype_of(full_name(EMBEDDING)).name}
  if parameter_count(checkpoint.cfg) > MAX_LOGITS_PARAMS or jax.process_count() > 1:
    reason = "tensors only: logits would take a second model"
    return report | {"logits_max_abs_difference": None, "reference": reason}
  return report | _compare_logits(saved, params, dtype_of)


def _compare_logits(saved: repo.HFCheckpoint, params: Params, dtype_of: DtypeFn) -> Json:
  """Returns how far the logits of an export are from those of the model in memory."""
  graph, shapes, _ = abstract_model(saved.cfg, ComputeConfig())
  ids_BT, lengths_B = _random_batch(saved)
  if importlib.util.find_spec("torch"):
    reference, theirs = _transformers_logits(saved.folder, ids_BT, bool(saved.cfg.classes))
  else:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    reference = f"jaxft {jaxft.__version__}, weights read back"
    theirs = compute_logits(graph, load_weights.load_params(saved, shapes, device), ids_BT)
  # A model that stays on the host is small enough here to be on the device as well.
  shardings = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), params)
  on_device = jax.device_put(params, shardings)
  ours = compute_logits(graph, round_to_dtype(on_device, saved, dtype_of), ids_BT)
  if saved.cfg.classes:  # transformers gives the last token's
    last = (np.arange(len(ids_BT)), lengths_B - 1)
    ours = ours[last]
    theirs = theirs if theirs.ndim == 2 else theirs[last]
  if not np.isfinite(ours).all():
    raise RequestError(
      f"export to {saved.folder}: the logits of the model in memory are no numbers: "
      "a weight is NaN or infinite"
    )
  difference = float(np.max(np.abs(ours - theirs)))
  tolerance = max(ATOL, RTOL * float(np.abs(theirs).max()))
  if not difference <= tolerance:
    raise StorageError(
      f"{saved.folder}: its float32 logits differ by {difference:.1e} from the trained model's "
      f"({reference}); at most {tolerance:.0e} is rounding. Please report this"
    )
  return {
    "logits_max_abs_difference": difference,
    "tolerance": tolerance,
    "reference": reference,
    "tokens_compared": int(lengths_B.sum()),
  }


def format_parity(parity: Json) -> str:
  """Formats a parity report as one line."""
  difference = parity["logits_max_abs_difference"]
  logits = "" if difference is None else f", logits within {difference:.1e} of the model in memory"
  return f"tensors {parity['tensors']}{logits} (reference: {parity['reference']})"


def compute_logits(graph: nnx.GraphDef[Decoder], params: Params, ids_BT: np.ndarray) -> np.ndarray:
  """(B, T) -> (B, T, V), or (B, T, classes)."""

  def run(params):
    decoder = nnx.merge(graph, params)
    return decoder.logits(decoder(jnp.asarray(ids_BT))[0])

  return np.asarray(jax.jit(run)(params))


def check_hf_config(folder: Path, checkpoint: repo.HFCheckpoint) -> None:
  """Raises RequestError where transformers reads no config.json, or another number of classes."""
  import transformers

  try:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
  except Exception as error:  # whatever is wrong with a key
    raise RequestError(
      f"{checkpoint.folder}: transformers does not read its config.json ({first_line(error)})"
    ) from error
  if checkpoint.cfg.classes and config.num_labels != checkpoint.cfg.classes:
    raise RequestError(
      f"{checkpoint.folder}: transformers reads {config.num_labels} classes in its config.json, "
      f"not {checkpoint.cfg.classes}"
    )


def _random_batch(checkpoint: repo.HFCheckpoint) -> tuple[np.ndarray, np.ndarray]:
  """Draws (B, T) tokens and the length of each row.

  A language model gets one row; a classifier two, the second half of it padding. None of the tokens
  is the padding token: transformers' classifiers look for the last that is not.
  """
  T = min(checkpoint.cfg.P, 128)
  pad = checkpoint.hf_config.get("pad_token_id")
  candidates = np.flatnonzero(np.arange(checkpoint.cfg.V) != pad)
  lengths_B = np.array([T, (T + 1) // 2][: 1 + (checkpoint.cfg.classes > 0 and pad is not None)])
  ids_BT = np.random.default_rng(0).choice(candidates, (len(lengths_B), T)).astype(np.int32)
  return np.where(np.arange(T) < lengths_B[:, None], ids_BT, pad or 0), lengths_B


def _transformers_logits(
  folder: Path, ids_BT: np.ndarray, classifies: bool
) -> tuple[str, np.ndarray]:
  import torch
  import transformers
  from transformers.utils.logging import disable_progress_bar

  disable_progress_bar()
  auto = transformers.AutoModelForCausalLM
  if classifies:
    auto = transformers.AutoModelForSequenceClassification
  try:
    model = auto.from_pretrained(
      folder,
      dtype=torch.float32,
      attn_implementation="eager",
      trust_remote_code=False,
      use_safetensors=True,
    )
    with torch.no_grad():
      logits = model(torch.from_numpy(ids_BT).long(), return_dict=True).logits.numpy()
  except Exception as error:  # whatever its config, or a package that it needs, makes it raise
    raise RequestError(
      f"{folder}: transformers does not load this export ({first_line(error)})"
    ) from error
  return f"transformers {transformers.__version__}, torch {torch.__version__}", logits
