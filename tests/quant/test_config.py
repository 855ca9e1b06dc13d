"""``quantization_config`` as GPTQModel, AutoGPTQ, optimum and transformers write it."""

from __future__ import annotations

import re
from typing import Any

import pytest

from lotaqaf_jax.errors import ConfigError
from lotaqaf_jax.quant.config import ModuleQuantization, QuantizationConfig

HUB = {"bits": 4, "group_size": 128, "damp_percent": 0.01, "desc_act": False, "static_groups": False, "sym": True}


def test_an_old_hub_file_without_format_means_v1_and_one_without_sym_means_symmetric() -> None:
    read = QuantizationConfig.from_hf(HUB | {"quant_method": "gptq"})
    assert read.default == ModuleQuantization(bits=4, group_size=128, sym=True, desc_act=False)
    assert (read.checkpoint_format, read.lm_head, read.dynamic) == ("gptq", False, ())
    bare = QuantizationConfig.from_hf({"bits": 3})
    assert bare.default == ModuleQuantization(bits=3, group_size=128, sym=True, desc_act=False)


@pytest.mark.parametrize("key", ["checkpoint_format", "format"])
def test_the_format_has_two_spellings(key: str) -> None:
    assert QuantizationConfig.from_hf({"bits": 4, key: "gptq_v2"}).checkpoint_format == "gptq_v2"


def test_nulls_mean_the_default() -> None:
    nulls = dict.fromkeys(("sym", "desc_act", "lm_head", "dynamic", "checkpoint_format", "pack_dtype"))
    assert QuantizationConfig.from_hf({"bits": 4} | nulls) == QuantizationConfig.from_hf({"bits": 4})


def test_dynamic_rules_are_tried_in_order_from_the_start_of_the_name() -> None:
    read = QuantizationConfig.from_hf(
        HUB
        | {
            "dynamic": {
                r"-:.*layers\.0\.mlp\..*": {},
                r"+:.*down_proj": {"bits": 8, "group_size": 32},
                r"lm_head": {"bits": 8, "sym": False, "note": "ignored", "group_size": -1},
                r".*down_proj": {"bits": 2},
                r"up_proj": {"bits": 2},
            }
        }
    )
    base = ModuleQuantization(4, 128, True, False)
    assert read.for_module("model.layers.0.mlp.down_proj") is None
    assert read.for_module("model.layers.1.mlp.down_proj") == ModuleQuantization(8, 32, True, False)
    assert read.for_module("lm_head") == ModuleQuantization(8, -1, False, False)
    assert read.for_module("model.layers.1.mlp.up_proj") == base, "a pattern matches from the start of the name"
    assert read.for_module("model.layers.0.self_attn.q_proj") == base


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": None}, "here: bits: None is not a supported width"),
        ({"bits": 5}, "here: bits: 5 is not a supported width; expected one of (2, 3, 4, 8)"),
        ({"bits": "4"}, "here: bits: '4' is not a supported width"),
        ({"quant_method": "awq"}, "here: quant_method is 'awq', expected 'gptq'"),
        ({"method": "qqq"}, "here: quant_method is 'qqq', expected 'gptq'"),
        ({"checkpoint_format": "gptq_p"}, "here: checkpoint_format: 'gptq_p' (bit-planar words"),
        ({"checkpoint_format": "marlin"}, "here: checkpoint_format: 'marlin' cannot be read"),
        ({"format": "bitblas"}, "here: checkpoint_format: 'bitblas' cannot be read"),
        ({"pack_dtype": "int64"}, "here: pack_dtype is 'int64', expected 'int32'"),
        ({"group_size": 0}, "here: group_size is 0, expected a positive integer, or -1"),
        ({"group_size": -2}, "here: group_size is -2"),
        ({"group_size": None}, "here: group_size is None"),
        ({"group_size": "128"}, "here: group_size is '128'"),
        ({"dynamic": {"-:(unclosed": {}}}, "here: dynamic['-:(unclosed']: not a regular expression"),
        ({"dynamic": {"lm_head": {"bits": 6}}}, "here: dynamic['lm_head']: bits: 6 is not a supported width"),
        ({"dynamic": {"lm_head": {"group_size": 0}}}, "here: dynamic['lm_head']: group_size is 0"),
        ({"dynamic": {"lm_head": 8}}, "here: dynamic['lm_head']: found int, expected an object"),
        ({"dynamic": ["lm_head"]}, "here: dynamic: found list, expected an object"),
    ],
)
def test_what_cannot_be_read_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        QuantizationConfig.from_hf(HUB | change, "here")


def test_missing_bits_are_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"here: 'bits' is missing; add the width \(2, 3, 4 or 8\)"):
        QuantizationConfig.from_hf({"group_size": 128}, "here")


def test_a_config_that_is_no_object_is_named() -> None:
    with pytest.raises(ConfigError, match="here: found str, expected an object"):
        QuantizationConfig.from_hf("gptq", "here")  # type: ignore[arg-type]
