"""The page: what each of its sections says, and the template it is put into."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from hf_corrector._files import atomic_write
from hf_corrector.metrics import metric_name
from hf_corrector.report.charts import (
    Chart,
    drift_charts,
    passes_charts,
    quality_charts,
    recovery_chart,
    slice_charts,
)
from hf_corrector.report.facts import LABELS, Condition, Run
from hf_corrector.report.reading import DRIFT, read_runs
from hf_corrector.report.words import logged, number, percent, spread
from hf_corrector.version import __version__

_TEMPLATES = Path(__file__).parent / "templates"
# Where more steps were logged, the table shows about so many of them, the first and the last among them.
_STEPS_SHOWN = 60


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        name: Its heading.
        cells: Its values; None is shown as missing.
        marked: Whether to set it off.
    """

    name: str
    cells: tuple[str | None, ...]
    marked: bool = False


@dataclass(frozen=True)
class Group:
    """Lines that belong together.

    Attributes:
        title: Their heading, or empty.
        rows: The lines.
    """

    title: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        caption: What it shows.
        head: Headings of its columns.
        groups: Its lines.
        words: Whether its cells are words rather than numbers.
    """

    caption: str
    head: tuple[str, ...]
    groups: tuple[Group, ...]
    words: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        id: Its anchor.
        heading: Its heading.
        intro: What is to be known of it.
        missing: What no record holds, and what would write it; empty where there is something to show.
        charts: Its charts.
        tables: Their numbers and others.
        examples: Runs whose example queries are shown.
    """

    id: str
    heading: str
    intro: str = ""
    missing: str = ""
    charts: tuple[Chart, ...] = ()
    tables: tuple[Table, ...] = ()
    examples: tuple[Run, ...] = ()


