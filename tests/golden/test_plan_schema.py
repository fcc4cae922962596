"""The plan's JSON: what is written fits the published schema, and what was written once still loads."""

import json
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest

import planner
from planner.plans.plan import SCHEMA_VERSION, Plan

GOLDEN = Path(__file__).parent
OLD = GOLDEN / "plan_v1.json"


@pytest.fixture(scope="module")
def schema():
    schema = json.loads((files("planner.plans") / "plan_schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture(scope="module")
def problem():
    workload = planner.TrainWorkload(64, 2048)
    return planner.Problem(
        planner.load_model("llama3.2-1b"),
        planner.load_cluster("h100-sxm:1x8"),
        workload,
        planner.load_stack(),
    )


def as_json(value):
    return json.loads(json.dumps(value, allow_nan=False))


def test_a_search_result_fits_the_schema(schema, problem):
    schema.validate(as_json(planner.search(problem, top=3).as_dict()))


def test_a_named_plan_fits_the_schema(schema, problem):
    schema.validate(as_json(planner.estimate(problem).as_dict()))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("mesh", "tp"), 0),
        (("mesh",), {}),
        (("stages",), []),
        (("knobs", "micro_batch_size"), "1"),
        (("estimate", "step_time_s"), 0),
        (("estimate", "memory_bytes"), {"parameters": 1.0}),
        (("schema_version",), "2.0"),
    ],
)
def test_the_schema_refuses_what_is_no_plan(schema, problem, path, value):
    plan = as_json(planner.estimate(problem).as_dict())
    table = plan
    for key in path[:-1]:
        table = table[key]
    table[path[-1]] = value
    assert not schema.is_valid(plan)
    with pytest.raises(planner.SpecError, match="major version" if path[0] == "schema_version" else path[-1]):
        Plan.from_dict(plan)


def test_every_field_is_described(schema, problem):
    plan = planner.estimate(problem).as_dict()
    defined = schema.schema["$defs"]
    assert set(plan) | {"layerwise"} == set(defined["plan"]["properties"])  # which uniform plans have none of
    assert set(plan["estimate"]) == set(defined["estimate"]["properties"])
    assert set(plan["optimality"]) == set(defined["optimality"]["properties"])
    assert set(planner.search(problem, top=1).as_dict()) | {"layerwise"} == set(
        defined["result"]["properties"]
    )


def test_a_plan_of_the_first_version_loads(schema):
    data = json.loads(OLD.read_text(encoding="utf-8"))
    schema.validate(data)
    for index, written in enumerate(data["plans"], start=1):
        plan = Plan.from_json(OLD, index)
        assert (plan.id, plan.devices) == (written["id"], 8)
        assert Plan.from_json(OLD, written["id"]) == plan


def test_fields_of_later_minor_versions_are_ignored():
    data = json.loads(OLD.read_text(encoding="utf-8"))["plans"][0]
    later = {
        **data,
        "schema_version": "1.7",
        "carbon_kg": 1.0,
        "estimate": {**data["estimate"], "water_l": 2.0},
    }
    plan = Plan.from_dict(later)
    assert plan.mesh == data["mesh"]
    assert SCHEMA_VERSION.startswith("1.")


def test_another_major_version_is_refused():
    data = json.loads(OLD.read_text(encoding="utf-8"))["plans"][0]
    with pytest.raises(planner.SpecError, match="major version 1"):
        Plan.from_dict({**data, "schema_version": "2.0"})


def test_layers_at_no_place_are_refused():
    """Types that are right are not enough: every strategy must be at a place that there is."""
    data = json.loads(OLD.read_text(encoding="utf-8"))["plans"][0]
    place = {"group": 0, "mesh": data["mesh"], "micro_batch_size": 1, "choices": {}, "stages": [0]}
    layerwise = {"strategies": [{}], "stages": [[[0, n]] for n in data["stages"]], "embedding": 0, "head": 0}
    assert Plan.from_dict({**data, "layerwise": {**layerwise, "places": [place], "at": [0]}}).places == [
        place
    ]
    with pytest.raises(planner.SpecError, match=r"1 strategies at places \[1\] of 1"):
        Plan.from_dict({**data, "layerwise": {**layerwise, "places": [place], "at": [1]}})
