"""The common tests of transformers, for every attention type and every kind of input."""

import unittest
import unittest.mock

import stand_ins
import torch
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.testing_utils import torch_device

from hf_hyla import HylaConfig, HylaForCausalLM, HylaForSequenceClassification, HylaModel
from hf_hyla.model.modeling_hyla import HylaSequenceClassifierOutput


stand_ins.install("transformers_tests")

from transformers_tests import test_modeling_common as common  # noqa: E402
from transformers_tests.test_configuration_common import ConfigTester  # noqa: E402


# By these tables the tests know what a class is; transformers lists its own models only.
for table, name in {
    "MODEL_MAPPING_NAMES": "HylaModel",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "HylaForSequenceClassification",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "HylaForCausalLM",
}.items():
    setattr(common, table, {**getattr(common, table), HylaConfig.model_type: name})

# Sizes that differ from each other, so that none can stand in for another.
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 5,
    "value_head_dim": 7,
    "intermediate_size": 37,
    "relative_attention_num_buckets": 6,
}
TEXT = {"vocab_size": 99, "answer_token_id": None, "embedding_bias": False, "pad_token_id": 0, "num_answers": 1}
SRAVEN = {"vocab_size": 9, "answer_token_id": 8, "embedding_bias": True, "num_answers": 4}
LOGIC = {"vocab_size": None, "input_size": 6, "num_answers": 1}


class HylaModelTester:
    """What transformers' tests ask for: a small config, and inputs for it."""

    is_training = True
    batch_size = 5
    seq_length = 9

    def __init__(self, settings: dict):
        self.settings = SIZES | settings
        vars(self).update(SIZES)

    def get_config(self) -> HylaConfig:
        return HylaConfig(**self.settings, num_labels=3)

    def prepare_config_and_inputs_for_common(self) -> tuple[HylaConfig, dict[str, torch.Tensor]]:
        config = self.get_config()
        shape = self.batch_size, self.seq_length
        # Padding on the left of one row and on the right of another.
        attention_mask = torch.ones(shape, dtype=torch.long)
        attention_mask[1, :3] = attention_mask[2, -3:] = 0
        inputs = {"attention_mask": attention_mask.to(torch_device)}
        if config.vocab_size is None:
            return config, inputs | {"input_values": torch.randn(*shape, config.input_size).to(torch_device)}
        # Id 0 is padding in text.
        input_ids = torch.randint(1, config.vocab_size, shape)
        if config.answer_token_id is not None:
            input_ids[:, -config.num_answers :] = config.answer_token_id
        return config, inputs | {"input_ids": input_ids.to(torch_device)}


class HylaCommonTests(common.ModelTesterMixin):
    settings: dict
    all_model_classes = (HylaModel, HylaForSequenceClassification)
    # Without this the test is skipped for files that have no line of copyright.
    test_can_init_all_missing_weights_before_2023 = True

    def setUp(self):
        self.model_tester = HylaModelTester(self.settings)
        self.config_tester = ConfigTester(
            self,
            config_class=HylaConfig,
            has_text_modality=self.settings["vocab_size"] is not None,
            **self.model_tester.settings,
        )

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_model_rope_scaling_from_config_0_linear(self):
        self._of_rotary_positions(super().test_model_rope_scaling_from_config_0_linear)

    def test_model_rope_scaling_from_config_1_dynamic(self):
        self._of_rotary_positions(super().test_model_rope_scaling_from_config_1_dynamic)

    def test_model_rope_scaling_from_config_2_yarn(self):
        self._of_rotary_positions(super().test_model_rope_scaling_from_config_2_yarn)

    def test_model_rope_with_partial_rotation(self):
        self._of_rotary_positions(super().test_model_rope_with_partial_rotation)

    def _of_rotary_positions(self, test):
        if self.settings.get("position_type") != "rotary":
            self.skipTest("Other positions are not scaled.")
        test()


class HylaTextTest(HylaCommonTests, unittest.TestCase):
    settings = TEXT | {"attention_type": "hyla"}


