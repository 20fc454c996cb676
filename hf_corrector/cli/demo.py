"""``hf-corrector demo``: the main job on data made on this machine."""

from __future__ import annotations

import torch

from hf_corrector.cli.common import parser
from hf_corrector.cli.train import WhatToTrain, train_and_judge
from hf_corrector.scans import fast_in_bfloat16
from hf_corrector.training.arguments import DualEncoderTrainingArguments

EXAMPLES = """\
  hf-corrector demo --output_dir demo
  hf-corrector demo --output_dir demo-full --num_layers 6 --max_steps 300 --seed 1
"""


def run(argv: list[str]) -> int:
    """Run the command."""
    flags = parser(
        "demo",
        "Fine-tune an encoder on Python's standard library (docstring to code) and compare the cache made before with "
        "the corrected and with the re-encoded one. Downloads nothing.",
        EXAMPLES,
    )
    flags.add_argument("--output_dir", required=True, metavar="OUT", help="folder of the run")
    flags.add_argument("--model", metavar="M", help="another encoder than the demo's MiniLM")
    flags.add_argument("--num_layers", type=int, default=3, help="keep only the encoder's first layers")
    flags.add_argument("--max_length", type=int, default=48, help="cut queries and targets to so many tokens")
    flags.add_argument("--max_steps", type=int, default=80, help="training steps")
    flags.add_argument("--seed", type=int, default=42, help="seed of all random choices")
    flags.add_argument("--quiet", action="store_true", help="no progress bars")
    arguments = flags.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = DualEncoderTrainingArguments(
        arguments.output_dir, max_steps=arguments.max_steps, learning_rate=1e-4, warmup_steps=0.1, seed=arguments.seed,
        logging_steps=20, save_strategy="no", report_to=[], bf16=fast_in_bfloat16(device),
    )  # fmt: skip
    what = WhatToTrain(
        model=arguments.model,
        num_layers=arguments.num_layers,
        max_length=arguments.max_length,
        quiet=arguments.quiet,
    )
    report = train_and_judge(what, args, command="demo")
    print(f"\n{report.table()}\n\n{report.judgement.sentence()}")
    print(f"\nModel, corrector, cache and run.json are in {arguments.output_dir}. Try:")
    print(
        f"  hf-corrector search --cache {arguments.output_dir}/cache --model {arguments.output_dir} "
        f"--corrector {arguments.output_dir}/corrector --data stdlib --query 'remove a directory tree'"
    )
    print(f"  hf-corrector report {arguments.output_dir}")
    return 0
