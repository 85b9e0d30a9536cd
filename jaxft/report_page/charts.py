"""Line charts as inline SVG of any width.

Labels are HTML, because text inside the SVG would be stretched with it.
"""

import bisect
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

from jaxft.report_page.markup import Child, Html, element

NUM_COLUMNS = 500  # columns of a downsampled line, two points each: more than most screens show
NUM_WINDOWS = 120  # windows of the mean of a noisy line
BOX_SIZE = 1000  # width and height of the box of the lines; script.js expects this value
NUM_COLOURS = 6  # line colors in style.css

Points = Sequence[tuple[float, float]]  # (step, value), ordered by step; all finite


class Series(NamedTuple):
  """A line of a chart."""

  name: str
  points: Points
  colour: int = 0
  dots: bool = False  # mark each value with a dot; for lines of few values
  noisy: bool = False  # draw the line faint, and its mean over windows of steps on top
  only_mean: bool = False  # draw only the mean; for several noisy lines in one chart

  @property
  def colour_class(self) -> str:
    """The CSS class of the line's color."""
    return f"s{self.colour % NUM_COLOURS}"

  @property
  def is_dense(self) -> bool:
    """Whether the line has enough points for a mean over windows."""
    return len(self.points) > 2 * NUM_WINDOWS


class Axes(NamedTuple):
  """The ends of the axes; on a logarithmic axis they are exponents of ten."""

  x0: float
  x1: float
  y0: float
  y1: float
  log: bool

  def x(self, step: float) -> float:
    """Return the horizontal position of a step in the box, from the left."""
    return BOX_SIZE * (step - self.x0) / (self.x1 - self.x0)

  def y(self, value: float) -> float:
    """Return the vertical position of a value in the box, from the top."""
    return BOX_SIZE * (self.y1 - (math.log10(value) if self.log else value)) / (self.y1 - self.y0)


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
  """Draw lines over the steps.

  The value axis is logarithmic if all values are positive and the largest is more than ten times
  the smallest, unless `from_zero` or `share` is set.

  Args:
    title: title of the chart.
    unit: unit of the values.
    series: the lines.
    from_zero: the value axis starts at 0.
    share: the value axis is 0 to 1.
    floor: name and value of a dashed horizontal line.
    nonfinite_steps: steps to mark at the bottom.
    wide: the chart takes the full width of the page.

  Returns:
    None if all values belong to one step.
  """
  series = [it._replace(points=_drawn_points(it)) for it in series if it.points]
  if any(len(it.points) > 1 for it in series):
    series = [it for it in series if len(it.points) > 1 or it.dots]
  steps = [x for it in series for x, _ in it.points]
  if len(set(steps)) < 2:
    return None
  values = [y for it in series for _, y in it.points] + ([floor[1]] if floor else [])
  axes = _fit_axes([*steps, *nonfinite_steps], values, from_zero, share)
  y_ticks = log_ticks(axes.y0, axes.y1) if axes.log else ticks(axes.y0, axes.y1)
  shapes = [_horizontal_line(axes.y(y), "grid") for y in y_ticks]
  shapes.append(_horizontal_line(BOX_SIZE, "axis"))
  for it in series:
    shapes += _draw_line(it, axes)
  labels = _axis_labels(axes, y_ticks)
  keys = [_legend_entry(it) for it in series] if len(series) > 1 else []
  if floor:
    y = axes.y(floor[1])
    shapes.append(_horizontal_line(y, "floor"))
    labels.append(_label(f"{floor[0]} {floor[1]:.4g}", "at", "top", y))
  if nonfinite_steps:
    marked = downsample([(x, 0.0) for x in nonfinite_steps])
    marks = " ".join(f"M{axes.x(x):.1f} {BOX_SIZE} v-60" for x, _ in marked)
    shapes.append(element("path", d=marks, class_="fault"))
    key = element("path", d="M13 10 v-10", class_="fault")
    keys.append(_legend_mark(key, "not finite, step skipped"))
  svg = element(
    "svg",
    shapes,
    viewBox=f"0 0 {BOX_SIZE} {BOX_SIZE}",
    preserveAspectRatio="none",
    role="img",
    aria_label=f"{title}, {unit}",
  )
  caption = element(
    "figcaption",
    element("b", title),
    element("span", unit + (", logarithmic" if axes.log else "")),
    element("div", keys, class_="keys") if keys else None,
  )
  plot = element(
    "div",
    svg,
    labels,
    class_="plot",
    data_x=f"{axes.x0} {axes.x1}",
    data_y=f"{axes.y0} {axes.y1}",
    data_log="1" if axes.log else None,
  )
  return element("figure", caption, plot, class_="wide" if wide else None)


