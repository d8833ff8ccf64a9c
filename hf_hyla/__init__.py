"""HYLA, hypernetwork linear attention, for Hugging Face transformers. Importing it registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

from .model import HylaConfig, HylaForSequenceClassification, HylaModel


__version__ = "0.1.0"

AutoConfig.register(HylaConfig.model_type, HylaConfig, exist_ok=True)
AutoModel.register(HylaConfig, HylaModel, exist_ok=True)
AutoModelForSequenceClassification.register(HylaConfig, HylaForSequenceClassification, exist_ok=True)

__all__ = ["HylaConfig", "HylaForSequenceClassification", "HylaModel", "__version__"]
