"""Train the correctors of model_cards/: one command a data set, and their results as a table.

    python examples/benchmarks/make_correctors.py --data FOLDER --output_dir runs/correctors --records model_cards/runs
    python examples/make_model_cards.py model_cards/runs/* --facts model_cards/facts.json

Every run is `hf-corrector train` with the words that are printed before it: all-MiniLM-L6-v2, whole or its first 3
layers, fine-tuned on the set's own train split, with a corrector of kernel and tokens that follows along; judged on the
whole test split, none of whose positives the corrector has seen. Long texts are cut, so that a run takes minutes on one
core; the table says how many were. A run that is in the output folder already is not made again.

What a card needs of a run is copied to `--records`: its run.json, without folders of this machine.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from common import data_folder, half_is_fast, print_head
from transformers import AutoTokenizer

from hf_corrector._extras import demo_encoder
from hf_corrector._files import read_json, write_json
from hf_corrector.cli.main import main as hf_corrector
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import column
from hf_corrector.records import RECORD_FILE, RunRecord

# What there was time for on a busy machine: one run of the whole encoder, and short ones of its first 3 layers.
SHORT = "--num_layers 3 --max_length 48 --max_steps 60 --learning_rate 1e-4"
SETTINGS = {
    "nl2bash": "--max_length 32 --max_steps 300 --learning_rate 5e-5",
    **dict.fromkeys(("stackexchange", "scifact", "squad", "jaquad"), SHORT),
}
COMMON = (
    "--warmup_steps 0.1 --seed 0 --corrector_kind kernel --corrector_side tokens "
    "--corrector_window 200 --corrector_update_steps 20 --logging_steps 25 --save_strategy no --report_to none "
    "--no_examples --quiet"
)
CONDITIONS = ("old", "stale", "corrected", "fresh")
HEAD = ("set", "layers, tokens, steps", "targets cut", "cosine", *CONDITIONS, "recovery", "TV, stale → corrected")


def main(argv: Sequence[str] | None = None) -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the sets")
    flags.add_argument("--output_dir", required=True, help="folder of the runs")
    flags.add_argument("--records", help="copy what cards need of the runs here, as NAME/run.json")
    flags.add_argument("--sets", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    flags.add_argument("--steps", type=int, help="another number of steps for all, to try it")
    arguments = flags.parse_args(argv)
    print_head("make_correctors", arguments)
    rows = []
    for name in arguments.sets:
        folder, run = data_folder(arguments.data, name), Path(arguments.output_dir) / name
        if not (run / RECORD_FILE).is_file():
            settings = settings_of(name, arguments.steps)
            print(f"hf-corrector train --data {name} --output_dir {name} {shlex.join(settings)}", flush=True)
            if hf_corrector(["train", "--data", str(folder), "--output_dir", str(run), *settings]) != 0:
                raise SystemExit(f"the run on {name} has failed")
        record = RunRecord.load(run)
        rows.append(row_of(name, record, share_cut(folder, record.arguments["max_length"])))
        if arguments.records:
            copy = Path(arguments.records) / name
            copy.mkdir(parents=True, exist_ok=True)
            write_json(copy / RECORD_FILE, without_folders(read_json(run / RECORD_FILE)))
    print("\n".join(["", f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|", *rows]), flush=True)


def settings_of(name: str, steps: int | None = None) -> list[str]:
    """Return the words of the command that makes a run, but for where to read and write."""
    words = f"{SETTINGS[name]} {COMMON}{' --bf16' if half_is_fast() else ''}"
    # Of a word that is given twice the last one counts.
    return shlex.split(words if steps is None else f"{words} --max_steps {steps}")


def row_of(name: str, record: RunRecord, cut: float) -> str:
    """Return a run's line of the table, in MRR@10."""
    layers = record.arguments["num_layers"] or 6
    steps, tokens = record.arguments["max_steps"], record.arguments["max_length"]
    means = [spread(record.evaluation["intervals"][one]["mrr@10"]) for one in CONDITIONS]
    found, fidelity = record.evaluation["recovery"]["mrr@10"], record.fidelity
    if found["estimate"] is None:
        recovery = "nothing to recover"
    else:
        recovery = f"{100 * found['estimate']:.0f} % [{100 * found['low']:.0f}, {100 * found['high']:.0f}]"
    cells = [
        f"{name}, {record.evaluation['clean_queries']:,} queries", f"{layers}, {tokens}, {steps}", f"{100 * cut:.0f} %",
        f"{fidelity['stale']['cosine']:.3f}", *means, recovery,
        f"{fidelity['stale']['tv']:.3f} → {fidelity['corrected']['tv']:.3f}",
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def spread(found: Mapping[str, float]) -> str:
    """Write a mean with its interval."""
    return f"{found['estimate']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def share_cut(folder: Path, tokens: int) -> float:
    """Return the share of targets that have more tokens than a run reads."""
    tokenizer = AutoTokenizer.from_pretrained(str(demo_encoder()))
    texts = column(load_retrieval_data(folder).corpus, "text")
    lengths = [len(one) for one in tokenizer(texts, truncation=True, max_length=tokens + 1)["input_ids"]]
    return sum(length > tokens for length in lengths) / len(lengths)


def without_folders(value: Any) -> Any:
    """Return a record's values with every folder of this machine by its own name alone."""
    if isinstance(value, dict):
        return {key: without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [without_folders(one) for one in value]
    return PurePath(value).name if isinstance(value, str) and value.startswith("/") else value


if __name__ == "__main__":
    main()
