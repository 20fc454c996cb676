"""What a run keeps in memory beside the model: bounded, however large the cache is, and less for chunked encoding."""

from __future__ import annotations

import ctypes
import platform
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from forking import forking_context
from peft import LoraConfig, get_peft_model

from hf_corrector.cache.target_cache import TargetCache
from hf_corrector.data.pairs import from_pairs
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.records import EncoderFingerprint
from hf_corrector.sampling import DrawKeys, ExcludedRows
from hf_corrector.scans import ScanPlan
from hf_corrector.training import checks
from hf_corrector.training.arguments import DualEncoderTrainingArguments
from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer
from hf_corrector.training.live_cache import LiveCache

SMALL, MIDDLE, LARGE, DIM = 21_000, 60_000, 400_000, 128
STEPS, BATCH = 4, 8
ALLOWED_GB = 1 / 64  # 16 MiB; corrected rows of the large cache are 195
# Targets, and MiB that may be needed beyond what a cache of 21,000 targets needs: 12 are the scores of a batch. An
# index holds all vectors, with room to grow, and learns from a copy, whatever is allowed for corrected ones.
BOUNDS = {"full": (LARGE, 48), "amortised": (LARGE, 48), "pooled": (LARGE, 48), "shortlist": (MIDDLE, 3 * 29 + 32)}
_M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def size_of(rows: int) -> float:
    """Return the MiB that vectors take."""
    return rows * DIM * 4 / 2**20


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Folders of caches by their size."""
    folder, generator = tmp_path_factory.mktemp("caches"), torch.Generator().manual_seed(0)
    made_by = EncoderFingerprint.of_precomputed("random", normalize=True)
    for rows in (SMALL, MIDDLE, LARGE):
        vectors = torch.nn.functional.normalize(torch.randn(rows, DIM, generator=generator), dim=1)
        TargetCache.from_arrays(folder / str(rows), vectors, (f"t{row}" for row in range(rows)), fingerprint=made_by)
    return {rows: folder / str(rows) for rows in (SMALL, MIDDLE, LARGE)}


def scan_for_some_steps(connection: Connection, caches: list[Path], encoder: str, out: Path, plan: ScanPlan) -> None:
    """Draw from a small cache, then from a large one, as a run does, and let the corrector follow in between."""
    torch.set_num_threads(1)
    # What is freed goes back at once, so that what is measured is what is held and not the allocator's stock.
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    args = DualEncoderTrainingArguments(str(out), report_to=[], use_cpu=True, corrector_update_steps=2)
    for path in caches:
        model, cache = DualEncoderModel.from_encoder(encoder, projection_dim=DIM), TargetCache.open(path)
        checks.attach_corrector(model, args, cache)
        live = LiveCache(cache, model, args)
        connection.send("ready")
        connection.recv()
        for step in range(STEPS):
            draw_and_follow(live, cache, plan, step)
        connection.send("done")


def draw_and_follow(live: LiveCache, cache: TargetCache, plan: ScanPlan, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    queries = torch.nn.functional.normalize(torch.randn(BATCH, DIM, generator=generator), dim=1)
    scan, keys = live.scan(plan, warming_up=False), DrawKeys(seed=0, step=step, query_ids=np.arange(BATCH))
    assert scan is not None
    scan.draw(queries, 4, scale=20.0, excluded=ExcludedRows([[row] for row in range(BATCH)]), keys=keys)
    assert live.online is not None
    rows = torch.randint(len(cache), (64,), generator=generator)
    live.online.observe(rows, cache.gather(rows).roll(1, dims=1), step=step)
    live.update_corrector(step, 1e-3)


def most_extra_memory(caches: list[Path], encoder: str, out: Path, plan: ScanPlan) -> float:
    """Return by how many MiB the memory of a process that belongs to no file grows at most, watched from outside.

    What a process needs anyway it has got with the small cache.
    """
    context = forking_context()
    here, there = context.Pipe()
    process = context.Process(target=scan_for_some_steps, args=(there, caches, encoder, out, plan), daemon=True)
    process.start()
    there.close()
    before = most = 0.0
    for _ in caches:
        assert here.recv() == "ready"
        before = most = anonymous_memory(process.pid)
        here.send("go")
        while not here.poll(0.001):
            most = max(most, anonymous_memory(process.pid))
        assert here.recv() == "done"
    process.join(30)
    process.kill()
    return most - before


def anonymous_memory(process: int | None) -> float:
    """Return the resident memory in MiB without the pages of files, which a system takes back when it needs them.

    Those of the mapped cache itself are among these.
    """
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) / 1024


on_linux = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="reads /proc and sets up glibc's allocator")


@on_linux
@pytest.mark.parametrize("strategy", BOUNDS)
def test_a_scan_of_a_large_cache_keeps_within_its_bound(
    caches: dict[int, Path], tiny_encoder: str, tmp_path: Path, strategy: str
) -> None:
    rows, bound = BOUNDS[strategy]
    plan = ScanPlan(strategy=strategy, refresh_steps=2, snapshot_bytes=int(ALLOWED_GB * 2**30))
    extra = most_extra_memory([caches[SMALL], caches[rows]], tiny_encoder, tmp_path, plan)
    print(f"{strategy}: {extra:.0f} MiB for {size_of(rows):.0f} MiB of cached vectors")
    assert extra < bound
    assert list(tmp_path.glob("scan-snapshot*")) == []


@on_linux
@pytest.mark.parametrize("strategy", ["full", "amortised"])
def test_corrected_rows_that_may_be_kept_are_seen_in_memory(
    caches: dict[int, Path], tiny_encoder: str, tmp_path: Path, strategy: str
) -> None:
    """Keep the measurement above honest: without the bound it shows what it must."""
    extra = most_extra_memory([caches[SMALL], caches[LARGE]], tiny_encoder, tmp_path, ScanPlan(strategy=strategy))
    assert extra > size_of(LARGE - SMALL)


# ---------------------------------------------------------------------- activations


@pytest.mark.parametrize("adapter", [False, True], ids=["whole", "adapter"])
def test_gradient_checkpointing_and_chunks_train_as_the_plain_run(
    tiny_encoder: str, tmp_path: Path, adapter: bool
) -> None:
    rows = [{"anchor": f"where is file {n}", "positive": f"folder {n} of {n % 7}"} for n in range(40)]
    data = from_pairs(Dataset.from_list(rows), dev_fraction=0.1, test_fraction=0.1)

    def losses(name: str, **changes: Any) -> tuple[list[float], int]:
        """Return the losses of a run, and how often the computation of the first layer began."""
        settings = {"max_steps": 4, "per_device_train_batch_size": 8, "num_negatives": 2, "learning_rate": 0.05}
        args = DualEncoderTrainingArguments(
            str(tmp_path / name), logging_steps=1, optim="sgd", report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True, corrector_warmup_steps=1, corrector_update_steps=2, **settings, **changes,
        )  # fmt: skip
        model: Any = DualEncoderModel.from_encoder(tiny_encoder)
        if adapter:
            torch.manual_seed(1)
            model = get_peft_model(model, LoraConfig(target_modules=["query", "value"], init_lora_weights=False))
            # What reentrant checkpointing needs where the weights below the first adapter are frozen.
            model.enable_input_require_grads()
        trainer, calls = DualEncoderTrainer(model, args, train_dataset=data.train, targets=data.corpus), list[int]()
        trainer.prepare()
        inside = trainer.encoder.get_submodule("encoder.encoder.layer.0.attention")
        inside.register_forward_pre_hook(lambda *about: calls.append(1))
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], len(calls)

    plain, computed = losses("plain")
    assert len(set(plain)) == 4
    for name, changes in {
        "checkpointed": {"gradient_checkpointing": True},
        "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        "chunked": {"mini_batch_size": 3},
        "both": {"gradient_checkpointing": True, "mini_batch_size": 3},
    }.items():
        found, computed_again = losses(name, **changes)
        assert found == pytest.approx(plain, rel=1e-3), name
        assert computed_again >= 2 * computed, name