def _drawn_points(it: Series) -> Points:
  return window_means(it.points) if it.only_mean and it.is_dense else it.points


def _fit_axes(steps: list[float], values: list[float], from_zero: bool, share: bool) -> Axes:
  """Return axes with a margin around the values, or from zero to a round number."""
  log = not (from_zero or share) and min(values) > 0 and max(values) > 10 * min(values)
  scaled = [math.log10(it) if log else it for it in values]
  y0, y1 = min(scaled), max(scaled)
  if share:
    y0, y1 = 0.0, 1.0
  elif from_zero and y0 >= 0:
    spacing = _tick_spacing(0.0, y1 or 1.0)
    y0, y1 = 0.0, spacing * math.ceil((y1 or 1.0) / spacing - 1e-9)
  else:
    y1 = max(y1, 0.0) if from_zero else y1
    margin = 0.05 * (y1 - y0) or 0.1 * abs(y1) or 1.0
    y0, y1 = y0 - margin, y1 + margin
  return Axes(x0=min(steps), x1=max(steps), y0=y0, y1=y1, log=log)


def _axis_labels(axes: Axes, y_ticks: list[float]) -> list[Html]:
  y_texts = map(format_tick, y_ticks) if axes.log else format_ticks(y_ticks)
  labels = [_label(text, "y", "top", axes.y(y)) for y, text in zip(y_ticks, y_texts)]
  x_ticks = step_ticks(axes.x0, axes.x1)
  x_texts = format_ticks(x_ticks)
  labels += [_label(text, "x", "left", axes.x(x)) for x, text in zip(x_ticks, x_texts)]
  return [*labels, element("span", f"step {math.floor(axes.x1):,}", class_="x last")]


def _label(text: str, class_: str, side: str, position: float) -> Html:
  return element("span", text, class_=class_, style=f"{side}:{position / BOX_SIZE:.2%}")


def _draw_line(it: Series, axes: Axes) -> list[Html]:
  """Draw the line, its mean and dots; script.js reads the element with a name."""
  sampled = downsample(it.points)

  def polyline(points: Points, class_: str, name: str | None = None) -> Html:
    pairs = " ".join(f"{axes.x(x):.1f},{axes.y(y):.1f}" for x, y in points)
    return element("polyline", points=pairs, class_=f"{class_} {it.colour_class}", data_name=name)

  if it.noisy and it.is_dense:
    return [polyline(sampled, "faint"), polyline(window_means(it.points), "line", it.name)]
  shapes = [polyline(sampled, "line", it.name)]
  if it.dots or len(it.points) == 1:
    dots = " ".join(f"M{axes.x(x):.1f} {axes.y(y):.1f} h0" for x, y in sampled)
    shapes.append(element("path", d=dots, class_=f"dots {it.colour_class}"))
  return shapes


def _horizontal_line(y: float, class_: str) -> Html:
  return element("line", x1=0, x2=BOX_SIZE, y1=f"{y:.1f}", y2=f"{y:.1f}", class_=class_)


def _legend_entry(it: Series) -> Html:
  mark = [element("path", d="M0 5 h26", class_=f"line {it.colour_class}")]
  if it.dots:
    mark.append(element("path", d="M13 5 h0", class_=f"dots {it.colour_class}"))
  return _legend_mark(mark, it.name)


