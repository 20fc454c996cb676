"""The charts of a report. All their numbers stand in a table of the page too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from hf_corrector.metrics import metric_name
from hf_corrector.report.facts import LABELS, Condition, Run
from hf_corrector.report.nodes import Level
from hf_corrector.report.svg import INK, MARKERS, MUTED, ROLES, SERIES, WIDTH, inline, style
from hf_corrector.report.words import logged, percent, spread

# Beyond so many slices a chart is no longer read; the table has all.
SLICES_DRAWN = 20
POINTS_DRAWN = 400
_LONGEST_LABEL, _LONGEST_LINE = 26, 44
_APART = 1.7
_JOINED = ("stale", "corrected", "fresh")
_DRIFT_TITLES = {
    "cosine": "Cosine of cached targets to fresh ones",
    "sampling_tv": "Distance of sampling from the exact softmax (TV)",
    "residual_uniform": "Squared distance of targets as seen to fresh ones", "loss": "Training loss",
}  # fmt: skip


@dataclass(frozen=True)
class Chart:
    """A drawn chart.

    Attributes:
        title: Its heading.
        svg: The ``<svg>`` element.
    """

    title: str
    svg: str


def quality_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draw every condition's quality with its interval, one chart a run, all of a metric on one scale."""
    charts: list[Chart] = []
    for place, run in enumerate(runs):
        levels = [(one, one.metrics[run.metric]) for one in run.conditions if run.metric in one.metrics]
        if not levels:
            continue
        same = [one for other in runs if other.metric == run.metric for one in other.conditions]
        everything = [one.metrics[run.metric] for one in same if run.metric in one.metrics]
        title = f"{metric_name(run.metric)}, {run.label}"
        with style():
            figure, axes = _rows_figure(len(levels))
            for row, (condition, level) in enumerate(levels):
                _interval(axes, level, row, colour=ROLES.get(condition.name, INK))
            _name_rows(axes, [condition.label for condition, _ in levels])
            axes.set_xlim(*_span(everything))
            axes.set_xlabel(f"{metric_name(run.metric)}, {run.interval.partition(' by ')[0]}")
            said = "; ".join(f"{condition.label} {spread(level)}" for condition, level in levels)
            charts.append(Chart(title, inline(figure, name=f"quality-{place}", title=title, description=f"{said}.")))
    return charts


