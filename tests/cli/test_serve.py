"""``planner serve`` and the verbs that read its plans: the contract of its JSON, exit codes, launch lines."""

import json

import pytest

from planner.serving.plan import ServePlan

SERVE = ("serve", "--model", "llama3.1-8b", "--cluster", "h100-sxm:1x4", "--isl", 2000, "--osl", 200)
LIMITS = ("--ttft-ms", 500, "--tpot-ms", 20)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    from planner.cli import main

    path = tmp_path_factory.mktemp("serve") / "plans.json"
    assert main([*map(str, (*SERVE, *LIMITS)), "-o", str(path), "--json"]) == 0
    return path


def test_json_has_the_promised_fields(planner):
    found = planner(*SERVE, *LIMITS, "--percentile", 90, "--json").json
    assert found["schema_version"].startswith("1.")
    assert set(found["search"]) >= {"candidates", "scored", "excluded_by_bound", "rejected", "wall_s"}
    for plan in found["plans"]:
        assert plan["optimality"]["status"] in ("exact", "gap")
        for pool in plan["pools"]:
            assert set(pool) >= {"role", "replicas", "mesh", "knobs"}
            assert pool["role"] in ("aggregated", "prefill", "decode")
        estimate = plan["estimate"]
        assert set(estimate) >= {
            "output_tokens_per_s_per_device", "ttft_s", "tpot_s", "max_concurrency", "goodput_requests_per_s",
            "usd_per_million_output_tokens", "memory_bytes", "binding",
        }  # fmt: skip
        for name in ("ttft_s", "tpot_s"):
            assert set(estimate[name]) == {"mean", "p50", "p90", "p99"}
        assert estimate["ttft_s"]["p90"] <= 0.5 + 1e-9
        assert estimate["tpot_s"]["p90"] <= 0.02 + 1e-9
        rate = estimate["goodput_requests_per_s"] * 200 / plan["devices"]
        assert estimate["output_tokens_per_s_per_device"] == pytest.approx(rate)


def test_same_input_same_plans(planner):
    one, other = (planner(*SERVE, *LIMITS, "--json").json for _ in range(2))
    assert one["plans"] == other["plans"]


def test_a_hub_name_says_the_precision(planner):
    base = ("serve", "--cluster", "h200-sxm:1x2", "--isl", 1000, "--osl", 100, "--top", 1, "--json")
    for model, weights in (
        ("Qwen/Qwen3-32B-FP8", "fp8"),
        ("qwen3-32b", "bf16"),
        ("minimax-m2.5", "fp8_block"),
    ):
        cluster = ("--cluster", "h200-sxm:1x4") if "minimax" in model else ()
        plan = planner(*base, "--model", model, *cluster).json["plans"][0]
        assert plan["pools"][0]["knobs"]["weights"] == weights


def test_lossy_choices_only_when_allowed(planner):
    formats = []
    for more in ((), ("--allow", "lossy")):
        found = planner(*SERVE, *LIMITS, *more, "--json").json["plans"]
        formats.append({pool["knobs"]["weights"] for plan in found for pool in plan["pools"]})
    assert formats[0] == {"bf16"}
    assert "fp8" in formats[1]


