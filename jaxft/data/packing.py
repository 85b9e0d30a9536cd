"""Examples laid out in rows of one length, one class per layout. Row i is a function of i alone.

T columns a row. A row is {"ids", "targets": (T,) int32, "mask": (T,) bool, true where the target
counts}; where several examples share it also {"segments": (T,) int32, 0 for padding, "positions":
(T,) int32}.
"""

from typing import NamedTuple, TypeAlias

import numpy as np

from jaxft.data.tokenize import TokenArrays

PackedRow: TypeAlias = dict[str, np.ndarray]


class PackingStats(NamedTuple):
  """What became of the examples when they were laid out."""

  filled: int  # columns that hold a token
  eos_targets: int  # end tokens among the targets
  overlong: int = 0  # examples that do not fit into one row
  empty: int = 0  # examples without a token to learn, which are left out
  dropped: dict[str, int] = {}  # tokens, by reason


class ConcatDataset:
  """All examples as one stream, cut every T tokens: each token is a target exactly once.

  The first token of all is predicted from an end token, as the first of every later example is. The
  last row is filled up with masked columns instead of being dropped; only rows that hold nothing
  but prompt are dropped.
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
      dropped={"rows of nothing but prompt": dropped} if dropped else {},
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> PackedRow:
    start = int(self._rows[i]) * self.seq_len
    return self.row(start, min(start + self.seq_len, len(self.tokens.ids)), first=start)

  def row(self, start: int, stop: int, first: int) -> PackedRow:
    """Return the row whose targets are tokens start ... stop - 1, those from `first` on learned."""
    window = np.zeros(self.seq_len + 1, np.int32)
    window[0] = self.tokens.ids[start - 1] if start else self._eos_id
    window[1 : 1 + stop - start] = self.tokens.ids[start:stop]
    mask = np.zeros(self.seq_len, bool)
    mask[first - start : stop - start] = self._loss_mask(first, stop)
    return {"ids": window[:-1], "targets": window[1:], "mask": mask}

  def _has_targets(self, num_rows: int) -> np.ndarray:
    """Return which rows have a token that is not part of a prompt."""
    starts = self.tokens.starts_N1[:-1] + self.tokens.prompts_N
    stops = self.tokens.starts_N1[1:]
    learned = starts < stops
    # Each completion adds 1 to the rows that it touches: +1 at its first row, -1 after its last,
    # and a running sum. One pass over the examples, however many rows they touch.
    delta = np.zeros(num_rows + 1, np.int64)
    np.add.at(delta, starts[learned] // self.seq_len, 1)
    np.add.at(delta, (stops[learned] - 1) // self.seq_len + 1, -1)
    return np.cumsum(delta[:-1]) > 0

  def _loss_mask(self, start: int, stop: int) -> np.ndarray | bool:
    """Return which of the tokens start ... stop - 1 are not part of a prompt."""
    starts = self.tokens.starts_N1
    first, last = np.searchsorted(starts, (start, stop - 1), side="right") - 1
    if not self.tokens.prompts_N[first : last + 1].any():
      return True
    at = np.arange(start, stop)
    example = np.searchsorted(starts, at, side="right") - 1
    return at - starts[example] >= self.tokens.prompts_N[example]


class SlidingWindowDataset:
  """The stream of `ConcatDataset` in windows of T tokens that overlap, to evaluate with context.

  An end token begins the stream. Windows begin `stride` tokens apart. Each token is a target once,
  in the first window that has it, so all but those of the first window see at least T - stride
  tokens before them. These are the windows of transformers' page on perplexity.
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
    # Targets before the first were targets of the window before.
    first = start - self._stride + self.seq_len - 1 if i else 0
    return self._stream.row(start, stop, first)


class Span(NamedTuple):
  """Tokens start ... stop - 1 of all, the targets of one segment, and the example they are of."""

  example: int
  start: int
  stop: int

  @property
  def length(self) -> int:
    return self.stop - self.start


class PackedDataset:
  """Examples that do not see each other: one per row ("pad"), or several as segments ("pack").

  A text that is longer than a row is split into spans for "pack" and truncated for "pad"; a prompt
  with its completion is truncated for both. The first token of a text is predicted from an end
  token, or from the bos token of its document if there is one; that of a prompt is not learned.
  """

  def __init__(self, tokens: TokenArrays, T: int, eos_id: int, *, pack: bool, texts: bool = False):
    """`texts`: examples have no prompt, but may begin with one bos token that is not learned."""
    self.tokens = tokens
    self.seq_len = T
    self._eos_id = eos_id
    self._pack = pack
    starts = np.asarray(tokens.starts_N1)
    prompts = np.asarray(tokens.prompts_N)
    # The first token of a prompt is an input only, so such an example may have one token more.
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
    # A first token that is not learned is an input only, and takes no column of its own.
    columns = [
      span.length - int(span.start < starts[span.example] + prompts[span.example]) for span in used
    ]
    self.stats = PackingStats(
      filled=sum(columns),
      eos_targets=sum(span.stop == int(starts[span.example + 1]) for span in used),
      overlong=int(overlong_N.sum()),
      empty=len(spans) - len(used),
      dropped={"cut to the length of a row": dropped} if dropped else {},
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
      # A learned first token needs an input to be predicted from: the token before it in its text,
      # never the last of the example before, which this segment must not see.
      if span.start >= start + prompt:
        before = self._eos_id if span.start == start else self.tokens.ids[span.start - 1]
        values = np.concatenate([[np.int32(before)], values])
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
  """One text per row, truncated to T tokens; the target is its class, at its last token."""

  def __init__(self, tokens: TokenArrays, T: int):
    self.tokens = tokens
    self.seq_len = T
    excess_N = np.maximum(tokens.lengths_N - T, 0)
    dropped = int(excess_N.sum())
    self.stats = PackingStats(
      filled=len(tokens.ids) - dropped,
      eos_targets=0,
      overlong=int((excess_N > 0).sum()),
      dropped={"cut to the length of a row": dropped} if dropped else {},
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
  """Return which lengths share a row of T: each goes into the fullest that fits, or a new one.

  Rows stay in the order in which they were begun. An integer's bits say how much room there is in
  some row, so that finding the fullest row is one step however many rows there are.
  """
  rows: list[list[int]] = []
  rows_with_room: list[list[int]] = [[] for _ in range(T + 1)]
  room_bits = 0  # bit r: a row with room for exactly r more
  for i, length in enumerate(lengths):
    fits = room_bits >> length
    if fits:
      room = length + (fits & -fits).bit_length() - 1  # the lowest bit is the fullest row
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
