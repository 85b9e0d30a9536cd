"""A stream of tokens cut into rows of one length.

T tokens a row
"""

import numpy as np


class ConcatRows:
  """Row i predicts stream[i * T + 1 ... (i + 1) * T] from the tokens before them, within the row.

  Every token of the stream but its first is a target exactly once: rows overlap by the one token that is the last target
  of a row and the first input of the next, and the last row is filled up with masked columns instead of being dropped.
  """

  def __init__(self, stream: np.ndarray, T: int):
    self.stream, self.T = stream, T

  def __len__(self) -> int:
    return -(-(len(self.stream) - 1) // self.T)

  def __getitem__(self, i: int) -> dict[str, np.ndarray]:
    """{"ids", "targets": (T,) int32, "mask": (T,) bool, true where the target counts}"""
    window = self.stream[i * self.T : (i + 1) * self.T + 1]
    row = np.zeros(self.T + 1, np.int32)
    row[: len(window)] = window
    return {"ids": row[:-1], "targets": row[1:], "mask": np.arange(self.T) < len(window) - 1}