def test_rate_and_concurrency(planner):
    rate = planner(*SERVE, *LIMITS, "--rate", 2, "--json").json["plans"][0]
    assert rate["estimate"]["goodput_requests_per_s"] == pytest.approx(2.0)
    assert rate["devices"] == 1
    many = planner(*SERVE, "--concurrency", 64, "--mode", "aggregated", "--json").json["plans"][0]
    assert many["pools"][0]["in_flight"] * many["pools"][0]["replicas"] >= 64


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (("--tpot-ms", 0.01), 3, "--tpot-ms"),
        (("--ttft-ms", 0.01), 3, "--ttft-ms"),
        (("--rate", 100000, "--tpot-ms", 20), 3, "--rate"),
        (("--rate", 0), 2, "--rate"),
        (("--rate", -1, "--for", "sglang"), 2, "--rate"),
        (("--rate", 2, "--concurrency", 3), 2, "--rate"),
        (("--isl", -1), 2, "--isl"),
        (("--precision", "fp3"), 2, "--precision"),
        (("--fix", "tpp=2"), 2, "tpp"),
        (("--engine", "nobody"), 2, "nobody"),
        (("--engine", "megatron-core"), 2, "--engine"),
        (("--prefix-hit", 1.5), 2, "--prefix-hit"),
        (("--model", "bert-base"), 2, "--model"),
        (("--mode", "split"), 2, "--mode"),
        (("--allow", "everything"), 2, "--allow"),
    ],
)
def test_bad_input_is_said(planner, more, code, said):
    result = planner(*SERVE, *more, "--json")
    assert result.code == code
    assert any(said in fault["where"] or said in fault["found"] for fault in result.faults)
    assert all(fault["found"] for fault in result.faults)


def test_everything_that_is_missing_is_said_at_once(planner):
    faults = planner("serve", "--json").faults
    assert {fault["where"] for fault in faults} == {"--model", "--cluster", "--isl", "--osl"}


def test_a_model_that_does_not_fit(planner):
    result = planner(
        "serve", "--model", "llama3.1-405b", "--cluster", "h100-sxm:1x2", "--isl", 10, "--osl", 10, "--json"
    )
    assert result.code == 3
    assert result.faults[0]["where"] == "device memory"


def test_screens_print(planner, plans):
    for arguments in (
        (*SERVE, *LIMITS), ("estimate", plans), ("explain", plans), ("explain", f"{plans}:2", "--all"),
        ("compare", plans, f"{plans}:2"),
    ):  # fmt: skip
        result = planner(*arguments)
        assert result.code == 0, result.err
        assert len(result.out.splitlines()) > 5
    assert "time to first token, p99" in result.out
    assert "GiB" in result.out


def test_a_written_plan_is_priced_alike(planner, plans):
    written = json.loads(plans.read_text())["plans"]
    for index, plan in enumerate(written[:4], 1):
        now = planner("estimate", f"{plans}:{index}", "--json").json["plans"][0]
        assert now["pools"] == plan["pools"]
        for name in ("goodput_requests_per_s", "max_concurrency"):
            assert now["estimate"][name] == pytest.approx(plan["estimate"][name])


def test_explain_accounts_for_an_iteration(planner, plans):
    found = planner("explain", plans, "--json").json
    for pool in found["pools"]:
        for iteration in pool["iterations"]:
            total = sum(item["seconds"] for item in iteration["items"])
            assert total == pytest.approx(iteration["seconds"], rel=0.02)
            assert all(item["by"] for item in iteration["items"])


def test_a_plan_that_serves_is_no_plan_that_trains(planner, plans):
    result = planner("goodput", plans, "--json")
    (fault,) = result.faults
    assert (result.code, fault["found"], fault["expected"]) == (2, "is a serving plan", "a training plan")


def test_a_plan_that_trains_is_no_plan_that_serves(planner, plans, tmp_path):
    other = tmp_path / "train.json"
    planner(
        "train",
        "--model",
        "gpt2",
        "--cluster",
        "a100:1x1",
        "--global-batch",
        8,
        "--seq-len",
        1024,
        "-o",
        other,
    )
    assert planner("compare", plans, other, "--json").code == 2
    assert planner("estimate", other, "--json").code == 2


ENGINES = {
    "vllm": 'exec vllm serve "$MODEL"',
    "sglang": "exec python3 -m sglang.launch_server",
    "trtllm": 'exec trtllm-serve "$MODEL"',
}


