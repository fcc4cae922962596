"""Do the solvers' parts do what they say: the adapter, layouts, operator graphs and what is priced from models?"""

import json
from dataclasses import replace

import numpy as np
import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack
from planner.costs import all_gather_bytes, all_reduce_bytes, reshard_bytes, resharding_steps
from planner.costs.resharding import PARTIAL, WHOLE
from planner.engine.block_table import tabulate
from planner.engine.pricer import Pricer
from planner.errors import Infeasible, SolverError, SpecError
from planner.mesh import Mesh
from planner.operators.baseline import EMBEDDING, HEAD
from planner.solve.combinatorial.certificate import Clock, certify
from planner.solve.combinatorial.choices import ChoiceGraph, minimise
from planner.solve.combinatorial.migrations import migrate
from planner.solve.combinatorial.milp import BACKENDS, Program, solve
from planner.solve.combinatorial.recompute import ComputeGraph, cheapest_schedule, front, keep_all
from planner.solve.combinatorial.sequences import assign_sequences, longest_first, micro_batches
from planner.solve.combinatorial.tiering import Kernel, Tensor, Tier, TieringProblem, place
from planner.solve.graph.graph_file import read_graph
from planner.solve.graph.operators import model_graph
from planner.solve.graph.recompute import layer_graph
from planner.solve.graph.sharding import ShardingProblem, shard
from planner.solve.named import examine
from planner.solve.passes import run_passes
from planner.solve.sequence_costs import sequence_problem
from planner.solve.tier_costs import tier_problem
from planner.specs.device import Sourced

# Operator graphs know kernels, but not the host that issues them.
STACK = replace(load_stack(), dispatch_s=Sourced(1e-9, "assumed", "planner-defaults"))
MLP = {
    "sizes": {"b": 32, "s": 2048, "h": 4096, "f": 16384},
    "operators": [
        {"name": "norm", "elementwise": "bsh", "reads": ["input"], "whole": ["h"]},
        {"name": "fc1", "einsum": "bsh,hf->bsf", "reads": ["norm", "weight"]},
        {"name": "act", "elementwise": "bsf", "reads": ["fc1"]},
        {"name": "fc2", "einsum": "bsf,fh->bsh", "reads": ["act", "weight"]},
        {"name": "add", "elementwise": "bsh", "reads": ["fc2", "input"], "passes": 3, "kept": False},
    ],
}


def written(tmp_path, content):
    path = tmp_path / "problem.json"
    path.write_text(json.dumps(content))
    return str(path)


def graph_of(model, *, batch=1, seq=2048, layers=1, **knobs):
    cluster = load_cluster("h100-sxm:1x8")
    return model_graph(
        load_model(model), cluster, STACK, TrainWorkload(batch, seq), layers=layers, knobs=knobs
    )


# -- integer programs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_cannot_be_is_infeasible(backend):
    program = Program()
    x = program.variables([1.0], integer=True)
    program.constrain([x], 1.0, low=2.0)
    assert solve(program, backend=backend).status == "infeasible"


def test_unbounded_program_is_an_error_of_the_solver():
    program = Program()
    program.variables([-1.0], upper=np.inf)
    with pytest.raises(SolverError, match="gave up"):
        solve(program)


def test_unknown_backend_is_named():
    with pytest.raises(SolverError, match="scipy, pulp"):
        solve(Program(), backend="gurobi")


def test_stopped_before_the_first_answer_is_unknown():
    """200 random choices of 20 with pairs: nothing is found within a millisecond."""
    rng = np.random.default_rng(0)
    costs = [rng.random(20) for _ in range(60)]
    edges = {(i, i + 1): rng.random((20, 20)) for i in range(59)}
    graph = ChoiceGraph([""] * 60, costs, [np.ones(20)] * 60, edges, 60.0)
    with pytest.raises(SolverError, match="in time"):
        minimise(graph, elimination=False, time_limit_s=1e-3)


def test_certificate_of_a_gap():
    found = certify(2.0, 1.5, "x", Clock())
    assert (found.status, found.gap, found.bound) == ("gap", 0.25, 1.5)
    assert found.as_dict()["solver"] == "x"


