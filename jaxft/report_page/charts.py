"""Line charts as inline SVG that any width can stretch: labels are HTML beside it, so that their size does not change."""

import bisect
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxft.report_page.markup import Html, element
from jaxft.report_page.style import LIGHT_COLOURS

NUM_COLUMNS = 500  # of a thinned line, two points in each: more than most screens show
NUM_WINDOWS = 120  # of a noisy line's mean
BOX_SIZE = 1000  # of the box that lines are drawn in, as the script expects it

Points = Sequence[tuple[float, float]]  # (step, value), in the order of steps; all finite


class Series(NamedTuple):
  name: str
  points: Points
  colour: int = 0
  dots: bool = False  # few values, each of its own: dots, joined by a line
  noisy: bool = False  # drawn faint, with its mean over windows of steps on top
  only_mean: bool = False  # only that mean is drawn: for several noisy lines in one chart


def chart(
  title: str,
  unit: str,
  series: list[Series],
  *,
  from_zero: bool = False,
  share: bool = False,
  floor: tuple[str, float] | None = None,
  nonfinite_steps: Sequence[float] = (),
  wide: bool = False,
) -> Html | None:
  """A figure of some lines over the steps; None where all values are of one step: that is no line.

  The values' axis is logarithmic where the largest is more than ten times the least, unless it is `from_zero` or a `share`.

  Args:
    from_zero: the axis begins at 0.
    share: the axis goes from 0 to 1.
    floor: name and value of a dashed line across.
    nonfinite_steps: steps that are marked at the bottom.
  """
  series = [
    it._replace(points=window_means(it.points)) if it.only_mean and _is_dense(it.points) else it
    for it in series
    if it.points
  ]
  if any(len(it.points) > 1 for it in series):
    series = [it for it in series if len(it.points) > 1 or it.dots]
  steps = [x for it in series for x, _ in it.points]
  if len(set(steps)) < 2:
    return None
  values = [y for it in series for _, y in it.points] + ([floor[1]] if floor else [])
  log = not (from_zero or share) and min(values) > 0 and max(values) > 10 * min(values)
  scale = math.log10 if log else float
  x0, x1 = min([*steps, *nonfinite_steps]), max([*steps, *nonfinite_steps])
  y0, y1 = (
    (0.0, 1.0) if share else _axis_range([0.0, *values] if from_zero else values, scale, from_zero)
  )
  across = lambda x: BOX_SIZE * (x - x0) / (x1 - x0)
  down = lambda y: BOX_SIZE * (y1 - scale(y)) / (y1 - y0)
  x_ticks, y_ticks = step_ticks(x0, x1), log_ticks(y0, y1) if log else ticks(y0, y1)

  drawn = [_horizontal_line(down(y), "grid") for y in y_ticks] + [
    _horizontal_line(BOX_SIZE, "axis")
  ]
  for it in series:
    drawn += _draw_line(it, across, down)
  if floor:
    drawn.append(_horizontal_line(down(floor[1]), "floor"))
  if nonfinite_steps:
    marks = " ".join(
      f"M{across(x):.1f} {BOX_SIZE} v-60"
      for x, _ in downsample([(x, 0.0) for x in nonfinite_steps])
    )
    drawn.append(element("path", d=marks, class_="fault"))
  svg = element(
    "svg",
    drawn,
    viewBox=f"0 0 {BOX_SIZE} {BOX_SIZE}",
    preserveAspectRatio="none",
    role="img",
    aria_label=f"{title}, {unit}",
  )
  y_labels = map(format_tick, y_ticks) if log else format_ticks(y_ticks)
  beside = [
    element("span", text, class_="y", style=f"top:{down(y) / BOX_SIZE:.2%}")
    for y, text in zip(y_ticks, y_labels)
  ]
  beside += [
    element("span", text, class_="x", style=f"left:{across(x) / BOX_SIZE:.2%}")
    for x, text in zip(x_ticks, format_ticks(x_ticks))
  ]
  beside.append(element("span", f"step {math.floor(x1):,}", class_="x last"))
  if floor:
    beside.append(
      element(
        "span",
        f"{floor[0]} {floor[1]:.4g}",
        class_="at",
        style=f"top:{down(floor[1]) / BOX_SIZE:.2%}",
      )
    )
  keys = [_legend_entry(it) for it in series] if len(series) > 1 else []
  if nonfinite_steps:
    keys.append(
      _legend_mark(element("path", d="M13 10 v-10", class_="fault"), "not finite, not applied")
    )
  return element(
    "figure",
    element(
      "figcaption",
      element("b", title),
      element("span", unit + (", logarithmic" if log else "")),
      element("div", keys, class_="keys") if keys else None,
    ),
    element(
      "div",
      svg,
      beside,
      class_="plot",
      data_x=f"{x0} {x1}",
      data_y=f"{y0} {y1}",
      data_log="1" if log else None,
    ),
    class_="wide" if wide else None,
  )


def _axis_range(
  values: list[float], scale: Callable[[float], float], from_zero: bool
) -> tuple[float, float]:
  """The ends of the values' axis: with some air, or from zero to the round number above all."""
  low, high = min(map(scale, values)), max(map(scale, values))
  if from_zero and low == 0:
    high = high or 1.0
    return 0.0, _tick_spacing(0.0, high) * math.ceil(high / _tick_spacing(0.0, high) - 1e-9)
  air = 0.05 * (high - low) or 0.1 * abs(high) or 1.0
  return low - air, high + air


