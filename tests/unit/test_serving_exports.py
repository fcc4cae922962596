"""Serving plans as engines' configurations, scripts and manifests: they say what the plan says, run, and come back."""

import asyncio
import csv
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from itertools import product

import pytest
import yaml

import planner
from planner.errors import ExportError, SpecError
from planner.export.serving import SERVING_EXPORTERS, export_serving
from planner.export.serving.checking import best_of_engine, serving_findings, steps_to
from planner.export.serving.readers import problem_of_launch, read_launch
from planner.export.serving.target import ServingTarget
from planner.serving.serve import serve
from planner.specs.serve_problem import ServeProblem
from planner.specs.speculation import Speculation
from planner.specs.stack import load_stack
from planner.specs.traffic import Traffic
from planner.validation.report import validate


def plan_of(model="llama3.1-8b", cluster="h100-sxm:1x8", mode="aggregated", engine="vllm", **fixed):
    traffic, weights = fixed.pop("traffic", None), fixed.pop("weights", None)
    speculation = fixed.pop("speculation", None)
    loaded = planner.load_model(model)
    asked = traffic or Traffic(2000, 200, ttft_s=10.0, tpot_s=0.2)
    formats = (weights or loaded.checkpoint,)
    problem = ServeProblem(
        loaded, planner.load_cluster(cluster), asked, load_stack(engine), formats, ("bf16",), (mode,), fixed,
        speculation=speculation,
    )  # fmt: skip
    return serve(problem, top=1).best


@pytest.fixture(scope="module")
def pair():
    fixed = {
        "prefill.tp": 2,
        "prefill.pp": 1,
        "decode.tp": 4,
        "decode.pp": 1,
        "prefill.replicas": 2,
        "decode.replicas": 1,
    }
    return plan_of(mode="disaggregated", **fixed)


@pytest.fixture(scope="module")
def two_kinds():
    """Prompts on one node of H100, generation on one of A100."""
    loaded, fixed = planner.load_model("llama3.1-70b"), {"prefill.tp": 2, "decode.tp": 4, "pp": 1}
    clusters = [planner.load_cluster(name) for name in ("h100-sxm:1x8", "a100-sxm-80gb:1x8")]
    problem = ServeProblem(
        loaded, clusters[0], Traffic(4000, 500, ttft_s=2.0, tpot_s=0.06), load_stack("vllm"), ("bf16",), ("bf16",),
        ("disaggregated",), fixed, others=(clusters[1],),
    )  # fmt: skip
    plans = serve(problem, top=10).plans
    wanted = {"prefill": clusters[0].name, "decode": clusters[1].name}
    return next(plan for plan in plans if {pool.role: pool.cluster for pool in plan.pools} == wanted)


@pytest.fixture(scope="module")
def experts():
    fixed = {"tp": 1, "pp": 1, "dp": 8, "ep": 8, "etp": 1, "experts": "exchanged", "replicas": 1}
    return plan_of("deepseek-v3", "h200-sxm:1x8", micro_batches=1, **fixed)


@pytest.fixture(scope="module")
def two_nodes():
    fixed = {"tp": 8, "pp": 2, "dp": 1, "replicas": 1}
    return plan_of("llama3.1-405b", "h100-sxm:2x8", **fixed)


# -- words of the engines --------------------------------------------------------------------------------------------


