"""Imported once by the process that others are forked from, as imports take seconds.

Only what stays the same for all is made here, and nothing that starts a thread.
"""

import gc

import pytest  # noqa: F401
import torch.distributed  # noqa: F401
from transformers import BertModel, GPT2LMHeadModel  # noqa: F401
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import hf_corrector.encoding
import hf_corrector.rag.rag_trainer
import hf_corrector.training.dual_encoder_trainer  # noqa: F401

# A table of a thousand expressions, compiled by the first model that is loaded.
get_checkpoint_conversion_mapping("bert")
# A trainer collects garbage several times; what has been imported is none, and looking at it takes half a second.
gc.freeze()
