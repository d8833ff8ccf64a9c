"""
The files that are uploaded beside the weights. They are flat, and import torch, transformers (with its huggingface_hub) and each
other.

This file is not uploaded. It registers the Auto classes and the pipeline, see `hf_hyla/__init__.py`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .attention_hyla import eager_attention_forward
from .configuration_hyla import HylaConfig
from .layers_hyla import HylaAttention, HylaRotaryEmbedding
from .modeling_hyla import HylaForCausalLM, HylaForSequenceClassification, HylaModel, HylaPreTrainedModel
from .pipeline_hyla import SymbolicReasoningPipeline


AutoConfig.register(HylaConfig.model_type, HylaConfig, exist_ok=True)
AutoModel.register(HylaConfig, HylaModel, exist_ok=True)
AutoModelForCausalLM.register(HylaConfig, HylaForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HylaConfig, HylaForSequenceClassification, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "symbolic-reasoning", SymbolicReasoningPipeline, pt_model=AutoModelForSequenceClassification
)

__all__ = [
    "HylaAttention",
    "HylaConfig",
    "HylaForCausalLM",
    "HylaForSequenceClassification",
    "HylaModel",
    "HylaPreTrainedModel",
    "HylaRotaryEmbedding",
    "SymbolicReasoningPipeline",
    "eager_attention_forward",
]