def passes_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draw quality over encoder passes, one chart a metric; the main indexes of a run are joined by a line."""
    charts: list[Chart] = []
    for metric in dict.fromkeys(run.metric for run in runs):
        drawn = [(run, _with_passes(run)) for run in runs if run.metric == metric]
        drawn = [(run, found) for run, found in drawn if found]
        if not drawn:
            continue
        title = f"{metric_name(metric)} over encoder passes"
        with style():
            figure = Figure(figsize=(WIDTH, 3.1), layout="constrained")
            axes = figure.add_subplot()
            for place, (_, found) in enumerate(drawn):
                _draw_passes(axes, found, metric, marker=MARKERS[place % len(MARKERS)])
            _scale_passes(axes, [passes for _, found in drawn for _, passes in found])
            axes.set_ylabel(metric_name(metric))
            axes.grid(True, axis="y")
            _passes_legend(figure, drawn)
            said = "; ".join(
                f"{run.label}, {one.label}: {spread(one.metrics[metric])} after {passes:,} passes"
                for run, found in drawn for one, passes in found
            )  # fmt: skip
            charts.append(Chart(title, inline(figure, name=f"passes-{len(charts)}", title=title, description=said)))
    return charts


def _with_passes(run: Run) -> list[tuple[Condition, int]]:
    """Return what has a price in passes over targets, once for the whole corpus."""
    return [
        (one, one.passes) for one in run.conditions
        if one.passes is not None and not one.passes_per_query and run.metric in one.metrics
    ]  # fmt: skip


def _draw_passes(axes: Axes, found: Sequence[tuple[Condition, int]], metric: str, *, marker: str) -> None:
    """Draw one run: the main indexes large, in their colours and joined, all others small."""
    joined = sorted((passes, one.metrics[metric].estimate) for one, passes in found if one.name in _JOINED)
    axes.plot([one for one, _ in joined], [one for _, one in joined], color=MUTED, linewidth=0.8, linestyle=":")
    for one, passes in found:
        level = one.metrics[metric]
        if one.name in ROLES:
            low, high = _errors(level)
            axes.errorbar(
                [passes], [level.estimate], yerr=[[low], [high]], color=ROLES[one.name], elinewidth=1.0, marker=marker
            )
        else:
            axes.plot([passes], [level.estimate], color=MUTED, marker=marker, markersize=2.5, linestyle="none")


def _scale_passes(axes: Axes, passes: Sequence[int]) -> None:
    """Use a logarithmic axis that has a place for no passes at all."""
    smallest, largest = min((one for one in passes if one), default=1), max(*passes, 1)
    axes.set_xscale("symlog", linthresh=smallest, linscale=0.4)
    axes.set_xlim(-0.15 * smallest, 1.6 * largest)
    ticks = [0]
    for one in sorted(set(passes)):
        # What would be written over its neighbour is left out.
        if one > _APART * ticks[-1]:
            ticks.append(one)
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("encoder passes over targets")


def _passes_legend(figure: Figure, drawn: Sequence[tuple[Run, Sequence[tuple[Condition, int]]]]) -> None:
    """Say which colour is which index, and where there are several which marker is which run."""
    names = dict.fromkeys(one.name if one.name in ROLES else "others" for _, found in drawn for one, _ in found)
    handles = [
        Line2D([], [], color=ROLES.get(name, MUTED), marker="o", linestyle="none", label=LABELS.get(name, name))
        for name in names
    ]
    if len(drawn) > 1:
        handles += [
            Line2D([], [], color=INK, marker=MARKERS[place % len(MARKERS)], linestyle="none", label=_cut(run.label))
            for place, (run, _) in enumerate(drawn)
        ]
    figure.legend(handles=handles, loc="outside upper left", ncols=3, columnspacing=1.0, handletextpad=0.2)


def recovery_chart(runs: Sequence[Run]) -> Chart | None:
    """Draw recovery over fitting pairs: forecasts of plans as lines with bands, what upgrades measured as points."""
    curves: dict[str, list[tuple[int, Level]]] = {}
    points: list[tuple[str, int, Level]] = []
    for run in runs:
        for one in run.points:
            if one.forecast:
                curves.setdefault(f"{run.label}: {one.label}, forecast", []).append((one.pairs, one.recovery))
            elif one.method == "corrected":
                points.append((f"{run.label}: {one.label.removeprefix('corrected: ')}", one.pairs, one.recovery))
    if not curves and not points:
        return None
    with style():
        figure = Figure(figsize=(WIDTH, 2.3 + 0.19 * (len(curves) + len(points))), layout="constrained")
        axes = figure.add_subplot()
        shade = 0.15 if len(curves) < 3 else 0.06
        for place, (label, curve) in enumerate(curves.items()):
            colour, pairs = SERIES[place % len(SERIES)], [count for count, _ in curve]
            axes.plot(
                pairs, [level.estimate for _, level in curve], color=colour, marker=MARKERS[place % len(MARKERS)],
                label=_cut(label, _LONGEST_LINE),
            )  # fmt: skip
            lows, highs = zip(*(_ends(level) for _, level in curve), strict=True)
            axes.fill_between(pairs, lows, highs, color=colour, alpha=shade, linewidth=0)
        for place, (label, count, level) in enumerate(points, start=len(curves)):
            low, high = _errors(level)
            axes.errorbar(
                [count], [level.estimate], yerr=[[low], [high]], color=SERIES[place % len(SERIES)],
                marker=MARKERS[place % len(MARKERS)], linestyle="none", label=_cut(label, _LONGEST_LINE),
            )  # fmt: skip
        counts = [count for curve in curves.values() for count, _ in curve] + [count for _, count, _ in points]
        axes.set_xscale("log")
        axes.set_xlim(0.8 * min(counts), 1.25 * max(counts))
        ticks = sorted(set(counts)) if len(set(counts)) <= 6 else [min(counts), max(counts)]
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_xlabel("fitting pairs")
        axes.set_ylabel("recovery of the loss")
        axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(True, axis="y")
        _legend(figure)
        said = [f"{label}: {percent(level)} at {count:,} pairs" for label, c in curves.items() for count, level in c]
        said += [f"{label}: {percent(level)} at {count:,} pairs" for label, count, level in points]
        title = "Recovery over fitting pairs"
        return Chart(title, inline(figure, name="recovery", title=title, description="; ".join(said)))


def drift_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draw what training logged over its steps, one chart a quantity."""
    quantities = {
        "cosine": ("cosine_stale_fresh", "cosine_corrected_fresh"), "sampling_tv": ("sampling_tv",),
        "residual_uniform": ("residual_uniform",), "loss": ("loss",),
    }  # fmt: skip
    charts: list[Chart] = []
    for quantity, names in quantities.items():
        lines = [(run, name) for run in runs for name in names if run.drift.get(name)]
        if not lines:
            continue
        title = _DRIFT_TITLES[quantity]
        logging = [run.label for run in runs if run.drift]
        with style():
            entries = len(lines) if quantity == "cosine" or len(logging) > 1 else 0
            figure = Figure(figsize=(WIDTH, 2.2 + 0.19 * entries), layout="constrained")
            axes = figure.add_subplot()
            for run, name in lines:
                stale, place = name == "cosine_stale_fresh", logging.index(run.label)
                kind = ("stale" if stale else "corrected") if quantity == "cosine" else quantity
                role, points = ROLES.get(kind, ROLES["corrected"]), _thinned(run.drift[name])
                axes.plot(
                    [step for step, _ in points], [value for _, value in points],
                    color=SERIES[place % len(SERIES)] if len(logging) > 1 else role, linestyle="--" if stale else "-",
                    marker="." if len(points) < 30 else "", label=_line_label(run, kind, quantity, logging),
                )  # fmt: skip
            axes.set_xlabel("training step")
            axes.grid(True, axis="y")
            if entries:
                _legend(figure)
            said = "; ".join(_line_words(run, name) for run, name in lines)
            charts.append(Chart(title, inline(figure, name=f"drift-{quantity}", title=title, description=said)))
    return charts


