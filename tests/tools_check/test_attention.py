"""`nlgmoe check` of attention: it finds each seeded defect by one property, and passes the attentions of the package."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from nlgmoe import AttentionConfig, GPTConfig, MLAConfig
from nlgmoe.commands.main import main as nlgmoe
from nlgmoe.parts import part_to_dict
from nlgmoe.tools.check.attention import attention_layer
from nlgmoe.tools.check.layer import Target
from nlgmoe.tools.check.properties import OF_ATTENTION, check_layer
from nlgmoe.tools.check.targets import find_layers
from tests.tools_check.broken_attention import DEFECTS, broken

GPU = "the GPU agrees with the CPU"


def failures(layer: Target) -> dict[str, str]:
    return {result.property: result.reason for result in check_layer(layer) if result.verdict == "fail"}


@pytest.mark.parametrize("defect", DEFECTS)
def test_check_attention_finds_each_planted_defect_by_one_property(defect: str) -> None:
    found = failures(broken(defect))
    name, _ = DEFECTS[defect]
    assert set(found) == {name}, found
    assert "Error: " not in found[name], found  # not by accident


def test_properties_of_attention_have_a_defect_each() -> None:
    assert {name for name, _ in DEFECTS.values()} == set(OF_ATTENTION) - {GPU}


def window() -> AttentionConfig:
    """A factory, as a user writes one."""
    return MLAConfig(8, 4, 4, 8)


BIG = GPTConfig(61, 2048, 24, 1024, 16, rope_theta=1e4, bias=False)
LATENT = replace(BIG, attention=MLAConfig(512, 128, 64, 128, q_lora_rank=96))


@pytest.mark.parametrize(
    ("target", "layers"),
    [("multi-head", 2), ("mla", 1), ("window_attention.WindowAttentionConfig", 2), (f"{__name__}.window", 1)],
)
def test_check_attention_passes_correct_attentions(target: str, layers: int) -> None:
    found = find_layers([target])
    assert len(found) == layers
    for layer in found:
        results = list(check_layer(layer))
        assert not [result for result in results if result.verdict == "fail"], results
        assert sum(result.verdict == "pass" for result in results) >= len(OF_ATTENTION) - 1


@pytest.mark.parametrize(
    "config", [LATENT, replace(BIG, num_kv_heads=4, attention_scale=0.1)], ids=["latent", "grouped"]
)
def test_check_attention_passes_a_large_one_with_few_heads(config: GPTConfig) -> None:
    layer = attention_layer(config, "large")
    assert (layer.config.num_heads, layer.config.head_size) == (4 if config.num_kv_heads else 2, 64)
    assert not failures(layer)


def test_check_covers_the_attention_of_a_configuration_beside_its_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (file := tmp_path / "latent.yaml").write_text(
        yaml.safe_dump({"model": {"config": {"rope_theta": 1e4, "attention": part_to_dict(MLAConfig(8, 4, 4, 8))}}})
    )
    kinds = [type(layer).__name__ for layer in find_layers(["configs/moe/laptop.yaml", str(file)])]
    assert kinds == ["OwnLayer", "AttentionLayer"]
    for name in set(OF_ATTENTION) - {"a cache changes no output"}:
        monkeypatch.delitem(OF_ATTENTION, name)
    nlgmoe(["check", "configs/dense/laptop.yaml", str(file)])
    out = capsys.readouterr().out
    assert "latent.yaml, MLAConfig: attention of 4 blocks, 2 heads, width 64\n  pass            a cache changes" in out
