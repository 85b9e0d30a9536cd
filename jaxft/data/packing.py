"""Examples laid out in rows of one length. One class a layout; row i is a function of i, so a loader can seek.

T columns a row. A row is {"ids", "targets": (T,) int32, "mask": (T,) bool, true where the target counts}, and where several
examples share it also {"segments": (T,) int32, 0 for padding, "positions": (T,) int32}.
"""

from typing import NamedTuple

import numpy as np

from jaxft.data.tokenize import TokenArrays

PackedRow = dict[str, np.ndarray]


class PackingStats(NamedTuple):
  """What became of the examples when they were laid out."""

  filled: int  # that hold a token
  eos_targets: int  # end tokens among the targets
  overlong: int = 0  # examples that do not fit a row whole
  empty: int = 0  # examples with nothing left to learn, and so left out
  dropped: dict[str, int] = {}  # tokens, by reason


class ConcatDataset:
  """All examples as one stream, cut every T tokens: each token is a target exactly once.

  The first token of all is predicted from an end token, as the first of every later example is. The last row is filled up
  with masked columns instead of being dropped; what is dropped are rows of nothing but prompt.
  """

  def __init__(self, tokens: TokenArrays, T: int, end: int):
    self.tokens, self.seq_len, self._end = tokens, T, end
    rows = np.arange(-(-len(tokens.ids) // T))
    self._rows = rows[self._teaches(len(rows))] if np.any(tokens.prompts_N) else rows
    lost = sum(min(T, len(tokens.ids) - int(i) * T) for i in np.setdiff1d(rows, self._rows))
    self.stats = PackingStats(
      filled=len(tokens.ids) - lost,
      eos_targets=len(tokens) if not len(tokens.labels_N) else 0,
      dropped={"rows of nothing but prompt": lost} if lost else {},
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> PackedRow:
    start = int(self._rows[i]) * self.seq_len
    stop = min(start + self.seq_len, len(self.tokens.ids))
    before = self.tokens.ids[start - 1] if start else self._end
    row, mask = np.zeros(self.seq_len + 1, np.int32), np.zeros(self.seq_len, bool)
    row[0], row[1 : 1 + stop - start] = before, self.tokens.ids[start:stop]
    mask[: stop - start] = self.learned(start, stop)
    return {"ids": row[:-1], "targets": row[1:], "mask": mask}

  def _teaches(self, rows: int) -> np.ndarray:
    """Which rows have a token that is no prompt."""
    starts, stops = self.tokens.starts_N1[:-1] + self.tokens.prompts_N, self.tokens.starts_N1[1:]
    change = np.zeros(rows + 1, np.int64)
    learned = starts < stops
    np.add.at(change, starts[learned] // self.seq_len, 1)
    np.add.at(change, (stops[learned] - 1) // self.seq_len + 1, -1)
    return np.cumsum(change[:-1]) > 0

  def learned(self, start: int, stop: int) -> np.ndarray | bool:
    """Which of the tokens start ... stop - 1 are no prompt."""
    starts = self.tokens.starts_N1
    first, last = np.searchsorted(starts, (start, stop - 1), side="right") - 1
    if not self.tokens.prompts_N[first : last + 1].any():
      return True
    at = np.arange(start, stop)
    example = np.searchsorted(starts, at, side="right") - 1
    return at - starts[example] >= self.tokens.prompts_N[example]


class SlidingWindowDataset:
  """The stream of `ConcatDataset` in windows of T tokens that overlap, to evaluate with more context; an end token begins it.

  Windows begin `stride` tokens apart. Each token is a target once, in the first window that has it, so all but those of the
  first window see at least T - stride tokens before them. These are the windows of transformers' page on perplexity.
  """

  def __init__(self, tokens: TokenArrays, T: int, end: int, stride: int):
    self._rows, self.seq_len, self._end, self._stride = (
      ConcatDataset(tokens, T, end),
      T,
      end,
      stride,
    )

  def __len__(self) -> int:
    return 1 - (-max(0, len(self._rows.tokens.ids) + 1 - self.seq_len) // self._stride)

  def __getitem__(self, i: int) -> PackedRow:
    stored, begin = (
      self._rows.tokens.ids,
      i * self._stride,
    )  # the window's first token is stored[begin - 1]
    stop = min(begin + self.seq_len - 1, len(stored))
    first = (
      begin - self._stride + self.seq_len - 1 if i else 0
    )  # of its targets; those before it were the last window's
    row, mask = np.zeros(self.seq_len + 1, np.int32), np.zeros(self.seq_len, bool)
    row[0], row[1 : 1 + stop - begin] = stored[begin - 1] if i else self._end, stored[begin:stop]
    mask[first - begin : stop - begin] = self._rows.learned(first, stop)
    return {"ids": row[:-1], "targets": row[1:], "mask": mask}


class Span(NamedTuple):
  """Tokens start ... stop - 1 of the store, which are targets of one segment, and the example they are of."""

  example: int
  start: int
  stop: int


class PackedDataset:
  """Examples that do not see each other: one a row ("pad"), or several with segments and positions of their own ("pack").

  A text that is longer than a row is cut in pieces for "pack" and cut short for "pad"; a prompt with its completion is cut
  short for both. The first token of a text is predicted from an end token, or from the one that begins each document where
  there is one; the first of a prompt is not learned.
  """

  def __init__(self, tokens: TokenArrays, T: int, end: int, *, pack: bool, texts: bool = False):
    """`texts`: examples have no prompt; one token that is not learned is what begins the document."""
    self.tokens, self.seq_len, self._end, self._pack = tokens, T, end, pack
    starts, prompts = np.asarray(tokens.starts_N1), np.asarray(tokens.prompts_N)
    # A prompt's first token is an input only, so such an example may have a token more.
    room_N = T + (prompts > 0)
    lengths_N = np.diff(starts)
    long_N = lengths_N > room_N
    in_pieces = long_N & (prompts <= int(texts)) & pack
    dropped = int((lengths_N - room_N)[long_N & ~in_pieces].sum())
    pieces = []
    for i in range(len(lengths_N)):
      if not in_pieces[i]:
        pieces.append(Span(i, int(starts[i]), int(starts[i] + min(lengths_N[i], room_N[i]))))
        continue
      for start in range(int(starts[i]), int(starts[i + 1]), T):
        pieces.append(Span(i, start, min(start + T, int(starts[i + 1]))))
    # A prompt that leaves no room for its completion teaches nothing.
    learned = [
      piece for piece in pieces if prompts[piece.example] < piece.stop - starts[piece.example]
    ]
    dropped += sum(piece.stop - piece.start for piece in pieces) - sum(
      p.stop - p.start for p in learned
    )
    # Where a piece begins with a token that is not learned, that one is an input only.
    inputs_only = [
      piece.start < starts[piece.example] + prompts[piece.example] for piece in learned
    ]
    columns = [
      piece.stop - piece.start - int(more) for piece, more in zip(learned, inputs_only, strict=True)
    ]
    self.stats = PackingStats(
      filled=sum(columns),
      eos_targets=sum(piece.stop == int(starts[piece.example + 1]) for piece in learned),
      overlong=int(long_N.sum()),
      empty=len(pieces) - len(learned),
      dropped={"cut to the length of a row": dropped} if dropped else {},
    )
    order = best_fit(columns, T) if pack else [[i] for i in range(len(learned))]
    self._rows = [[learned[i] for i in row] for row in order]

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, i: int) -> PackedRow:
    ids, targets, segments, positions = np.zeros((4, self.seq_len), np.int32)
    mask, at = np.zeros(self.seq_len, bool), 0
    for segment, piece in enumerate(self._rows[i], 1):
      start, prompt = (
        int(self.tokens.starts_N1[piece.example]),
        int(self.tokens.prompts_N[piece.example]),
      )
      values = self.tokens.ids[piece.start : piece.stop].astype(np.int32)
      if piece.start >= start + prompt:
        before = self._end if piece.start == start else self.tokens.ids[piece.start - 1]
        values = np.concatenate([[np.int32(before)], values])
      n = len(values) - 1
      here = slice(at, at + n)
      ids[here], targets[here], segments[here], positions[here] = (
        values[:-1],
        values[1:],
        segment,
        np.arange(n),
      )
      mask[here] = piece.stop - n + np.arange(n) - start >= prompt
      at += n
    row = {"ids": ids, "targets": targets, "mask": mask}
    return row | {"segments": segments, "positions": positions} if self._pack else row


class ClassificationDataset:
  """One text a row, cut short where it is longer; the target is its class, at its last token."""

  def __init__(self, tokens: TokenArrays, T: int):
    self.tokens, self.seq_len = tokens, T
    over = np.maximum(tokens.lengths_N - T, 0)
    lost = int(over.sum())
    self.stats = PackingStats(
      filled=len(tokens.ids) - lost,
      eos_targets=0,
      overlong=int((over > 0).sum()),
      dropped={"cut to the length of a row": lost} if lost else {},
    )

  def __len__(self) -> int:
    return len(self.tokens)

  def __getitem__(self, i: int) -> PackedRow:
    ids, targets = np.zeros((2, self.seq_len), np.int32)
    values = self.tokens.ids[self.tokens.starts_N1[i] : self.tokens.starts_N1[i + 1]][
      : self.seq_len
    ]
    ids[: len(values)], targets[len(values) - 1] = values, self.tokens.labels_N[i]
    return {"ids": ids, "targets": targets, "mask": np.arange(self.seq_len) == len(values) - 1}


def best_fit(lengths: list[int], T: int) -> list[list[int]]:
  """Which lengths share a row of T: each goes into the fullest row that has room for it, else into a new one.

  Rows keep the order in which they were begun. A whole number holds, bit by bit, how much room there is in some row, so
  that finding the fullest is one step however many rows there are.
  """
  rows: list[list[int]] = []
  with_room: list[list[int]] = [[] for _ in range(T + 1)]
  some = 0  # bit r: a row with room for exactly r more
  for i, length in enumerate(lengths):
    fits = some >> length
    if fits:
      room = length + (fits & -fits).bit_length() - 1
      row = with_room[room].pop()
      if not with_room[room]:
        some &= ~(1 << room)
    else:
      room, row = T, len(rows)
      rows.append([])
    rows[row].append(i)
    with_room[room - length].append(row)
    some |= 1 << (room - length)
  return rows
