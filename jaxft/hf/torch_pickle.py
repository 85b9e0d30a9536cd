"""Reads pytorch_model*.bin: pickles, with torch's mode that builds tensors and runs nothing."""

import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
  import torch


class TorchTensor(NamedTuple):
  """A tensor of a memory-mapped file: its bytes are read when they are used."""

  tensor: "torch.Tensor"
  dtype: np.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.tensor.shape)

  def view(self) -> np.ndarray:
    import torch

    tensor = self.tensor.contiguous()
    if tensor.dtype == torch.bfloat16:  # numpy has none of its own
      return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def load_tensors(file: Path) -> dict[str, TorchTensor]:
  """Returns the float tensors of a state dict by name, without causal masks.

  Raises ImportError without torch, and ValueError for anything but a state dict of float32, float16
  or bfloat16 tensors.
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
      # From before torch 1.6 (2020): it cannot be mapped, and is read into memory.
      content = torch.load(file, map_location="cpu", weights_only=True)
  except Exception as error:  # of many classes: a pickle can be wrong in many ways
    raise ValueError(str(error)) from error
  if not isinstance(content, dict):
    raise ValueError(f"it holds a {type(content).__name__}, not a dict of tensors")
  tensors = {}
  for name, tensor in content.items():
    plain = isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided
    plain = plain and tensor.device.type == "cpu" and not tensor.is_neg() and not tensor.is_conj()
    if not isinstance(name, str) or not plain:
      raise ValueError(f"its entry {str(name)[:100]!r} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
      raise ValueError(f"its tensor {name!r} is larger than what is stored of it")
    if tensor.dtype in (torch.bool, torch.uint8):
      continue
    if tensor.dtype not in dtypes:
      raise ValueError(f"its tensor {name!r} has dtype {tensor.dtype}")
    tensors[name] = TorchTensor(tensor.detach(), dtypes[tensor.dtype])
  return tensors
