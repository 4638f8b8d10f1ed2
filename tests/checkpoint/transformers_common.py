"""`transformers`' own tests of a model class, for ours: a module of its package `tests`, run by test_transformers_common.py."""

import unittest

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

from nlgmoe.tools.hugging_face.configuration_nlgmoe import NlgmoeConfig
from nlgmoe.tools.hugging_face.modeling_nlgmoe import NlgmoeForCausalLM, NlgmoeModel

from .test_modeling_common import ModelTesterMixin, ids_tensor

B, T, V = 13, 7, 99
WITHOUT_ATTENTIONS = (
    "test_attention_outputs",
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
)
MODEL_MAPPING_NAMES["nlgmoe"] = "NlgmoeModel"  # by which the tests know which class takes labels
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["nlgmoe"] = "NlgmoeForCausalLM"


class NlgmoeModelTester:
    def __init__(self):
        self.batch_size, self.seq_length, self.is_training = B, T, True
        self.hidden_size, self.num_hidden_layers, self.num_attention_heads = 32, 2, 4

    def get_config(self):
        moe = {"num_experts": [2, 4], "mlp_type": "residual", "loss_coeff": 0.1, "expert_interval": 1}
        special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
        return NlgmoeConfig(
            vocab_size=V, seq_len=64, num_layers=2, hidden_size=32, num_heads=4, rope_theta=1e4, moe=moe, **special
        )

    def prepare_config_and_inputs_for_common(self):
        ids = ids_tensor([B, T], V - 1) + 1  # no padding
        return self.get_config(), {"input_ids": ids, "attention_mask": ids.new_ones(B, T)}


class NlgmoeModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (NlgmoeModel, NlgmoeForCausalLM)

    def setUp(self):
        # `output_attentions` is refused; other tests need the flag to run at all.
        self.has_attentions = self._testMethodName not in WITHOUT_ATTENTIONS
        self.model_tester = NlgmoeModelTester()
