"""transformers' own common tests of models and configurations, run on cut models and on deadhead's own.

They lie in transformers' source distribution, not in its wheel: `make test-transformers` fetches them and names the
folder in TRANSFORMERS_TESTS; without it all is skipped.
"""

from __future__ import annotations

import copy
import os
import sys
import types
import unittest
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from deadhead.models import (
    AllAttentionConfig,
    AllAttentionForCausalLM,
    AllAttentionModel,
    TransformerXLConfig,
    TransformerXLForCausalLM,
    TransformerXLModel,
)
from deadhead.models.pruned import modeling_pruned
from tests.models.test_pruned import small_model

if "TRANSFORMERS_TESTS" not in os.environ:
    pytest.skip("run by make test-transformers", allow_module_level=True)

sys.path.insert(0, os.environ["TRANSFORMERS_TESTS"])
# The source distribution leaves these modules out.
for _name, _has in {
    "exporters": {},
    "exporters.test_export": {"ExportTesterMixin": object},
    "generation": {},
    "generation.test_utils": {"GenerationTesterMixin": type("GenerationTesterMixin", (), {})},
    "utils": {},
    "utils.test_configuration_utils": {"config_common_kwargs": {}},
}.items():
    _module: Any = types.ModuleType(f"transformers_tests.{_name}")
    _module.__path__ = []
    vars(_module).update(_has)
    sys.modules[_module.__name__] = _module

from transformers_tests.test_configuration_common import ConfigTester  # type: ignore[import-not-found]  # noqa: E402
from transformers_tests.test_modeling_common import (  # type: ignore[import-not-found]  # noqa: E402
    ModelTesterMixin,
    ids_tensor,
)

_UNEVEN = "expects as many heads in each layer as the configuration says"
_COLUMNS = "expects a weight for each position alone, and persistent vectors have weights too"
_SIZE = "is about the size of the model that the test is given"
_GENERATION = "asks for the mixin of generation's tests, which the source distribution leaves out"
_SKIPPED = {
    "Llama": {"test_attention_outputs": _UNEVEN, "test_num_layers_is_small": _SIZE},
    "GPT2": {"test_attention_outputs": _UNEVEN, "test_num_layers_is_small": _SIZE},
    "Bert": {"test_attention_outputs": _UNEVEN, "test_num_layers_is_small": _SIZE},
    "AllAttention": {"test_attention_outputs": _COLUMNS},
    "TransformerXL": {},
}


class _Tester:
    """What the common tests ask of a model's tester."""

    batch_size, seq_length, is_training = 3, 7, True

    def __init__(self, make: Callable[[], PreTrainedModel]) -> None:
        self.config: Any = make().config
        # The tests choose the kernel.
        self.config._attn_implementation_internal = None
        self.num_hidden_layers: int = self.config.num_hidden_layers
        self.hidden_size: int = self.config.hidden_size
        self.num_attention_heads: int = self.config.num_attention_heads
        self.vocab_size: int = self.config.vocab_size

    def get_config(self) -> Any:
        return copy.deepcopy(self.config)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        ids = ids_tensor([self.batch_size, self.seq_length], self.config.vocab_size)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _case(name: str, make: Callable[[], PreTrainedModel], *classes: type[PreTrainedModel]) -> type:
    def set_up(case: Any) -> None:
        case.model_tester = _Tester(make)
        config_class: Any = classes[0].config_class
        sizes = {config_class.attribute_map.get(name, name): size for name, size in _SIZES.items()}
        case.config_tester = ConfigTester(case, config_class=config_class, **sizes)

    def test_config(case: Any) -> None:
        case.config_tester.run_common_tests()

    members: dict[str, Any] = {"all_model_classes": classes, "setUp": set_up, "test_config": test_config}
    skipped = {"test_generation_tester_mixin_inheritance": _GENERATION, **_SKIPPED[name]}
    for test, reason in skipped.items():
        members[test] = unittest.skip(reason)(getattr(ModelTesterMixin, test))
    return type(f"Test{name}", (ModelTesterMixin, unittest.TestCase), members)


def _cut_case(name: str, model_type: str, causal: str) -> type:
    classes = (getattr(modeling_pruned, f"Deadhead{each}") for each in (f"{name}Model", causal))
    return _case(name, partial(small_model, model_type, first_empty=False), *classes)


_SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2}


def _own(config: Any, model: Any) -> PreTrainedModel:
    sizes = {"vocab_size": 99, "memory_length": 24, "pad_token_id": 0, "initializer_range": 0.02, **_SIZES}
    made: PreTrainedModel = model(config(**sizes))
    return made


TestLlama = _cut_case("Llama", "llama", "LlamaForCausalLM")
TestGPT2 = _cut_case("GPT2", "gpt2", "GPT2LMHeadModel")
TestBert = _cut_case("Bert", "bert", "BertLMHeadModel")
TestAllAttention = _case(
    "AllAttention",
    partial(_own, AllAttentionConfig, AllAttentionForCausalLM),
    AllAttentionModel,
    AllAttentionForCausalLM,
)
TestTransformerXL = _case(
    "TransformerXL",
    partial(_own, TransformerXLConfig, TransformerXLForCausalLM),
    TransformerXLModel,
    TransformerXLForCausalLM,
)
