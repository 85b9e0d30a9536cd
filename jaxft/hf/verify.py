"""Verifies an export by the tensors and logits of the model in memory."""

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

# In larger models only tensors are compared. Logits would need a second copy of the model.
MAX_LOGITS_PARAMS = 500_000_000
# An export's float32 logits may differ by ATOL, which the docs promise, or by RTOL times the
# largest logit. RTOL is for models with large logits: those of the published GPT-2 are around -100,
# where float32 has steps of 8e-6.
ATOL, RTOL = 1e-4, 1e-4


def verify_export(
  folder: Path,
  params: Params,
  checkpoint: repo.HFCheckpoint,
  dtype_of: DtypeFn,
  tokenizer: "PreTrainedTokenizerFast | None" = None,
) -> Json:
  """Read the folder back; compare every tensor bit for bit, and logits in float32.

  If torch is installed, transformers computes the folder's logits. Otherwise jaxft's model does,
  with the weights read back. For a dtype narrower than float32, the model in memory is rounded to
  it first.

  Returns:
    The parity report; its key `reference` names the implementation that computed the logits.

  Raises:
    StorageError: a tensor differs, or a logit by more than `ATOL` and `RTOL` allow.
    RequestError: a logit is not finite, or transformers cannot load the export.
  """
  written = load_weights.list_tensors(folder)
  for tensor in hf_tensors(params, checkpoint, dtype_of):
    ref = written.pop(tensor.name)
    is_ref = isinstance(ref, load_weights.TensorRef)
    if not is_ref or ref.shape != tensor.shape or not ref.bytes_equal(tensor.chunks()):
      raise StorageError(
        f"{folder}: tensor {tensor.name!r} differs when read back; the disk may be failing"
      )
  if written:
    raise StorageError(f"{folder}: unexpected tensors {sorted(written)} were written")
  saved = repo.resolve(str(folder))
  if saved.cfg != checkpoint.cfg:
    raise StorageError(
      f"{folder}: config.json read back describes a different model: {saved.cfg}, "
      f"not {checkpoint.cfg}"
    )
  if tokenizer:
    verify_tokenizer(folder, tokenizer, checkpoint.tokenizer_folder)
  report = {"tensors": "bit for bit", "dtype": dtype_of(full_name(EMBEDDING)).name}
  if parameter_count(checkpoint.cfg) > MAX_LOGITS_PARAMS or jax.process_count() > 1:
    reason = "tensors only: logits would need a second copy of the model"
    return report | {"logits_max_abs_difference": None, "reference": reason}
  return report | _compare_logits(saved, params, dtype_of)


def _compare_logits(saved: repo.HFCheckpoint, params: Params, dtype_of: DtypeFn) -> Json:
  """Compare an export's logits with those of the model, on random tokens."""
  graph, shapes, _ = abstract_model(saved.cfg, ComputeConfig())
  ids_BT, lengths_B = _random_batch(saved)
  if importlib.util.find_spec("torch"):
    reference, theirs = _transformers_logits(saved.folder, ids_BT, bool(saved.cfg.classes))
  else:
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    reference = f"jaxft {jaxft.__version__}, weights read back"
    theirs = compute_logits(graph, load_weights.load_params(saved, shapes, device), ids_BT)
  # A model in host memory is small enough here (MAX_LOGITS_PARAMS) to fit on the device too.
  shardings = jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), params)
  on_device = jax.device_put(params, shardings)
  ours = compute_logits(graph, round_to_dtype(on_device, saved, dtype_of), ids_BT)
  if saved.cfg.classes:  # transformers returns the last token's logits alone
    last = (np.arange(len(ids_BT)), lengths_B - 1)
    ours = ours[last]
    theirs = theirs if theirs.ndim == 2 else theirs[last]
  if not np.isfinite(ours).all():
    raise RequestError(
      f"export to {saved.folder}: the logits of the model in memory are not finite: "
      "a weight is NaN or infinite"
    )
  difference = float(np.max(np.abs(ours - theirs)))
  tolerance = max(ATOL, RTOL * float(np.abs(theirs).max()))
  if not difference <= tolerance:
    raise StorageError(
      f"{saved.folder}: its float32 logits differ by {difference:.1e} from the trained model's "
      f"({reference}); rounding explains at most {tolerance:.0e}. Please report this bug"
    )
  return {
    "logits_max_abs_difference": difference,
    "tolerance": tolerance,
    "reference": reference,
    "tokens_compared": int(lengths_B.sum()),
  }


def format_parity(parity: Json) -> str:
  """Format a parity report as one line."""
  difference = parity["logits_max_abs_difference"]
  logits = "" if difference is None else f", logits within {difference:.1e} of the model in memory"
  return f"tensors {parity['tensors']}{logits} (reference: {parity['reference']})"


def compute_logits(graph: nnx.GraphDef[Decoder], params: Params, ids_BT: np.ndarray) -> np.ndarray:
  """Compute the logits (B, T, V) or (B, T, classes) of token ids (B, T)."""

  def run(params):
    decoder = nnx.merge(graph, params)
    return decoder.logits(decoder(jnp.asarray(ids_BT))[0])

  return np.asarray(jax.jit(run)(params))


def check_hf_config(folder: Path, checkpoint: repo.HFCheckpoint) -> None:
  """Raise RequestError if transformers misreads config.json."""
  import transformers

  try:
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
  except Exception as error:  # the class depends on the wrong key
    raise RequestError(
      f"{checkpoint.folder}: transformers cannot read its config.json ({first_line(error)})"
    ) from error
  if checkpoint.cfg.classes and config.num_labels != checkpoint.cfg.classes:
    raise RequestError(
      f"{checkpoint.folder}: transformers reads {config.num_labels} classes in its config.json, "
      f"not {checkpoint.cfg.classes}"
    )


def _random_batch(checkpoint: repo.HFCheckpoint) -> tuple[np.ndarray, np.ndarray]:
  """Draw token ids (B, T) and the length of each row (B,).

  A language model gets one row. A classifier gets two, and the second row is half padding. No drawn
  token is the padding token, because transformers' classifiers search for the last other token.
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
  except Exception as error:  # the class depends on the config, or on a missing package
    raise RequestError(
      f"{folder}: transformers cannot load this export ({first_line(error)})"
    ) from error
  return f"transformers {transformers.__version__}, torch {torch.__version__}", logits
