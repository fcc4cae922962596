"""Do the listings of techniques, hardware and models say what the library knows?"""

import json
import tomllib
from pathlib import Path

import pytest

from planner import load_model
from planner.specs.hardware import list_clusters, list_devices
from planner.specs.models import list_models
from planner.technique import catalogue

CONFIGS = Path(__file__).resolve().parents[1] / "data" / "hf_configs"


def test_techniques_are_those_of_the_catalogue(planner):
    found = planner("techniques", "--json").json
    assert {t["key"] for t in found} == set(catalogue())
    assert {"key", "name", "job", "kind", "slot", "status", "source", "figures"} <= set(found[0])
    serving = planner("techniques", "--job", "serving", "--json").json
    assert {t["job"] for t in serving} <= {"serving"}
    for arguments in ((), ("--all",)):
        out = planner("techniques", *arguments).out
        assert "not modelled" in out
        assert max(map(len, out.splitlines())) <= 100
        words = set(out.replace(",", " ").split())
        assert {t["key"] for t in found} <= words


def test_hardware_is_listed_and_shown_with_its_sources(planner):
    assert planner("hardware", "list", "--json").json == {
        "devices": list_devices(),
        "clusters": list_clusters(),
    }
    # NVIDIA H100 data sheet: 3.35 TB/s.
    device = planner("hardware", "show", "H100", "--json").json["device"]
    assert device["memory_bytes_per_s"] == {
        "value": 3.35e12,
        "kind": "datasheet",
        "source": "nvidia-h100-datasheet",
    }
    shown = planner("hardware", "show", "h100").out
    assert "3.35 TB/s" in shown
    assert "nvidia-h100-datasheet" in shown
    cluster = planner("hardware", "show", "h100:2x8", "--json").json["cluster"]
    assert [tier["size"] for tier in cluster["tiers"]] == [8, 16]
    assert "nvlink" in planner("hardware", "show", "selene").out
    assert len(planner("hardware", "list").out.splitlines()) > len(list_devices()) + len(list_clusters())


def test_hardware_check_says_what_is_implausible(planner, tmp_path):
    assert planner("hardware", "check", "h100-sxm", "a100").code == 0
    path = tmp_path / "odd.toml"
    path.write_text('generation = "hopper"\n')
    found = planner("hardware", "check", path, "--json")
    assert found.code == 2
    assert found.faults


def test_models_are_listed_and_counted(planner):
    assert planner("models", "list", "--json").json["models"] == list_models()
    # arXiv:2412.19437: 671B parameters, 37B of them active.
    model = planner("models", "show", "deepseek-ai/DeepSeek-V3", "--json").json["model"]
    assert round(model["parameters"] / 1e9) == 671
    assert "671,026,404,352 parameters" in planner("models", "show", "deepseek-v3").out


@pytest.mark.parametrize("config", ["deepseek-ai--DeepSeek-V3.json", "openai--gpt-oss-20b.json"])
def test_imported_model_is_the_same_model(planner, tmp_path, config):
    path = tmp_path / "model.toml"
    found = planner("models", "import", CONFIGS / config, "-o", path)
    assert found.code == 0
    assert "parameters" in found.out
    written, read = load_model(path), load_model(CONFIGS / config)
    assert (written.blocks, written.layers, written.vocab) == (read.blocks, read.layers, read.vocab)
    assert tomllib.loads(path.read_text())["source"]


def test_model_that_a_file_cannot_express_is_refused(planner, tmp_path):
    """MiMo-V2-Flash has other head counts in its windowed layers than in its full ones."""
    path = tmp_path / "model.toml"
    found = planner("models", "import", CONFIGS / "XiaomiMiMo--MiMo-V2-Flash.json", "-o", path, "--json")
    assert found.code == 2
    assert not path.exists()


def test_schema_describes_a_plan(planner, plans):
    jsonschema = pytest.importorskip("jsonschema")
    schema = planner("schema").json
    jsonschema.validate(json.loads(plans.read_text()), schema)
