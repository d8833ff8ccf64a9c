"""Replacements for modules that transformers' tests import and its source distribution leaves out."""

import importlib.util
import sys
import types

import torch
from transformers.testing_utils import torch_device


class ExportTesterMixin:
    """Base of `ModelTesterMixin`, so that this test runs with the others."""

    def test_exported_program_computes_what_eager_does(self):
        for model_class in self.all_model_classes:
            config, inputs_dict = self.model_tester.prepare_config_and_inputs_for_common()
            inputs = self._prepare_for_class(inputs_dict, model_class)
            model = model_class(config).to(torch_device).eval()
            dynamic_batch = {name: {0: torch.export.Dim.DYNAMIC} for name in inputs}
            program = torch.export.export(model, (), inputs, dynamic_shapes=dynamic_batch, strict=False)
            for batch in (inputs, {name: tensor[:2] for name, tensor in inputs.items()}):
                with torch.no_grad():
                    torch.testing.assert_close(program.module()(**batch)[0], model(**batch)[0])


class GenerationTesterMixin:
    """
    Only asked for as a base class of the tests of models that generate. With `tests/generation/test_utils.py` of transformers in
    the fetched folder, as `transformers_tests/generation/test_utils.py`, its tests run in place of this; those of ours are in
    `tests/model/test_generation.py`.
    """


# Every field that a config inherits, with a value that is not its default.
CONFIG_COMMON_KWARGS = {
    "architectures": ["HylaModel"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "zero", 1: "one"},
    "is_encoder_decoder": True,
    "label2id": {"zero": 0, "one": 1},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}


def install(package: str) -> None:
    """Makes these known under the names by which the tests in `package` import them, unless it has modules of those names."""
    for name, contents in {
        "exporters.test_export": {"ExportTesterMixin": ExportTesterMixin},
        "generation.test_utils": {"GenerationTesterMixin": GenerationTesterMixin},
        "utils.test_configuration_utils": {"config_common_kwargs": CONFIG_COMMON_KWARGS},
    }.items():
        parent, _, _ = name.partition(".")
        if importlib.util.find_spec(f"{package}.{parent}") is None:
            module = types.ModuleType(f"{package}.{name}")
            vars(module).update(contents)
            sys.modules[module.__name__] = module