def write_report(folders: Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Render the records of some runs into one self-contained HTML page.

    Args:
        folders: Folders of runs, or their ``run.json``.
        output: The page; ``report.html`` in the first folder if not given. An existing page is replaced.

    Returns:
        Where the page is.

    Raises:
        InputError: If a record is missing, unknown or damaged.
    """
    content = render(read_runs(folders)).encode("utf-8")
    first = Path(folders[0])
    path = (first if first.is_dir() else first.parent) / "report.html" if output is None else Path(output)

    def write(temporary: Path) -> None:
        temporary.write_bytes(content)

    atomic_write(path, write)
    return path


def render(runs: Sequence[Run]) -> str:
    """Return the page as HTML."""
    # All text of records is escaped by the template; what is safe is said there, and is what this package drew itself.
    templates = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = Markup((_TEMPLATES / "style.css").read_text(encoding="utf-8"))
    makers: tuple[Callable[[Sequence[Run]], Section], ...] = (
        _quality, _passes, _pairs, _drift, _sampling, _slices, _examples, _costs, _circumstances,
    )  # fmt: skip
    return templates.get_template("page.html").render(
        title=f"hf_corrector report: {', '.join(run.label for run in runs)}", version=__version__, style=style,
        runs=runs, glance=_glance(runs), sections=[make(runs) for make in makers], roles=tuple(LABELS),
        names={run.metric: metric_name(run.metric) for run in runs}, number=number,
    )  # fmt: skip


def _glance(runs: Sequence[Run]) -> Table:
    rows = []
    for run in runs:
        found = {one.name: one for one in run.conditions}
        levels = [_level(found.get(name), run.metric) for name in LABELS]
        corrected = found.get("corrected")
        recovery = None if corrected is None else _recovered(corrected)
        rows.append(Row(run.label, (run.command, metric_name(run.metric) or None, *levels, recovery)))
    head = ("run", "command", "metric", *LABELS.values(), "recovery")
    return Table("All runs at a glance", head, (Group("", tuple(rows)),))


def _quality(runs: Sequence[Run]) -> Section:
    tables = []
    for run in (one for one in runs if one.conditions):
        others = [metric for metric in run.metrics if metric != run.metric]
        rows = tuple(
            Row(
                one.label,
                (_level(one, run.metric), _recovered(one), _passes_words(one), *(_level(one, each) for each in others)),
                one.name == "corrected",
            )
            for one in run.conditions
        )  # fmt: skip
        head = ("index searched", metric_name(run.metric), "recovery", "target passes", *map(metric_name, others))
        tables.append(Table(f"{run.label}: quality, with {run.interval}", head, (Group(run.note, rows),)))
    missing = "" if tables else "none of these records judged anything; train, demo, evaluate and upgrade do."
    return Section("quality", "Quality", "", missing, tuple(quality_charts(runs)), tuple(tables))


def _passes(runs: Sequence[Run]) -> Section:
    charts = tuple(passes_charts(runs))
    intro = (
        "Passes over targets, once for the whole corpus: of an upgrade those that adopting a row takes, of a training "
        "run all it made up to that index. What costs passes at every search is in the table of quality alone."
    )
    missing = "" if charts else "no record says how many passes its indexes took; train, demo and upgrade do."
    return Section("passes", "Quality over encoder passes", intro if charts else "", missing, charts)


def _pairs(runs: Sequence[Run]) -> Section:
    chart, groups = recovery_chart(runs), []
    for run in (one for one in runs if one.points):
        rows = tuple(
            Row(one.label, (f"{one.pairs:,}", percent(one.recovery), "forecast" if one.forecast else "measured"))
            for one in run.points
        )  # fmt: skip
        groups.append(Group(f"{run.label}, {run.interval}", rows))
    table = Table("Recovery by fitting pairs", ("method", "pairs", "recovery", "how known"), tuple(groups))
    missing = "" if groups else "no record speaks of recovery and pairs; plan and upgrade do."
    return Section(
        "pairs", "Recovery over pairs", "", missing, () if chart is None else (chart,), (table,) if groups else ()
    )


def _drift(runs: Sequence[Run]) -> Section:
    groups = []
    for run in (one for one in runs if one.drift):
        values = {name: dict(line) for name, line in run.drift.items()}
        steps = sorted({step for line in values.values() for step in line})
        every = -(-len(steps) // _STEPS_SHOWN)
        shown = [step for place, step in enumerate(steps) if place % every == 0 or step == steps[-1]]
        rows = tuple(
            Row(f"{step:.10g}", tuple(logged(values[n][step]) if step in values.get(n, {}) else None for n in DRIFT))
            for step in shown
        )  # fmt: skip
        groups.append(Group(run.label if every == 1 else f"{run.label}, every {every}th logged step", rows))
    table = Table("Logged steps", ("step", *DRIFT), tuple(groups))
    missing = "" if groups else "no record holds logged steps; train and demo write them."
    return Section("drift", "Drift over steps", "", missing, tuple(drift_charts(runs)), (table,) if groups else ())


def _sampling(runs: Sequence[Run]) -> Section:
    measured = [run for run in runs if run.fidelity]
    names = tuple(dict.fromkeys(name for run in measured for one in run.fidelity.values() for name in one))
    groups = tuple(
        Group(
            run.label,
            tuple(
                Row(name, tuple(number(one[key]) if key in one else None for key in names))
                for name, one in run.fidelity.items()
            ),
        )
        for run in measured
    )  # fmt: skip
    table = Table("How close sampling and vectors are to fresh ones", ("targets", *names), groups)
    missing = "" if measured else "no record compares sampling from the cache; train, demo and evaluate do."
    return Section("sampling", "Sampling from the cache", "", missing, (), (table,) if measured else ())


def _slices(runs: Sequence[Run]) -> Section:
    sliced, worst, groups = [run for run in runs if run.slices], [], []
    for run in sliced:
        first = run.slices[0]
        worst.append(f"Worst in {run.label}: {first.name}, {spread(first.difference)} against {first.against}.")
        names = tuple(LABELS)
        rows = tuple(
            Row(
                one.name,
                (f"{one.queries:,}", *(number(one.means[n]) if n in one.means else None for n in names),
                 f"{spread(one.difference)} against {one.against}", "" if one.judged else "too few queries"),
                one is first,
            )
            for one in run.slices
        )  # fmt: skip
        groups.append(Group(f"{run.label}, {metric_name(run.metric)}", rows))
    table = Table(
        "Slices, worst first", ("slice", "queries", *LABELS.values(), "change by correction", "note"), tuple(groups)
    )
    missing = "" if sliced else "no record has slices; upgrade --slice_by FIELD writes them."
    return Section("slices", "Slices", " ".join(worst), missing, tuple(slice_charts(runs)), (table,) if sliced else ())


def _examples(runs: Sequence[Run]) -> Section:
    found = tuple(run for run in runs if run.examples is not None)
    without = [run.label for run in runs if run.examples is None]
    missing = ""
    if without:
        missing = (
            f"no examples in {', '.join(without)}; train, demo, evaluate and upgrade write them, unless nothing was "
            "corrected or --no_examples was given."
        )
    return Section("examples", "Example queries", "", missing, examples=found)


def _costs(runs: Sequence[Run]) -> Section:
    tables = (_side_by_side("Encoder passes, in texts", runs, "cost"), _side_by_side("Seconds", runs, "timing"))
    return Section("costs", "Costs", tables=tables)


def _circumstances(runs: Sequence[Run]) -> Section:
    tables = (
        _side_by_side("Run and machine", runs, "run"), _side_by_side("Versions", runs, "versions"),
        _side_by_side("Arguments", runs, "arguments"),
    )  # fmt: skip
    intro = "" if len(runs) == 1 else "Lines in bold differ between the runs."
    return Section("circumstances", "Machine, versions and arguments", intro, tables=tables)


def _side_by_side(caption: str, runs: Sequence[Run], table: str) -> Table:
    """Lay facts out in one column a run, and set off what differs."""
    names = dict.fromkeys(name for run in runs for name in run.facts[table])
    rows = []
    for name in names:
        values = tuple(run.facts[table].get(name) or None for run in runs)
        rows.append(Row(name, values, len(set(values)) > 1))
    head = ("name", *(run.label for run in runs))
    group = Group("" if rows else "missing from these records", tuple(rows))
    return Table(caption, head, (group,), words=table not in ("cost", "timing"))


def _level(condition: Condition | None, metric: str) -> str | None:
    return spread(condition.metrics[metric]) if condition is not None and metric in condition.metrics else None


def _recovered(condition: Condition) -> str | None:
    if condition.name in ("stale", "fresh"):
        return ""
    if condition.recovery is not None:
        return percent(condition.recovery)
    return f"cannot be told: {condition.no_recovery}" if condition.no_recovery else None


def _passes_words(condition: Condition) -> str | None:
    if condition.passes_per_query:
        return f"{condition.passes_per_query:,} a query"
    return None if condition.passes is None else f"{condition.passes:,}"