@pytest.mark.parametrize("engine", ENGINES)
def test_a_folder_starts_every_pool(planner, plans, engine, tmp_path):
    made = json.loads(plans.read_text())["plans"]
    # NixlConnector takes caches of one stage alone.
    number = next(n for n, plan in enumerate(made, 1) if all(p["mesh"]["pp"] == 1 for p in plan["pools"]))
    chosen = f"{plans}:{number}"
    result = planner("export", chosen, "--to", engine, "--json")
    assert result.code == 0
    scripts = {name for name in result.json["files"] if name.startswith("serve")}
    assert len(scripts) == len(made[number - 1]["pools"])
    assert all(ENGINES[engine] in result.json["files"][name] for name in scripts)
    done = planner(
        "export", chosen, "--to", engine, "--with", "k8s", "--with", "slurm", "-o", tmp_path / engine
    )
    assert done.code == 0
    assert {path.name for path in (tmp_path / engine).iterdir()} >= {
        *scripts, "README.md", "measure.py", "plan.json", "run.sh", "job.sbatch", "leaderworkerset.yaml",
    }  # fmt: skip
    assert planner("export", chosen, "--to", "megatron").code == 2
    assert planner("export", chosen, "--to", engine, "--script", "x.py").code == 2


def test_a_refused_plan_names_the_next_one_that_runs(planner, tmp_path):
    path = tmp_path / "plans.json"
    degrees = ("decode.tp=1", "decode.pp=2", "prefill.pp=2", "prefill.tp=1")
    choices = [word for degree in degrees for word in ("--fix", degree)]
    for_vllm = planner(*SERVE, "--mode", "disaggregated", *choices, "--engine", "vllm", "-o", path)
    assert for_vllm.code == 3
    assert "vllm: stages in a pool that generates" in for_vllm.err
    assert planner(*SERVE, "--mode", "disaggregated", *choices, "--engine", "sglang", "-o", path).code == 0
    refused = planner("export", path, "--to", "vllm")
    assert refused.code == 5
    assert "No other plan of the same file can be run there" in refused.err
    both = json.loads(path.read_text())
    assert planner(*SERVE, "--mode", "aggregated", "-o", path).code == 0
    both["plans"] += json.loads(path.read_text())["plans"]
    path.write_text(json.dumps(both))
    refused = planner("export", path, "--to", "vllm").err
    number = int(refused.split("Closest: plan ")[1].split()[0])
    assert planner("export", f"{path}:{number}", "--to", "vllm").code == 0


def test_a_launch_is_priced_and_checked(planner, tmp_path):
    (tmp_path / "run.sh").write_text(
        "vllm serve meta-llama/Llama-3.1-8B-Instruct -tp 4 --enforce-eager --frobnicate 3"
    )
    job = (
        "--from",
        "vllm",
        tmp_path / "run.sh",
        "--cluster",
        "h100-sxm:1x4",
        "--isl",
        2000,
        "--osl",
        200,
        *LIMITS,
    )
    found = planner("estimate", *job, "--json").json
    assert found["plans"][0]["pools"][0]["mesh"]["tp"] == 4
    assert "Ignored: --frobnicate." in found["notes"]
    assert found["best"]["speedup"] >= 1.0
    checked = planner("check", *job)
    assert checked.code == 0
    assert "--enforce-eager" in checked.out
    assert (
        planner("check", *job, "--isl", 200_000).code == 1
    )  # longer than the model's context, and than its caches
    assert planner("estimate", "--from", "vllm", tmp_path / "run.sh").err.count("is missing") == 3
    assert "beside a job that trains" in planner("estimate", "--model", "gpt2", "--isl", 3).err


def test_plans_keep_their_schema(planner, plans):
    jsonschema = pytest.importorskip("jsonschema")
    schema = planner("schema", "--serving").json
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(plans.read_text()), schema)
    jsonschema.validate(json.loads(plans.read_text())["plans"][0], schema)


