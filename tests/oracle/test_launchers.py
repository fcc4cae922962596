"""Exported plans, judged by the launchers' own parsers, as benchmarks/launchers.py does, which has the heavier launchers too.

Needs the extra ``launchers`` (and hetu-galvatron for its test); skipped where they are not installed, which is never in .ci/run.
"""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.oracle
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("accelerate", "accelerate"),
        ("deepspeed", "deepspeed"),
        ("galvatron", "galvatron"),
        ("torchrun", "torch"),
        ("transformers", "transformers"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_the_launcher_takes_what_was_exported(name, package, monkeypatch):
    pytest.importorskip(package, reason=f"{package} is not installed (extra launchers)")
    monkeypatch.syspath_prepend(str(ROOT))
    kept = {key: module for key, module in sys.modules.items() if key.partition(".")[0] == "galvatron"}
    from benchmarks.launchers import PLANS, try_launcher

    try:
        found = try_launcher(name, PLANS)  # prints the plans that fail
    finally:
        sys.modules.update(kept)
    assert (found["tried"], found["accepted"], found["slips_noticed"]) == (PLANS, PLANS, PLANS)
    assert found["read_back"] in (None, PLANS)


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
