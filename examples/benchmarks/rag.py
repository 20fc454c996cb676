"""Retrieval-augmented fine-tuning while the index grows stale: what is lost, what correction wins back, what it costs.

    python examples/benchmarks/rag.py --output_dir runs/rag
    python examples/benchmarks/rag.py --output_dir runs/rag --set squad --data FOLDER

A reader (an encoder-decoder that starts from MiniLM) first learns to read from judged passages; this stands for a
language model that can already read, is done once and shared by all runs. (For the default set MiniLM learns it within
200 steps; for squad the reader of the default set learns on, see ``--reader_from`` and ``--gap_steps``.) Then retriever
and reader are trained on answers alone, no judgement of a passage is seen any more, and only what is retrieved for
training differs:

* ``closed_book``: the reader gets no passage;
* ``fixed``: passages come from the index of the untrained retriever, which is not trained;
* ``ignore``: the retriever is trained and searches the index made before training;
* ``corrector``: as before, the index seen through a corrector that follows the drift on the pairs training yields;
* ``refresh``: the index is encoded anew on the schedule ``--refresh_steps``.

Judged on held-out questions, as training goes on and at its end: marginal log-likelihood of the answer
log P(a|x) = log Σ_y P(y|x)·P_LM(a|x,y) and recall of the gold target among 10, over the stale index, the one the run
itself serves, and a fresh one; exact match and F1 of answers written from the second. Differences are paired by
question and seed, their intervals over seeds and questions, both drawn anew. Targets of judged questions are held out
of the corrector's pairs. A run that is in ``--output_dir`` already is not made again.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data_folder, half_is_fast, print_head
from datasets import Dataset
from transformers import TrainerCallback

from hf_corrector._extras import demo_encoder
from hf_corrector.answers import exact_match, f1
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, column, positives_as_rows
from hf_corrector.data.stdlib import standard_library_questions
from hf_corrector.models import DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel
from hf_corrector.rag.default_reader import cross_attention_names, default_reader
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.passages import closed_book
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer

CONDITIONS: dict[str, dict[str, Any]] = {
    "closed_book": {"staleness": "ignore", "objective": "generator_only"},
    "fixed": {"staleness": "ignore", "objective": "generator_only"},
    "ignore": {"staleness": "ignore"},
    "corrector": {"staleness": "corrector"},
    "refresh": {"staleness": "refresh"},
}
MEASURES = ("answer_log_likelihood", "gold_recall@10", "exact_match", "f1")
TRAINING_COSTS = ("train_target_passes", "refresh_target_passes")
TARGET_LENGTH = {"default": 48, "squad": 96}
READER_LENGTH = {"default": 80, "squad": 128}
# Prompts a step while the reader learns to read, and a function that draws as many with their answers, in tokens.
READER_BATCH = 16
Examples = Callable[[torch.Generator], tuple[list[list[int]], list[list[int]]]]


@dataclass(frozen=True)
class Judged:
    """Held-out questions with one answer and the rows of their gold targets."""

    questions: list[str]
    answers: list[list[str]]
    gold: list[dict[int, float]]

    @classmethod
    def of(cls, split: Dataset, corpus: Dataset) -> Judged:
        """Take them from a split."""
        return cls(column(split, "query"), column(split, "answers"), positives_as_rows(split, corpus))

    def first(self, count: int) -> Judged:
        """Keep so many of them."""
        return Judged(self.questions[:count], self.answers[:count], self.gold[:count])


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the data sets")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--set", choices=list(TARGET_LENGTH), default="default")
    flags.add_argument("--layers", type=int, default=6, help="of the retriever")
    flags.add_argument("--reader_layers", type=int, default=6, help="of each half of the reader")
    flags.add_argument(
        "--reader_steps", type=int, default=200, help="of 16 questions, in which the reader learns to read"
    )
    flags.add_argument(
        "--gap_steps", type=int, default=0, help="of 16 gaps in passages, in which the reader learns to copy before"
    )
    flags.add_argument("--reader_from", help="folder of a run's model whose reader learns on, instead of a new one")
    flags.add_argument(
        "--reader_learning_rates", type=float, nargs=2, default=[2e-4, 6e-4],
        help="while it learns to read, and of its attention to what it has read",
    )  # fmt: skip
    flags.add_argument("--steps", type=int, default=80)
    flags.add_argument("--batch", type=int, default=8, help="questions a step")
    flags.add_argument("--passages", type=int, default=4)
    flags.add_argument("--learning_rate", type=float, default=1.5e-4, help="of the retriever")
    flags.add_argument("--warmup_steps", type=int, default=10)
    flags.add_argument("--objective", default="marginal")
    flags.add_argument("--refresh_steps", default="20")
    flags.add_argument("--corrector_kind", default="kernel")
    flags.add_argument("--corrector_side", default="tokens")
    flags.add_argument("--questions", type=int, default=500, help="held-out questions to judge by")
    flags.add_argument("--curve_questions", type=int, default=64, help="of these, while training")
    flags.add_argument("--written_questions", type=int, default=100, help="of these, to which answers are written")
    flags.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    flags.add_argument("--conditions", nargs="+", choices=list(CONDITIONS), default=list(CONDITIONS))
    arguments = flags.parse_args()
    if arguments.reader_steps < 1 or arguments.gap_steps < 0:
        flags.error(
            f"--reader_steps, --gap_steps: expected at least 1 and 0, got {arguments.reader_steps} and "
            f"{arguments.gap_steps}"
        )
    print_head("retrieval-augmented fine-tuning on a stale index", arguments)
    data = load(arguments)
    regime = f"{arguments.steps}-steps-at-{arguments.learning_rate}-{arguments.passages}-passages-{arguments.objective}"
    start = f"{arguments.set}-{arguments.layers}-layers-{arguments.reader_layers}-reader-{arguments.reader_steps}-steps"
    start += f"-after-{arguments.gap_steps}-gaps" if arguments.gap_steps else ""
    start_folder = Path(arguments.output_dir) / start
    folder = start_folder / regime
    folder.mkdir(parents=True, exist_ok=True)
    warm_reader(arguments, data, start_folder)
    for seed in arguments.seeds:
        for condition in arguments.conditions:
            file = folder / f"{condition}-{seed}.json"
            if not file.exists():
                found = run(arguments, data, condition, seed, folder, start_folder)
                file.write_text(json.dumps(found))
    print_tables(folder)
    draw(folder)


def load(arguments: argparse.Namespace) -> RetrievalData:
    """Load questions, answers and targets of one set."""
    if arguments.set == "default":
        return standard_library_questions()
    return load_retrieval_data(data_folder(arguments.data, arguments.set))


def judged_questions(arguments: argparse.Namespace, data: RetrievalData) -> Dataset:
    """Return the test questions that are judged, drawn by a fixed seed."""
    order = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(0))[: arguments.questions]
    return data.test.select(order.tolist())


def readable(split: Dataset, model: RetrievalAugmentedModel) -> Dataset:
    """Keep the questions whose first answer the reader can write."""
    room = model.config.answer_max_length - 2
    tokens = model.reader_tokenizer([one[0] for one in column(split, "answers")], add_special_tokens=False)
    return split.select([row for row, ids in enumerate(tokens["input_ids"]) if len(ids) <= room])


# ---------------------------------------------------------------- the reader


def warm_reader(arguments: argparse.Namespace, data: RetrievalData, folder: Path) -> None:
    """Teach a reader to read from judged passages, once for all runs."""
    if (folder / "config.json").exists():
        return
    retriever = DualEncoderModel.from_encoder(
        str(demo_encoder()), num_hidden_layers=arguments.layers, query_max_length=32,
        target_max_length=TARGET_LENGTH[arguments.set],
    )  # fmt: skip
    if arguments.reader_from is None:
        reader, tokenizer = default_reader(num_hidden_layers=arguments.reader_layers)
    else:
        before = RetrievalAugmentedModel.from_pretrained(arguments.reader_from)
        reader, tokenizer = before.generator, before.reader_tokenizer
    model = RetrievalAugmentedModel.from_parts(
        retriever, reader, tokenizer, reader_max_length=READER_LENGTH[arguments.set], answer_max_length=16
    )
    train, started = readable(data.train, model), time.time()
    texts = column(data.corpus, "text")
    stages: list[tuple[int, Examples]] = [(arguments.reader_steps, judged_examples(model, train, data))]
    if arguments.gap_steps:
        stages.insert(0, (arguments.gap_steps, gap_examples(model, texts)))
    train_reader(model, stages, learning_rates=arguments.reader_learning_rates, seed=0)
    judged = Judged.of(readable(judged_questions(arguments, data), model), data.corpus)
    generator = torch.Generator().manual_seed(0)
    for name, rows in {
        "the gold target": [next(iter(one)) for one in judged.gold],
        "a random one": torch.randint(len(texts), (len(judged.gold),), generator=generator).tolist(),
    }.items():  # fmt: skip
        loss = reader_loss(model, judged, [texts[row] for row in rows])
        print(f"reader, {time.time() - started:.0f} s: held-out loss per token {loss:.2f} with {name}", flush=True)
    model.save_pretrained(folder)


def judged_examples(model: RetrievalAugmentedModel, split: Dataset, data: RetrievalData) -> Examples:
    """Draw questions with their first positive and their answer."""
    style, tokenizer, texts = model.reader.format, model.reader, column(data.corpus, "text")
    questions = tokenizer.questions(column(split, "query"))
    answers = tokenizer.answers([one[0] for one in column(split, "answers")])
    gold = tokenizer.passages([texts[next(iter(rows))] for rows in positives_as_rows(split, data.corpus)])

    def draw(generator: torch.Generator) -> tuple[list[list[int]], list[list[int]]]:
        rows = torch.randint(len(questions), (READER_BATCH,), generator=generator).tolist()
        return [style.prompt(questions[row], [gold[row]]) for row in rows], [answers[row] for row in rows]

    return draw


def gap_examples(model: RetrievalAugmentedModel, texts: list[str]) -> Examples:
    """Draw passages, asked what stands in a gap of 1 to 4 tokens, of which 8 before and 8 after it are shown.

    This teaches to find and to copy without a question or an answer of the data set.
    """
    style, mask = model.reader.format, int(model.reader_tokenizer.mask_token_id)
    shown, longest = 8, 4
    passages = [one for one in model.reader.passages(texts) if len(one) >= 2 * shown + longest]
    # A passage that does not fit beside its question is cut at its end, where there must be no gap.
    room = style.field_room - (2 * shown + 1)

    def draw(generator: torch.Generator) -> tuple[list[list[int]], list[list[int]]]:
        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high + 1, (1,), generator=generator))

        prompts, hidden = [], []
        for row in torch.randint(len(passages), (READER_BATCH,), generator=generator).tolist():
            passage, width = passages[row][:room], number(1, longest)
            start = number(shown, len(passage) - shown - width)
            end = start + width
            question = [*passage[start - shown : start], mask, *passage[end : end + shown]]
            prompts.append(style.prompt(question, [passage]))
            hidden.append([*passage[start:end], style.end])
        return prompts, hidden

    return draw


def train_reader(
    model: RetrievalAugmentedModel, stages: Sequence[tuple[int, Examples]], *, learning_rates: Sequence[float],
    seed: int,
) -> None:  # fmt: skip
    """Train the reader alone on drawn prompts and answers, for some steps on each kind of them.

    Args:
        model: Holds the reader.
        stages: Steps, and what is drawn in them.
        learning_rates: Of the reader, and of its attention to what it has read.
        seed: Of the draws.
    """
    reader = model.generator
    attending = cross_attention_names(reader)
    groups = [
        {"params": [one for name, one in reader.named_parameters() if (name in attending) == new], "lr": rate}
        for new, rate in zip((False, True), learning_rates, strict=True)
    ]
    steps = sum(count for count, _ in stages)
    optimizer = torch.optim.AdamW(groups)
    # Up over 30 steps, then level, then down to a twentieth over the second half.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 30, max(0.05, 2 - 2 * step / steps))
    )
    generator = torch.Generator().manual_seed(seed)
    reader.train()
    for examples in (one for count, one in stages for _ in range(count)):
        prompts, wanted = examples(generator)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half_is_fast()):
            loss = -model.read(prompts, wanted).sum() / sum(map(len, wanted))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    reader.eval()


@torch.no_grad()
def reader_loss(model: RetrievalAugmentedModel, judged: Judged, passages: list[str]) -> float:
    """Return the reader's loss per token on given passages."""
    style, tokenizer = model.reader.format, model.reader
    answers = tokenizer.answers([one[0] for one in judged.answers])
    pairs = zip(tokenizer.questions(judged.questions), tokenizer.passages(passages), strict=True)
    prompts = [style.prompt(question, [passage]) for question, passage in pairs]
    found = torch.cat([
        model.read(prompts[start : start + 32], answers[start : start + 32]) for start in range(0, len(prompts), 32)
    ])  # fmt: skip
    return -float(found.sum()) / sum(map(len, answers))


