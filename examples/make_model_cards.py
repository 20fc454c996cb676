"""Write model_cards/ anew from the run.json of correctors that were trained: one card a run, named as its folder.

    python examples/make_model_cards.py model_cards/runs/* --facts model_cards/facts.json

The runs themselves are made by examples/benchmarks/make_correctors.py, which keeps their records there. A card is a
function of the record and of what no run knows of itself, which the file of facts holds by name of the run:

    {"nl2bash": {"license": "apache-2.0", "datasets": [], "language": ["en"],
                 "stale_name": "sentence-transformers/all-MiniLM-L6-v2", "fresh_name": "…", "repo_id": "…"}}
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hf_corrector._files import make_directory, read_json, write_text
from hf_corrector.cards import CardFacts, card_of_reading_run, card_of_run
from hf_corrector.errors import InputError
from hf_corrector.models.hub_files import PLACEHOLDER
from hf_corrector.records import RECORD_FILE, RunRecord


def main(argv: Sequence[str] | None = None) -> int:
    flags = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flags.add_argument("runs", nargs="+", metavar="RUN", help="output folder of an upgrade or of training")
    flags.add_argument("--facts", metavar="FILE", help="JSON: licence, data sets, languages and names by run")
    flags.add_argument("--output_dir", default="model_cards", metavar="DIR")
    flags.add_argument("--of_encoder", action="store_true", help="cards of the trained models, not of the correctors")
    arguments = flags.parse_args(argv)
    for run in arguments.runs:
        if not (Path(run) / RECORD_FILE).is_file():
            flags.error(f"{run}: expected a run's folder with {RECORD_FILE}, got none; no card was written")
    facts = {} if arguments.facts is None else read_json(Path(arguments.facts))
    folder = Path(arguments.output_dir)
    make_directory(folder)
    for run in map(Path, arguments.runs):
        known, repo_id = facts_of(facts.get(run.name, {}), where=f"{arguments.facts}: {run.name}")
        record = RunRecord.load(run)
        if arguments.of_encoder and record.command == "rag-train":
            text = card_of_reading_run(record, known)
        else:
            text = card_of_run(record, known, of_encoder=arguments.of_encoder)
        path = folder / f"{run.name}.md"
        write_text(path, text if repo_id is None else text.replace(PLACEHOLDER, repo_id))
        print(path)
    return 0


def facts_of(given: dict[str, Any], *, where: str) -> tuple[CardFacts, str | None]:
    """Return the facts of one run, and the repository it is pushed to."""
    known = {item.name for item in fields(CardFacts)} | {"repo_id"}
    if not given.keys() <= known:
        got = str(sorted(given.keys() - known))
        raise InputError(where, expected=f"names among {sorted(known)}", got=got, cure="Correct the spelling.")
    return CardFacts(**{name: value for name, value in given.items() if name != "repo_id"}), given.get("repo_id")


if __name__ == "__main__":
    raise SystemExit(main())