def test_drafts_are_planned_repriced_and_launched(planner, tmp_path):
    path = tmp_path / "plans.json"
    drafting = ("--draft", "llama3.2-1b", "--acceptance", 0.8, "--tpot-ms", 6, "--mode", "aggregated")
    assert planner(*SERVE, *drafting, "-o", path).code == 0
    plan = json.loads(path.read_text())["plans"][0]
    knobs = plan["pools"][0]["knobs"]
    assert knobs["draft"] == "llama3.2-1b"
    now = planner("estimate", path, "--json").json["plans"][0]
    assert now["estimate"]["goodput_requests_per_s"] == pytest.approx(
        plan["estimate"]["goodput_requests_per_s"]
    )
    assert "draft" in planner("explain", path).out
    files = planner("export", path, "--to", "vllm", "--json").json["files"]
    assert f"num_speculative_tokens: {knobs['draft_tokens']}" in files["vllm.yaml"]
    assert "meta-llama/Llama-3.2-1B" in files["vllm.yaml"]  # what the hub calls it, which the engine can load
    found = planner("simulate", path, "--requests", 4000, "--json").json
    assert found["simulated"]["tpot_s"]["mean"] == pytest.approx(plan["estimate"]["tpot_s"]["mean"], rel=0.1)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--draft", "mtp"), "--acceptance"),
        (("--acceptance", 0.5), "--acceptance"),
        (("--draft", "mtp", "--acceptance", 0.5), "--draft"),
        (("--draft", "ngram", "--acceptance", 2), "--acceptance"),
        (("--draft", "no-such-model", "--acceptance", 0.5), "--draft"),
        (("--draft", "ngram", "--acceptance", 0.5, "--draft-tokens", "1,x"), "--draft-tokens"),
    ],
)
def test_bad_drafts_are_said(planner, more, said):
    result = planner(*SERVE, *more, "--json")
    assert result.code == 2
    assert any(said in fault["where"] for fault in result.faults), result.faults


def test_a_day_is_shown_and_written(planner, tmp_path):
    (tmp_path / "day.txt").write_text("2\n5\n20\n")
    for load in ("2,5,20", tmp_path / "day.txt"):
        found = planner(*SERVE, *LIMITS, "--daily", load, "--objective", "usd", "--json").json
        assert [period["rate_per_s"] for period in found["days"][0]["periods"]] == [2.0, 5.0, 20.0]
        assert len(found["days"]) == len(found["plans"])
    assert "device hours" in planner(*SERVE, *LIMITS, "--daily", "2,5,20").out
    shown = planner(*SERVE, *LIMITS, "--daily", "2,50000").out
    assert "not on this cluster" in shown[: shown.index("tok/s/device")]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--daily", "0,0"), "--daily"), (("--daily", "1,x"), "--daily"), (("--daily", "1,-2"), "--daily"),
        (("--daily", "1,2", "--rate", 3), "--rate"), (("--headroom", 0.5), "--headroom"),
        (("--daily", "1,2", "--headroom", -1), "--headroom"), (("--objective", "speed"), "--objective"),
    ],
)  # fmt: skip
def test_bad_days_and_objectives_are_said(planner, more, said):
    result = planner(*SERVE, *LIMITS, *more, "--json")
    assert result.code == 2
    assert any(said in fault["where"] for fault in result.faults), result.faults


def test_pools_on_two_types_in_the_other_verbs(planner, tmp_path):
    path = tmp_path / "mixed.json"
    clusters = ("--cluster", "h100-sxm:1x4+l40s:1x8")
    base = ("serve", "--model", "llama3.1-8b", "--isl", 2000, "--osl", 200, *clusters)
    assert planner(*base, "--ttft-ms", 1000, "--tpot-ms", 40, "-o", path).code == 0
    written = json.loads(path.read_text())["plans"][0]
    assert {pool["cluster"] for pool in written["pools"]} == {"h100-sxm:1x4", "l40s:1x8"}
    now = planner("estimate", path, "--json").json["plans"][0]["estimate"]
    assert now["goodput_requests_per_s"] == pytest.approx(
        written["estimate"]["goodput_requests_per_s"], rel=0.02
    )
    assert "l40s" in planner("explain", path).out
    assert planner("compare", path, f"{path}:2").code == 0
    exported = planner("export", path, "--to", "vllm")
    if exported.code:  # by a pool that the engine cannot run, and says which
        assert exported.code == 5
        assert "pool: pp=" in exported.err
    else:
        assert "placement.tsv" in exported.out
    simulated = planner("simulate", path, "--requests", 3000, "--json").json
    for name in ("tpot_s", "ttft_s"):  # the plan says those of its slowest pools
        assert 0.5 * now[name]["mean"] < simulated["simulated"][name]["mean"] < 1.1 * now[name]["mean"]
    assert planner(*base, "--mode", "aggregated", "--json").code == 2
    assert planner(*base[:-1], "h100-sxm:1x4+no-such:1x8", "--json").code == 2
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(json.loads(path.read_text()), planner("schema", "--serving").json)


