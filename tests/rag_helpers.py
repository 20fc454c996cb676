"""Tiny retrieval-augmented models with random weights, and what they read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from model_helpers import HIDDEN, byte_bpe_tokenizer, wordpiece_tokenizer
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    EncoderDecoderConfig,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from hf_corrector.batching import pad_tokens
from hf_corrector.index.base import TensorVectors
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel
from hf_corrector.models.text_encoding import Tokens
from hf_corrector.rag.generation import GenerationOptions
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel
from hf_corrector.rag.passages import NearestPassages, RetrievedTargets, distinct_rows
from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
from hf_corrector.sampling import Candidates

KINDS = ("gpt2", "llama", "qwen2", "t5", "bart", "bert2bert")
PASSAGES = [
    "list all files", "remove the old archive of the disk", "count the words of a file", "copy a folder",
    "find files changed today", "sort lines by number", "print the last ten lines", "who is logged in",
]  # fmt: skip
QUESTIONS = ["how to list files", "what counts words", "sort a file by number"]
ANSWERS = ["list", "count words", "sort lines"]


def generator_of(kind: str, *, seed: int = 0, dropout: float = 0.0) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Make a tiny reader and its tokenizer; GPT-2's has no padding token."""
    torch.manual_seed(seed)
    match kind:
        case "gpt2":
            config = GPT2Config(
                vocab_size=300, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3,
                resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=1,
            )  # fmt: skip
            return GPT2LMHeadModel(config), _long(byte_bpe_tokenizer(end_token=False, pad_token=False))
        case "llama":
            llama = LlamaConfig(
                vocab_size=300, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
                bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
            )  # fmt: skip
            return LlamaForCausalLM(llama), _long(byte_bpe_tokenizer(end_token=True))
        case "qwen2":
            # Queries and keys have biases here, and two heads share their keys.
            qwen2 = Qwen2Config(
                vocab_size=300, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, max_position_embeddings=128, initializer_range=0.3, pad_token_id=0,
                bos_token_id=None, eos_token_id=1,
            )  # fmt: skip
            return Qwen2ForCausalLM(qwen2), _long(byte_bpe_tokenizer(end_token=False))
        case "bart":
            # Its answers start from the token that ends them; as shipped it also forces an end where room runs out.
            bart = BartConfig(
                vocab_size=300, d_model=HIDDEN, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=128,
                init_std=0.3, bos_token_id=None, pad_token_id=0, eos_token_id=1, decoder_start_token_id=1,
                forced_eos_token_id=None, dropout=dropout,
            )  # fmt: skip
            return BartForConditionalGeneration(bart), _long(byte_bpe_tokenizer(end_token=True))
        case "t5":
            t5 = T5Config(
                vocab_size=300, d_model=HIDDEN, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0,
                eos_token_id=1, decoder_start_token_id=0, dropout_rate=dropout,
            )  # fmt: skip
            return T5ForConditionalGeneration(t5), _long(byte_bpe_tokenizer(end_token=True))
    tokenizer = wordpiece_tokenizer()
    bert = BertConfig(
        vocab_size=240, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=128, initializer_range=0.3, hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    both = EncoderDecoderConfig.from_encoder_decoder_configs(
        bert, BertConfig(**{**bert.to_dict(), "is_decoder": True, "add_cross_attention": True})
    )
    both.decoder_start_token_id, both.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
    return EncoderDecoderModel(both), _long(tokenizer)


def _long(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    tokenizer.model_max_length = 128
    return tokenizer


def rag_of(encoder: str, kind: str = "gpt2", *, seed: int = 0, dropout: float = 0.0, **settings: Any) -> Any:
    """Compose a tiny retrieval-augmented model."""
    generator, tokenizer = generator_of(kind, seed=seed, dropout=dropout)
    settings = {"answer_max_length": 16, **settings}
    return RetrievalAugmentedModel.from_parts(DualEncoderModel.from_encoder(encoder), generator, tokenizer, **settings)


def step_inputs(model: RetrievalAugmentedModel, questions: list[str] | None = None) -> dict[str, Tokens]:
    """Return the tokens a training step reads."""
    questions = QUESTIONS if questions is None else questions
    pad = model.retriever.pad_token_id("query")
    return {
        "questions": pad_tokens(model.retriever.tokenize(questions, "query"), pad),
        "reader_questions": pad_tokens(model.reader.questions(questions), 0),
        "answers": pad_tokens(model.reader.answers(ANSWERS[: len(questions)]), 0),
    }


def retrieved_of(
    model: RetrievalAugmentedModel, ids: list[list[int]], *, fresh: bool = True, passages: list[str] | None = None
) -> RetrievedTargets:
    """Return what was found: rows of PASSAGES, −1 for a place that is masked."""
    rows = torch.tensor(ids)
    texts = PASSAGES if passages is None else passages
    mask, nothing = rows >= 0, torch.zeros(rows.shape)
    candidates = Candidates(rows, nothing, nothing, mask, torch.zeros_like(mask))
    distinct, places = distinct_rows(rows, mask)
    chosen = [texts[row] for row in distinct]
    words = model.reader.passages(chosen)
    tokens = pad_tokens(model.retriever.tokenize(chosen, "target"), model.retriever.pad_token_id("target"))
    if fresh:
        return RetrievedTargets(candidates, places, words, tokens=tokens)
    return RetrievedTargets(candidates, places, words, vectors=model.retriever.encode_target(chosen))


def answers_of(model: RetrievalAugmentedModel) -> dict[str, Any]:
    """Return vectors and answers of a model, by both methods and by beams."""
    targets = model.retriever.encode_target(PASSAGES)
    find = NearestPassages(TensorVectors(targets), model.reader.passages(PASSAGES), k=3)
    ways = (GenerationOptions(), GenerationOptions(method="fast"), GenerationOptions(num_beams=2))
    found = [one for way in ways for one in model.generate(QUESTIONS, find, options=way)]
    return {
        "queries": model.retriever.encode_query(QUESTIONS), "targets": targets,
        "answers": [[(one.text, one.log_prob, one.passage_log_probs) for one in each.answers] for each in found],
        "rows": [each.rows for each in found],
    }  # fmt: skip


COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")
THINGS = ("cat", "dog", "house", "tree", "river", "stone")


def question_data() -> tuple[Dataset, Dataset, Dataset]:
    """Return targets, training questions and test questions; the answer is the colour of a thing."""
    pairs = [(colour, thing) for colour in COLOURS for thing in THINGS]
    targets = [{"id": f"t{n}", "text": f"the {two} number {n} is {one}"} for n, (one, two) in enumerate(pairs)]
    questions = [
        {"query_id": f"q{n}", "query": f"which colour has {two} {n}", "answers": [one], "positive_ids": [f"t{n}"]}
        for n, (one, two) in enumerate(pairs)
    ]
    return Dataset.from_list(targets), Dataset.from_list(questions[:36]), Dataset.from_list(questions[36:])


def rag_trainer(
    model: Any, out: Path, *, optimizers: tuple[Any, Any] = (None, None), evaluation: Any = None, **changes: Any
) -> RetrievalAugmentedTrainer:
    """Make a trainer of a few steps over the questions above; evaluated on the test questions if not told otherwise."""
    settings: dict[str, Any] = {
        "max_steps": 4, "per_device_train_batch_size": 4, "num_passages": 3, "learning_rate": 1e-3, "logging_steps": 1,
        "report_to": [], "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "corrector_warmup_steps": 1,
        "corrector_update_steps": 2, "seed": 3, "scan": "full",
    }  # fmt: skip
    if changes.get("objective") == "generator_only":
        settings["staleness"] = "ignore"
    targets, train, test = question_data()
    args = RetrievalAugmentedTrainingArguments(str(out), **{**settings, **changes})
    return RetrievalAugmentedTrainer(
        model, args, train_dataset=train, targets=targets, eval_dataset=test if evaluation is None else evaluation,
        optimizers=optimizers,
    )  # fmt: skip
