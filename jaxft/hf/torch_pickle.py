"""pytorch_model*.bin: pickles, read by torch alone, in the mode that builds tensors and runs nothing."""

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np


class TorchTensor(NamedTuple):
  """A tensor of a file that torch has mapped into memory: its bytes are read when they are used."""

  tensor: Any
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.tensor.shape)

  def view(self) -> np.ndarray:
    import torch

    whole = self.tensor.contiguous()
    if whole.dtype == torch.bfloat16:  # numpy has none of its own
      return whole.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return whole.numpy()


def load_tensors(file: Path) -> dict[str, TorchTensor]:
  """The float tensors of a state dict by name; causal masks are left out.

  Raises ImportError without torch, and ValueError for anything that is no state dict of float32, float16 or bfloat16 tensors.
  """
  import torch

  dtypes = {
    torch.float32: np.dtype("float32"),
    torch.float16: np.dtype("float16"),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
  }
  try:
    try:
      content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
      if zipfile.is_zipfile(file):
        raise
      # Of before torch 1.6 (2020): all of it in memory.
      content = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # of many classes: a pickle can be wrong in many ways
    raise ValueError(str(error)) from error
  if not isinstance(content, dict):
    raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
  found = {}
  for name, tensor in content.items():
    plain = (
      isinstance(tensor, torch.Tensor)
      and tensor.layout == torch.strided
      and tensor.device.type == "cpu"
    )
    if not isinstance(name, str) or not plain or tensor.is_neg() or tensor.is_conj():
      raise ValueError(f"its entry {str(name)[:100]!r} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
      raise ValueError(f"its tensor {name!r} is larger than what is stored of it")
    if tensor.dtype in (torch.bool, torch.uint8):
      continue
    if tensor.dtype not in dtypes:
      raise ValueError(f"its tensor {name!r} has dtype {tensor.dtype}")
    found[name] = TorchTensor(tensor.detach(), dtypes[tensor.dtype])
  return found