def slice_charts(runs: Sequence[Run]) -> list[Chart]:
    """Draw what correction changes in every slice, one chart a run, the worst on top."""
    charts: list[Chart] = []
    for place, run in enumerate(runs):
        rows = run.slices[:SLICES_DRAWN]
        if not rows:
            continue
        title = f"Corrected minus {rows[0].against} by slice, {run.label}"
        with style():
            figure, axes = _rows_figure(len(rows))
            for row, one in enumerate(rows):
                _interval(axes, one.difference, row, colour=ROLES["corrected"] if one.judged else MUTED)
            axes.axvline(0, color=INK, linewidth=0.8)
            _name_rows(axes, [one.name for one in rows])
            axes.set_xlabel(f"change of {metric_name(run.metric)}, 95 % intervals")
            said = "; ".join(f"{one.name} {spread(one.difference)}" for one in rows)
            charts.append(Chart(title, inline(figure, name=f"slices-{place}", title=title, description=said)))
    return charts


def _rows_figure(rows: int) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, 0.75 + 0.27 * rows), layout="constrained")
    return figure, figure.add_subplot()


def _name_rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_cut(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(True, axis="x")


def _interval(axes: Axes, level: Level, row: int, *, colour: str) -> None:
    low, high = _errors(level)
    axes.errorbar([level.estimate], [row], xerr=[[low], [high]], color=colour, marker="o", elinewidth=2.2)


def _ends(level: Level) -> tuple[float, float]:
    low = level.estimate if level.low is None else level.low
    return low, level.estimate if level.high is None else level.high


def _errors(level: Level) -> tuple[float, float]:
    """Return how far an interval reaches below and above; a damaged one that leaves its estimate out reaches 0."""
    low, high = _ends(level)
    return max(level.estimate - low, 0.0), max(high - level.estimate, 0.0)


def _span(levels: Sequence[Level]) -> tuple[float, float]:
    low, high = min(_ends(one)[0] for one in levels), max(_ends(one)[1] for one in levels)
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _thinned(line: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return every so many points of a line and its last one, as more could not be told apart."""
    every = -(-len(line) // POINTS_DRAWN)
    return line if every < 2 else [*line[:-1:every], line[-1]]


def _line_label(run: Run, kind: str, quantity: str, logging: Sequence[str]) -> str:
    if quantity != "cosine":
        return _cut(run.label, _LONGEST_LINE)
    return kind if len(logging) < 2 else f"{_cut(run.label)}, {kind}"


def _line_words(run: Run, name: str) -> str:
    (first, before), (last, after) = run.drift[name][0], run.drift[name][-1]
    return f"{run.label}, {name}: {logged(before)} at step {first:.10g}, {logged(after)} at step {last:.10g}"


def _legend(figure: Figure) -> None:
    figure.legend(loc="outside upper left", ncols=1)


def _cut(label: str, longest: int = _LONGEST_LABEL) -> str:
    """Shorten; matplotlib would leave a label out that begins with an underscore."""
    label = f" {label}" if label.startswith("_") else label
    return label if len(label) <= longest else f"{label[: longest - 1]}…"
