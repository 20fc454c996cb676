"""Language models that read what a dual encoder finds, trained together while the cache of targets goes stale."""

from transformers import AutoConfig, AutoModel

from hf_corrector.rag.configuration_rag import RetrievalAugmentedConfig
from hf_corrector.rag.modeling_rag import RetrievalAugmentedModel

AutoConfig.register(RetrievalAugmentedConfig.model_type, RetrievalAugmentedConfig, exist_ok=True)
AutoModel.register(RetrievalAugmentedConfig, RetrievalAugmentedModel, exist_ok=True)

__all__ = ["RetrievalAugmentedConfig", "RetrievalAugmentedModel"]
