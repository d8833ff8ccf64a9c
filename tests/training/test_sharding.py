"""Sharding over processes (FSDP 2), and the launcher's configurations in recipes/accelerate."""

import copy
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from forks import on_ranks
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from hf_hyla import HylaConfig, HylaForSequenceClassification
from hf_hyla.model.layers_hyla import HylaLayer
from hf_hyla.tasks import get_task


CONFIGURATIONS = Path(__file__).parents[2] / "recipes" / "accelerate"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def compare_sharded_with_whole(rank: int, name: str, attention_type: str) -> int:
    distributed.init_process_group("gloo")
    task = get_task(name)
    torch.manual_seed(0)
    whole = HylaForSequenceClassification(
        HylaConfig(**{**task.model_defaults, "num_hidden_layers": 2}, attention_type=attention_type)
    )
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for layer in sharded.modules():
        if isinstance(layer, HylaLayer):
            fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert all(isinstance(parameter, DTensor) for parameter in sharded.parameters())

    batch = task.collate(task.dataset("train").__getitems__(range(8)))
    share = {column: values[4 * rank : 4 * rank + 4] for column, values in batch.items()}
    num_labels = batch["labels"].numel()
    # Attention dropout is on, and each draws the same mask.
    torch.manual_seed(1)
    expected = whole(**batch, num_items_in_batch=num_labels)
    expected.loss.backward()
    torch.manual_seed(1)
    # Twice, since gradients are averaged over the two processes.
    output = sharded(**share, num_items_in_batch=num_labels / 2)
    output.loss.backward()
    torch.testing.assert_close(output.logits, expected.logits[4 * rank : 4 * rank + 4], rtol=1e-4, atol=1e-4)
    # A gradient that is nought but for rounding is compared with the others'.
    largest = max(parameter.grad.abs().max() for parameter in whole.parameters())
    for (key, parameter), other in zip(sharded.named_parameters(), whole.parameters(), strict=True):
        assert isinstance(parameter.grad, DTensor), key
        scale = other.grad.abs().max() + 1e-3 * largest
        torch.testing.assert_close(
            parameter.grad.full_tensor() / scale, other.grad / scale, rtol=0, atol=1e-4, msg=lambda m, key=key: key + m
        )
    weights = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if rank == 0:
        assert weights.keys() == whole.state_dict().keys()
        assert all(torch.equal(weights[key], value) for key, value in whole.state_dict().items())
    distributed.barrier()
    distributed.destroy_process_group()
    return 0


@pytest.mark.parametrize("attention_type", ["hyla", "softmax"])
@pytest.mark.parametrize("name", ["logic", "sraven"])
def test_a_sharded_model_computes_and_saves_what_the_whole_one_does(tmp_path, name, attention_type):
    for code, errors in on_ranks(tmp_path, lambda rank: compare_sharded_with_whole(rank, name, attention_type), 2):
        assert code == 0, errors


@pytest.mark.parametrize(
    ("name", "kind", "processes"),
    [
        ("single_gpu", "NO", 1),
        ("ddp_cpu", "MULTI_GPU", 2),
        ("ddp", "MULTI_GPU", 8),
        ("fsdp2", "FSDP", 8),
        ("deepspeed_zero2", "DEEPSPEED", 8),
    ],
)
def test_accelerate_reads_each_configuration(name, kind, processes):
    path = CONFIGURATIONS / f"{name}.yaml"
    assert path.read_text().startswith("# ")
    configuration = load_config_from_file(str(path))
    assert (configuration.distributed_type, configuration.num_processes) == (kind, processes)
    assert configuration.mixed_precision == "no"
    assert f"`{name}.yaml`" in (CONFIGURATIONS / "README.md").read_text()


def test_every_configuration_is_tested():
    assert len(list(CONFIGURATIONS.glob("*.yaml"))) == 5


def test_fsdp_wraps_the_layers_that_the_model_has():
    settings = load_config_from_file(str(CONFIGURATIONS / "fsdp2.yaml")).fsdp_config
    assert settings["fsdp_version"] == 2
    assert settings["fsdp_transformer_layer_cls_to_wrap"] == HylaLayer.__name__
