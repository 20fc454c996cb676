"""Fine-tune an encoder and keep what its drift looks like, so that other benchmarks need no encoder.

    python examples/benchmarks/drifts.py --data FOLDER --output_dir runs/drifts --set nl2bash

The encoder is fine-tuned on one data set with an online affine corrector. At each of the steps ``--at`` everything a
later benchmark asks for is written to ``OUT/SET-STEP``: old and new vectors of all targets, of the test and of the dev
queries, the targets that training re-encoded for free, and the targets' tokens. Positives of test queries are held out
of the free pairs.
"""

from __future__ import annotations

import argparse
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import data_folder, half_is_fast, print_head
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from hf_corrector._extras import demo_encoder
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.data.retrieval import RetrievalData, positives_as_rows
from hf_corrector.models import DualEncoderModel
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer


@dataclass(frozen=True)
class Drift:
    """One drift: vectors before and after, and what the judgements say.

    Attributes:
        name: Data set and training steps.
        old: Vectors of all targets by the old encoder, ``(n, dim)``.
        new: The same by the new encoder.
        queries_old: Test queries by the old encoder, ``(q, dim)``.
        queries_new: The same by the new encoder.
        queries_other: Queries without judgements (a part of the training queries) by the new encoder, ``(r, dim)``.
        relevant: For each test query its relevant rows and grades.
        free_rows: Targets that training re-encoded, the latest of each, ``(m,)``.
        free_fresh: Their vectors at that time, ``(m, dim)``.
        free_steps: The step of that, ``(m,)``.
        free_clock: How far training had come then, as a share of how far it has come, by the sum of learning rates.
        tokens: Token ids of all targets, one after the other.
        offsets: Where each target's tokens start, ``(n + 1,)``.
        scale: Inverse temperature of the encoder's softmax.
    """

    name: str
    old: torch.Tensor
    new: torch.Tensor
    queries_old: torch.Tensor
    queries_new: torch.Tensor
    queries_other: torch.Tensor
    relevant: list[dict[int, float]]
    free_rows: torch.Tensor
    free_fresh: torch.Tensor
    free_steps: torch.Tensor
    free_clock: torch.Tensor
    tokens: torch.Tensor
    offsets: torch.Tensor
    scale: float

    @property
    def held_out(self) -> torch.Tensor:
        """Rows no fit may see: the relevant targets of the judged queries."""
        return torch.tensor(sorted({row for known in self.relevant for row in known}))


def load_drift(folder: Path) -> Drift:
    """Read what :class:`KeepDrift` wrote."""
    facts = json.loads((folder / "facts.json").read_text())
    relevant = [{int(row): grade for row, grade in known.items()} for known in facts["relevant"]]
    return Drift(facts["name"], relevant=relevant, scale=facts["scale"], **load_file(folder / "drift.safetensors"))


class KeepDrift(TrainerCallback):
    """Write a drift at given steps of a run."""

    def __init__(self, data: RetrievalData, name: str, steps: list[int], folder: Path) -> None:
        self.data, self.name, self.steps, self.folder = data, name, steps, folder
        self.trainer: DualEncoderTrainer | None = None
        self.before: dict[str, torch.Tensor] = {}

    def encode(self) -> dict[str, torch.Tensor]:
        """Encode all targets and the test queries with the weights of now."""
        self.trainer.model.eval()
        judge = self.trainer.run_judge
        fresh = judge.encode_fresh()
        vectors = {"targets": fresh.read(0, len(fresh)), "queries": judge.encode_queries(self.data.test)}
        self.trainer.model.train()
        return vectors

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Remember where everything was before training."""
        self.before = self.encode()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the drift up to this step, if it is one of those asked for."""
        if state.global_step not in self.steps:
            return
        after, free = self.encode(), self.trainer.live_cache.online.window.pairs()
        other = self.trainer.run_judge.encode_queries(self.data.train.select(range(0, len(self.data.train), 8)))
        lists = self.trainer.tokens.tokens(np.arange(len(self.trainer.tokens)))
        folder = self.folder / f"{self.name}-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            "old": self.before["targets"], "new": after["targets"], "queries_old": self.before["queries"],
            "queries_new": after["queries"], "queries_other": other, "free_rows": free.rows, "free_fresh": free.fresh,
            "free_steps": free.steps, "free_clock": (free.progress / free.progress.max()).clamp(min=1e-3),
            "tokens": torch.tensor([one for tokens in lists for one in tokens]),
            "offsets": torch.tensor([0, *np.cumsum([len(tokens) for tokens in lists]).tolist()]),
        }  # fmt: skip
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "drift.safetensors")
        self.trainer.model.save_pretrained(folder / "encoder")
        relevant = positives_as_rows(self.data.test, self.data.corpus)
        facts = {"name": folder.name, "scale": float(self.trainer.model.config.scale), "relevant": relevant}
        (folder / "facts.json").write_text(json.dumps(facts))
        cosine = torch.nn.functional.cosine_similarity(self.before["targets"], after["targets"]).mean()
        print(f"{folder.name}: cosine(old, new) {cosine:.3f}, {len(free.rows)} free pairs", flush=True)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the data sets")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--set", default="nl2bash")
    flags.add_argument("--model", default=None, help="encoder; by default all-MiniLM-L6-v2 of the extra 'demo'")
    flags.add_argument("--layers", type=int, default=6)
    flags.add_argument("--at", type=int, nargs="+", default=[75, 150, 300], help="steps at which the drift is kept")
    flags.add_argument("--max_length", type=int, default=32)
    flags.add_argument("--learning_rate", type=float, default=5e-5)
    flags.add_argument("--window", type=int, default=100, help="steps whose re-encoded targets are kept")
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head(f"drift of an encoder fine-tuned on {arguments.set}", arguments)
    data = load_retrieval_data(data_folder(arguments.data, arguments.set))
    model = DualEncoderModel.from_encoder(
        str(demo_encoder()) if arguments.model is None else arguments.model, num_hidden_layers=arguments.layers,
        query_max_length=arguments.max_length, target_max_length=arguments.max_length,
    )  # fmt: skip
    work = Path(arguments.output_dir) / f"{arguments.set}-work"
    shutil.rmtree(work, ignore_errors=True)
    args = DualEncoderTrainingArguments(
        str(work), max_steps=max(arguments.at), learning_rate=arguments.learning_rate, seed=arguments.seed,
        bf16=half_is_fast(), corrector_window=arguments.window, logging_steps=25, save_strategy="no", report_to=[],
        disable_tqdm=True,
    )  # fmt: skip
    keep = KeepDrift(data, arguments.set, arguments.at, Path(arguments.output_dir))
    trainer = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus, callbacks=[keep])
    keep.trainer = trainer
    trainer.hold_out(data.test)
    trainer.train()
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
