"""Models and their configurations, known to transformers' auto classes once this is imported."""

from transformers import AutoConfig, AutoModel

from hf_corrector.models.configuration_corrector import CorrectorConfig
from hf_corrector.models.configuration_dual_encoder import DualEncoderConfig
from hf_corrector.models.contrast import DualEncoderOutput, SampledTargets
from hf_corrector.models.modeling_corrector import CorrectorModel
from hf_corrector.models.modeling_dual_encoder import DualEncoderModel

AutoConfig.register(CorrectorConfig.model_type, CorrectorConfig, exist_ok=True)
AutoConfig.register(DualEncoderConfig.model_type, DualEncoderConfig, exist_ok=True)
AutoModel.register(CorrectorConfig, CorrectorModel, exist_ok=True)
AutoModel.register(DualEncoderConfig, DualEncoderModel, exist_ok=True)

__all__ = [
    "CorrectorConfig",
    "CorrectorModel",
    "DualEncoderConfig",
    "DualEncoderModel",
    "DualEncoderOutput",
    "SampledTargets",
]
