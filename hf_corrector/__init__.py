"""Correct stale target embeddings instead of re-encoding them.

Target corrector networks (arXiv 2409.01890) move cached embeddings to where the current encoder would put them.
Importing the package makes its models known to transformers' auto classes; everything else is imported on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from hf_corrector.models import CorrectorConfig, CorrectorModel, DualEncoderConfig, DualEncoderModel
from hf_corrector.rag import RetrievalAugmentedConfig, RetrievalAugmentedModel
from hf_corrector.version import __version__

if TYPE_CHECKING:
    from hf_corrector._hub import PushOptions
    from hf_corrector.adaptation.adaptive_cache import AdaptiveCache
    from hf_corrector.adaptation.streaming_corrector import StreamingCorrector
    from hf_corrector.cache.target_cache import TargetCache
    from hf_corrector.cards import CardFacts
    from hf_corrector.corrected_retriever import CorrectedRetriever, RetrieverOptions
    from hf_corrector.data.datasets import RetrievalData, from_pairs, load_retrieval_data
    from hf_corrector.data.stdlib import standard_library_data, standard_library_questions
    from hf_corrector.drift_detection import AdaptationPolicy, DriftDetector
    from hf_corrector.encoding import EncodeOptions, build_cache, update_cache
    from hf_corrector.evaluation.staleness import measure_staleness
    from hf_corrector.exports.numpy_worker import save_for_numpy
    from hf_corrector.exports.sentence_transformer import save_as_sentence_transformer
    from hf_corrector.index_upgrade.fitted_corrector import FittedCorrector
    from hf_corrector.index_upgrade.options import UpgradeOptions
    from hf_corrector.index_upgrade.report import UpgradeReport
    from hf_corrector.index_upgrade.upgrading import upgrade
    from hf_corrector.index_upgrade.vector_inputs import JudgedVectors
    from hf_corrector.index_upgrade.vector_upgrade import VectorUpgradeReport, upgrade_vectors
    from hf_corrector.rag.generation import GenerationOptions
    from hf_corrector.rag.passages import NearestPassages
    from hf_corrector.rag.rag_arguments import RetrievalAugmentedTrainingArguments
    from hf_corrector.rag.rag_trainer import RetrievalAugmentedTrainer
    from hf_corrector.records import EncoderFingerprint, RunRecord
    from hf_corrector.side_features import DenseSide, TokenCounts
    from hf_corrector.training.arguments import DualEncoderTrainingArguments
    from hf_corrector.training.corrector_choice import choose_corrector
    from hf_corrector.training.corrector_fit import fit_corrector
    from hf_corrector.training.dual_encoder_trainer import DualEncoderTrainer

_HOMES = {
    "load_retrieval_data": "hf_corrector.data.datasets",
    "from_pairs": "hf_corrector.data.datasets",
    "RetrievalData": "hf_corrector.data.datasets",
    "standard_library_data": "hf_corrector.data.stdlib",
    "standard_library_questions": "hf_corrector.data.stdlib",
    "TargetCache": "hf_corrector.cache.target_cache",
    "EncodeOptions": "hf_corrector.encoding",
    "build_cache": "hf_corrector.encoding",
    "fit_corrector": "hf_corrector.training.corrector_fit",
    "DualEncoderTrainingArguments": "hf_corrector.training.arguments",
    "DualEncoderTrainer": "hf_corrector.training.dual_encoder_trainer",
    "measure_staleness": "hf_corrector.evaluation.staleness",
    # No module is called "upgrade": importing one would put it in the function's place.
    "upgrade": "hf_corrector.index_upgrade.upgrading",
    "UpgradeReport": "hf_corrector.index_upgrade.report",
    "CorrectedRetriever": "hf_corrector.corrected_retriever",
    "RetrieverOptions": "hf_corrector.corrected_retriever",
    "choose_corrector": "hf_corrector.training.corrector_choice",
    "DenseSide": "hf_corrector.side_features",
    "TokenCounts": "hf_corrector.side_features",
    "UpgradeOptions": "hf_corrector.index_upgrade.options",
    "update_cache": "hf_corrector.encoding",
    "EncoderFingerprint": "hf_corrector.records",
    "RunRecord": "hf_corrector.records",
    "AdaptiveCache": "hf_corrector.adaptation.adaptive_cache",
    "StreamingCorrector": "hf_corrector.adaptation.streaming_corrector",
    "AdaptationPolicy": "hf_corrector.drift_detection",
    "DriftDetector": "hf_corrector.drift_detection",
    "upgrade_vectors": "hf_corrector.index_upgrade.vector_upgrade",
    "VectorUpgradeReport": "hf_corrector.index_upgrade.vector_upgrade",
    "JudgedVectors": "hf_corrector.index_upgrade.vector_inputs",
    "save_as_sentence_transformer": "hf_corrector.exports.sentence_transformer",
    "save_for_numpy": "hf_corrector.exports.numpy_worker",
    "RetrievalAugmentedTrainingArguments": "hf_corrector.rag.rag_arguments",
    "RetrievalAugmentedTrainer": "hf_corrector.rag.rag_trainer",
    "NearestPassages": "hf_corrector.rag.passages",
    "GenerationOptions": "hf_corrector.rag.generation",
    "FittedCorrector": "hf_corrector.index_upgrade.fitted_corrector",
    "CardFacts": "hf_corrector.cards",
    "PushOptions": "hf_corrector._hub",
}

__all__ = [
    "load_retrieval_data",
    "from_pairs",
    "RetrievalData",
    "standard_library_data",
    "standard_library_questions",
    "DualEncoderConfig",
    "DualEncoderModel",
    "CorrectorConfig",
    "CorrectorModel",
    "TargetCache",
    "EncodeOptions",
    "build_cache",
    "fit_corrector",
    "DualEncoderTrainingArguments",
    "DualEncoderTrainer",
    "measure_staleness",
    "upgrade",
    "UpgradeReport",
    "CorrectedRetriever",
    "RetrieverOptions",
    "choose_corrector",
    "DenseSide",
    "TokenCounts",
    "UpgradeOptions",
    "update_cache",
    "EncoderFingerprint",
    "RunRecord",
    "AdaptiveCache",
    "StreamingCorrector",
    "AdaptationPolicy",
    "DriftDetector",
    "upgrade_vectors",
    "VectorUpgradeReport",
    "JudgedVectors",
    "save_as_sentence_transformer",
    "save_for_numpy",
    "RetrievalAugmentedConfig",
    "RetrievalAugmentedModel",
    "RetrievalAugmentedTrainingArguments",
    "RetrievalAugmentedTrainer",
    "NearestPassages",
    "GenerationOptions",
    "FittedCorrector",
    "CardFacts",
    "PushOptions",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hf_corrector' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