@pytest.mark.parametrize(
    ("limits", "where"),
    [
        (("--ttft-ms", 0.01, "--tpot-ms", 50), "--ttft-ms"), (("--ttft-ms", 1000, "--tpot-ms", 0.5), "--tpot-ms"),
        (("--ttft-ms", 1000, "--tpot-ms", 50, "--rate", 1e5), "--rate"), (("--ttft-ms", 40, "--tpot-ms", 50), "--ttft-ms"),
    ],
)  # fmt: skip
def test_pools_on_two_types_say_which_limit_nothing_keeps(planner, limits, where):
    clusters = ("--cluster", "h100-sxm:1x4+l40s:1x8")
    result = planner(
        "serve", "--model", "llama3.1-8b", "--isl", 2000, "--osl", 200, *clusters, *limits, "--json"
    )
    assert result.code == 3
    (fault,) = result.faults
    assert fault["where"] == where
    assert "fits" in fault["try"]


def test_offloaded_plans_in_the_other_verbs(planner, tmp_path):
    path = tmp_path / "plans.json"
    base = (
        "--model",
        "opt-30b",
        "--cluster",
        "t4:1x2",
        "--isl",
        512,
        "--osl",
        32,
        "--precision",
        "fp16",
        "--mode",
        "offloaded",
    )
    assert planner("serve", *base, "-o", path).code == 0
    plan = json.loads(path.read_text())["plans"][0]
    now = planner("estimate", path, "--json").json["plans"][0]
    assert now["pools"] == plan["pools"]
    assert now["estimate"] == plan["estimate"]
    assert "disk reads" in planner("explain", path).out
    assert planner("export", path, "--to", "vllm", "--json").code == 5
    simulated = planner("simulate", path, "--requests", 2000, "--json").json["simulated"]
    expected = plan["estimate"]["output_tokens_per_s_per_device"] * 2
    assert simulated["output_tokens_per_s"] == pytest.approx(expected, rel=0.02)
    assert planner("simulate", path, "--scheduler", "orca").code == 2


def test_static_batches_in_the_other_verbs(planner, tmp_path):
    path = tmp_path / "static.json"
    base = ("serve", "--model", "llama3.1-8b", "--cluster", "h100-sxm:1x2", "--isl", 500, "--osl", 200)
    assert planner(*base, "--mode", "static", "--ttft-ms", 1500, "-o", path).code == 0
    plan = json.loads(path.read_text())["plans"][0]
    assert plan["mode"] == "static"
    assert planner("estimate", path, "--json").json["plans"][0]["estimate"] == plan["estimate"]
    iterations = planner("explain", path, "--json").json["pools"][0]["iterations"]
    assert [one["decodes"] for one in iterations] == [plan["pools"][0]["in_flight"], 0.0]
    assert iterations[1]["prefill_tokens"] == plan["pools"][0]["in_flight"] * 500
    found = planner("simulate", path, "--requests", 4000, "--json").json["simulated"]
    assert found["ttft_s"]["mean"] == pytest.approx(plan["estimate"]["ttft_s"]["mean"], rel=0.1)
    assert planner("export", path, "--to", "vllm", "--json").code == 5
    continuous = planner(*base, "--mode", "aggregated", "--ttft-ms", 1500, "--json").json["plans"][0]
    assert continuous["estimate"]["goodput_requests_per_s"] > plan["estimate"]["goodput_requests_per_s"]


