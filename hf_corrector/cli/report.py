"""``hf-corrector report``: one HTML page from the records of runs."""

from __future__ import annotations

from hf_corrector._extras import check_report_libraries
from hf_corrector._progress import working
from hf_corrector.cli.common import parser, quieten

EXAMPLES = """\
  hf-corrector report demo
  hf-corrector report upgraded-500 upgraded-2000 upgraded-8000 --output report.html
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser(
        "report",
        "Render the records of one or several runs into one self-contained HTML page: verdict, quality with intervals, "
        "costs, drift, slices, examples. Reads run.json alone and asks nothing of the network.",
        EXAMPLES,
    )
    flags.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its run.json")
    flags.add_argument("--output", metavar="FILE", help="the page; by default report.html in the first folder")
    flags.add_argument("--quiet", action="store_true", help="no signs of progress")
    arguments = flags.parse_args(argv)
    check_report_libraries()
    # Only now, as matplotlib may not be there.
    from hf_corrector.report.page import write_report

    with working("draw the report", shown=quieten(quiet=arguments.quiet)):
        path = write_report(arguments.runs, arguments.output)
    print(f"written to {path}")
    return 0