# -- layouts ---------------------------------------------------------------------------------------------------------------


def test_changes_of_layout_are_the_collectives_of_the_convention():
    assert reshard_bytes("rows", WHOLE, 64.0, 8) == all_gather_bytes(64.0, 8)
    assert reshard_bytes(PARTIAL, WHOLE, 64.0, 8) == all_reduce_bytes(64.0, 8)
    assert reshard_bytes(WHOLE, PARTIAL, 64.0, 8) == 0.0


def test_two_axes_that_exchange_their_dimensions_gather_one():
    steps = resharding_steps(("a", "b"), ("b", "a"), (2, 4))
    # One axis is gathered (a half of the tensor is b's shard: T/4 is there), the other changes its dimension.
    assert [step.collective for step in steps] == ["all_gather", "all_to_all"]
    assert steps[0].fraction == 1 / 4
    assert steps[1].fraction == 1 / 4


def test_axis_of_one_rank_sends_nothing():
    assert resharding_steps((PARTIAL, "a"), (WHOLE, "a"), (1, 8)) == ()


# -- operator graphs ---------------------------------------------------------------------------------------------------------


def test_graph_has_the_weights_of_the_layer():
    """Llama-3 8B, one layer: 4096·(4096 + 2·1024) + 4096² + 3·4096·14336 (arXiv:2407.21783, Table 3)."""
    graph = graph_of("llama3-8b")
    weights = sum(
        float(graph.axes[o.weight]) for o in graph.operators if o.weight and o.name.startswith("layer0")
    )
    assert weights == 4096 * (4096 + 2 * 1024) + 4096**2 + 3 * 4096 * 14336


def test_graph_keeps_what_the_engine_says_is_kept():
    """Korthikanti et al. 2022 (arXiv:2205.05198), Table 2: sbh(34 + 5as/h) bytes, with eager attention and dropout."""
    graph = graph_of("gpt3-175b", attention_kernel="eager", precision="fp16")
    held = sum(
        float(np.ravel(graph.axes[item.size])[0]) * item.bytes_per_element
        for o in graph.operators
        if o.name.startswith("layer0")
        for item in o.held
    )
    assert held == pytest.approx(2048 * 12288 * (34 + 5 * 96 * 2048 / 12288))


def test_operators_stand_behind_what_they_read():
    for model in ("deepseek-v3", "gemma2-9b", "phi-2", "qwen2-57b-a14b", "gpt2"):
        graph = graph_of(model, seq=1024, layers=2)
        for number, operator in enumerate(graph.operators):
            assert all(read.source < number for read in operator.reads)
            assert number == 0 or operator.reads


EAGER = {"elementwise_kernel": "eager", "attention_kernel": "eager", "loss_kernel": "log_softmax"}


@pytest.mark.parametrize("knobs", [{"precision": "fp8"}, EAGER], ids=["fp8", "eager"])
@pytest.mark.parametrize("model", ["llama3-8b", "qwen2-57b-a14b", "gpt2"])
def test_other_kernels_are_the_same_operators(model, knobs):
    plain, other = graph_of(model, seq=1024), graph_of(model, seq=1024, **knobs)
    cores = ("core", "scores", "softmax", "context")
    names, same = ({o.name for o in g.operators if not o.name.endswith(cores)} for g in (plain, other))
    assert names == same


def test_unknown_data_flow_is_an_error():
    with pytest.raises(SpecError, match="ssm"):
        graph_of("mamba-130m")


def block_s(model, cluster, workload, tp, before):
    """What the engine makes of every block's forward and backward."""
    one = np.ones(1)
    mesh = Mesh(tp * one, one, one, one, one, one)
    ledger, *_ = run_passes(
        model, cluster, STACK, workload, mesh, workload.global_batch_size * one, before, {}
    )
    table = tabulate(ledger, Pricer(cluster, STACK), (model.layers[0][0], EMBEDDING, HEAD), 1)
    return (table["forward_s"] + table["backward_s"] + table["weight_s"])[:, 0]


