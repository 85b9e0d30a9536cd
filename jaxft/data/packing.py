"""Lay out examples in rows of T tokens, one class per layout.

Row i is a function of i alone.

A row is {"ids", "targets": (T,) int32, "mask": (T,) bool, true if the target counts in the loss}.
If several examples share a row, it also has {"segments": (T,) int32, 0 for padding, "positions":
(T,) int32}.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from jaxft.data.tokenize import TokenArrays

PackedRow: TypeAlias = dict[str, np.ndarray]


class PackingStats(NamedTuple):
  """Counts of the examples and tokens in a layout."""

  filled: int  # columns that hold a token
  eos_targets: int  # end tokens among the targets
  overlong: int = 0  # examples that do not fit into one row
  empty: int = 0  # examples without a token to learn; they are dropped
  dropped: dict[str, int] = {}  # tokens, by reason


class ConcatDataset:
  """All examples as one stream, cut every T tokens.

  Each token is a target exactly once.

  The first token of the stream is predicted from an end token, like the first token of every later
  example. The last row is padded with masked columns, not dropped. Rows that hold only prompts are
  dropped.
  """

  def __init__(self, tokens: TokenArrays, T: int, eos_id: int):
    self.tokens = tokens
    self.seq_len = T
    self._eos_id = eos_id
    rows = np.arange(-(-len(tokens.ids) // T))
    self._rows = rows[self._has_targets(len(rows))] if np.any(tokens.prompts_N) else rows
    dropped = sum(min(T, len(tokens.ids) - int(i) * T) for i in np.setdiff1d(rows, self._rows))
    self.stats = PackingStats(
      filled=len(tokens.ids) - dropped,
      eos_targets=len(tokens) if not len(tokens.labels_N) else 0,
      dropped={"sequences with only prompt tokens": dropped} if dropped else {},
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> PackedRow:
    start = int(self._rows[i]) * self.seq_len
    return self.row(start, min(start + self.seq_len, len(self.tokens.ids)), first=start)

  def row(self, start: int, stop: int, first: int) -> PackedRow:
    """Return the row whose targets are tokens start ... stop - 1.

    Targets before `first` are masked.
    """
    window = np.zeros(self.seq_len + 1, np.int32)
    window[0] = self.tokens.ids[start - 1] if start else self._eos_id
    window[1 : 1 + stop - start] = self.tokens.ids[start:stop]
    mask = np.zeros(self.seq_len, bool)
    mask[first - start : stop - start] = self._loss_mask(first, stop)
    return {"ids": window[:-1], "targets": window[1:], "mask": mask}

  def _has_targets(self, num_rows: int) -> np.ndarray:
    """Return a mask of the rows that have a token outside prompts."""
    starts = self.tokens.starts_N1[:-1] + self.tokens.prompts_N
    stops = self.tokens.starts_N1[1:]
    learned = starts < stops
    # Each completion adds 1 to the rows that it touches: +1 at its first row, -1 after its last,
    # and a running sum. This takes one pass over the examples, even if each touches many rows.
    delta = np.zeros(num_rows + 1, np.int64)
    np.add.at(delta, starts[learned] // self.seq_len, 1)
    np.add.at(delta, (stops[learned] - 1) // self.seq_len + 1, -1)
    return np.cumsum(delta[:-1]) > 0

  def _loss_mask(self, start: int, stop: int) -> np.ndarray | bool:
    """Return a mask of the tokens start ... stop - 1 that are outside prompts."""
    starts = self.tokens.starts_N1
    first, last = np.searchsorted(starts, (start, stop - 1), side="right") - 1
    if not self.tokens.prompts_N[first : last + 1].any():
      return True
    at = np.arange(start, stop)
    example = np.searchsorted(starts, at, side="right") - 1
    return at - starts[example] >= self.tokens.prompts_N[example]


class SlidingWindowDataset:
  """The stream of `ConcatDataset` in overlapping windows of T tokens.

  Used to evaluate with context.

  An end token begins the stream. Windows begin `stride` tokens apart. Each token is a target once,
  in the first window that has it. So every target after the first window has at least T - stride
  tokens of context. These are the windows of transformers' page on perplexity.
  """

  def __init__(self, tokens: TokenArrays, T: int, eos_id: int, stride: int):
    self._stream = ConcatDataset(tokens, T, eos_id)
    self.seq_len = T
    self._stride = stride

  def __len__(self) -> int:
    return 1 - (-max(0, len(self._stream.tokens.ids) + 1 - self.seq_len) // self._stride)

  def __getitem__(self, i: int) -> PackedRow:
    start = i * self._stride  # the window begins with the token before it
    stop = min(start + self.seq_len - 1, len(self._stream.tokens.ids))
    # Earlier targets counted in the previous window.
    first = start - self._stride + self.seq_len - 1 if i else 0
    return self._stream.row(start, stop, first)


class Span(NamedTuple):
  """Tokens start ... stop - 1 of one example: the targets of one segment."""

  example: int
  start: int
  stop: int

  @property
  def length(self) -> int:
    """Return the number of tokens."""
    return self.stop - self.start


class PackedDataset:
  """Examples in rows, with attention only inside each example.

  A row holds one example ("pad"), or several as segments ("pack").

  A text longer than a row is split into spans for "pack" and truncated for "pad". A prompt with its
  completion is truncated for both. The first token of a text is predicted from the bos token of its
  document if it has one, else from an end token. The first token of a prompt is not learned.
  """

  def __init__(self, tokens: TokenArrays, T: int, eos_id: int, *, pack: bool, texts: bool = False):
    """Lay out the examples.

    Args:
      tokens: the examples.
      T: tokens per row.
      eos_id: the end token, the input before the first token of an example.
      pack: whether several examples may share a row.
      texts: whether examples are plain text: no prompt, except one bos token that is not learned.
    """
    self.tokens = tokens
    self.seq_len = T
    self._eos_id = eos_id
    self._pack = pack
    starts = np.asarray(tokens.starts_N1)
    prompts = np.asarray(tokens.prompts_N)
    # The first token of a prompt is an input only, so such an example may have one more token.
    capacity_N = T + (prompts > 0)
    lengths_N = np.diff(starts)
    overlong_N = lengths_N > capacity_N
    # Only texts are split: a later span of a completion would not have its prompt.
    split_N = overlong_N & (prompts <= int(texts)) & pack
    dropped = int((lengths_N - capacity_N)[overlong_N & ~split_N].sum())
    spans = []
    for i in range(len(lengths_N)):
      if not split_N[i]:
        spans.append(Span(i, int(starts[i]), int(starts[i] + min(lengths_N[i], capacity_N[i]))))
        continue
      for start in range(int(starts[i]), int(starts[i + 1]), T):
        spans.append(Span(i, start, min(start + T, int(starts[i + 1]))))
    # A prompt that leaves no room for its completion has no targets.
    used = [span for span in spans if prompts[span.example] < span.stop - starts[span.example]]
    dropped += sum(span.length for span in spans) - sum(span.length for span in used)
    # A first token that is not learned is an input only, so its span needs one column fewer than it
    # has tokens.
    columns = [
      span.length - int(span.start < starts[span.example] + prompts[span.example]) for span in used
    ]
    self.stats = PackingStats(
      filled=sum(columns),
      eos_targets=sum(span.stop == int(starts[span.example + 1]) for span in used),
      overlong=int(overlong_N.sum()),
      empty=len(spans) - len(used),
      dropped={"truncated to the sequence length": dropped} if dropped else {},
    )
    order = best_fit(columns, T) if pack else [[i] for i in range(len(used))]
    self._rows = [[used[i] for i in row] for row in order]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> PackedRow:
    ids, targets, segments, positions = np.zeros((4, self.seq_len), np.int32)
    mask = np.zeros(self.seq_len, bool)
    end = 0
    for segment, span in enumerate(self._rows[i], 1):
      start = int(self.tokens.starts_N1[span.example])
      prompt = int(self.tokens.prompts_N[span.example])
      values = self.tokens.ids[span.start : span.stop].astype(np.int32)
      # A learned first token needs an input to be predicted from: the token before it in its text.
      # Never the last token of the previous example, which this segment must not see.
      if span.start >= start + prompt:
        before = self._eos_id if span.start == start else self.tokens.ids[span.start - 1]
        values = np.concatenate([[np.int32(before)], values])
      # Targets are the inputs shifted by one, so n + 1 tokens fill n columns.
      n = len(values) - 1
      at = slice(end, end + n)
      ids[at] = values[:-1]
      targets[at] = values[1:]
      segments[at] = segment
      positions[at] = np.arange(n)
      mask[at] = span.stop - n + np.arange(n) - start >= prompt
      end += n
    row = {"ids": ids, "targets": targets, "mask": mask}
    return row | {"segments": segments, "positions": positions} if self._pack else row


class ClassificationDataset:
  """One text per row, truncated to T tokens.

  The target is its class, at its last token.
  """

  def __init__(self, tokens: TokenArrays, T: int):
    self.tokens = tokens
    self.seq_len = T
    excess_N = np.maximum(tokens.lengths_N - T, 0)
    dropped = int(excess_N.sum())
    self.stats = PackingStats(
      filled=len(tokens.ids) - dropped,
      eos_targets=0,
      overlong=int((excess_N > 0).sum()),
      dropped={"truncated to the sequence length": dropped} if dropped else {},
    )

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, i: int) -> PackedRow:
    ids, targets = np.zeros((2, self.seq_len), np.int32)
    start, stop = self.tokens.starts_N1[i : i + 2]
    values = self.tokens.ids[start:stop][: self.seq_len]
    ids[: len(values)] = values
    targets[len(values) - 1] = self.tokens.labels_N[i]
    return {"ids": ids, "targets": targets, "mask": np.arange(self.seq_len) == len(values) - 1}


LayoutDataset: TypeAlias = ConcatDataset | PackedDataset | ClassificationDataset
TokenDataset: TypeAlias = LayoutDataset | SlidingWindowDataset


def best_fit(lengths: list[int], T: int) -> list[list[int]]:
  """Pack lengths into rows of T by best fit.

  Each goes into the fullest row that has room, else into a new one.

  Bit r of an integer says that some row has room for exactly r more tokens. So the fullest row is
  found in one step for any number of rows.

  Args:
    lengths: columns of each example, at most T.
    T: columns of a row.

  Returns:
    For each row, in the order in which rows were begun, the indices into `lengths`.
  """
  rows: list[list[int]] = []
  rows_with_room: list[list[int]] = [[] for _ in range(T + 1)]
  room_bits = 0
  for i, length in enumerate(lengths):
    fits = room_bits >> length
    if fits:
      room = length + (fits & -fits).bit_length() - 1  # the lowest set bit: the least room
      row = rows_with_room[room].pop()
      if not rows_with_room[room]:
        room_bits &= ~(1 << room)
    else:
      room = T
      row = len(rows)
      rows.append([])
    rows[row].append(i)
    rows_with_room[room - length].append(row)
    room_bits |= 1 << (room - length)
  return rows
