"""Encoding speed beside sentence-transformers' own ``encode``, in one process, on the same texts.

    python examples/benchmarks/encode_throughput.py [--data FOLDER --set nl2bash] [--rounds 7]

Rounds alternate between the encoders, so that whatever else the machine does hits all of them; what is reported is the
ratio of their times with a bootstrap interval over rounds. Without ``--data`` the texts are Python functions of the
standard library.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from common import data_folder, print_head
from torch.nn import functional as F

from hf_corrector._extras import demo_encoder, missing_extra
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import column
from hf_corrector.data.stdlib import standard_library_data
from hf_corrector.models import DualEncoderModel

try:
    from sentence_transformers import SentenceTransformer
except ImportError as error:
    raise missing_extra("encode_throughput", package="sentence-transformers", extra="benchmarks") from error


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the set")
    flags.add_argument("--set", default=None, help="nl2bash, stackexchange, ...; by default the standard library")
    flags.add_argument("--texts", type=int, default=1500)
    flags.add_argument("--rounds", type=int, default=7)
    flags.add_argument("--max_length", type=int, default=128)
    flags.add_argument("--batch_size", type=int, default=32, help="of sentence-transformers; 32 is its default")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head("encode_throughput", arguments)
    folder = str(demo_encoder())
    theirs = SentenceTransformer(folder, device="cpu")
    theirs.max_seq_length = arguments.max_length
    ours = DualEncoderModel.from_sentence_transformer(folder, target_max_length=arguments.max_length)
    texts = load_texts(arguments)
    tokens = sum(len(one) for one in ours.tokenize(texts, "target"))
    print(f"{len(texts)} texts of {tokens / len(texts):.1f} tokens on average\n")
    encoders: dict[str, Callable[[], torch.Tensor]] = {
        "sentence-transformers": lambda: torch.from_numpy(theirs.encode(texts, batch_size=arguments.batch_size)),
        "hf_corrector float32": lambda: ours.encode_target(texts),
        "hf_corrector bfloat16": lambda: ours.encode_target(texts, compute_dtype="bfloat16"),
    }
    vectors = {name: encode() for name, encode in encoders.items()}
    seconds: dict[str, list[float]] = {name: [] for name in encoders}
    for number in range(arguments.rounds):
        names = list(encoders) if number % 2 else list(encoders)[::-1]
        for name in names:
            started = time.perf_counter()
            encoders[name]()
            seconds[name].append(time.perf_counter() - started)
    report(vectors, seconds, len(texts), np.random.default_rng(arguments.seed))


def load_texts(arguments: argparse.Namespace) -> list[str]:
    if arguments.set is None:
        corpus = standard_library_data().corpus
    else:
        corpus = load_retrieval_data(data_folder(arguments.data, arguments.set)).corpus
    picked = np.random.default_rng(arguments.seed).permutation(len(corpus))[: arguments.texts]
    return column(corpus.select(np.sort(picked)), "text")


def report(
    vectors: dict[str, torch.Tensor], seconds: dict[str, list[float]], texts: int, generator: np.random.Generator
) -> None:
    """Print speed relative to sentence-transformers and how far the vectors are apart."""
    names = list(seconds)
    base, base_seconds = vectors[names[0]], np.array(seconds[names[0]])
    print("encoder                  texts/s   speed ratio [95 %]        largest difference   smallest cosine")
    for name in names:
        spent = np.array(seconds[name])
        rounds = generator.integers(len(spent), size=(5000, len(spent)))
        ratios = np.median(base_seconds[rounds] / spent[rounds], axis=1)
        low, high = np.quantile(ratios, [0.025, 0.975])
        apart = (vectors[name] - base).abs().max().item()
        cosine = F.cosine_similarity(vectors[name], base).min().item()
        print(f"{name:<23} {texts / np.median(spent):8.0f}   {np.median(base_seconds / spent):6.2f} "
              f"[{low:.2f}, {high:.2f}] {apart:24.1e} {cosine:17.6f}")  # fmt: skip


if __name__ == "__main__":
    main()
