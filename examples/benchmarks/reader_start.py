"""How fast the default reader learns to read, by what its new weights start from.

    python examples/benchmarks/reader_start.py --steps 150

The encoder has no attention to another text and no layer before the vocabulary. Compared are drawing both anew, as
transformers does, starting attention to the text read from attention to itself, and this with an identity before the
vocabulary, as :func:`hf_corrector.rag.default_reader.default_reader` does. Learnt on gold targets of the standard
library's questions, judged by the loss per token of held-out answers with their gold target and with a random one: a
reader that reads is good at the first and bad at the second.
"""

from __future__ import annotations

import argparse
import time

import torch
from common import print_head
from rag import Judged, judged_examples, judged_questions, readable, reader_loss, train_reader
from torch import nn
from transformers import EncoderDecoderModel

from hf_corrector._extras import demo_encoder
from hf_corrector.data.retrieval import column
from hf_corrector.data.stdlib import standard_library_questions
from hf_corrector.models import DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import cross_attention_names, default_reader

STARTS = ("drawn", "attention", "attention and identity")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--reader_layers", type=int, default=6)
    flags.add_argument("--steps", type=int, default=150, help="of 16 questions")
    flags.add_argument("--questions", type=int, default=200, help="held-out questions to judge by")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0])
    flags.add_argument("--starts", nargs="+", choices=STARTS, default=list(STARTS))
    arguments = flags.parse_args()
    print_head("what the default reader starts from", arguments)
    data = standard_library_questions()
    retriever = DualEncoderModel.from_encoder(str(demo_encoder()), num_hidden_layers=1)
    print("start                    seed   seconds   loss per token, gold target   random target")
    for seed in arguments.seeds:
        for start in arguments.starts:
            reader, tokenizer = default_reader(num_hidden_layers=arguments.reader_layers)
            draw_anew(reader, start, seed)
            model = RetrievalAugmentedModel.from_parts(
                retriever, reader, tokenizer, reader_max_length=80, answer_max_length=16
            )
            train, started = readable(data.train, model), time.time()
            stages = [(arguments.steps, judged_examples(model, train, data))]
            train_reader(model, stages, learning_rates=(2e-4, 6e-4), seed=seed)
            judged = Judged.of(readable(judged_questions(arguments, data), model), data.corpus)
            texts, generator = column(data.corpus, "text"), torch.Generator().manual_seed(0)
            others = torch.randint(len(texts), (len(judged.gold),), generator=generator).tolist()
            gold = reader_loss(model, judged, [texts[next(iter(one))] for one in judged.gold])
            other = reader_loss(model, judged, [texts[row] for row in others])
            seconds = time.time() - started
            print(f"{start:<24} {seed:>4}   {seconds:7.0f}   {gold:27.2f}   {other:13.2f}", flush=True)


@torch.no_grad()
def draw_anew(reader: EncoderDecoderModel, start: str, seed: int) -> None:
    """Draw the weights that do not start from anything under ``start``, in place, as BERT draws its own."""
    drawn = {
        "drawn": [*cross_attention_names(reader), "decoder.cls.predictions.transform.dense.weight"],
        "attention": ["decoder.cls.predictions.transform.dense.weight"],
    }.get(start, [])
    generator = torch.Generator().manual_seed(seed)
    for name, weight in reader.named_parameters():
        if name in drawn and weight.ndim == 2:
            nn.init.normal_(weight, std=reader.config.decoder.initializer_range, generator=generator)
        elif name in drawn:
            nn.init.constant_(weight, float(name.endswith("LayerNorm.weight")))


if __name__ == "__main__":
    main()