def test_attention_and_experts_apart_in_the_other_verbs(planner, tmp_path):
    path = tmp_path / "apart.json"
    base = ("serve", "--model", "mixtral-8x7b", "--cluster", "h100-sxm:1x8", "--isl", 1000, "--osl", 50)
    assert planner(*base, "--mode", "ping_pong", "--tpot-ms", 60, "--ttft-ms", 900, "-o", path).code == 0
    for plan in json.loads(path.read_text())["plans"]:
        again = planner("estimate", f"{path}:{plan['id']}", "--json").json["plans"][0]
        assert (again["id"], again["estimate"]) == (plan["id"], plan["estimate"])
    token, *sides, prompts = planner("explain", path, "--json").json["pools"]
    assert [part["role"] for part in (token, *sides, prompts)] == [
        "attention and experts", "attention", "experts", "prefill",
    ]  # fmt: skip
    assert "waiting for the other side" in planner("explain", path, "--all").out
    assert planner("compare", path, f"{path}:2", "--json").json["a"]["devices"] <= 8
    found = planner("simulate", path, "--requests", 4000, "--json").json
    assert found["simulated"]["tpot_s"]["mean"] == pytest.approx(
        found["predicted"]["tpot_s"]["mean"], rel=0.05
    )
    refused = planner("export", path, "--to", "vllm", "--json")
    assert refused.code == 5
    assert "attention and experts apart" in refused.faults[0]["expected"]


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--model", "llama3.1-8b", "--engine", "vllmm"), 2, "Did you mean vllm or"),
        (("--model", "llama3.1-8b", "--ttft-ms", -5), 2, "--ttft-ms: -5; expected milliseconds above 0"),
        (("--model", "opt-13b", "--isl", 4000), 2, "At most 1,948 in fit beside 100 out."),
        (("--model", "llama3.1-8b", "--fix", "replicas=9"), 2, "9 on 2 devices"),
        (("--model", "llama3.1-8b", "--precision", "fp8"), 3, "--precision bf16 fits."),
        (("--model", "llama3.1-8b", "--fix", "tp=5"), 2, "no replica on 2 devices has tp=5"),
        (("--model", "llama3.1-8b", "--fix", "ep=2"), 3, "Leave out --fix ep=2."),
        (("--model", "llama3.1-8b", "--fix", "cache_copies=dcp"), 3, "Leave out --fix cache_copies=dcp"),
    ],
)
def test_what_would_fit_is_told(planner, options, code, said):
    found = planner("serve", "--cluster", "a100-sxm-80gb:1x2", "--isl", 1000, "--osl", 100, *options)
    assert found.code == code
    assert said in " ".join(found.err.split())


_MODES = {
    "offloaded": ("opt-1.3b", "t4:1x1", "--precision", "fp16"),
    "static": ("llama3.1-8b", "h100-sxm:1x2"),
    "ping_pong": ("mixtral-8x7b", "h100-sxm:1x8", "--tpot-ms", 60),
    "disaggregated": ("llama3.1-8b", "h100-sxm:1x4", "--tpot-ms", 60),
}


@pytest.mark.parametrize("mode", _MODES)
def test_plans_of_every_mode_keep_the_schema(planner, mode):
    jsonschema = pytest.importorskip("jsonschema")
    model, cluster, *limits = _MODES[mode]
    job = ("--model", model, "--cluster", cluster, "--isl", 1000, "--osl", 50, *limits)
    found = planner("serve", *job, "--mode", mode, "--top", 2, "--json").json
    jsonschema.validate(found, planner("schema", "--serving").json)
    assert {plan["mode"] for plan in found["plans"]} == {mode}
    for plan in found["plans"]:
        assert json.loads(json.dumps(ServePlan.from_dict(plan).as_dict())) == plan
    if mode == "disaggregated":  # no limit of the first token keeps its load from growing
        assert "ttft" not in {plan["estimate"]["binding"] for plan in found["plans"]}