# ---------------------------------------------------------------- one run


class Curve(TrainerCallback):
    """Judge a run while it trains, over the stale index and over the one it serves."""

    def __init__(self, at: tuple[int, ...], judged: Judged) -> None:
        self.at, self.judged, self.points = at, judged, list[dict[str, Any]]()
        self.trainer: RetrievalAugmentedTrainer | None = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Judge at the steps asked for."""
        if state.global_step in self.at:
            self.note(state.global_step)

    def note(self, step: int) -> None:
        """Measure after so many steps; the index as it was at first only where it is not what is served."""
        live = self.trainer.live_cache
        views = {"served": live.corrected} | ({} if self.trainer.args.staleness == "ignore" else {"stale": live.first})
        for view, vectors in views.items():
            self.points.append({"step": step, "view": view, **judge(self.trainer, vectors, self.judged)})


def run(
    arguments: argparse.Namespace, data: RetrievalData, condition: str, seed: int, folder: Path, start: Path
) -> dict[str, Any]:
    """Train under one condition from the model in ``start``, and judge over every index."""
    out = folder / f"running-{condition}-{seed}"
    shutil.rmtree(out, ignore_errors=True)
    model = RetrievalAugmentedModel.from_pretrained(start)
    reads = condition != "closed_book"
    settings: dict[str, Any] = {"staleness": "ignore", "objective": arguments.objective, **CONDITIONS[condition]}
    if condition == "corrector":
        settings |= {"corrector_kind": arguments.corrector_kind, "corrector_side": arguments.corrector_side}
        settings |= {"corrector_window": arguments.steps, "corrector_update_steps": 10, "corrector_warmup_steps": 10}
    if condition == "refresh":
        settings["refresh_steps"] = arguments.refresh_steps
    args = RetrievalAugmentedTrainingArguments(
        str(out), max_steps=arguments.steps, learning_rate=arguments.learning_rate, generator_learning_rate=1e-4,
        warmup_steps=arguments.warmup_steps,
        per_device_train_batch_size=arguments.batch, num_passages=arguments.passages if reads else 0, seed=seed,
        bf16=half_is_fast(), cache_dir=str(folder / "cache"), logging_steps=20, save_strategy="no", report_to=[],
        disable_tqdm=True, **settings,
    )  # fmt: skip
    judged = Judged.of(readable(judged_questions(arguments, data), model), data.corpus)
    curve = Curve(
        tuple(range(0, arguments.steps + 1, arguments.steps // 4))[1:], judged.first(arguments.curve_questions)
    )
    trainer = RetrievalAugmentedTrainer(
        model, args, train_dataset=readable(data.train, model), targets=data.corpus, callbacks=[curve] if reads else []
    )
    curve.trainer = trainer
    trainer.hold_out(data.test)
    trainer.prepare()
    if reads:
        curve.note(0)
    started = time.time()
    trainer.train()
    seconds = time.time() - started
    views: dict[str, Any] = {"served": None}
    if reads:
        views = {"stale": trainer.live_cache.first, "served": trainer.live_cache.corrected}
        views["fresh"] = trainer.run_judge.encode_fresh()
    evaluation = {
        name: judge(trainer, view, judged, written=arguments.written_questions if name == "served" else 0)
        for name, view in views.items()
    }
    shown = {
        name: {key: round(float(np.mean(one)), 4) for key, one in found.items()} for name, found in evaluation.items()
    }
    print(f"{condition} seed {seed}: {seconds:.0f} s, {trainer.cost}\n  {shown}", flush=True)
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    shutil.rmtree(out)
    return {"evaluation": evaluation, "curve": curve.points, "cost": trainer.cost, "seconds": seconds, "logs": logs}


def judge(trainer: RetrievalAugmentedTrainer, view: Any, judged: Judged, *, written: int = 0) -> dict[str, list[float]]:
    """Return every measure per question over one view of the targets; answers are written to the first ``written``."""
    model, k = trainer.rag, trainer.args.num_passages
    was_training = model.training
    find = closed_book if k == 0 else trainer.nearest_passages(view, k=k)
    options = GenerationOptions(batch_size=32, compute_dtype="bfloat16" if half_is_fast() else "float32")
    first = [one[0] for one in judged.answers]
    found: dict[str, list[float]] = {
        "answer_log_likelihood": model.answer_log_likelihoods(
            judged.questions, first, find, options=options
        ).marginal.tolist()
    }
    if k:
        nearest = trainer.nearest_passages(view, k=10)(trainer.encoder.encode_query(judged.questions))
        rows = nearest.candidates.ids.tolist()
        found["gold_recall@10"] = [
            float(bool(set(ids) & set(gold))) for ids, gold in zip(rows, judged.gold, strict=True)
        ]
    if written:
        some = judged.first(written)
        texts = [one.best.text for one in model.generate(some.questions, find, options=options)]
        pairs = list(zip(texts, some.answers, strict=True))
        found["exact_match"] = [exact_match(text, answers) for text, answers in pairs]
        found["f1"] = [f1(text, answers) for text, answers in pairs]
    model.train(was_training)
    return found


# ---------------------------------------------------------------- tables and the drawing


def print_tables(folder: Path) -> None:
    """Print quality over the index each run serves, and paired differences."""
    runs = read_runs(folder)
    seeds = sorted(set.intersection(*(set(found) for found in runs.values())))
    if not seeds:
        print("no seed has run under every condition yet")
        return
    print(f"\n## {folder.parent.name}, {folder.name}: {len(seeds)} seeds, over the index each run serves")
    for measure in MEASURES:
        print(f"\n{measure}\ncondition      value [95 %], and minus whatever of fixed, ignore and refresh was run")
        values = {name: table(found, seeds, "served", measure) for name, found in runs.items()}
        values = {name: one for name, one in values.items() if one is not None}
        for name, one in values.items():
            parts = [f"{name:<12} {interval_text(one, '.4f')}"]
            for other in ("fixed", "ignore", "refresh"):
                if other in values and other != name:
                    parts.append(f"minus {other} {interval_text(one - values[other], '+.4f')}")
            print("   ".join(parts))
    print("\nthe same encoders and readers over other indexes, and the index served minus these")
    for name, found in runs.items():
        for view in ("stale", "fresh"):
            for measure in MEASURES[:2]:
                other, served = (table(found, seeds, one, measure) for one in (view, "served"))
                if other is not None and served is not None:
                    gain = interval_text(served - other, "+.4f")
                    print(f"{name:<12}   {view:<6} {measure:<24} {other.mean():9.4f}   {gain}")
    print("\nencoder passes over targets while training")
    for name, found in runs.items():
        costs = {
            key: int(np.mean([found[seed]["cost"].get(key, 0) for seed in seeds]))
            for key in (*TRAINING_COSTS, "probe_target_passes")
        }
        print(f"{name:<12}   {costs}")


def read_runs(folder: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Return all runs of a folder by condition and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for name in CONDITIONS:
        for file in sorted(folder.glob(f"{name}-[0-9]*.json")):
            found.setdefault(name, {})[int(file.stem.rsplit("-", 1)[1])] = json.loads(file.read_text())
    return found


def table(found: dict[int, dict[str, Any]], seeds: list[int], view: str, measure: str) -> np.ndarray | None:
    """Return one measure as ``(seeds, questions)``; None where it was not measured."""
    evaluations = [found[seed]["evaluation"] for seed in seeds]
    if any(measure not in one.get(view, {}) for one in evaluations):
        return None
    return np.array([one[view][measure] for one in evaluations])


def interval_text(values: np.ndarray, form: str) -> str:
    """Return mean, 95 % interval and standard errors from zero over seeds and questions, ``(seeds, questions)``."""
    generator, means = np.random.default_rng(0), []
    for _ in range(2000):
        seeds = generator.integers(len(values), size=len(values))
        questions = generator.integers(values.shape[1], size=values.shape[1])
        means.append(values[seeds][:, questions].mean())
    low, high = np.percentile(means, (2.5, 97.5))
    errors = values.mean() / max(float(np.std(means)), 1e-9)
    return f"{values.mean():{form}} [{low:{form}}, {high:{form}}] ({errors:+.1f} se)"


def draw(folder: Path) -> None:
    """Draw likelihood and recall over training steps; skipped without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        print("not drawn: matplotlib is not installed")
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for name, found in read_runs(folder).items():
        for measure, axes in zip(MEASURES[:2], panels, strict=True):
            for view in ("served", "stale") if name == "corrector" else ("served",):
                points: dict[int, list[float]] = {}
                for one in found.values():
                    for point in one["curve"]:
                        if point["view"] == view:
                            points.setdefault(point["step"], []).append(float(np.mean(point[measure])))
                if points:
                    label = name if view == "served" else f"{name}, its index uncorrected"
                    style = "o-" if view == "served" else "o:"
                    axes.plot(sorted(points), [np.mean(points[step]) for step in sorted(points)], style, label=label)
            axes.set(xlabel="training steps", ylabel=measure.replace("_", " "))
            axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.suptitle(f"{folder.name}: held-out questions over the index each run serves")
    figure.savefig(folder / "over-steps.png", dpi=150)
    pyplot.close(figure)
    print("drawn: over-steps.png")


if __name__ == "__main__":
    main()
