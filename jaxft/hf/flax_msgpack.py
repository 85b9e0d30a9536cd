"""Lists the tensors of a flax_model.msgpack without reading their data.

The format is nested maps with text keys (https://github.com/msgpack/msgpack/blob/master/spec.md).
Each array is an extension of type 1 that holds (shape, dtype name, bytes), as written by
`flax.serialization`. We do not use its msgpack_restore for two reasons. It reads the whole file
into memory (768 MiB peak for a file of 576 MiB). It also accepts negative sizes and leaves that are
not arrays.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import ml_dtypes
import numpy as np

DTYPES = {
  "float32": np.dtype("float32"),
  "float16": np.dtype("float16"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NDARRAY_TYPE = 1  # Flax's extension type for arrays
EXT_TAGS = (0xC7, 0xC8, 0xC9, 0xD4, 0xD5, 0xD6, 0xD7, 0xD8)
# Limits against hostile files, far above those of any real checkpoint.
MAX_DEPTH = 16
MAX_KEY_BYTES = 256

# Path, dtype, shape, and offset of the data in the file.
Entry: TypeAlias = tuple[tuple[str, ...], np.dtype, tuple[int, ...], int]


class MalformedError(ValueError):
  """The file was not written by flax.serialization, or is damaged."""


def list_arrays(file: Path) -> Iterator[Entry]:
  """Yield every array of a file; raise MalformedError for a malformed one."""
  with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
    reader = _Reader(data)
    yield from reader.node(())
    if reader.pos != len(data):
      raise MalformedError(f"{len(data) - reader.pos} extra bytes at the end")


class _Reader:
  def __init__(self, data: mmap.mmap):
    self.data = data
    self.pos = 0

  def read(self, size: int) -> bytes:
    if self.pos + size > len(self.data):
      raise MalformedError("the file is truncated")
    self.pos += size
    return self.data[self.pos - size : self.pos]

  def uint(self, size: int) -> int:
    return int.from_bytes(self.read(size), "big")

  def length(self, what: str, fixed: range, wide: dict[int, int]) -> int:
    """Read the length of a `what`, in one of msgpack's two encodings.

    Args:
      what: the expected kind of value, for the error.
      fixed: tags that contain the length: it is the tag's index in this range.
      wide: tags that precede the length -> size of the length in bytes.
    """
    tag = self.uint(1)
    if tag in fixed:
      return tag - fixed.start
    if tag not in wide:
      raise MalformedError(f"expected {what} at byte {self.pos - 1}")
    return self.uint(wide[tag])

  def text(self) -> str:
    length = self.length("text", range(0xA0, 0xC0), {0xD9: 1, 0xDA: 2})
    if length > MAX_KEY_BYTES:
      raise MalformedError(f"a key of {length} bytes")
    return self.read(length).decode()

  def node(self, path: tuple[str, ...]) -> Iterator[Entry]:
    if self.pos < len(self.data) and self.data[self.pos] in EXT_TAGS:
      yield path, *self.array(path)
      return
    if len(path) == MAX_DEPTH:
      raise MalformedError(f"maps nested deeper than {MAX_DEPTH}")
    for _ in range(self.length("map or array", range(0x80, 0x90), {0xDE: 2, 0xDF: 4})):
      yield from self.node((*path, self.text()))

  def array(self, path: tuple[str, ...]) -> tuple[np.dtype, tuple[int, ...], int]:
    wide = {0xC7: 1, 0xC8: 2, 0xC9: 4}.get(self.uint(1))
    length = self.uint(wide) if wide else 0
    end = self.pos + 1 + length
    if not wide or self.uint(1) != NDARRAY_TYPE or self.uint(1) != 0x93:
      raise MalformedError(f"{'.'.join(path)}: an extension that is not an array")
    ndim = self.length("shape", range(0x90, 0xA0), {})
    sizes = {0xCC: 1, 0xCD: 2, 0xCE: 4}
    shape = tuple(self.length("size", range(0x80), sizes) for _ in range(ndim))
    name = self.text()
    size = self.length("bytes", range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
    fits = name in DTYPES and size == math.prod(shape) * DTYPES[name].itemsize
    if not fits or self.pos + size != end:
      raise MalformedError(f"{'.'.join(path)}: {size} bytes for {name} of shape {shape}")
    start = self.pos
    self.pos += size
    if self.pos > len(self.data):
      raise MalformedError("the file is truncated")
    return DTYPES[name], shape, start