def _legend_mark(mark: Child, name: str) -> Html:
  svg = element("svg", mark, viewBox="0 0 26 10", aria_hidden="true")
  return element("span", svg, element("span", name), class_="key")


def downsample(points: Points) -> list[tuple[float, float]]:
  """Return the first and last point, and extremes of NUM_COLUMNS spans of steps."""
  if len(points) <= 2 * NUM_COLUMNS:
    return list(points)
  indices = {0, len(points) - 1}

  def value(i: int) -> float:
    return points[i][1]

  for column in _bins(points, NUM_COLUMNS):
    indices |= {min(column, key=value), max(column, key=value)}
  return [points[i] for i in sorted(indices)]


def window_means(points: Points) -> list[tuple[float, float]]:
  """Return the mean step and mean value of each of NUM_WINDOWS spans of steps."""

  def mean(span: range, axis: int) -> float:
    return sum([points[i][axis] for i in span]) / len(span)

  return [(mean(span, 0), mean(span, 1)) for span in _bins(points, NUM_WINDOWS)]


def _bins(points: Points, count: int) -> list[range]:
  """Return the indices of the points in each of `count` equal spans of steps.

  Empty spans are omitted.
  """
  first, last = points[0][0], points[-1][0]
  edges = (first + (last - first) * i / count for i in range(count))
  starts = [bisect.bisect_left(points, edge, key=lambda it: it[0]) for edge in edges]
  spans = itertools.pairwise([*starts, len(points)])
  return [range(start, end) for start, end in spans if end > start]


def ticks(low: float, high: float) -> list[float]:
  """Return round numbers from `low` to `high`."""
  return _tick_multiples(_tick_spacing(low, high), low, high)


def step_ticks(low: float, high: float) -> list[float]:
  """Return round integers from `low`; none in the last quarter.

  The label of the last step is there.
  """
  return _tick_multiples(max(1.0, _tick_spacing(low, high)), low, high - 0.25 * (high - low))


def _tick_multiples(spacing: float, low: float, high: float) -> list[float]:
  first = math.ceil(low / spacing - 1e-9)
  last = math.floor(high / spacing + 1e-9)
  return [i * spacing for i in range(first, last + 1)]


def _tick_spacing(low: float, high: float) -> float:
  """Return the spacing of up to seven ticks: 1, 2 or 5 times a power of ten."""
  minimum = (high - low) / 6
  unit = 10.0 ** math.floor(math.log10(minimum))
  return next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= minimum * (1 - 1e-9))


def log_ticks(low: float, high: float) -> list[float]:
  """Return powers of ten from 10^low to 10^high; if few, also 2 and 5 times these."""
  exponents = range(math.floor(low), math.ceil(high) + 1)
  stride = max(1, len(exponents) // 6)
  factors = (1, 2, 5) if len(exponents) <= 4 else (1,)
  values = [factor * 10.0**e for e in exponents[::stride] for factor in factors]
  return [it for it in values if low <= math.log10(it) <= high]


def format_tick(number: float) -> str:
  """Format a tick of a logarithmic axis: 0.001, 1,000, 10k, 1M, 1e-7, 1e20."""
  if not 1e-4 <= number < 1e15:
    return _with_exponent(number)
  unit, letter = next((it for it in UNITS if number >= max(it[0], 1e4)), (1.0, ""))
  return f"{number / unit:,.10g}{letter}"


def format_ticks(numbers: list[float]) -> list[str]:
  """Format the ticks of an axis with one unit: 0, 0.0005; 0, 2e-5; 0, 5k, 10k."""
  sizes = [abs(it) for it in numbers if it]
  if sizes and (min(sizes) < 1e-4 or max(sizes) >= 1e15):
    return [_with_exponent(it) if it else "0" for it in numbers]
  unit, letter = next((it for it in UNITS if sizes and max(sizes) >= 10 * it[0]), (1.0, ""))
  return [f"{it / unit:,.10g}{letter if it else ''}" for it in numbers]


UNITS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _with_exponent(number: float) -> str:
  mantissa, exponent = f"{number:.2e}".split("e")
  return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
