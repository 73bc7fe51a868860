"""What every page is made of: result files, templates, tables with intervals, and charts."""

import io
import json
import math
import statistics
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import t as student

from trol.errors import DataError
from trol.files import folder, write_json, write_whole


def render(template: str, **values: Any) -> str:
    """What the template `NAME.j2` beside this file makes of `values`; a missing one is an error."""
    environment = Environment(
        loader=PackageLoader("trol.reports", "."),
        autoescape=template.endswith(".html"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "points": points}
    return environment.get_template(f"{template}.j2").render(**values)


@contextmanager
def warning_if_it_fails(results: Path) -> Generator[None]:
    """Around making a page of results that lie in a file: an error becomes a warning.

    Results that took hours to measure must outlive an error in their page.
    """
    try:
        yield
    except Exception as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())
        warnings.warn(
            f"the page could not be made ({message}); the results are kept in {results}.",
            stacklevel=3,
        )


class Results(NamedTuple):
    """A kind of result file: its name, its page, the command that writes it, and its keys."""

    file: str
    page: str
    command: str
    keys: tuple[str, ...]

    def check(self, results: Mapping[str, Any], path: Path) -> None:
        """Raises `DataError` where results lack one of the keys."""
        if missing := [key for key in self.keys if key not in results]:
            raise DataError(f"{path} lacks {', '.join(missing)}; run `{self.command}` again.")

    def read(self, path: Path) -> dict[str, Any]:
        """The results in a file, or a folder; raises `DataError` where they cannot be read."""
        path = path / self.file if path.is_dir() else path
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            message = f"{path} cannot be read: {error}; run `{self.command}` again."
            raise DataError(message) from error
        self.check(results, path)
        return results

    def write(
        self, results: Mapping[str, Any], out: str | Path, page: Callable[[Path], str]
    ) -> Path:
        """Writes results, then the page that `page` makes, given their folder; returns its path.

        Where the page fails, that is a warning, and the path is that of the results.

        Raises:
            DataError: the results lack a key.
            UsageError: the folder cannot be made.
        """
        self.check(results, Path(out) / self.file)
        place = folder(out)
        file = write_json(place / self.file, results)
        with warning_if_it_fails(file):
            return write_whole(place / self.page, page(place))
        return file


class Table(NamedTuple):
    """A table that a page and a terminal show alike."""

    heading: list[str]
    rows: list[list[str]]
    notes: list[str]
    """What a reader must know of the figures."""


CONFIDENCE = 0.95


@dataclass(frozen=True)
class Comparison:
    """Paired differences a - b, one pair for each seed."""

    differences: tuple[float, ...]
    mean: float
    low: float | None
    """Lower end of the 95 % interval of the mean (Student's t); None for a single seed."""
    high: float | None
    """Its upper end."""

    @property
    def holds_zero(self) -> bool:
        """Whether the sign of the mean is not shown: the interval holds zero, or there is none."""
        return self.low is None or self.high is None or self.low <= 0 <= self.high

    def text(self, scale: float = 1, digits: int = 3) -> str:
        """The mean and its interval, as in "+0.020 [−0.005, +0.045]"."""
        mean, low, high = (
            None if one is None else f"{scale * one:+.{digits}f}".replace("-", "−")
            for one in (self.mean, self.low, self.high)
        )
        return f"{mean}" if low is None else f"{mean} [{low}, {high}]"


def compare(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Pairs `a` with `b`, seed by seed."""
    differences = tuple(x - y for x, y in zip(a, b, strict=True))
    if not differences:
        raise ValueError("compare: no seeds were given; give at least one pair.")
    mean, n = statistics.fmean(differences), len(differences)
    if n == 1:
        return Comparison(differences, mean, None, None)
    error = statistics.stdev(differences) / math.sqrt(n)
    half = float(student.ppf(0.5 + CONFIDENCE / 2, n - 1)) * error
    return Comparison(differences, mean, mean - half, mean + half)


def percent(share: float) -> str:
    """A share in percent, one decimal."""
    return f"{100 * share:.1f} %"


def points(values: Sequence[float]) -> str:
    """Mean of shares over seeds, in points, and their standard deviation where there is one."""
    mean = f"{100 * statistics.fmean(values):.1f}"
    return f"{mean} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else mean


# Okabe and Ito's colours, for colour-blind readers; readable on light and on dark.
BLUE, ORANGE, GREEN = "#0a84d0", "#e08a00", "#00986b"
SKY, PURPLE, RED = "#56b4e9", "#b0568f", "#d55e00"
GREY = "#8b8f96"
PAGE_INK = "#010203"
"""Stands for the page's text colour, which replaces it in SVG."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": PAGE_INK,
    "axes.labelcolor": PAGE_INK,
    "axes.edgecolor": PAGE_INK,
    "xtick.color": PAGE_INK,
    "ytick.color": PAGE_INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "legend.frameon": False,
}


def new_axes(
    size: tuple[float, float], x: str, y: str, panels: int = 1
) -> tuple[Figure, list[Any]]:
    """A figure with pairs of axes side by side, on no background; `x` and `y` are their labels."""
    figure = Figure(figsize=size, layout="constrained")
    figure.patch.set_alpha(0)
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for one in axes:
        one.patch.set_alpha(0)
        one.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)
        one.set_axisbelow(True)
        one.set_xlabel(x)
        one.set_ylabel(y)
    return figure, axes


def as_svg(figure: Figure, name: str) -> str:
    """`figure` as an SVG element; `name` keeps its ids apart from those of other charts."""
    out = io.StringIO()
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue().replace(PAGE_INK, "currentColor")
    return text[text.index("<svg") :]


def as_png(figure: Figure) -> bytes:
    """`figure` as a PNG on white."""
    out = io.BytesIO()
    figure.patch.set_alpha(1)
    with rc_context(STYLE):
        figure.savefig(out, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    figure.patch.set_alpha(0)
    return out.getvalue()
