"""Reads pytorch_model*.bin with torch.

These files are pickles, which can run code. torch's weights_only mode runs none.
"""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
  import torch


class TorchTensor(NamedTuple):
  """A tensor of a memory-mapped file; its bytes are read on use."""

  tensor: "torch.Tensor"
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    """Shape of the tensor."""
    return tuple(self.tensor.shape)

  def view(self) -> np.ndarray:
    """View the tensor as a numpy array."""
    import torch

    tensor = self.tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy itself lacks bfloat16
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load_tensors(file: Path) -> dict[str, TorchTensor]:
  """Return the float tensors of a state dict by name, without causal masks.

  Raises:
    ImportError: torch is not installed.
    ValueError: not a state dict of float32, float16 or bfloat16 tensors.
  """
  import torch

  names = ("float32", "float16", "bfloat16")
  dtypes = {getattr(torch, name): np.dtype(name) for name in names}
  try:
    try:
      content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError:
      if zipfile.is_zipfile(file):
        raise
      # A file from before torch 1.6 (2020) cannot be memory-mapped, so it is read into memory.
      content = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # a damaged pickle raises exceptions of many classes
    raise ValueError(str(error)) from error
  if not isinstance(content, dict):
    raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
  tensors = {}
  for name, tensor in content.items():
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    plain = plain and tensor.device.type == "cpu" and not tensor.is_neg() and not tensor.is_conj()
    if not isinstance(name, str) or not plain:
      raise ValueError(f"its entry {str(name)[:100]!r} is not a plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
      raise ValueError(f"its tensor {name!r} is larger than its stored data")
    if tensor.dtype in (torch.bool, torch.uint8):
      continue
    if tensor.dtype not in dtypes:
      raise ValueError(f"its tensor {name!r} has dtype {tensor.dtype}")
    tensors[name] = TorchTensor(tensor.detach(), dtypes[tensor.dtype])
  return tensors
