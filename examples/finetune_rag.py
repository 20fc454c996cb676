"""Fine-tune a retriever and a small reader on questions about Python's library, from answers alone; runs offline.

pip install 'hf-corrector[demo]', then python examples/finetune_rag.py. The retriever is trained while its cache of
passages goes stale; a corrector, fitted on the passages each step encodes anyway, stands in for encoding all of them
again. At the end the same questions are answered from stale, corrected and freshly encoded passages.
"""

import sysconfig
import tempfile
from pathlib import Path

from hf_corrector import DualEncoderModel
from hf_corrector._extras import demo_encoder
from hf_corrector.data.stdlib import python_source_questions
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import default_reader
from hf_corrector.rag.evaluation import judge_trained, reading_options
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer


def main(
    output_dir: str, *, sources: str | None = None, max_steps: int = 300, layers: int = 6, judged: int = 100
) -> None:
    """Compose, train, judge and answer."""
    # A question is a docstring, its answer the name of the function, and only the source of that function holds it.
    data = python_source_questions(Path(sources or sysconfig.get_path("stdlib")))

    # Any encoder and any causal or sequence-to-sequence model will do; these two come with the package.
    retriever = DualEncoderModel.from_encoder(str(demo_encoder()), num_hidden_layers=layers, target_max_length=64)
    reader, tokenizer = default_reader(num_hidden_layers=layers)
    model = RetrievalAugmentedModel.from_parts(retriever, reader, tokenizer, reader_max_length=80)

    args = RetrievalAugmentedTrainingArguments(
        output_dir, max_steps=max_steps, objective="marginal", num_passages=4, staleness="corrector",
        # What the reader attends to its passages with is new to that task and has to learn faster than the rest.
        learning_rate=2e-5, generator_learning_rate=1e-4, cross_attention_learning_rate=5e-4,
        logging_steps=max(1, max_steps // 10), report_to=[], corrector_warmup_steps=min(20, max_steps // 2),
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = RetrievalAugmentedTrainer(model, args, train_dataset=data.train, targets=data.corpus)
    # What the test questions look for never teaches the corrector, so that all of them can judge it.
    test = data.test.select(range(min(judged, len(data.test))))
    trainer.hold_out(test)
    trainer.train()
    trainer.save_model()

    print(judge_trained(trainer, test, options=reading_options(args)).table())
    question = test["query"][0]
    (found,) = model.generate([question], trainer.nearest_passages())
    print(f"\n{question}\n  {found.best.text}, from {data.corpus['id'][found.passage_row]}")
    print(f"  right would be {' or '.join(test['answers'][0])}")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        main(folder)