@pytest.mark.parametrize(
    ("options", "where"),
    [
        (("--model", "llama3.1-8b", "--precision", "fp8"), "t4 has no fp8 matrix rate"),
        (("--model", "llama3.1-8b", "--cache", "fp8"), "t4 has no fp8 matrix rate"),
        (
            ("--model", "opt-175b", "--precision", "fp16"),
            "2.69 times",
        ),  # 352 GB in 0.8 of 13 (of 16), 26 and 125 GB
        (("--model", "opt-1.3b", "--daily", "no/such.txt"), "no file 'no/such.txt'"),
    ],
)
def test_what_offloading_cannot_do_is_told(planner, options, where):
    found = planner(
        "serve", *options, "--cluster", "t4:1x1", "--isl", 512, "--osl", 32, "--mode", "offloaded"
    )
    assert found.code in (2, 3)
    assert where in found.err


def test_requests_longer_than_the_model_was_made_for_are_told(planner):
    base = (
        "serve",
        "--model",
        "llama3.1-8b",
        "--cluster",
        "h100-sxm:1x2",
        "--osl",
        100,
        "--top",
        1,
        "--json",
    )
    within, beyond = (planner(*base, "--isl", isl).json["plans"][0]["assumptions"] for isl in (1000, 150_000))
    assert not any("context" in one for one in within)
    assert "context: 150,100 tokens of a request, of a model made for 131,072" in beyond


def test_pruned_weights_run_where_no_engine_has_a_word_against_them(planner):
    refused = planner(*SERVE, "--precision", "sparse24")
    assert refused.code == 2
    assert "has no words for weights=sparse24" in refused.err
    plan = planner(*SERVE, "--precision", "sparse24", "--engine", "serving", "--top", 1, "--json").json[
        "plans"
    ][0]
    assert plan["pools"][0]["knobs"]["weights"] == "sparse24"


@pytest.mark.parametrize(
    "load", [(), ("--rate", 250), ("--concurrency", 32)], ids=("highest", "rate", "clients")
)
def test_answers_of_one_token_share_iterations(planner, tmp_path, load):
    """Whatever came during an iteration goes into the next; one prompt an iteration would be 120 of these a second."""
    base = (
        "serve",
        "--model",
        "llama3.1-8b",
        "--cluster",
        "h100-sxm:1x1",
        "--isl",
        128,
        "--osl",
        1,
        "--top",
        1,
    )
    found = planner(*base, *load, "-o", tmp_path / "one.json", "--json").json
    estimate = found["plans"][0]["estimate"]
    assert estimate["goodput_requests_per_s"] > 240
    run = planner("simulate", f"{tmp_path / 'one.json'}:1", "--requests", 20000, "--json").json["simulated"]
    assert run["requests_per_s"] == pytest.approx(estimate["goodput_requests_per_s"], rel=0.05)
    assert run["ttft_s"]["mean"] == pytest.approx(estimate["ttft_s"]["mean"], rel=0.25)
    assert max(point["output_tokens_per_s_per_user"] for point in found["pareto"]) < 100


def test_a_plan_that_is_priced_again_says_its_job_itself(planner, plans):
    found = planner("estimate", f"{plans}:1", "--rate", 5, "--model", "llama2-7b", "-o", "x.json")
    assert found.code == 2
    for flag in ("--rate", "--model", "-o"):
        assert f"{flag}: is given beside a plan" in found.err
    assert planner("estimate", f"{plans}:1", "--json").code == 0


@pytest.mark.parametrize("more", [("--mode", "disaggregated"), ("--mode", "ping_pong"), ()])
def test_pools_that_generate_have_something_to_generate(planner, more):
    cluster = "h100-sxm:1x2" if more else "h100-sxm:1x2+l40s:1x2"
    model = "mixtral-8x7b" if "ping_pong" in more else "llama3.1-8b"
    found = planner("serve", "--model", model, "--cluster", cluster, "--isl", 128, "--osl", 1, *more)
    assert found.code == 2
    assert "--osl: 1, an answer that ends with its prompt" in found.err
