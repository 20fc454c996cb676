"""``hf-corrector``: dispatch to a command, and turn expected errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from hf_corrector.errors import HFCorrectorError
from hf_corrector.version import __version__

COMMANDS = {
    "demo": "train on Python's standard library and show what correction recovers",
    "embed": "encode a corpus into a cache",
    "train": "train a dual encoder with hard negatives from a corrected cache",
    "rag-train": "train a retriever and a language model that reads what it finds",
    "rag-answer": "answer questions with a model that rag-train made",
    "plan": "forecast from a small probe what correction would recover",
    "evaluate": "compare stale, corrected and fresh targets of a cache",
    "upgrade": "correct, keep or re-embed an old index: compare and decide",
    "search": "search a cache, corrected or as it is",
    "verify": "check every byte of a cache",
    "report": "render the records of runs into one HTML page",
    "apply": "write the corrected vectors of a cache into another one",
    "push": "put a corrector, a dual encoder, a reader or a cache on the Hub",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0 done, 1 a problem that was explained, 2 wrong usage.

    ``upgrade`` answers by it: 0 go, 3 no-go, 4 re-embed a part first.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        prog="hf-corrector",
        description="Correct stale target embeddings instead of re-encoding them.",
        epilog="commands:\n" + "\n".join(f"  {name:<10} {text}" for name, text in COMMANDS.items())
        + "\n\nhf-corrector COMMAND --help explains a command, with examples.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"hf-corrector {__version__}")
    parser.add_argument("command", choices=list(COMMANDS), metavar="COMMAND", help="what to do")
    chosen = parser.parse_args(arguments[:1])
    try:
        return _run(chosen.command, arguments[1:])
    except HFCorrectorError as error:
        print(f"hf-corrector {chosen.command}: {error}", file=sys.stderr)
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        # A missing model, a full disk, an argument transformers refuses: its own words and the system's say which.
        if os.environ.get("HF_CORRECTOR_DEBUG"):
            raise
        print(f"hf-corrector {chosen.command}: {error} (set HF_CORRECTOR_DEBUG=1 for the traceback)", file=sys.stderr)
    except KeyboardInterrupt:
        print(f"\nhf-corrector {chosen.command}: interrupted", file=sys.stderr)
        return 130
    return 1


def _run(command: str, arguments: list[str]) -> int:
    """Import only the command that is run: --help of one does not wait for the libraries of another."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    match command:
        case "demo":
            from hf_corrector.cli.demo import run
        case "embed":
            from hf_corrector.cli.embed import run
        case "train":
            from hf_corrector.cli.train import run
        case "rag-train":
            from hf_corrector.cli.rag_train import run
        case "rag-answer":
            from hf_corrector.cli.rag_answer import run
        case "plan":
            from hf_corrector.cli.plan import run
        case "evaluate":
            from hf_corrector.cli.evaluate import run
        case "upgrade":
            from hf_corrector.cli.upgrade import run
        case "search":
            from hf_corrector.cli.search import run
        case "report":
            from hf_corrector.cli.report import run
        case "apply":
            from hf_corrector.cli.apply import run
        case "push":
            from hf_corrector.cli.push import run
        case _:
            from hf_corrector.cli.verify import run
    return run(arguments)


if __name__ == "__main__":
    sys.exit(main())
