"""HYLA, hypernetwork linear attention, for Hugging Face transformers. Importing it registers the Auto classes and the pipeline."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification
from transformers.pipelines import PIPELINE_REGISTRY

from .model import HylaConfig, HylaForSequenceClassification, HylaModel, SymbolicReasoningPipeline


__version__ = "0.1.0"

AutoConfig.register(HylaConfig.model_type, HylaConfig, exist_ok=True)
AutoModel.register(HylaConfig, HylaModel, exist_ok=True)
AutoModelForSequenceClassification.register(HylaConfig, HylaForSequenceClassification, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(
    "symbolic-reasoning", SymbolicReasoningPipeline, pt_model=AutoModelForSequenceClassification
)

__all__ = ["HylaConfig", "HylaForSequenceClassification", "HylaModel", "SymbolicReasoningPipeline", "__version__"]
