"""Exported plans, judged by the launchers' own parsers; benchmarks/launchers.py tries hundreds in the same way.

Needs the extra ``launchers`` (and hetu-galvatron for its test); skipped where they are not installed.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLANS = 12


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("accelerate", "accelerate"),
        ("deepspeed", "deepspeed"),
        ("transformers", "transformers"),
        ("galvatron", "galvatron"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_launcher_takes_what_was_exported(name, package, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed (extra launchers)")
    monkeypatch.syspath_prepend(str(ROOT))
    kept = {key: module for key, module in sys.modules.items() if key.partition(".")[0] == "galvatron"}
    from benchmarks.launchers import draw_plans, export, notices_a_slip, read_back, validator
    from planner.export.readers import READERS

    judge = validator(name)
    try:
        for plan in draw_plans(name, PLANS):
            files = export(plan, name)
            assert judge.refusal(files, plan) == ""
            assert notices_a_slip(name, judge, files, plan)
            assert name not in READERS or read_back(name, files, plan) == ""
    finally:
        sys.modules.update(kept)


@pytest.mark.oracle
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name",
    ["llama3.1-8b", "qwen2.5-7b", "qwen3-14b", "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3", "gpt2-xl"],
)
def test_transformers_builds_a_model_of_as_many_parameters(name):
    """On the meta device: no weight is made."""
    transformers = pytest.importorskip(
        "transformers", reason="transformers is not installed (extra launchers)"
    )
    torch = pytest.importorskip("torch")
    from planner.export.hf_model import hf_model
    from planner.specs.models import load_model
    from planner.specs.parameters import parameter_count

    model = load_model(name)
    config = transformers.AutoConfig.for_model(**hf_model(model).config)
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameter_count(model)