def _draw_line(
  it: Series, across: Callable[[float], float], down: Callable[[float], float]
) -> list[Html]:
  """The line, and what is on it; the one that the script reads out has the name."""
  colour = f"s{it.colour % len(LIGHT_COLOURS)}"
  at = lambda points: [f"{across(x):.1f},{down(y):.1f}" for x, y in points]
  poly = lambda points, how, name=None: element(
    "polyline", points=" ".join(at(points)), class_=how, data_name=name
  )
  if it.noisy and _is_dense(it.points):
    return [
      poly(downsample(it.points), f"faint {colour}"),
      poly(window_means(it.points), f"line {colour}", it.name),
    ]
  drawn = [poly(downsample(it.points), f"line {colour}", it.name)]
  if it.dots or len(it.points) == 1:
    places = " ".join("M" + pair.replace(",", " ") + " h0" for pair in at(downsample(it.points)))
    drawn.append(element("path", d=places, class_=f"dots {colour}"))
  return drawn


def _is_dense(points: Points) -> bool:
  """Whether a mean of it tells more than the line."""
  return len(points) > 2 * NUM_WINDOWS


def _horizontal_line(y: float, how: str) -> Html:
  return element("line", x1=0, x2=BOX_SIZE, y1=f"{y:.1f}", y2=f"{y:.1f}", class_=how)


def _legend_entry(it: Series) -> Html:
  colour = f"s{it.colour % len(LIGHT_COLOURS)}"
  mark = [element("path", d="M0 5 h26", class_=f"line {colour}")]
  if it.dots:
    mark.append(element("path", d="M13 5 h0", class_=f"dots {colour}"))
  return _legend_mark(mark, it.name)


def _legend_mark(mark, name: str) -> Html:
  return element(
    "span",
    element("svg", mark, viewBox="0 0 26 10", aria_hidden="true"),
    element("span", name),
    class_="key",
  )


def downsample(points: Points) -> list[tuple[float, float]]:
  """The least and the greatest of each of COLUMNS spans of steps, the first and the last: no spike is lost."""
  if len(points) <= 2 * NUM_COLUMNS:
    return list(points)
  kept = {0, len(points) - 1}
  for column in _bins(points, NUM_COLUMNS):
    kept |= {min(column, key=lambda i: points[i][1]), max(column, key=lambda i: points[i][1])}
  return [points[i] for i in sorted(kept)]


def window_means(points: Points) -> list[tuple[float, float]]:
  """The mean step and the mean value of each of WINDOWS spans of steps."""
  mean = lambda numbers: sum(numbers) / len(numbers)
  return [
    (mean([points[i][0] for i in span]), mean([points[i][1] for i in span]))
    for span in _bins(points, NUM_WINDOWS)
  ]


def _bins(points: Points, count: int) -> list[range]:
  """The indices of the points in each of `count` equal spans of steps, without the empty ones."""
  first, last = points[0][0], points[-1][0]
  starts = [
    bisect.bisect_left(points, first + (last - first) * i / count, key=lambda it: it[0])
    for i in range(count)
  ]
  return [
    range(start, end) for start, end in itertools.pairwise([*starts, len(points)]) if end > start
  ]


def ticks(low: float, high: float) -> list[float]:
  """Round numbers from `low` to `high`."""
  return _tick_multiples(_tick_spacing(low, high), low, high)


def step_ticks(low: float, high: float) -> list[float]:
  """Round whole numbers from `low` on, and none where the label of the last step is: in the last quarter."""
  return _tick_multiples(max(1.0, _tick_spacing(low, high)), low, high - 0.25 * (high - low))


def _tick_multiples(apart: float, low: float, high: float) -> list[float]:
  return [
    i * apart for i in range(math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9) + 1)
  ]


def _tick_spacing(low: float, high: float) -> float:
  """1, 2 or 5 times a power of ten: how far apart up to seven ticks are."""
  least = (high - low) / 6
  unit = 10.0 ** math.floor(math.log10(least))
  return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= least * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
  """Powers of ten between 10^low and 10^high; 1, 2 and 5 times these where they are few."""
  exponents = range(math.floor(low), math.ceil(high) + 1)
  every = max(1, len(exponents) // 6)
  factors = (1, 2, 5) if len(exponents) <= 4 else (1,)
  found = [factor * 10.0**e for e in exponents[::every] for factor in factors]
  return [it for it in found if low <= math.log10(it) <= high]


def format_tick(number: float) -> str:
  """A tick of a logarithmic axis, each in a unit of its own: 0.001, 1,000, 10k, 1M, 1e-7, 1e20."""
  if not 1e-4 <= number < 1e15:
    return _with_exponent(number)
  unit, letter = next((it for it in UNITS if number >= max(it[0], 1e4)), (1.0, ""))
  return f"{number / unit:,.10g}{letter}"


def format_ticks(numbers: list[float]) -> list[str]:
  """The ticks of an axis, all in one unit: 0, 0.0005, 0.001; 0, 2e-5, 4e-5; 0, 5k, 10k."""
  sizes = [abs(it) for it in numbers if it]
  if sizes and (min(sizes) < 1e-4 or max(sizes) >= 1e15):
    return [_with_exponent(it) if it else "0" for it in numbers]
  unit, letter = next((it for it in UNITS if sizes and max(sizes) >= 10 * it[0]), (1.0, ""))
  return [f"{it / unit:,.10g}{letter if it else ''}" for it in numbers]


UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _with_exponent(number: float) -> str:
  mantissa, exponent = f"{number:.2e}".split("e")
  return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
