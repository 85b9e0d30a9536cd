"""flax_model.msgpack without Flax's model classes: where each tensor lies in the file, found without reading the tensors.

The format: nested maps with text keys (https://github.com/msgpack/msgpack/blob/master/spec.md), and for each array an
extension of type 1 that holds (shape, dtype name, bytes), as `flax.serialization` writes it.
"""

import math
import mmap
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

DTYPES = {
  "float32": np.dtype("float32"),
  "float16": np.dtype("float16"),
  "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
NDARRAY_TYPE, MAX_DEPTH, MAX_KEY_BYTES = (
  1,
  16,
  256,
)  # the extension type; bounds that no checkpoint comes near


class MalformedError(ValueError):
  """Not a file that flax.serialization wrote."""


def list_arrays(file: Path) -> Iterator[tuple[tuple[str, ...], np.dtype, tuple[int, ...], int]]:
  """(path, dtype, shape, offset of the bytes) of every array in the file; raises Malformed."""
  with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
    reader = _Reader(data)
    yield from reader.node(())
    if reader.at != len(data):
      raise MalformedError(f"{len(data) - reader.at} bytes after its end")


class _Reader:
  def __init__(self, data: mmap.mmap):
    self.data, self.at = data, 0

  def take(self, count: int) -> bytes:
    if self.at + count > len(self.data):
      raise MalformedError("it ends too early")
    self.at += count
    return self.data[self.at - count : self.at]

  def number(self, size: int) -> int:
    return int.from_bytes(self.take(size), "big")

  def count(self, what: str, fixed: range, wide: dict[int, int]) -> int:
    """A length: the place of the tag in `fixed`, or what stands after one of the `wide` tags, in so many bytes."""
    tag = self.number(1)
    if tag in fixed:
      return tag - fixed.start
    if tag not in wide:
      raise MalformedError(f"no {what} at byte {self.at - 1}")
    return self.number(wide[tag])

  def text(self) -> str:
    length = self.count("text", range(0xA0, 0xC0), {0xD9: 1, 0xDA: 2})
    if length > MAX_KEY_BYTES:
      raise MalformedError(f"a key of {length} bytes")
    return self.take(length).decode()

  def node(
    self, path: tuple[str, ...]
  ) -> Iterator[tuple[tuple[str, ...], np.dtype, tuple[int, ...], int]]:
    if self.at < len(self.data) and self.data[self.at] in (
      0xC7,
      0xC8,
      0xC9,
      0xD4,
      0xD5,
      0xD6,
      0xD7,
      0xD8,
    ):
      yield path, *self.array(path)
      return
    if len(path) == MAX_DEPTH:
      raise MalformedError(f"maps nested deeper than {MAX_DEPTH}")
    for _ in range(self.count("map or array", range(0x80, 0x90), {0xDE: 2, 0xDF: 4})):
      yield from self.node((*path, self.text()))

  def array(self, path: tuple[str, ...]) -> tuple[np.dtype, tuple[int, ...], int]:
    wide = {0xC7: 1, 0xC8: 2, 0xC9: 4}.get(self.number(1))
    length = self.number(wide) if wide else 0
    end = self.at + 1 + length
    if not wide or self.number(1) != NDARRAY_TYPE or self.number(1) != 0x93:
      raise MalformedError(f"{'.'.join(path)}: an extension that is no array")
    axes = self.count("shape", range(0x90, 0xA0), {})
    shape = tuple(self.count("size", range(0x80), {0xCC: 1, 0xCD: 2, 0xCE: 4}) for _ in range(axes))
    name = self.text()
    size = self.count("bytes", range(0), {0xC4: 1, 0xC5: 2, 0xC6: 4})
    if (
      name not in DTYPES
      or size != math.prod(shape) * DTYPES[name].itemsize
      or self.at + size != end
    ):
      raise MalformedError(f"{'.'.join(path)}: {size} bytes for {name} of shape {shape}")
    start, self.at = self.at, self.at + size
    if self.at > len(self.data):
      raise MalformedError("it ends too early")
    return DTYPES[name], shape, start
