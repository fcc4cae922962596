"""Every shipped model and many Hugging Face configs have as many parameters as others print or count."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from planner.specs.huggingface import model_from_config
from planner.specs.model import Model
from planner.specs.models import list_models, load_model
from planner.specs.parameters import (
    active_parameter_count,
    block_parameters,
    embedding_parameters,
    head_parameters,
    parameter_count,
)

CONFIGS = Path(__file__).parents[1] / "data" / "hf_configs"
COUNTS = tomllib.loads((CONFIGS / "counts.toml").read_text())
CLASSES = json.loads((CONFIGS / "classes.json").read_text())["models"]


def unit_of_last_digit(value: float, digits: int) -> float:
    """1e6 for 355M, 1e7 for 1.37B."""
    exponent = len(str(int(value))) - 1
    return 10.0 ** (exponent - digits + 1)


def agrees(count: float, printed: float, digits: int) -> bool:
    """Within 1 %, or rounds to the printed digits."""
    unit = unit_of_last_digit(printed, digits)
    return abs(count / printed - 1) <= 0.01 or round(count / unit) == round(printed / unit)


@pytest.mark.parametrize("name", list_models())
def test_shipped_model_has_its_published_size(name: str) -> None:
    # Oracle: published_parameters of each file, as the source named in the file prints it.
    model = load_model(name)
    assert model.published_parameters is not None, "each shipped model states its published size"
    fits = agrees(parameter_count(model), model.published_parameters, model.published_digits)
    if model.exception:
        assert not fits, f"the exception is not needed any more: {model.exception}"
        assert abs(parameter_count(model) / model.published_parameters - 1) < 0.05
    else:
        assert fits, f"{parameter_count(model):,} against {model.published_parameters:,.0f}"


@pytest.mark.parametrize("name", [n for n in list_models() if load_model(n).published_active_parameters])
def test_shipped_model_has_its_published_active_size(name: str) -> None:
    # Published active sizes count both embeddings, the output alone, or neither, and some are names ("A3B")
    # rather than sums: one of the three conventions is within one unit of the last printed digit.
    model = load_model(name)
    printed = model.published_active_parameters
    assert printed is not None
    table = model.vocab * model.hidden
    unit = unit_of_last_digit(printed, model.published_active_digits)
    active = active_parameter_count(model)
    assert any(abs(active - k * table - printed) <= unit for k in (0, 1, 2))
    assert active < parameter_count(model)


def test_every_exception_gives_a_reason() -> None:
    reasons = {name: load_model(name).exception for name in list_models()}
    assert {name for name, reason in reasons.items() if reason} == {
        "gpt3-350m",
        "gshard-600b",
        "llama4-scout",
    }
    assert all(len(reason.split()) >= 5 for reason in reasons.values() if reason)


def test_every_shipped_model_names_its_source() -> None:
    for name in list_models():
        source = load_model(name).source
        assert (
            "arXiv:" in source or "config.json of" in source or "et al." in source or "README of" in source
        ), name


@pytest.mark.parametrize("name", COUNTS)
def test_published_config_has_the_exact_count(name: str) -> None:
    # Oracle: transformers 5.23.0 meta-device count (tests/data/hf_configs/counts.toml).
    assert parameter_count(load_model(CONFIGS / f"{name}.json")) == COUNTS[name]


@pytest.mark.parametrize("name", CLASSES)
def test_config_of_each_class_has_the_exact_count(name: str) -> None:
    # Oracle: transformers 5.23.0 meta-device count (tests/data/hf_configs/classes.json).
    row = CLASSES[name]
    model = model_from_config(row["config"], name)
    assert parameter_count(model) == row["parameters"]
    assert "assumed" not in model.extras


@pytest.mark.parametrize(
    "hub_id",
    [
        "meta-llama/Meta-Llama-3.1-405B",
        "mistralai/Mixtral-8x7B-v0.1",
        "Qwen/Qwen3-0.6B",
        "Qwen/Qwen3-30B-A3B",
        "Qwen/Qwen3.5-35B-A3B",
        "deepseek-ai/DeepSeek-V3",
        "deepseek-ai/DeepSeek-V3.2",
        "moonshotai/Kimi-K2.5",
        "zai-org/GLM-5",
        "openai/gpt-oss-20b",
        "MiniMaxAI/MiniMax-M2.5",
        "meta-llama/Llama-4-Scout-17B-16E-Instruct",
        "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        "nvidia/Nemotron-H-56B-Base-8K",
        "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
        "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    ],
)
def test_shipped_file_and_published_config_describe_one_model(hub_id: str) -> None:
    # Oracle: the two files were written by different people; layer by layer they must be the same model.
    ours = load_model(hub_id)
    theirs = load_model(CONFIGS / f"{hub_id.replace('/', '--')}.json")
    assert ours.hidden == theirs.hidden
    assert ours.vocab == theirs.vocab
    assert ours.tied_embeddings == theirs.tied_embeddings
    assert sequence(ours) == sequence(theirs)


def sequence(model: Model) -> list[object]:
    return [model.blocks[name] for name, repeat in model.layers for _ in range(repeat)]


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("mamba-130m", 0.129e9),
        ("mamba-1.4b", 1.372e9),
        ("mamba-2.8b", 2.768e9),
    ],
)
def test_mamba_counts(name: str, published: float) -> None:
    # Oracle: sizes of the released checkpoints of arXiv:2312.00752 (129M, 1.372B, 2.768B).
    assert parameter_count(load_model(name)) == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize("name", list_models())
def test_the_count_is_the_sum_of_its_parts(name: str) -> None:
    # Weights conserved: embedding + layers + head, the law that stage memory relies on.
    model = load_model(name)
    layers = sum(n * block_parameters(model, block) for block, n in (*model.encoder_layers, *model.layers))
    assert embedding_parameters(model) + layers + head_parameters(model) == parameter_count(model)
