import pytest
import torch

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.tasks import get_task


@pytest.fixture(scope="module")
def sraven():
    return get_task("sraven", num_features=2)


@pytest.fixture(scope="module")
def logic():
    return get_task("logic", num_variables=3, num_examples=6)


@pytest.fixture
def build():
    """A small model for a task, with weights so large that codes and heads matter."""

    def build(task, **settings) -> HylaForSequenceClassification:
        torch.manual_seed(0)
        small = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 4}
        model = HylaForSequenceClassification(HylaConfig(**{**task.model_defaults, **small, **settings}))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5)
        return model.eval()

    return build