@pytest.mark.parametrize("name", ["llama3-8b", "mixtral-8x7b", "gpt2-xl"])
def test_on_one_device_the_graph_takes_what_the_engine_says(name):
    cluster, model, workload = load_cluster("h100-sxm:1x1"), load_model(name), TrainWorkload(8, 1024)
    graph = model_graph(model, cluster, STACK, workload, layers=1)
    found = shard(graph, cluster, STACK, (1,), budget_bytes=1e15)
    blocks = block_s(model, cluster, workload, 1, "gradient_accumulation")
    assert found.time_s == pytest.approx(blocks.sum(), rel=1e-9)


@pytest.mark.parametrize("name", ["gpt3-175b", "llama3-70b"])
def test_megatrons_plan_takes_what_the_engine_says_of_tensor_parallelism(name):
    cluster, model, workload = load_cluster("a100-sxm-80gb:1x8"), load_model(name), TrainWorkload(1, 2048)
    graph = model_graph(model, cluster, STACK, workload, layers=1)
    problem = ShardingProblem.priced(graph, cluster, STACK, (8,), budget_bytes=1e15)
    split = dict.fromkeys(("qkv", "rope", "core", "output"), "heads") | dict.fromkeys(
        ("fc1", "act", "fc2"), "ffn"
    )
    choices, names = problem.choices, problem.choices.names
    x = [
        s.index((split.get(n.rpartition(".")[2], ""),))
        for n, s in zip(names, problem.strategies, strict=True)
    ]
    inside = [i for i, name in enumerate(names) if name.startswith("layer0")]
    nodes = sum(choices.time_s[i][x[i]] for i in inside)
    edges = sum(table[x[i], x[j]] for (i, j), table in choices.edges.items() if j in inside)
    assert nodes + edges == pytest.approx(
        block_s(model, cluster, workload, 8, "sequence_parallel")[0], rel=1e-9
    )


def test_mixture_sends_tokens_to_their_experts():
    """Experts on one axis, tokens on it before: the exchange is an all-to-all of T/G bytes a rank (GShard, arXiv:2006.16668)."""
    cluster = load_cluster("h100-sxm:1x8")
    graph = model_graph(load_model("mixtral-8x7b"), cluster, STACK, TrainWorkload(8, 2048), layers=1)
    problem = ShardingProblem.priced(graph, cluster, STACK, (8,))
    number = {o.name: i for i, o in enumerate(graph.operators)}
    permute, fc1 = number["layer0.moe.permute"], number["layer0.moe.fc1"]
    read = graph.operators[fc1].reads[0]
    sent = problem.layouts.sent_bytes(
        graph.operators[permute], graph.operators[fc1], read, ("batch",), ("experts",)
    )
    tensor = 8 * 2048 * 2 * 4096 * 2.0  # batch, length, two experts each, hidden, bf16
    assert sent == pytest.approx(2 * tensor / 8 * 7 / 8)  # there, and the gradient back


@pytest.mark.reaches("alpa", "flexflow", "oneflow_sbp")
def test_sharding_of_few_tokens_is_tensor_parallel_and_of_many_is_data_parallel():
    cluster = load_cluster("h100-sxm:1x8")

    def split(batch):
        graph = model_graph(load_model("llama3-8b"), cluster, STACK, TrainWorkload(batch, 2048), layers=2)
        found = shard(graph, cluster, STACK, (8,))
        assert found.certificate.status == "exact"
        return {o["name"]: o["splits"][0] for o in found.operators}

    assert split(64)["layer0.mlp.fc1"] == "batch"
    few = split(1)
    assert few["layer0.mlp.fc1"] in ("ffn", "seq")
    assert few["layer0.attention.core"] in ("heads", "seq")


def test_sharding_within_less_memory_is_slower_and_fits():
    cluster = load_cluster("h100-sxm:4x8")
    graph = model_graph(load_model("mixtral-8x7b"), cluster, STACK, TrainWorkload(32, 4096), layers=2)
    free = shard(graph, cluster, STACK, (4, 8))
    budget = 0.85 * free.memory_bytes
    tight = shard(graph, cluster, STACK, (4, 8), budget_bytes=budget)
    assert tight.certificate.status == "exact"
    assert tight.memory_bytes <= budget
    assert tight.time_s > free.time_s
    with pytest.raises(Infeasible, match="smallest assignment"):
        shard(graph, cluster, STACK, (4, 8), budget_bytes=1e9)