class RotaryLanguageTest(HylaCommonTests, common.GenerationTesterMixin, unittest.TestCase):
    """The language model, with weights of its own for the head, and positions of which several types are tried."""

    settings = TEXT | {
        "attention_type": "hyla",
        "position_type": "rotary",
        "max_position_embeddings": 32,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.7},
        "head_dim": 6,
        "value_head_dim": 6,  # as wide as keys, which transformers' tests of generation take for granted
        "is_causal": True,
        "tie_word_embeddings": False,
    }
    all_model_classes = (HylaModel, HylaForCausalLM)


class RelativeLanguageTest(HylaCommonTests, common.GenerationTesterMixin, unittest.TestCase):
    settings = TEXT | {"attention_type": "softmax", "is_causal": True, "value_head_dim": 5}
    all_model_classes = (HylaModel, HylaForCausalLM)


class LinearTextTest(HylaCommonTests, unittest.TestCase):
    settings = TEXT | {"attention_type": "linear"}


class SoftmaxTextTest(HylaCommonTests, unittest.TestCase):
    settings = TEXT | {"attention_type": "softmax"}


class CausalMixtureTest(HylaCommonTests, common.GenerationTesterMixin, unittest.TestCase):
    """The parts that the others leave out."""

    all_model_classes = (HylaModel, HylaForSequenceClassification, HylaForCausalLM)

    settings = TEXT | {
        "attention_type": "hyla",
        "value_depth": 2,
        "value_head_dim": 5,
        "qk_norm": True,
        "position_type": "none",
        "is_causal": True,
        "ffn_type": "moe",
        "num_experts": 3,
        "norm_type": "rms_norm",
    }

    def setUp(self):
        super().setUp()
        # Tests look in the annotation for what to expect, and it names what all models return, dense ones too.
        for model_class, output in (
            (HylaModel, MoeModelOutputWithPast),
            (HylaForSequenceClassification, HylaSequenceClassifierOutput),
            (HylaForCausalLM, MoeCausalLMOutputWithPast),
        ):
            patch = unittest.mock.patch.dict(model_class.forward.__annotations__, {"return": output})
            self.enterContext(patch)


class HylaSravenTest(HylaCommonTests, unittest.TestCase):
    settings = SRAVEN | {"attention_type": "hyla"}

    def _prepare_for_class(self, inputs_dict, model_class, return_labels=False):
        inputs = super()._prepare_for_class(inputs_dict, model_class, return_labels)
        num_answers = self.model_tester.settings["num_answers"]
        if "labels" in inputs and num_answers > 1:
            inputs["labels"] = inputs["labels"].unsqueeze(1).repeat(1, num_answers)
        return inputs

    def test_load_with_mismatched_shapes(self):
        # The number of labels is looked for in the axis of answers.
        self.model_tester.settings["num_answers"] = 1
        super().test_load_with_mismatched_shapes()

    def test_problem_types(self):
        # Several labels are written into the axis of answers.
        self.model_tester.settings["num_answers"] = 1
        super().test_problem_types()

    def test_resize_tokens_embeddings(self):
        # Sizes down to 4 ids, and from there 15 ids fewer than at first.
        self.model_tester.settings |= {"vocab_size": 29, "answer_token_id": 2}
        super().test_resize_tokens_embeddings()


class HylaLogicTest(HylaCommonTests, unittest.TestCase):
    settings = LOGIC | {"attention_type": "hyla"}
    test_resize_embeddings = False

    def test_inputs_embeds(self):
        self.skipTest("Continuous inputs have no ids; the next test passes inputs_embeds.")

    def test_inputs_embeds_matches_input_ids(self):
        for model_class in self.all_model_classes:
            config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
            model = model_class(config).to(torch_device).eval()
            with torch.no_grad():
                expected = model(**inputs)[0]
                embeds = model.get_input_embeddings()(inputs.pop("input_values"))
                torch.testing.assert_close(model(inputs_embeds=embeds, **inputs)[0], expected)

    def test_load_with_mismatched_shapes(self):
        self.skipTest("Continuous inputs have no vocabulary whose size could differ.")

    def test_model_get_set_embeddings(self):
        self.skipTest("Continuous inputs pass a linear layer, not the table of embeddings that is set here.")
