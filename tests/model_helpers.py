"""Tiny encoders with random weights and real tokenizers, built on the spot: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import BPE, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2Model,
    LlamaConfig,
    LlamaModel,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

TEXTS = [
    "list all files", "remove the old archive", "count the words of a file", "copy a folder and keep its dates",
    "show which process listens on a port", "find files changed today", "sort lines by number and drop duplicates",
    "the quick brown fox jumps over the lazy dog", "print the last ten lines", "compress a folder",
    "who is logged in", "change the owner of every file below a folder, links included", "disk space", "ping",
    "replace a word in all files", "download a page and save it under another name",
]  # fmt: skip
HIDDEN = 32
POSITIONS = 64
BERT = BertConfig(
    vocab_size=240, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
    max_position_embeddings=POSITIONS, initializer_range=0.5, pad_token_id=0,
)  # fmt: skip


def wordpiece_tokenizer(*, lowercase: bool = True) -> PreTrainedTokenizerFast:
    """Make a WordPiece tokenizer that knows the words of TEXTS, single letters, and BERT's special tokens."""
    # Spelled out, as the trainer of the library numbers its tokens differently in every process.
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:,.")
    words = sorted({word for text in TEXTS for word in text.replace(",", "").split()})
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = BertPreTokenizer()
    pairs = [(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    backend.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=pairs)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
        mask_token="[MASK]", model_max_length=POSITIONS,
    )  # fmt: skip


def byte_bpe_tokenizer(*, end_token: bool, pad_token: bool = True) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on TEXTS, as decoders and T5-like models have them."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    special = ["<pad>", "</s>"]
    trainer = BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    if end_token:
        backend.post_processor = TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", backend.token_to_id("</s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="</s>", pad_token="<pad>" if pad_token else None,
        model_max_length=POSITIONS,
    )  # fmt: skip


def save_encoder(path: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> str:
    """Save a model and its tokenizer and return the folder."""
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def save_bert(path: Path, *, seed: int = 0, lowercase: bool = True) -> str:
    """Save a random tiny BERT."""
    torch.manual_seed(seed)
    return save_encoder(path, BertModel(BERT, add_pooling_layer=False), wordpiece_tokenizer(lowercase=lowercase))


def save_gpt2(path: Path) -> str:
    """Save a random tiny GPT-2, whose tokenizer knows no padding."""
    torch.manual_seed(1)
    config = GPT2Config(
        vocab_size=300, n_embd=HIDDEN, n_layer=2, n_head=2, n_positions=POSITIONS, initializer_range=0.5
    )
    return save_encoder(path, GPT2Model(config), byte_bpe_tokenizer(end_token=False, pad_token=False))


def save_llama(path: Path) -> str:
    """Save a random tiny Llama."""
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=300, hidden_size=HIDDEN, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=POSITIONS, initializer_range=0.5, pad_token_id=0,
        bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    return save_encoder(path, LlamaModel(config), byte_bpe_tokenizer(end_token=True))


def save_t5(path: Path) -> str:
    """Save a random tiny T5, decoder included."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=300, d_model=HIDDEN, d_kv=16, d_ff=48, num_layers=2, num_heads=2, pad_token_id=0, eos_token_id=1,
        decoder_start_token_id=0, initializer_factor=1.0,
    )  # fmt: skip
    return save_encoder(path, T5ForConditionalGeneration(config), byte_bpe_tokenizer(end_token=True))
