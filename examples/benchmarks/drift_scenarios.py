"""Where correction pays: one encoder fine-tuned in several ways, one upgrade each, one line each.

    python examples/benchmarks/drift_scenarios.py --data FOLDER --output_dir runs/scenarios

In each scenario an encoder is fine-tuned on one set of queries, and an index made before of the judged corpus is
upgraded to it with ``upgrade()``: same task (nl2bash), questions of some sites for those of others, older questions for
newer ones (stackexchange), another domain (squad for scifact), another language than the encoder knows (jaquad).
Pairs are drawn once per scenario; intervals are over judged queries.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from common import compute_dtype, data_folder, fine_tune, print_head
from datasets import Dataset

from hf_corrector import upgrade
from hf_corrector._extras import demo_encoder
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.encoding import EncodeOptions, build_cache
from hf_corrector.index_upgrade.options import UpgradeOptions
from hf_corrector.index_upgrade.report import UpgradeReport
from hf_corrector.metrics import Interval
from hf_corrector.models import DualEncoderModel

# Every second site of the data set, in alphabetical order, is trained on; the others are judged.
TRAINED_SITES = (
    "3dprinting.meta", "beer", "coffee", "french.meta", "history.meta", "matheducators", "quantumcomputing",
)  # fmt: skip


@dataclass(frozen=True)
class Scenario:
    """What the encoder is fine-tuned on and what it is judged on."""

    trained: str
    judged: str
    max_length: int = 64
    train_on: Callable[[str], bool] = lambda site: True
    judge_on: Callable[[str], bool] = lambda site: True


SCENARIOS = {
    "same task (nl2bash)": Scenario("nl2bash", "nl2bash", 32),
    "site to site (stackexchange)": Scenario(
        "stackexchange", "stackexchange", train_on=lambda site: site in TRAINED_SITES,
        judge_on=lambda site: site not in TRAINED_SITES,
    ),
    "old to new dates (stackexchange)": Scenario("stackexchange", "stackexchange"),
    "another domain (squad to scifact)": Scenario("squad", "scifact"),
    "Japanese (jaquad)": Scenario("jaquad", "jaquad"),
}  # fmt: skip


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--data", help="folder that holds the data sets")
    flags.add_argument("--output_dir", required=True)
    flags.add_argument("--scenarios", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    flags.add_argument("--steps", type=int, default=150)
    flags.add_argument("--pairs", type=int, default=1000)
    flags.add_argument("--judge_queries", type=int, default=1000)
    flags.add_argument("--kinds", nargs="+", default=["procrustes", "affine", "kernel"])
    flags.add_argument("--seed", type=int, default=0)
    arguments = flags.parse_args()
    print_head("where correction pays", arguments)
    lines = []
    for name in arguments.scenarios:
        report, cosine = run(SCENARIOS[name], Path(arguments.output_dir) / name.split(" (")[0], arguments)
        print(f"## {name}: cosine(old, new) {cosine:.3f}\n{report.table()}\n\n{report.verdict}\n", flush=True)
        lines.append(line_of(name, cosine, report))
        (Path(arguments.output_dir) / "lines.json").write_text(json.dumps(lines))
    print(
        "scenario                            cosine      old    stale  corrected    fresh   recovery           verdict"
    )
    print("\n".join(lines))


def run(scenario: Scenario, folder: Path, arguments: argparse.Namespace) -> tuple[UpgradeReport, float]:
    """Fine-tune, and upgrade the index made before."""
    trained = load_retrieval_data(data_folder(arguments.data, scenario.trained))
    judged = load_retrieval_data(data_folder(arguments.data, scenario.judged))
    judged = dataclasses.replace(
        judged, test=kept(judged.test, scenario.judge_on), train=kept(judged.train, scenario.judge_on)
    )
    old, new = (load_encoder(scenario) for _ in range(2))
    encoding = EncodeOptions(compute_dtype=compute_dtype(), progress=False)
    cache = build_cache(old, judged.corpus, folder / "old", options=encoding).cache
    data = dataclasses.replace(trained, train=kept(trained.train, scenario.train_on))
    fine_tune(new, data, folder / "training", steps=arguments.steps, seed=arguments.seed)
    options = UpgradeOptions(
        output_dir=folder / "out", kinds=tuple(arguments.kinds), encoding=encoding, seed=arguments.seed,
        judge_queries=min(arguments.judge_queries, len(judged.test)),
    )  # fmt: skip
    report = upgrade(cache, new, judged, num_pairs=arguments.pairs, old_model=old, options=options)
    report.save(folder / "out")
    rows = torch.as_tensor(report.pairs.rows)
    texts = [judged.corpus[row]["text"] for row in rows[:500].tolist()]
    fresh = new.encode_target(texts, compute_dtype=compute_dtype())
    return report, float(torch.nn.functional.cosine_similarity(cache.gather(rows[:500]), fresh).mean())


def kept(split: Dataset, wanted: Callable[[str], bool]) -> Dataset:
    """Keep the queries of some sites."""
    return split.filter(lambda row: wanted(json.loads(row["metadata"] or "{}").get("site", "")))


def load_encoder(scenario: Scenario) -> DualEncoderModel:
    """Load MiniLM with the lengths of a scenario."""
    return DualEncoderModel.from_encoder(
        str(demo_encoder()), query_max_length=scenario.max_length, target_max_length=scenario.max_length
    )


def line_of(name: str, cosine: float, report: UpgradeReport) -> str:
    """Return one line of the map."""
    means, primary = report.judgement.means, report.judgement.primary
    found = [means[one][primary].estimate if one in means else float("nan") for one in ("old", "stale")]
    found += [means[one][primary].estimate for one in ("corrected", "fresh")]
    recovery = report.judgement.recovery["corrected"][primary]
    shown = (
        f"{recovery.estimate:5.2f} [{recovery.low:5.2f}, {recovery.high:5.2f}]"
        if isinstance(recovery, Interval) else "undefined           "
    )  # fmt: skip
    old, stale, corrected, fresh = found
    quality = f"{old:7.3f}  {stale:7.3f}  {corrected:9.3f}  {fresh:7.3f}"
    return f"{name:<35} {cosine:6.3f}  {quality}   {shown}   {report.decision.decision}"


if __name__ == "__main__":
    main()