def test_vllm_is_told_what_the_plan_says(experts):
    found = yaml.safe_load(export_serving(experts, "vllm")["vllm.yaml"])
    pool = experts.pools[0]
    assert [found[f"{name}-parallel-size"] for name in ("tensor", "pipeline", "data")] == [1, 1, 8]
    assert (found["enable-expert-parallel"], found["all2all-backend"]) == (True, "deepep_high_throughput")
    # Sequences are counted per data-parallel rank, rounded up.
    assert found["max-num-seqs"] == -(-pool.knobs["max_sequences"] // 8)
    assert found["max-num-batched-tokens"] >= max(pool.knobs["chunk_tokens"], found["max-num-seqs"])
    # 2,000 in and 200 out, and 256 tokens of room for what a chat template adds.
    assert found["max-model-len"] == 2456
    assert "quantization" not in found  # the checkpoint is published in blocks of fp8


def test_sixteen_bit_checkpoints_are_narrowed_by_the_engine():
    plan = plan_of(weights="fp8", tp=1, replicas=1)
    assert yaml.safe_load(export_serving(plan, "vllm")["vllm.yaml"])["quantization"] == "fp8"
    assert yaml.safe_load(export_serving(plan, "sglang")["sglang.yaml"])["quantization"] == "fp8"
    assert "has to be one in fp8" in export_serving(plan, "trtllm")["README.md"]


def test_a_format_that_no_engine_makes_has_no_checkpoint_to_fall_back_on():
    """TensorRT-LLM reads fp8 from the checkpoint: the model's 16-bit one would be served as it is, and may not fit."""
    files = export_serving(plan_of(weights="fp8", tp=1, replicas=1), "trtllm", around=["kubernetes"])
    assert "MODEL=${MODEL:?a checkpoint of this model in fp8}" in files["serve.sh"]
    assert "name-your-checkpoint" in files["leaderworkerset.yaml"]
    assert "name-your-checkpoint" in files["README.md"]
    plain = export_serving(plan_of(weights="bf16", tp=1, replicas=1), "trtllm", around=["kubernetes"])
    assert "name-your-checkpoint" not in plain["leaderworkerset.yaml"]


def test_a_page_names_no_file_that_is_not_there():
    for to in ("dynamo", "llm-d"):
        files = export_serving(plan_of(replicas=2), to)
        assert "router.sh" not in files
        assert "router.sh" not in files["README.md"]
        assert "MODEL=" not in files["README.md"]


def test_three_meanings_of_a_memory_fraction():
    plan = plan_of(tp=2, replicas=1)
    target = ServingTarget(plan)
    memory = float(target.clusters[0].device.memory_bytes)
    vllm, sglang, trtllm = (
        yaml.safe_load(export_serving(plan, engine)[f"{engine}.yaml"])
        for engine in ("vllm", "sglang", "trtllm")
    )
    # vLLM: of all memory, for everything. SGLang: of all memory, without activations and what the process holds. TensorRT-LLM: of
    # what is free after the weights (its own default, whatever stack the plan was made for).
    held = target.capacity(plan.pools[0])
    beside = (float(held.activation_bytes[0]) + held.reserved_bytes) / memory
    assert vllm["gpu-memory-utilization"] == 0.9
    assert sglang["mem-fraction-static"] == pytest.approx(0.9 - beside, abs=1e-3)
    assert trtllm["kv_cache_config"]["free_gpu_memory_fraction"] == 0.9


def test_sglang_counts_ranks_and_requests_over_all_attention_ranks(experts):
    found = yaml.safe_load(export_serving(experts, "sglang")["sglang.yaml"])
    pool = experts.pools[0]
    assert (found["tp-size"], found["attn-dp-size"], found["ep-size"]) == (8, 8, 8)
    assert found["chunked-prefill-size"] == 8 * pool.knobs["chunk_tokens"]
    assert 0 <= found["max-running-requests"] - pool.knobs["max_sequences"] < 8
    assert found["moe-a2a-backend"] == "deepep"


def test_tensorrt_llm_gives_attention_ranks_whole_devices(experts):
    found = yaml.safe_load(export_serving(experts, "trtllm")["trtllm.yaml"])
    assert (found["tensor_parallel_size"], found["enable_attention_dp"]) == (8, True)
    assert (found["moe_expert_parallel_size"], found["moe_tensor_parallel_size"]) == (8, 1)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_nodes_of_a_replica_are_told_their_rank(two_nodes, engine):
    script = export_serving(two_nodes, engine)["serve.sh"]
    assert "--nnodes 2 --node-rank $RANK" in script
    assert ("--headless" in script) == (engine == "vllm")


REFUSED = [
    ("vllm", {"mode": "disaggregated", "decode.pp": 2, "prefill.pp": 1}, "pp=2"),
    (
        "sglang",
        {"mode": "disaggregated", "decode.pp": 2, "prefill.pp": 4},
        "pp=2: stages in a pool that generates; expected stages in none, or as many",
    ),
    (
        "trtllm",
        {"model": "llama3.1-405b", "cluster": "h100-sxm:2x8", "tp": 16},
        "a replica over several nodes",
    ),
    (
        "sglang",
        {
            "model": "deepseek-v3",
            "cluster": "h200-sxm:1x8",
            "tp": 4,
            "dp": 2,
            "speculation": Speculation("ngram", 0.4, (3,)),
            "draft_tokens": 3,
        },
        "dp=2.*: tokens drafted from the prompt beside attention ranks",
    ),
    (
        "vllm",
        {"model": "mixtral-8x7b", "tp": 4, "ep": 2, "etp": 2},
        "ep=2 etp=2: experts over some ranks of a stage; expected ep of 1, or of all",
    ),
]


@pytest.mark.parametrize(("to", "choices", "why"), REFUSED, ids=str)
def test_what_an_engine_cannot_run_is_refused(to, choices, why):
    with pytest.raises(ExportError, match=why):
        export_serving(plan_of(**choices), to)


def test_batch_systems_and_versions_are_checked(pair):
    for options, why in (
        ({"around": ["slurn"]}, "Did you mean slurm"),
        ({"version": "0.9"}, "files of others are not known to be right"),
    ):
        with pytest.raises(SpecError, match=why):
            export_serving(pair, "vllm", **options)
    with pytest.raises(SpecError, match="it brings its own deployment"):
        export_serving(pair, "dynamo", around=["slurm"])
    with pytest.raises(SpecError, match="Did you mean vllm"):
        export_serving(pair, "vlm")


# -- where replicas stand --------------------------------------------------------------------------------------------


def test_every_replica_stands_on_devices_of_its_own(pair):
    seats = ServingTarget(pair).seats
    taken = [(seat.node, device) for seat in seats for device in seat.devices]
    assert len(taken) == len(set(taken)) == pair.devices == 8
    assert len({(seat.node, seat.port) for seat in seats}) == len(seats)


def test_pools_stand_on_nodes_of_their_own_kind(two_kinds):
    target = ServingTarget(two_kinds)
    nodes = {
        role: {s.node for s in target.seats if two_kinds.pools[s.pool].role == role}
        for role in ("prefill", "decode")
    }
    assert nodes == {"prefill": {0}, "decode": {1}}
    files = export_serving(two_kinds, "vllm", around=["kubernetes"])
    assert "1 node of 8 × h100-sxm (NODE_RANK 0)" in files["README.md"]
    assert "1 node of 8 × a100-sxm-80gb (NODE_RANK 1)" in files["README.md"]
    sets = [
        document
        for document in yaml.safe_load_all(files["leaderworkerset.yaml"])
        if document["kind"] == "LeaderWorkerSet"
    ]
    asked = {
        document["metadata"]["name"].rsplit("-", 1)[1]: document["spec"]["leaderWorkerTemplate"][
            "workerTemplate"
        ]["spec"]["nodeSelector"]
        for document in sets
    }
    assert asked == {"prefill": {"accelerator": "h100-sxm"}, "decode": {"accelerator": "a100-sxm-80gb"}}
    for to, around, why in (("vllm", ["slurm"], "nodes of one kind"), ("dynamo", [], "on one kind of node")):
        with pytest.raises(ExportError, match=why):
            export_serving(two_kinds, to, around=around)


def test_each_pool_is_told_the_memory_of_its_own_devices(two_kinds):
    weights = {"prefill": 2, "decode": 4}  # tensor-parallel ranks that share 141 GB
    for pool in two_kinds.pools:
        total = float(ServingTarget(two_kinds).cluster(pool).device.memory_bytes)
        held = ServingTarget(two_kinds).capacity(pool)
        assert float(held.weights_bytes[0]) == pytest.approx(141e9 / weights[pool.role], rel=0.01)
        text = export_serving(two_kinds, "sglang")[f"sglang-{pool.role}.yaml"]
        fraction = float(yaml.safe_load(text)["mem-fraction-static"])
        assert fraction * total == pytest.approx(float(held.weights_bytes[0] + held.cache_bytes[0]), rel=2e-3)


def test_replicas_that_do_not_divide_a_node_are_refused_where_they_do_not_fit():
    plan = plan_of("llama3.1-8b", "h100-sxm:2x4", tp=2, pp=3, dp=1, replicas=1)
    with pytest.raises(ExportError, match="nodes of 4; expected replicas of whole nodes"):
        export_serving(plan, "vllm")


# -- scripts run -----------------------------------------------------------------------------------------------------


def run(folder, script, tools, environment):
    """Runs a script of a folder with stand-ins for the engine's commands, which write down their arguments."""
    bin_ = folder / "bin"
    bin_.mkdir(exist_ok=True)
    for name in [*tools, "curl"]:  # by which routers ask whether replicas are ready
        (bin_ / name).write_text('#!/bin/sh\necho "$CUDA_VISIBLE_DEVICES" "$0" "$@"\nsleep 0.3\n')
        (bin_ / name).chmod(0o755)
    path = f"{bin_}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", script],
        cwd=folder,
        env={"PATH": path, "HOME": "/", **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def written(plan, to, folder, **options):
    for name, text in export_serving(plan, to, **options).items():
        (folder / name).write_text(text)
    return folder


def test_unlike_pools_of_one_role_have_files_and_addresses_of_their_own(two_kinds, tmp_path):
    """A role with two kinds of replicas: neither's configuration may take the other's place."""
    prompts, answers = two_kinds.pools
    small = replace(prompts, replicas=1, share=0.3)
    large = replace(prompts, replicas=1, mesh={**prompts.mesh, "tp": 4}, share=0.7)
    plan = replace(two_kinds, pools=(small, large, answers))
    folder = written(plan, "vllm", tmp_path, around=["kubernetes"])
    degrees = {
        name: yaml.safe_load((folder / f"vllm-{name}.yaml").read_text())["tensor-parallel-size"]
        for name in ("prefill-1", "prefill-2", "decode")
    }
    assert degrees == {"prefill-1": 2, "prefill-2": 4, "decode": 4}
    hosts = {"MODEL": "/weights", "HOSTS": "a b", "NODE_RANK": "0"}
    assert run(folder, "run.sh", ["vllm"], hosts).returncode == 0
    logs = {path.name: path.read_text() for path in folder.glob("engine*.log")}
    assert "0,1,2,3 " in logs["engine-prefill-2-0-0.log"]
    assert "--config vllm-prefill-1.yaml" in logs["engine-prefill-1-0-0.log"]
    routes = run(folder, "router.sh", ["vllm-router"], hosts).stdout
    assert "--prefill=http://a:8000 --prefill=http://a:8001 --decode=http://b:8000" in routes
    documents = list(yaml.safe_load_all((folder / "leaderworkerset.yaml").read_text()))
    sets = [item["metadata"]["name"] for item in documents if item["kind"] == "LeaderWorkerSet"]
    assert len(set(sets)) == 3
    (deployment,) = (item for item in documents if item["kind"] == "Deployment")
    addresses = {
        item["name"]: item["value"] for item in deployment["spec"]["template"]["spec"]["containers"][0]["env"]
    }
    assert [url.split(".")[1].split(":")[0] for url in addresses["PREFILL"].split()] == sets[:2]
    assert "prefill-1 30%, prefill-2 70%" in (folder / "README.md").read_text()
    assert (
        "--policy power_of_two" in routes
    )  # turn by turn, the slower kind would get as much as the faster one
    assert "type: load_balancing" in export_serving(plan, "trtllm")["router.sh"]
    one_kind = replace(plan, pools=(small, large, replace(answers, cluster=prompts.cluster, replicas=1)))
    for to in ("dynamo", "llm-d"):  # a component per role
        with pytest.raises(ExportError, match="unlike prefill pools"):
            export_serving(one_kind, to)


@pytest.mark.parametrize("files", ["", "/prefill.yaml,{}/prefill.yaml,{}/decode.yaml"])
def test_pools_whose_counts_no_file_holds_are_read_from_the_plan_beside_them(files, tmp_path):
    """Three pools, or the folder that was exported."""
    for name in ("prefill", "decode"):
        kv = "{kv_connector: NixlConnector, kv_role: kv_both}"
        (tmp_path / f"{name}.yaml").write_text(
            f"model: a/b\ntensor-parallel-size: 2\nkv-transfer-config: {kv}\n"
        )
    asked = f"{tmp_path}{files.format(tmp_path, tmp_path)}"
    with pytest.raises(SpecError) as without:
        read_launch("vllm", asked)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(SpecError) as found:
        read_launch("vllm", asked)
    hint = f"planner explain {tmp_path}/plan.json"
    assert hint not in str(without.value)
    assert hint in str(found.value)


def test_a_node_starts_its_replicas(pair, tmp_path):
    folder = written(pair, "vllm", tmp_path)
    done = run(folder, "run.sh", ["vllm"], {"MODEL": "/weights"})
    assert done.returncode == 0, done.stderr
    logs = {path.name: path.read_text() for path in folder.glob("engine*.log")}
    assert sorted(logs) == ["engine-decode-0-0.log", "engine-prefill-0-0.log", "engine-prefill-1-0.log"]
    assert logs["engine-decode-0-0.log"].startswith("0,1,2,3 ")  # the largest replica comes first
    assert (
        "serve /weights --config vllm-decode.yaml --host 0.0.0.0 --port 8000" in logs["engine-decode-0-0.log"]
    )
    assert {text.split()[0] for text in logs.values()} == {"0,1,2,3", "4,5", "6,7"}


def test_nodes_are_named_by_the_environment(two_nodes, tmp_path):
    folder = written(two_nodes, "vllm", tmp_path)
    assert "names of the nodes" in run(folder, "run.sh", ["vllm"], {"NODE_RANK": "0"}).stderr
    assert "the plan takes 2" in run(folder, "run.sh", ["vllm"], {"NODE_RANK": "0", "HOSTS": "a"}).stderr
    run(folder, "run.sh", ["vllm"], {"NODE_RANK": "1", "HOSTS": "a b"})
    assert "--nnodes 2 --node-rank 1 --master-addr a --headless" in (folder / "engine-0-1.log").read_text()


@pytest.mark.parametrize(
    ("to", "tool", "expected"),
    [
        (
            "vllm",
            "vllm-router",
            "--prefill=http://localhost:8001 --prefill=http://localhost:8002 --decode=http://localhost:8000",
        ),
        (
            "sglang",
            "python3",
            "--prefill http://localhost:8001 8999 --prefill http://localhost:8002 9000 --decode http://localhost:8000",
        ),
        ("trtllm", "trtllm-serve", "disaggregated --config_file disaggregated.yaml"),
    ],
)
def test_a_router_knows_every_replica(pair, tmp_path, to, tool, expected):
    folder = written(pair, to, tmp_path)
    done = run(folder, "router.sh", [tool], {})
    asked, started = done.stdout.splitlines()[:3], done.stdout.splitlines()[3]
    # A router that starts before its engines gives up on them (trtllm-serve disaggregated after 180 s).
    assert [line.split()[-1] for line in asked] == [
        f"http://localhost:{port}/health" for port in (8001, 8002, 8000)
    ]
    assert expected in started
    if to == "trtllm":
        found = yaml.safe_load((folder / "disaggregated.yaml").read_text())
        assert found["context_servers"] == {"num_instances": 2, "urls": ["localhost:8001", "localhost:8002"]}
        assert found["generation_servers"]["urls"] == ["localhost:8000"]


def test_every_script_and_manifest_is_well_formed(pair, two_nodes, tmp_path):
    for to, plan in product(SERVING_EXPORTERS, (pair, two_nodes)):
        if to == "trtllm" and plan is two_nodes:
            continue
        around = ["slurm", "k8s"] if to in ("vllm", "sglang", "trtllm") else []
        files = export_serving(plan, to, around=around, image="registry/engine:1")
        for name, text in files.items():
            if name.endswith((".sh", ".sbatch")):
                assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0, name
            if name.endswith(".yaml"):
                assert list(yaml.safe_load_all(text))
        compile(files["measure.py"], "measure.py", "exec")
        assert json.loads(files["plan.json"])["id"] == plan.id


def test_leader_worker_sets_have_a_group_per_replica(two_nodes):
    text = export_serving(two_nodes, "vllm", around=["k8s"], image="engine:1")["leaderworkerset.yaml"]
    group, service = yaml.safe_load_all(text)
    template = group["spec"]["leaderWorkerTemplate"]
    assert (group["spec"]["replicas"], template["size"]) == (1, 2)
    assert template["workerTemplate"]["spec"]["containers"][0]["resources"]["limits"] == {
        "nvidia.com/gpu": "8"
    }
    assert service["spec"]["selector"] == template["leaderTemplate"]["metadata"]["labels"]


def test_dynamo_and_llm_d_have_a_component_per_pool(pair, two_nodes):
    components = yaml.safe_load(export_serving(pair, "dynamo")["dynamo.yaml"])["spec"]["components"]
    assert [(c["name"], c["replicas"]) for c in components] == [
        ("Frontend", 1),
        ("prefill", 2),
        ("decode", 1),
    ]
    values = yaml.safe_load(export_serving(pair, "llm-d")["values.yaml"])
    assert (values["prefill"]["replicas"], values["decode"]["parallelism"]["tensor"]) == (2, 4)
    assert values["multinode"] is False
    wide = yaml.safe_load(export_serving(two_nodes, "llm-d")["values.yaml"])
    assert wide["multinode"] is True
    assert wide["decode"]["parallelism"]["workers"] == 2
    assert "--node-rank $LWS_WORKER_INDEX" in wide["decode"]["containers"][0]["args"][0]


# -- measured beside predicted ---------------------------------------------------------------------------------------


class Server:
    """An OpenAI-compatible server that answers every request with as many tokens as it asks for."""

    def __enter__(self):
        self.loop, ready = asyncio.new_event_loop(), threading.Event()

        async def handle(reader, writer):
            size = 0
            while (line := await reader.readline()).strip():
                if line.lower().startswith(b"content-length"):
                    size = int(line.split(b":")[1])
            asked = json.loads(await reader.readexactly(size))
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n")
            for _ in range(asked["max_tokens"]):
                writer.write(b'data: {"choices":[{"text":"x"}]}\n\n')
            writer.write(b"data: [DONE]\n\n")
            await writer.drain()
            writer.close()

        async def start():
            self.server = await asyncio.start_server(handle, "127.0.0.1", 0)
            self.port = self.server.sockets[0].getsockname()[1]
            ready.set()

        def serve_forever():
            self.loop.run_until_complete(start())
            self.loop.run_forever()

        self.thread = threading.Thread(target=serve_forever, daemon=True)
        self.thread.start()
        ready.wait(10)
        return self

    def __exit__(self, *_):
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join(10)
        self.server.close()
        self.loop.run_until_complete(asyncio.sleep(0.05))
        self.loop.close()


@pytest.mark.parametrize("which", ["aggregated", "pair"])
def test_what_is_measured_is_a_row_that_validate_reads(which, pair, tmp_path):
    plan = (
        pair
        if which == "pair"
        else plan_of(tp=2, replicas=2, chunk_tokens=8192, traffic=Traffic(2000, 200, concurrency=8))
    )
    folder = written(plan, "vllm", tmp_path)
    with Server() as server:
        url = f"http://127.0.0.1:{server.port}"
        command = [
            sys.executable,
            "measure.py",
            url,
            "--requests",
            "32",
            "--concurrency",
            "8",
            "--share",
            "2",
        ]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "measured/predicted" in done.stdout
    (row,) = csv.DictReader((folder / "measured.csv").read_text().splitlines())
    assert float(row["concurrency"]) == (
        8 if which == "pair" else 4
    )  # two replicas do not know of each other
    report = validate([str(folder / "measured.csv")])
    entries = {entry.metric: entry for entry in report.rows if entry.row_id == f"plan-{plan.id}"}
    assert {entries[name].status for name in ("tpot", "ttft", "output_tokens_per_s")} == {"scored"}
    if which == "aggregated":  # at the plan's own load the row is predicted as the plan was
        assert entries["tpot"].predicted == pytest.approx(plan.estimate.tpot_s["mean"], rel=1e-6)


def test_a_server_that_does_not_answer_is_one_message(tmp_path):
    folder = written(plan_of(tp=1, replicas=1), "vllm", tmp_path)
    done = subprocess.run(
        [sys.executable, "measure.py", "http://127.0.0.1:9", "--requests", "4"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("no answer: ")
    assert "Traceback" not in done.stderr


# -- read back -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("which", ["experts", "two_nodes", "pair"])
def test_what_was_written_is_read(engine, which, request, tmp_path):
    plan = request.getfixturevalue(which)
    folder = written(plan, engine, tmp_path)
    names = [f"serve-{role}.sh" for role in ("prefill", "decode")] if which == "pair" else ["serve.sh"]
    pools = read_launch(engine, ",".join(str(folder / name) for name in names))
    for meant, found in zip(plan.pools, pools, strict=True):
        moe = any(block.moe for block in planner.load_model(plan.model).blocks.values())
        kept = ("tp", "pp", "dp", "ep") if moe else ("tp", "pp", "dp")
        assert {name: found.fixed[name] for name in kept} == {name: meant.mesh[name] for name in kept}
        assert found.role == meant.role
        assert found.ignored == ()
        if meant.role == "aggregated":
            assert found.fixed["chunk_tokens"] == meant.knobs["chunk_tokens"]


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_launch_is_priced_as_the_plan_was(engine, tmp_path):
    traffic = Traffic(2000, 200, concurrency=16)
    plan = plan_of(engine=engine, tp=2, replicas=4, traffic=traffic)
    folder = written(plan, engine, tmp_path)
    pools = read_launch(engine, str(folder / "serve.sh"))
    problem = problem_of_launch(
        pools, planner.load_model(plan.model), planner.load_cluster(plan.cluster), traffic, None
    )
    again = serve(problem, top=1).best
    assert again.estimate.tpot_s["mean"] == pytest.approx(plan.estimate.tpot_s["mean"])
    assert again.estimate.memory_budget_bytes == pytest.approx(plan.estimate.memory_budget_bytes, rel=2e-3)


def test_a_pair_of_sglang_is_priced_as_the_plan_was(tmp_path):
    """The file of a pool that generates names no chunk; what its process holds beside weights and caches is the plan's."""
    traffic = Traffic(2000, 200, ttft_s=10.0, tpot_s=0.2)
    fixed = {
        f"{role}.{name}": n
        for role in ("prefill", "decode")
        for name, n in (("tp", 4), ("pp", 1), ("replicas", 1))
    }
    plan = plan_of(mode="disaggregated", engine="sglang", traffic=traffic, **fixed)
    folder = written(plan, "sglang", tmp_path)
    pools = read_launch("sglang", f"{folder}/serve-prefill.sh,{folder}/serve-decode.sh")
    problem = problem_of_launch(
        pools, planner.load_model(plan.model), planner.load_cluster(plan.cluster), traffic, None
    )
    again = serve(problem, top=1).best.estimate
    assert again.goodput_requests_per_s == pytest.approx(plan.estimate.goodput_requests_per_s)
    assert again.ttft_s["mean"] == pytest.approx(plan.estimate.ttft_s["mean"])
    # --mem-fraction-static has three digits: 80 MB of 80 GB.
    assert again.memory_budget_bytes == pytest.approx(plan.estimate.memory_budget_bytes, rel=1.2e-3)


DRAFTS = {
    "a model's own modules": ("deepseek-v3", Speculation("mtp", 0.8, (2,))),
    "the prompt": ("llama3.1-8b", Speculation("ngram", 0.3, (3,))),
    "a smaller model": ("llama3.1-8b", Speculation("draft", 0.7, (4,), planner.load_model("llama3.2-1b"))),
}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("who", DRAFTS)
def test_drafts_are_read_back_and_need_to_be_told_how_good_they_are(engine, who, tmp_path):
    name, speculation = DRAFTS[who]
    fixed = {"tp": 8, "pp": 1, "dp": 1, "ep": 1, "replicas": 1, "draft_tokens": speculation.tokens[0]}
    traffic = Traffic(2000, 200, concurrency=16)
    plan = plan_of(name, "h200-sxm:1x8", engine=engine, traffic=traffic, speculation=speculation, **fixed)
    pools = read_launch(engine, str(written(plan, engine, tmp_path) / "serve.sh"))
    asked = (pools, planner.load_model(name), planner.load_cluster(plan.cluster), traffic, None)
    again = serve(problem_of_launch(*asked, acceptance=speculation.acceptance), top=1).best
    drafts = ("draft", "draft_tokens", "acceptance")
    assert [again.pools[0].knobs[knob] for knob in drafts] == [plan.pools[0].knobs[knob] for knob in drafts]
    assert again.estimate.tpot_s["mean"] == pytest.approx(plan.estimate.tpot_s["mean"])
    with pytest.raises(SpecError, match="a measured probability"):
        problem_of_launch(*asked)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_slots_for_adapters_are_read_back(engine, tmp_path):
    traffic = Traffic(2000, 200, concurrency=16, adapters=8, adapter_rank=32)
    plan = plan_of(
        "llama3.1-8b", "h100-sxm:1x8", engine=engine, traffic=traffic, tp=8, pp=1, dp=1, replicas=1
    )
    pools = read_launch(engine, str(written(plan, engine, tmp_path) / "serve.sh"))
    assert [pool.adapters for pool in pools] == [(8, 32)]
    job = (planner.load_model("llama3.1-8b"), planner.load_cluster(plan.cluster))
    again = serve(problem_of_launch(pools, *job, Traffic(2000, 200, concurrency=16), None), top=1).best
    assert again.traffic["adapters"] == 8
    assert again.estimate.tpot_s["mean"] == pytest.approx(plan.estimate.tpot_s["mean"])


def test_keys_of_an_object_may_be_flags_of_their_own(tmp_path):
    """vLLM's parser takes ``--speculative-config.method mtp`` for ``--speculative-config '{"method": "mtp"}'``."""
    (tmp_path / "run.sh").write_text(
        "vllm serve m --speculative-config.method mtp --speculative-config.num_speculative_tokens 2"
        " --kv-transfer-config.kv_role kv_consumer"
    )
    (tmp_path / "first.sh").write_text("vllm serve m --kv-transfer-config.kv_role kv_producer")
    first, pool = read_launch("vllm", f"{tmp_path / 'first.sh'},{tmp_path / 'run.sh'}")
    assert (first.role, pool.role) == ("prefill", "decode")
    assert pool.drafts is not None
    assert (pool.drafts.method, pool.drafts.tokens, pool.ignored) == ("mtp", 2, ())


LAUNCHES = [
    ("vllm", "vllm serve m -tp 2 --max-num-seqs 64 --max-num-batched-tokens 32", "is less than max-num-seqs"),
    (
        "sglang",
        "python -m sglang.launch_server --model-path m --cuda-graph-max-bs 64",
        "is gone in SGLang 0.5.23",
    ),
]


@pytest.mark.parametrize(("engine", "text", "why"), LAUNCHES)
def test_what_an_engine_refuses_is_said_with_its_layer(engine, text, why, tmp_path):
    (tmp_path / "run.sh").write_text(text)
    (pool,) = read_launch(engine, str(tmp_path / "run.sh"))
    ((what, layer),) = pool.errors
    assert why in what
    assert layer


BAD = {
    "vllm": {
        "": "is empty",
        "echo hi": "starts no serve",
        "vllm serve m --tensor-parallel-size two": "expected a whole number",
        "vllm serve m --speculative-config '{}'": "a JSON object with num_speculative_tokens",
        "vllm serve m --speculative-config.method mtp --speculative-config.num_speculative_tokens 0": "expected num_spec",
        "vllm serve m --speculative-config.method mtp": "a JSON object with num_speculative_tokens",
        "vllm serve m --kv-transfer-config x": "expected a JSON object",
        """vllm serve m --speculative-config '{"method": "eagle3", "num_speculative_tokens": 2}'""": "not modelled",
    },
    "sglang": {
        "echo hi": "starts no sglang.launch_server",
        "python -m sglang.launch_server --tp 4 --attn-dp-size 3": "a divisor of --tp-size",
        "python -m sglang.launch_server --speculative-algorithm NGRAM": "drafted tokens of a step",
        "python -m sglang.launch_server --speculative-algorithm NGRAM --speculative-num-steps 0": "0 drafted tokens",
        "python -m sglang.launch_server --speculative-algorithm EAGLE3 --speculative-num-steps 3": "not modelled",
        "python -m sglang.launch_server --disaggregation-mode prefil": "Did you mean prefill",
        "python -m sglang.launch_server --disaggregation-mode prefill": "is one pool of a pair",
    },
}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{below}: &{below} [{','.join([f'*{above}'] * 9)}]\n"
    for above, below in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "why"),
    [(BOMB, "nested beyond any option"), ("- a\n", "holds a list"), ("colour: red\n", "is an option of")],
)
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_a_bad_file_of_options_gets_one_clear_message(engine, text, why, tmp_path):
    (tmp_path / "engine.yaml").write_text(text)
    with pytest.raises(SpecError, match=why):
        read_launch(engine, str(tmp_path / "engine.yaml"))


@pytest.mark.parametrize(
    ("engine", "text", "why"),
    [(engine, text, why) for engine, files in BAD.items() for text, why in files.items()],
)
def test_a_bad_launch_gets_one_clear_message(engine, text, why, tmp_path):
    (tmp_path / "run.sh").write_text(text)
    with pytest.raises(SpecError, match=why):
        read_launch(engine, str(tmp_path / "run.sh"))


# -- check -----------------------------------------------------------------------------------------------------------


def launched(tmp_path, text, **traffic):
    (tmp_path / "run.sh").write_text(text)
    pools = read_launch("vllm", str(tmp_path / "run.sh"))
    asked = Traffic(2000, 200, **traffic)
    return problem_of_launch(
        pools, planner.load_model("llama3.1-8b"), planner.load_cluster("h100-sxm:1x4"), asked, None
    ), pools


@pytest.mark.parametrize("given", ["", "--ep-size 4"])
def test_an_exchange_spreads_experts_over_all_ranks(given, tmp_path):
    """SGLang's documentation starts pairs so, without --ep-size; ServerArgs sets it (srt/arg_groups/overrides.py, 0.5.23)."""
    (tmp_path / "serve.sh").write_text(
        "GLOO_SOCKET_IFNAME=eth0 python -m sglang.launch_server --model-path deepseek-ai/DeepSeek-V3 --tp-size 16 --dp-size 8 "
        f"--enable-dp-attention --moe-a2a-backend deepep {given}\n"
    )
    (pool,) = read_launch("sglang", str(tmp_path / "serve.sh"))
    assert {name: pool.fixed[name] for name in ("tp", "dp", "ep", "experts")} == {
        "tp": 2, "dp": 8, "ep": 16, "experts": "exchanged",
    }  # fmt: skip
    assert "spreads experts over all 16 ranks" in " ".join(pool.notes)


def test_check_names_idle_caches_and_contexts_that_are_too_short(tmp_path):
    problem, pools = launched(
        tmp_path, "vllm serve m -tp 4 --max-num-seqs 8 --max-model-len 2000 --enforce-eager"
    )
    found, plan = serving_findings(problem, pools)
    assert plan is not None
    texts = [finding.what for finding in found]
    assert any("contexts of 2,000 tokens at most, 2,200" in text for text in texts)
    assert any("at most 8 sequences per replica are let in" in text for text in texts)
    assert any("--enforce-eager" in text for text in texts)


def test_what_does_not_fit_is_an_error(tmp_path):
    problem, pools = launched(tmp_path, "vllm serve m --gpu-memory-utilization 0.15")
    found, plan = serving_findings(problem, pools)
    assert plan is None
    assert any(f.level == "error" and "device memory" in f.what and f.caught_by for f in found)


def test_gains_lead_to_the_best_plan(tmp_path):
    problem, _ = launched(
        tmp_path, "vllm serve m -tp 4 --max-num-seqs 8 --max-num-batched-tokens 1024", tpot_s=0.05, ttft_s=5.0
    )
    plan, best = serve(problem, top=1).best, best_of_engine(problem, "vllm")
    steps = steps_to(problem, plan, best)
    assert steps[0].before_tokens_per_s == pytest.approx(plan.estimate.output_tokens_per_s_per_device)
    assert steps[-1].after_tokens_per_s == pytest.approx(best.estimate.output_tokens_per_s_per_device)
    assert best.estimate.output_tokens_per_s_per_device > plan.estimate.output_tokens_per_s_per_device


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        (
            "vllm",
            {
                "speculative-config": {
                    "method": "eagle3",
                    "model": "me/EAGLE3-head",
                    "num_speculative_tokens": 3,
                }
            },
        ),
        ("sglang", {"speculative-algorithm": "EAGLE3", "speculative-draft-model-path": "me/EAGLE3-head"}),
    ],
)
def test_draft_heads_are_told_and_read_back(engine, said, tmp_path):
    drafts = Speculation("eagle", 0.7, (3,), head="me/EAGLE3-head")
    plan = plan_of(tp=1, pp=1, replicas=1, speculation=drafts, draft_tokens=3)
    files = export_serving(plan, engine)
    found = yaml.safe_load(files[f"{engine}.yaml"])
    assert {name: found[name] for name in said} == said
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    (pool,) = read_launch(engine, str(tmp_path / "serve.sh"))
    assert (pool.drafts.method, pool.drafts.tokens, pool.drafts.model) == ("eagle", 3, "me/EAGLE3-head")
    asked = Traffic(2000, 200, ttft_s=10.0, tpot_s=0.2)
    problem = problem_of_launch(
        (pool,), planner.load_model("llama3.1-8b"), planner.load_cluster("h100-sxm:1x1"), asked, None, 0.7
    )
    assert serve(problem, top=1).best.pools[0].knobs["draft_head"] == "me/EAGLE3-head"


def test_a_draft_head_without_a_name_is_not_exported():
    plan = plan_of(tp=1, replicas=1, speculation=Speculation("eagle", 0.7, (3,)), draft_tokens=3)
    with pytest.raises(ExportError, match="eagle:HUB_NAME"):
        export_serving(plan, "vllm")
