"""What is uploaded beside the weights: flat files that import torch, transformers (with its huggingface_hub) and each other."""

from .configuration_hyla import HylaConfig
from .modeling_hyla import HylaForSequenceClassification, HylaModel, HylaPreTrainedModel
from .pipeline_hyla import SymbolicReasoningPipeline


__all__ = [
    "HylaConfig",
    "HylaForSequenceClassification",
    "HylaModel",
    "HylaPreTrainedModel",
    "SymbolicReasoningPipeline",
]
