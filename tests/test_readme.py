"""What README and pages say is run as it is written, with a small encoder and a small folder in place of large ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_stand_in import Hub
from rag_helpers import generator_of

from hf_corrector import EncodeOptions, TargetCache, UpgradeOptions, build_cache, upgrade
from hf_corrector.cli.main import main
from hf_corrector.data.datasets import load_retrieval_data
from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedModel

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "examples").rglob("*.md"))]
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
README = TEXTS["README.md"]
WORDS = ["copy", "move", "list", "count", "sort", "find", "print", "replace", "delete", "join", "split", "merge"]


def block(language: str, containing: str, page: str = "README.md") -> str:
    """Return the one block of a page that contains something."""
    blocks = re.findall(rf"```{language}\n(.*?)```", TEXTS[page], flags=re.DOTALL)
    found = [text for text in blocks if containing in text]
    assert len(found) == 1
    return found[0]


@pytest.fixture
def workplace(tiny_encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with my_beir_folder and, under the name the README uses, an encoder."""
    monkeypatch.chdir(tmp_path)
    DualEncoderModel.from_encoder(tiny_encoder).encoder.save_pretrained(tmp_path / "intfloat/e5-base-v2")
    for file in Path(tiny_encoder).glob("tok*"):
        (tmp_path / "intfloat/e5-base-v2" / file.name).write_bytes(file.read_bytes())
    folder = tmp_path / "my_beir_folder"
    (folder / "qrels").mkdir(parents=True)
    targets = [{"_id": f"t{n}", "text": f"{WORDS[n % 12]} the files number {n}"} for n in range(60)]
    queries = [{"_id": f"q{n}", "text": f"how to {WORDS[n % 12]} {n}"} for n in range(60)]
    for name, rows in (("corpus", targets), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split, rows in (("train", range(40)), ("dev", range(40, 50)), ("test", range(50, 60))):
        lines = ["query-id\tcorpus-id\tscore", *(f"q{n}\tt{n}\t1" for n in rows)]
        (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_python_example_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python", "load_retrieval_data(").replace("max_steps=1000", "max_steps=3, report_to=[]")
    names: dict[str, object] = {"stale_vectors": torch.randn(4, 32)}
    exec(compile(code, "README.md", "exec"), names)
    assert tuple(names["fresh"].shape) == (4, 32)  # type: ignore[attr-defined]
    assert "MRR@10" in capsys.readouterr().out


def test_the_shell_examples_run(workplace: Path) -> None:
    lines = block("bash", "hf-corrector embed").strip().splitlines()
    assert len(lines) == 5
    for line in lines:
        words = shlex.split(line.replace("--max_steps 1000", "--max_steps 3 --report_to none"))
        assert words[0] == "hf-corrector" and main(words[1:]) == 0, line


@pytest.fixture
def upgradable(workplace: Path) -> Path:
    """The workplace with an old_cache and a new-model whose vectors differ a little."""
    encoder = "intfloat/e5-base-v2"
    assert main(["embed", "--data", "my_beir_folder", "--model", encoder, "--output_dir", "old_cache", "--quiet"]) == 0
    model = DualEncoderModel.from_encoder(encoder)
    with torch.no_grad():
        for number, weight in enumerate(model.encoder.parameters()):
            weight += 0.02 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(number))
    model.save_pretrained("new-model")
    return workplace


def test_the_upgrade_example_runs(upgradable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python", "import upgrade").replace("num_pairs=2000", "num_pairs=30")
    names: dict[str, object] = {"data": load_retrieval_data("my_beir_folder")}
    exec(compile(code, "README.md", "exec"), names)
    assert "full re-embed" in capsys.readouterr().out
    assert names["report"].go == Path("new_cache").is_dir()  # type: ignore[attr-defined]


def test_the_example_of_mapping_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sample's vectors are a rotation of the old ones, so that the verdict is go and something is written."""
    generator = np.random.default_rng(0)
    old, turn = generator.normal(size=(400, 16)), np.linalg.qr(generator.normal(size=(16, 16)))[0]
    rows = np.arange(0, 400, 2)
    for name, array in {"vectors": old, "sample": (old @ turn)[rows]}.items():
        np.save(f"{name}.npy", array.astype(np.float32))
    code = block("python", "upgrade_vectors(", "examples/mapping_old_to_new_embeddings.md")
    assert len(code.replace("\n\n", "\n").splitlines()) <= 5
    names: dict[str, object] = {"rows": rows}
    exec(compile(code, "mapping.md", "exec"), names)
    assert names["report"].go and "procrustes" in capsys.readouterr().out  # type: ignore[attr-defined]
    assert np.abs(np.load("corrected.npy") - old @ turn).max() < 0.01 * np.abs(old).max()


def test_the_upgrade_commands_run(upgradable: Path) -> None:
    lines = block("bash", "--old-cache").strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("--pairs 2000", "--pairs 30"))
        status = main(words[1:])
        assert status in ((0, 3, 4) if words[1] == "upgrade" else (0,)), line


def test_the_retriever_example_runs(upgradable: Path) -> None:
    corrector = CorrectorModel(CorrectorConfig(kind="affine", input_dim=32))
    names: dict[str, object] = {"corrector": corrector, "query_vectors": torch.randn(2, 32)}
    exec(compile(block("python", "CorrectedRetriever(", "examples/upgrade.md"), "README.md", "exec"), names)
    assert names["found"].rows.shape == (2, 10)  # type: ignore[attr-defined]


def test_the_plan_command_runs(upgradable: Path) -> None:
    command = re.search(r"`(hf-corrector plan [^`]*)`", TEXTS["examples/upgrade.md"])
    assert command is not None
    words = shlex.split(command.group(1).replace("\n", " ").replace("--probe 500", "--probe 45"))
    assert main(words[1:]) == 0


@pytest.fixture
def answerable(workplace: Path) -> Path:
    """The workplace with my_questions, where queries have answers, and a tiny reader under the name the page uses."""
    source = workplace / "my_beir_folder"
    (workplace / "my_questions/qrels").mkdir(parents=True)
    for file in source.rglob("*.*"):
        (workplace / "my_questions" / file.relative_to(source)).write_bytes(file.read_bytes())
    rows = [{"_id": f"q{n}", "text": f"how to {WORDS[n % 12]} {n}", "answers": [f"files {n}"]} for n in range(60)]
    (workplace / "my_questions/queries.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader, tokenizer = generator_of("t5")
    for part in (reader, tokenizer):
        part.save_pretrained(workplace / "google/flan-t5-small")
    return workplace


def test_the_example_of_reading_runs(answerable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code = block("python", "RetrievalAugmentedTrainer(", "examples/rag.md")
    exec(compile(code.replace("max_steps=1000", "max_steps=2, report_to=[]"), "rag.md", "exec"), {})
    assert re.search(r" -\d.* t\d+\n$", capsys.readouterr().out)


def test_the_commands_of_reading_run(answerable: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    lines = block("bash", "rag-train", "examples/rag.md").strip().splitlines()
    assert len(lines) == 3
    for line in lines:
        words = shlex.split(line.replace("--max_steps 1000", "--max_steps 2 --report_to none"))
        assert main(words[1:]) == 0, line
    assert "from t" in capsys.readouterr().out
    named = re.search(r'RetrievalAugmentedModel.from_pretrained\("([^"]*)"\)', TEXTS["examples/rag.md"])
    assert named is not None and RetrievalAugmentedModel.from_pretrained(named.group(1)).reader


def test_the_example_of_langchain_runs(upgradable: Path) -> None:
    pytest.importorskip("langchain_core")
    names: dict[str, object] = {
        "new_model": DualEncoderModel.from_pretrained("new-model"), "data": load_retrieval_data("my_beir_folder"),
        "corrector": CorrectorModel(CorrectorConfig(kind="affine", input_dim=32)),
    }  # fmt: skip
    exec(compile(block("python", "TextSearch(", "examples/rag.md"), "rag.md", "exec"), names)
    assert len(names["documents"]) == 4  # type: ignore[arg-type]


@pytest.fixture
def fitted(upgradable: Path, tiny_model: DualEncoderModel) -> Path:
    """The workplace with old-model, its cache, and what an upgrade to new-model has fitted."""
    tiny_model.save_as_sentence_transformer("old-model")
    old = DualEncoderModel.from_encoder("old-model")
    data = load_retrieval_data("my_beir_folder")
    shutil.rmtree("old_cache")
    build_cache(old, data.corpus, "old_cache", options=EncodeOptions(progress=False))
    new = DualEncoderModel.from_pretrained("new-model")
    options = UpgradeOptions(output_dir=Path("upgraded"), kinds=("affine",))
    upgrade("old_cache", new, data, num_pairs=30, old_model=old, side=None, options=options).save("upgraded")
    shutil.rmtree("new-model")
    new.save_as_sentence_transformer("new-model")
    return upgradable


def test_the_hub_example_and_its_commands_run(fitted: Path, hub: Hub) -> None:
    lines = block("bash", "hf-corrector push", "examples/hub.md").strip().splitlines()
    assert [main([*shlex.split(line)[1:], "--quiet"]) for line in lines] == [0, 0]
    exec(compile(block("python", "FittedCorrector", "examples/hub.md"), "hub.md", "exec"), {})
    assert len(TargetCache.open("new_cache")) == 60


def test_the_examples_of_sentence_transformers_and_numpy_run(fitted: Path) -> None:
    names: dict[str, object] = {}
    exec(compile(block("python", "encode_document", "examples/hub.md"), "hub.md", "exec"), names)
    assert names["queries"].shape == names["documents"].shape == (1, 32)  # type: ignore[attr-defined]
    exec(compile(block("python", "save_for_numpy", "examples/hub.md"), "hub.md", "exec"), {})
    assert Path("worker/numpy_corrector.py").is_file()
    code = block("python", "CorrectedNegativesLoss", "examples/hub.md")
    short = "from sentence_transformers import SentenceTransformerTrainingArguments as Arguments\n" + code.replace(
        "model, train_dataset", 'model, args=Arguments("st-out", max_steps=2, report_to=[]), train_dataset'
    )
    exec(compile(short, "hub.md", "exec"), {})


def test_the_example_of_items_runs(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generator = np.random.default_rng(0)
    old, turn = generator.normal(size=(400, 16)).astype(np.float32), np.linalg.qr(generator.normal(size=(16, 16)))[0]
    rows, users = np.arange(0, 400, 2), old[:100:2] + 0.1
    for name, array in {"items": old, "new_items_of_rows": old[rows] @ turn, "rows": rows}.items():
        np.save(f"{name}.npy", array)
    # The old tower knew nothing of these users.
    strangers = generator.normal(size=users.shape)
    known = {"new_users": users @ turn, "old_users": strangers, "taken_next": [{2 * row: 1.0} for row in range(50)]}
    code = block("python", "JudgedVectors", "examples/recommendation.md")
    exec(compile(code, "recommendation.md", "exec"), known)
    assert known["report"].go and known["report"].verdict in capsys.readouterr().out
    assert np.load("corrected_items.npy").shape == (400, 16)


def test_the_commands_for_vectors_run(workplace: Path) -> None:
    generator = np.random.default_rng(0)
    old, turn = generator.normal(size=(400, 16)), np.linalg.qr(generator.normal(size=(16, 16)))[0]
    rows = np.arange(0, 400, 2)
    for name, array in {"vectors": old, "sample": (old @ turn)[rows], "rows": rows}.items():
        np.save(f"{name}.npy", array.astype(np.int64 if name == "rows" else np.float32))
    lines = block("bash", "vectors.npy", "examples/upgrade.md").strip().splitlines()
    assert [main([*shlex.split(line)[1:], "--quiet"]) for line in lines] == [0, 0]
    assert np.load("corrected.npy").shape == (400, 16)


def test_ci_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "readme_block test" in script
    commands = re.search(r"<!-- test -->\n```bash\n(.*?)```", README, flags=re.DOTALL)
    assert commands is not None and "/pytest" in commands.group(1).strip().splitlines()[-1]


def test_every_constraint_is_an_exact_version() -> None:
    lines = (ROOT / ".ci" / "constraints.txt").read_text().split()
    assert "torch==2.13.0" in lines
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][\w.]*", line) for line in lines)


@pytest.mark.parametrize("page", PAGES)
def test_links_of_pages_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", TEXTS[page]):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = ROOT / page if not name else ((ROOT / page).parent / name).resolve()
        assert target.is_file(), link
        if anchor:
            heads = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads}, link


def test_every_page_is_named_by_the_readme() -> None:
    assert [page for page in PAGES[1:] if f"({page})" not in README] == []


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```(?:python|bash)\n(.*?)```", TEXTS[page], flags=re.DOTALL)


def test_what_pages_repeat_of_the_readme_is_the_same() -> None:
    """An example that stands on two pages must not age on one of them."""
    first = {tuple(code.splitlines()[:2]): code for code in code_blocks("README.md")}
    for page in PAGES[1:]:
        for code in code_blocks(page):
            assert first.get(tuple(code.splitlines()[:2]), code) == code, page