def test_mesh_must_cover_the_cluster():
    graph = graph_of("gpt2", seq=1024)
    with pytest.raises(SpecError, match="product is the 8 devices"):
        shard(graph, load_cluster("h100-sxm:1x8"), STACK, (2, 2))


def test_file_is_the_graph_that_it_describes(tmp_path):
    graph = read_graph(written(tmp_path, MLP))
    fc1 = graph.operators[1]
    assert [(i.phase, i.m, i.n, i.k) for i in fc1.kernels] == [
        ("forward", "b*s", "f", "h"), ("backward", "b*s", "h", "f"), ("weight", "h", "f", "b*s"),
    ]  # fmt: skip
    assert fc1.weight == "h*f"
    assert [o.reads[0].source for o in graph.operators[1:]] == [0, 1, 2, 3]
    found = shard(graph, load_cluster("h100-sxm:1x8"), STACK, (8,))
    # 65,536 tokens against 134 M weights: the gradient's sum is cheaper than the activations'.
    assert found.operators[1]["splits"] in (["b"], ["s"])


BROKEN = {
    "no sizes": {"sizes": {}},
    "unknown letter": {"operators": [{"name": "a", "elementwise": "bx", "reads": ["input"]}]},
    "unknown source": {"operators": [{"name": "a", "elementwise": "b", "reads": ["z"]}]},
    "no matrices": {"operators": [{"name": "a", "einsum": "bs,sh->b", "reads": ["input", "weight"]}]},
    "one operand": {"operators": [{"name": "a", "einsum": "bs->b", "reads": ["input"]}]},
    "two names": {"operators": [{"name": "a", "elementwise": "b", "reads": []}] * 2},
    "both": {"operators": [{"name": "a", "elementwise": "b", "einsum": "bs,sh->bh", "reads": []}]},
    "none": {"operators": []},
    "stray key": {"operators": [{"name": "a", "elementwise": "b", "reads": [], "flop": 3}]},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_broken_graph_is_refused(tmp_path, change):
    with pytest.raises(SpecError) as error:
        read_graph(written(tmp_path, {**MLP, **change}))
    assert all("problem.json" in problem.where for problem in error.value.problems)


# -- recomputation ---------------------------------------------------------------------------------------------------------


def chain(layers):
    """Unit layers: forward i leaves 1; backward i reads its gradient, its input and its output."""
    names = [f"f{i}" for i in range(layers)] + [f"b{i}" for i in reversed(range(layers))]
    reads = [(i - 1,) if i else () for i in range(layers)]
    for i in reversed(range(layers)):
        inputs = {i} | ({i - 1} if i else set()) | ({len(reads) - 1} if i < layers - 1 else set())
        reads.append(tuple(sorted(inputs)))
    return ComputeGraph(names, [1.0] * layers + [2.0] * layers, [1.0] * 2 * layers, reads, boundary=layers)


def test_chain_of_sixteen_within_the_square_root_of_its_memory():
    """Chen et al. 2016 (arXiv:1604.06174), section 4.1: 2√n of memory for at most one more forward pass."""
    graph = chain(16)
    assert keep_all(graph).peak_bytes == 17.0  # all outputs and a gradient
    found = cheapest_schedule(graph, budget_bytes=2 * 4.0 + 1.0)
    assert found.certificate.status == "exact"
    assert 0.0 < found.recompute_s <= 16.0


def test_less_memory_never_takes_less_time():
    graph = chain(7)
    times = [cheapest_schedule(graph, budget_bytes=float(budget)).time_s for budget in (9, 8, 7, 6, 5)]
    assert times == sorted(times)
    assert times[0] == graph.once_s


def test_impossible_budget_says_what_is_needed():
    with pytest.raises(Infeasible, match="which one node needs"):
        cheapest_schedule(chain(4), budget_bytes=1.0)


def test_front_of_a_layer_ends_in_nothing_kept():
    """Full recomputation runs the whole forward again but for what nobody reads: at most one forward pass more."""
    cluster = load_cluster("h100-sxm:1x8")
    graph = layer_graph(graph_of("llama3-8b"), 0, cluster, STACK)
    points = front(graph, points=6)
    kept, extra = ([getattr(p, name) for p in points] for name in ("kept_bytes", "recompute_s"))
    assert all(p.certificate.status == "exact" for p in points)
    assert kept == sorted(kept, reverse=True)
    assert kept[-1] == 0.0
    assert extra == sorted(extra)
    assert extra[-1] <= sum(graph.time_s[: graph.boundary])


@pytest.mark.parametrize("choice", ["norm+act+qkv", "norm+fc1", "norm+qkv+fc1"])
@pytest.mark.parametrize("model", ["llama3-8b", "llama2-13b"])
def test_points_of_the_front_are_choices_of_plans(model, choice):
    """No schedule of a layer's kernels that keeps as little as the choice runs less again."""
    cluster = load_cluster("h100-sxm:1x8")
    fixed = {"dp": "8", "zero_stage": "1", "recompute": choice}
    problem = Problem(load_model(model), cluster, TrainWorkload(8, 4096), load_stack(), fixed=fixed)
    table = examine(problem).table
    kept, again = float(table["saved_bytes"][0, 0]), float(table["recompute_s"][0, 0])
    given = 4096.0 * problem.model.hidden * 2  # a layer's input, which the graph has anyway
    graph = layer_graph(graph_of(model, seq=4096), 0, cluster, STACK)
    best = cheapest_schedule(graph, kept_limit_bytes=kept - given)
    assert best.certificate.status == "exact"
    assert 0.9 * best.recompute_s <= again <= best.recompute_s * (1.0 + 1e-9)
    # The graph keeps what rotary embeddings read apart from what they make; a plan has them in one tensor.
    rotary = graph.time_s[graph.names.index("attention.rope")]
    assert again >= best.recompute_s - rotary * (1.0 + 1e-9)


@pytest.mark.reaches("checkmate")
def test_attention_is_recomputed_first_where_its_scores_are_kept():
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 5: scores and softmax are large and cheap to compute again."""
    cluster = load_cluster("h100-sxm:1x8")
    graph = layer_graph(graph_of("gpt3-175b", attention_kernel="eager"), 0, cluster, STACK)
    scores = graph.memory_bytes[graph.names.index("attention.softmax")]
    plain = keep_all(graph)
    found = cheapest_schedule(graph, kept_limit_bytes=plain.kept_bytes - 2 * scores)
    assert "attention.softmax" in found.again
    assert not {"attention.qkv", "mlp.fc1", "mlp.fc2"} & set(found.again)


# -- tiers -----------------------------------------------------------------------------------------------------------------


def test_tensors_of_a_step_are_those_of_zero():
    """Rajbhandari et al. 2020 (arXiv:1910.02054), section 3.1: 2 + 12 bytes a parameter, and gradients, here of 4 bytes."""
    cluster, model = load_cluster("a100-sxm-80gb:1x8"), load_model("llama2-7b")
    problem = tier_problem(model, cluster, STACK, TrainWorkload(1, 1024), layers=2)
    weights = 2 * (4 * 4096**2 + 3 * 4096 * 11008) + 2 * 32000 * 4096  # without the gains of norms
    sizes = {
        part: sum(t.size_bytes for t in problem.tensors if t.name.startswith(part))
        for part in ("weights", "gradients", "states")
    }
    assert sizes == {"weights": weights * 2 / 8, "gradients": weights * 4 / 8, "states": weights * 12 / 8}
    assert [tier.name for tier in problem.tiers][:2] == ["device", "host"]


def test_a_kernel_waits_for_what_its_gap_is_too_short_for():
    """Two tensors of 4 B, room for one and links of 2 B/s: x leaves in 2 s beside nothing, y makes room and x returns in 2 s.

    Kernel 1 waits for x to be gone (2 s), kernel 2 for y's end and the way back (2 s): 3 kernels of 1 s and 4 s of waiting. With
    room for both nothing moves.
    """
    kernels = tuple(Kernel(f"k{i}", 1.0, (tensor,)) for i, tensor in enumerate((0, 1, 0)))
    tensors = (Tensor("x", 4.0), Tensor("y", 4.0))

    def step_s(room_bytes: float, bytes_per_s: float) -> float:
        tiers = (Tier("near", room_bytes), Tier("far", 100.0, bytes_per_s, bytes_per_s))
        return migrate(TieringProblem(kernels, tensors, tiers, "scheduled")).time_s

    assert step_s(4.0, 2.0) == pytest.approx(7.0)
    assert step_s(4.0, 8.0) == pytest.approx(4.0)  # half a second each way
    assert step_s(8.0, 2.0) == pytest.approx(3.0)


@pytest.mark.reaches("g10")
def test_a_return_begins_when_there_is_room_for_it():
    """As above with a kernel of 3 s between y's last use and x's next: the way back hides behind it, the way out does not."""
    kernels = tuple(
        Kernel(f"k{i}", t, uses)
        for i, (t, uses) in enumerate([(1.0, (0,)), (1.0, (1,)), (3.0, ()), (1.0, (0,))])
    )
    tiers = (Tier("near", 4.0), Tier("far", 100.0, 2.0, 2.0))
    found = migrate(TieringProblem(kernels, (Tensor("x", 4.0), Tensor("y", 4.0)), tiers, "scheduled"))
    assert found.time_s == pytest.approx(1.0 + 2.0 + 1.0 + 3.0 + 1.0)


@pytest.mark.reaches("autotm", "swapadvisor")
def test_with_room_for_all_nothing_moves_and_with_less_something_does():
    cluster, model = load_cluster("a100-sxm-80gb:1x1"), load_model("llama2-7b")
    roomy = tier_problem(model, cluster, STACK, TrainWorkload(1, 1024), layers=4)
    assert not place(roomy).rests
    tight = tier_problem(model, cluster, STACK, TrainWorkload(1, 1024), layers=4, device_bytes=16e9)
    found = place(tight)
    assert found.certificate.status == "exact"
    assert found.rests
    assert found.time_s > found.kernels_s
    assert found.peak_bytes["device"] <= 16e9


# -- sequences ---------------------------------------------------------------------------------------------------------------


@pytest.mark.reaches("flexsp", "bytescale_hdp")
def test_groups_of_several_sizes_beat_groups_of_one():
    cluster = load_cluster("a100-sxm-80gb:1x8")
    histogram = {1024: 64, 32768: 1}
    problem = sequence_problem(
        load_model("llama3-8b"), cluster, STACK, TrainWorkload(1, 1024), histogram, [1, 2, 4, 8], {"context": "a2a"}
    )  # fmt: skip
    found = assign_sequences(problem, gap=0.02, time_limit_s=20.0)
    dealt = [longest_first(problem, degree) for degree in problem.degrees]
    uniform = [groups.time_s for groups in dealt if groups is not None]
    assert found.time_s < min(uniform)
    assert len(set(found.degrees)) > 1


@pytest.mark.reaches("dynapipe")
def test_micro_batches_by_length_beat_as_many_sequences_in_each():
    """DynaPipe (arXiv:2311.10418): eight sequences of one unit and one of eight, a second per padded unit and one per call.

    By hand, on two stages: 8 + 1 and 8 + 1 seconds, and the longer once more: 27. Three by three, padded: 4, 4, 25 and 25: 58.
    """
    lengths = [1] * 8 + [8]

    def seconds(count, length):
        return count * length + 1.0

    found = micro_batches(lengths, seconds, lambda count, length: True, 2)
    assert found.time_s == pytest.approx(27.0)
    for each in (1, 3, 9):
        pieces = [seconds(each, max(lengths[i : i + each])) for i in range(0, len(lengths), each)]
        assert found.time_s < sum(pieces) + max(pieces)


def test_sequence_that_no_rule_allows_is_named():
    with pytest.raises(SpecError, match="1,000 tokens"):
        sequence_problem(
            load_model("llama3-8b"), load_cluster("a100-sxm-80gb:2x8"), STACK, TrainWorkload(1, 1024), {1000: 1}, [16], {}
        )  # fmt: skip


def test_clock_without_a_limit_is_never_over():
    assert Clock(1e-9).over
    assert not Clock(None).over
    assert Clock(5.0).left_s <= 5.0
