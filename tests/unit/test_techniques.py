"""What every technique owes: a record that says enough, a pass that keeps the ledger's promises, and degree 1 = baseline."""

import ast
import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import planner.techniques
from planner.ledger import Collective, Item, Kernel, Matmul, Resident
from planner.mesh import Mesh
from planner.operators.baseline import baseline
from planner.specs.hardware import load_cluster
from planner.specs.models import load_model
from planner.specs.stack import load_stack
from planner.specs.workload import TrainWorkload
from planner.technique import SERVING_SLOTS, SLOTS, Context, catalogue, discover, off
from planner.techniques import figures

ROOT = Path(planner.techniques.__file__).parent
HEADINGS = ("What it does:", "Saves:", "Costs:", "Assumes:", "Source:")
RECORDS = {path: path.read_text() for path in ROOT.rglob("*.py")}
FILES = [path for path, text in RECORDS.items() if "\nTECHNIQUE = " in text or "\nTECHNIQUES = " in text]
MODELLED = list(discover().values())
MODELS = (
    "gpt3-1.3b",
    "llama3-8b",
    "gemma2-9b",
    "deepseek-v2-lite",
    "mixtral-8x7b",
    "t5-3b",
    "mamba-1.4b",
    "falcon-40b",
    "gpt-oss-20b",
    "deepseek-v3.2",
    "qwen2-57b-a14b",
    "olmo2-7b",
)
PLAIN = {
    "precision": "bf16", "attention_kernel": "flash", "loss_kernel": "fused", "tensor": "1d", "sequence_parallel": "false",
    "context": "p2p", "expert": "folded", "pipeline": "stages", "optimizer": "adamw", "zero_stage": "1", "schedule": "1f1b",
}  # fmt: skip
SEQ = 1024


def serve(slot, value):
    return next((t for t in MODELLED if t.slot == slot and value in t.choices), None)


def run(model, *, upto=None, cluster="h100-sxm:4x8", rows=1, degrees=None, **choices):
    """The ledger and context of a recipe: PLAIN but for ``choices``; with ``upto``, of the slots before that one."""
    knobs = {slot: off(slot) for slot in SLOTS} | PLAIN | choices
    sizes = {name: np.ones(rows) for name in ("tp", "cp", "dp", "pp", "ep", "etp")}
    sizes |= {name: np.asarray(value, dtype=float) * np.ones(rows) for name, value in (degrees or {}).items()}
    spec = load_model(model)
    ctx = Context(
        spec, load_cluster(cluster), TrainWorkload(64, SEQ), load_stack(), Mesh(**sizes), np.ones(rows), knobs
    )
    ledger = baseline(spec, batch=np.ones(rows), seq=float(SEQ))
    for slot in SLOTS if upto is None else SLOTS[: SLOTS.index(upto)]:
        technique = serve(slot, knobs[slot])
        if technique is not None:
            ledger = technique.apply(ledger, ctx)
    return ledger, ctx


def amounts(ledger):
    """What a rank computes, sends and holds, item by item; collectives of one rank and nothing are left out."""
    found = []
    for item in ledger.items:
        sizes = [
            getattr(item, name)
            for name in ("m", "n", "k", "groups", "size", "batch", "heads", "kv_heads", "q", "kv")
            if hasattr(item, name)
        ]
        if isinstance(item, Collective) and np.all(item.group.size == 1):
            continue
        amount = [tuple(np.ravel(ledger.axes[size])) for size in sizes]
        if all(all(value > 0 for value in values) for values in amount):
            rate = getattr(item, "bytes_per_element", getattr(item, "passes", 0.0))
            found.append((type(item).__name__, item.what, item.block, item.phase, rate, *amount))
    return sorted(found, key=repr)


# -- records -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_docstring_has_the_five_headings_in_order(path):
    text = ast.get_docstring(ast.parse(RECORDS[path]))
    lines = [line for line in text.splitlines() if line.startswith(HEADINGS)]
    assert [line.partition(":")[0] + ":" for line in lines] == list(HEADINGS)
    assert text.splitlines()[0].endswith(".")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_file_lies_in_the_folder_of_its_slot(path):
    module = importlib.import_module(
        ".".join(("planner.techniques", *path.relative_to(ROOT).with_suffix("").parts))
    )
    records = getattr(module, "TECHNIQUES", None) or (module.TECHNIQUE,)
    folders = {record.slot or record.job for record in records}
    assert folders == {path.parent.name}


@pytest.mark.parametrize("technique", MODELLED, ids=lambda t: t.key)
def test_record_says_enough(technique):
    assert technique.status == "modelled"
    assert technique.name
    assert technique.source
    assert technique.summary
    assert technique.slot is None or technique.slot in (
        SLOTS if technique.job == "training" else SERVING_SLOTS
    )
    assert bool(technique.choices) == (technique.slot is not None)
    if technique.kind == "baseline":
        assert not technique.edits
        assert not technique.order
    else:
        assert technique.figures
        assert (
            technique.edits
            or technique.order
            or technique.compose
            or technique.fixes
            or (technique.solve and technique.naive)
        )
        assert bool(technique.fixes) == (technique.kind == "preset")
        assert all(figure.source and figure.tolerance < 0.1 for figure in technique.figures)


@pytest.mark.parametrize("slot", SLOTS)
def test_choices_of_a_slot_are_distinct(slot):
    choices = [choice for technique in MODELLED if technique.slot == slot for choice in technique.choices]
    assert choices
    assert len(set(choices)) == len(choices)
    assert off(slot) not in choices
    assert sum(technique.default for technique in MODELLED if technique.slot == slot) <= 1


def test_a_slots_knob_names_its_choices():
    for technique in MODELLED:
        for knob in technique.knobs:
            if knob.name in SLOTS:
                known = {c for t in MODELLED if t.slot == knob.name for c in t.choices}
                assert set(knob.values) <= known | {off(knob.name)}, (
                    knob.name
                )  # others come with their own files


def test_declared_entries_have_reasons_and_never_shadow_a_model():
    entries = catalogue()
    assert dict(discover()).items() <= dict(entries).items()
    for key, entry in entries.items():
        assert key == entry.key
        assert entry.name
        assert entry.source
        assert len(entry.summary) > 10
        if entry.status == "declared":
            assert not entry.figures
            assert not entry.edits
            assert not entry.order


# -- passes --------------------------------------------------------------------------------------------------------------

RECIPES = {
    "plain": {},
    "eager": {"attention_kernel": "eager", "loss_kernel": "eager"},
    "tp sp": {"degrees": {"tp": 2, "dp": 4}, "sequence_parallel": "true"},
    "kept gathers": {"degrees": {"tp": 4, "dp": 2}, "sequence_parallel": "gathered", "recompute": "mlp", "precision": "fp8"},
    "scattered hops": {"degrees": {"tp": 2, "pp": 2}, "pipeline": "scatter_gather"},
    "ring fsdp full": {"degrees": {"cp": 4, "dp": 4}, "zero_stage": "fsdp", "recompute": "full"},
    "gather eager": {"degrees": {"cp": 2, "tp": 2}, "attention_kernel": "eager", "context": "all_gather"},
    "gathered ring": {"degrees": {"cp": 4, "dp": 2}, "context": "gathered_ring", "recompute": "full"},
    "eager ring": {"degrees": {"cp": 2}, "attention_kernel": "eager"},
    "ulysses": {"degrees": {"cp": 2, "dp": 2}, "context": "a2a", "zero_stage": "3"},
    "eager ulysses": {"degrees": {"cp": 2}, "attention_kernel": "eager", "context": "a2a"},
    "usp sp chunked": {
        "degrees": {"cp": 8, "tp": 2, "dp": 2}, "context": "a2a+p2p", "sequence_parallel": "true", "tensor_overlap": "chunked",
    },
    "fp8 hsdp": {"degrees": {"dp": 16}, "precision": "fp8", "zero_stage": "3", "zero_group": "node"},
    "muon": {"degrees": {"dp": 4}, "optimizer": "muon", "zero_stage": "1"},
    "swaps": {
        "degrees": {"pp": 2, "dp": 4}, "recompute": "norm+act", "optimizer_offload": "cpu", "activation_offload": "cpu",
        "parameter_offload": "cpu", "zero_stage": "3",
    },
    "experts": {"degrees": {"tp": 2, "dp": 4, "ep": 4, "etp": 2}, "sequence_parallel": "true", "recompute": "mlp"},
    "checkpoints": {"degrees": {"tp": 2}, "recompute": "partitioned", "zero_stage": "0"},
    "per op": {
        "degrees": {"tp": 2, "dp": 2}, "sequence_parallel": "true", "tensor_overlap": "chunked", "recompute": "per_op",
        "zero_stage": "fsdp",
    },
    "per op fp8": {"degrees": {"tp": 2}, "precision": "fp8", "recompute": "per_op"},
    "adapters": {"degrees": {"tp": 2, "dp": 2}, "sequence_parallel": "true", "adaptation": "lora", "zero_stage": "1"},
    "adapters fsdp": {"degrees": {"dp": 4}, "adaptation": "lora", "zero_stage": "fsdp", "precision": "fp8", "recompute": "full"},
    "some layers swapped": {"degrees": {"pp": 2}, "activation_offload": "cpu", "activation_offload_layers": 3},
    "groups of two": {"degrees": {"dp": 8}, "zero_stage": "3", "zero_group": "ranks", "zero_group_ranks": 2},
    "mla": {"degrees": {"tp": 2, "dp": 2}, "sequence_parallel": "true", "recompute": "norm+mla_up", "zero_stage": "2"},
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_expression_names_axes_and_every_item_its_technique(model, name):
    ledger, _ = run(model, **RECIPES[name])
    texts = {
        "what",
        "block",
        "phase",
        "by",
        "source",
        "window",
        "track",
        "dtype",
        "kernel",
        "kind",
        "tier",
        "pool",
        "lifetime",
        "format",
        "stored",
    }
    for item in ledger.items:
        assert item.by == "model" or item.by in discover(), item
        for field in type(item).__dataclass_fields__:
            value = getattr(item, field)
            if isinstance(value, str) and field not in texts:
                amount = ledger.axes[value]
                assert np.all(np.isfinite(amount)), (item, field)
                assert np.all(amount >= 0), (item, field)
    assert {item.window for item in ledger.items} >= set(ledger.chunks)


DEGREES = {
    "tp": ("tensor", {}),
    "sp": ("sequence_parallel", {"sequence_parallel": "true"}),
    "kept gathers": ("sequence_parallel", {"sequence_parallel": "gathered"}),
    "ring": ("context", {"context": "p2p"}),
    "gathered keys": ("context", {"context": "all_gather"}),
    "gathered ring": ("context", {"context": "gathered_ring"}),
    "ulysses": ("context", {"context": "a2a"}),
    "usp": ("context", {"context": "a2a+p2p"}),
    "experts": ("expert", {}),
    "overlap": ("tensor_overlap", {"tensor_overlap": "chunked"}),
    "pipeline": ("pipeline", {}),
    "scattered hops": ("pipeline", {"pipeline": "scatter_gather"}),
    "ddp": ("zero_stage", {"zero_stage": "0"}),
    "zero1": ("zero_stage", {"zero_stage": "1"}),
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", DEGREES)
def test_degree_one_is_the_baseline(model, name):
    slot, choices = DEGREES[name]
    before, ctx = run(model, upto=slot, **choices)
    after = serve(slot, ctx.knobs[slot]).apply(before, ctx)
    assert amounts(after) == amounts(before)


@pytest.mark.parametrize("slot", SLOTS)
def test_one_row_of_many_is_the_same_as_one_alone(slot):
    """Passes are arrays over rows: a row's amounts do not depend on its neighbours."""
    degrees = {"tp": [1, 2, 4], "cp": [1, 2, 1], "dp": [8, 2, 4], "pp": [1, 2, 2]}
    choices = {slot: next(t.choices[0] for t in MODELLED if t.slot == slot)} | {"sequence_parallel": "true"}
    together, _ = run("llama3-8b", rows=3, degrees=degrees, **choices)
    for row in range(3):
        alone, _ = run(
            "llama3-8b", degrees={name: values[row] for name, values in degrees.items()}, **choices
        )
        sizes = {item_key(item): item for item in alone.items}
        for item in together.items:
            if isinstance(item, Resident | Kernel) and hasattr(item, "size") and item_key(item) in sizes:
                expected = np.ravel(alone.axes[sizes[item_key(item)].size])[0]
                got = np.broadcast_to(together.axes[item.size], (3,))[row]
                assert got == pytest.approx(expected)


def item_key(item: Item):
    return type(item).__name__, item.what, item.block, item.phase, item.window, getattr(item, "tier", "")


# -- composition ---------------------------------------------------------------------------------------------------------


def collectives(ledger, **fields):
    return [item for item in ledger.of(Collective, **fields) if np.any(item.group.size > 1)]


def test_recomputation_repeats_collectives_of_activations_and_no_gather_of_weights():
    ledger, _ = run(
        "llama3-8b",
        degrees={"tp": 2, "cp": 2, "dp": 2},
        sequence_parallel="true",
        zero_stage="3",
        recompute="full",
    )
    forward = {(i.what, i.block) for i in collectives(ledger, phase="forward") if i.block == "dense"}
    again = {(i.what, i.block) for i in collectives(ledger, phase="recompute")}
    assert again == {key for key in forward if "parameters" not in key[0]}
    assert any("pass_kv" in what for what, _ in again)


def test_some_layers_swap_their_share():
    def moved(**choices):
        ledger, _ = run("llama3.1-70b", degrees={"pp": 2}, activation_offload="cpu", **choices)
        layer = [i for i in ledger.items if i.block not in ("embedding", "head")]
        residents = [i for i in layer if isinstance(i, Resident) and i.lifetime == "micro_batch"]
        parts = [[i for i in residents if i.tier == tier] for tier in ("host", "device")]
        return [figures.total_bytes(ledger, part) for part in parts]

    whole, nothing = moved()
    assert nothing == 0
    host, device = moved(activation_offload_layers=10)  # of the 40 layers of each stage
    assert host == pytest.approx(whole / 4)
    assert device == pytest.approx(whole * 3 / 4)
    assert moved(activation_offload_layers=50) == pytest.approx([whole, 0.0])


def test_adapters_alone_are_trained():
    # Megatron-Bridge's default on Llama-2 7B: rank 32 on four products of width 4096 and 11008, gate and up as one.
    ledger, _ = run("llama2-7b", adaptation="lora", degrees={"dp": 2}, zero_stage="1")
    ends = [(4096, 3 * 4096), (4096, 4096), (4096, 2 * 11008), (11008, 4096)]
    trained = 32 * sum(into + out for into, out in ends)
    layer = [i for i in ledger.of(Resident) if i.block == "dense"]
    sizes = {
        pool: sum(float(np.ravel(ledger.axes[i.size])[0]) for i in layer if i.pool == pool)
        for pool in ("gradients", "parameters")
    }
    assert sizes["gradients"] == trained
    assert sizes["parameters"] == trained + 4096 * 3 * 4096 + 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    # 12 bytes of fp32 weights and moments per trained parameter, over two ranks.
    states = figures.total_bytes(ledger, [i for i in layer if i.pool == "optimizer"])
    assert states == pytest.approx(12 * trained / 2)
    weight_gradients = {i.what.rpartition(".")[2] for i in ledger.of(Matmul, phase="weight")}
    assert weight_gradients == {"adapter_down", "adapter_up"}
    gathered = [i for i in collectives(ledger, phase="step") if i.kind == "all_gather" and i.block == "dense"]
    assert sum(float(np.ravel(ledger.axes[i.size])[0]) for i in gathered) == trained


def test_adapters_of_rank_one_on_gpt3():
    """Trained parameters of query and value (arXiv:2106.09685, Table 4: 4.7M): two products of the output projection's shape."""
    ledger, _ = run("gpt3-175b", adaptation="lora", adapter_rank=1, adapter_targets="linear_proj")
    gradients = [i for i in ledger.of(Resident, pool="gradients") if i.block == "dense"]
    assert 2 * 96 * sum(float(np.ravel(ledger.axes[i.size])[0]) for i in gradients) == 4_718_592


def test_modules_join_as_megatron_names_them():
    def saved(**choices):
        return figures.saved_bytes(run("deepseek-v2-lite", degrees={"ep": 4, "dp": 4}, **choices)[0])

    pairs = [("layernorm+moe_act", "norm+act"), ("layernorm+mla_up_proj", "norm+mla_up"), ("mlp+moe", "mlp")]
    for modules, choice in pairs:
        named = saved(recompute="modules", recompute_modules=modules)
        assert named == saved(recompute=choice) < saved()
    both = saved(recompute="modules", recompute_modules="layernorm+moe")
    assert both < saved(recompute="modules", recompute_modules="moe")


def test_states_are_sharded_over_as_many_ranks_as_asked():
    def held(**choices):
        ledger, _ = run("llama3-8b", degrees={"dp": 32}, zero_stage="3", **choices)
        return figures.held_bytes(ledger)

    assert held(zero_group="ranks", zero_group_ranks=4) == pytest.approx(8 * held())
    assert held(zero_group="ranks", zero_group_ranks=8) == pytest.approx(held(zero_group="node"))


def test_a_multi_token_prediction_module_is_as_large_as_released():
    # DeepSeek-V3's README_WEIGHTS: 11.5B of a module's parameters are its own (its layer has 11.51e9, the projection 0.10e9);
    # embedding and head are shared.
    model = load_model("deepseek-v3")
    ctx = {"batch": np.ones(1), "seq": 64.0}
    sizes = []
    for modules in (0, 1, 2):
        ledger = baseline(replace(model, mtp_modules=modules), **ctx)
        own = [i for i in ledger.of(Resident, pool="parameters") if i.block == "head"]
        sizes.append(sum(float(np.ravel(ledger.axes[i.size])[0]) for i in own))
        # One loss for every token that is predicted.
        assert len(ledger.of(Matmul, what="head.logits", phase="forward")) == 1 + modules
    assert sizes[1] - sizes[0] == pytest.approx(11.5e9, rel=1e-2)
    assert sizes[2] - sizes[1] == sizes[1] - sizes[0]


def test_update_is_sharded_by_every_stage_but_the_first():
    def update_elements(stage):
        ledger, _ = run("llama3-8b", degrees={"dp": 8}, zero_stage=stage)
        return sum(
            float(np.ravel(ledger.axes[i.size])[0])
            for i in ledger.items
            if "update" in i.tags and hasattr(i, "size")
        )

    whole = update_elements("0")
    assert [whole / update_elements(stage) for stage in ("1", "2", "3", "fsdp")] == pytest.approx([8.0] * 4)


def test_muon_flop_of_a_square_matrix_are_thirty_cubes():
    # 5 iterations of 4m²n + 2m³ with m = n (K. Jordan et al. 2024): 30 m³; llama-7b's output projection is 4096 × 4096.
    ledger, _ = run("llama-7b", optimizer="muon", zero_stage="0")
    products = [
        i for i in ledger.items if i.what.startswith("attention.output.") and "newton_schulz" in i.tags
    ]
    flop = sum(
        2 * np.prod([float(np.ravel(ledger.axes[s])[0]) for s in (i.m, i.n, i.k, i.groups)]) for i in products
    )
    assert flop == pytest.approx(30 * 4096**3)


def test_muon_keeps_one_moment_of_matrices_and_two_of_embeddings():
    ledger, _ = run("llama3-8b", optimizer="muon")
    moments = {
        i.block: i.bytes_per_element
        for i in ledger.of(Resident, pool="optimizer")
        if i.what.endswith("moments")
    }
    assert moments == {"dense": 4.0, "embedding": 8.0, "head": 8.0}


def test_kv_heads_are_replicated_where_ranks_outnumber_them():
    # 8 KV heads on 16 ranks: every rank holds one whole head, K of s·head_dim elements; on 4 ranks it holds two.
    for tp, heads in ((4, 2), (16, 1)):
        ledger, _ = run("llama3-8b", degrees={"tp": tp})
        (keys,) = [i for i in ledger.of(Resident) if i.what == "attention.k"]
        assert float(np.ravel(ledger.axes[keys.size])[0]) == SEQ * heads * 128


def test_latents_are_summed_and_gathered_in_place_of_the_hidden_state():
    # DeepSeek-V2-Lite has no query latent: q reads the hidden state (2048), the KV up-projection 512 + 64.
    ledger, _ = run("deepseek-v2-lite", degrees={"tp": 2}, sequence_parallel="true")
    gathers = {
        i.what: float(np.ravel(ledger.axes[i.size])[0])
        for i in collectives(ledger, phase="forward")
        if i.block == "moe"
    }
    assert gathers["attention.q.all_gather"] == SEQ * 2048
    assert gathers["attention.kv_up.all_gather"] == SEQ * 576


@pytest.mark.parametrize(
    ("model", "backward"), [("gpt-j-6b", 1), ("falcon-7b", 1), ("gpt-neox-20b", 2), ("falcon-40b", 2)]
)
def test_parallel_blocks_reduce_their_sum_once(model, backward):
    # Attention and MLP are added before one all-reduce (GPT-NeoX, megatron/model/transformer.py: "we can do a single
    # allreduce after we add mlp / attn outputs"). Their inputs are one tensor and one fused product in PaLM's form
    # (arXiv:2204.02311, section 2), and two where each has a norm: GPT-NeoX's ColumnParallelLinear all-reduces either.
    ledger, _ = run(model, degrees={"tp": 2})
    phases = [
        i.phase
        for i in collectives(ledger)
        if i.group.name == "tp" and i.block not in ("head", "embedding") and i.phase != "step"
    ]
    assert sorted(phases) == ["backward"] * backward + ["forward"]


@pytest.mark.parametrize(
    ("model", "lookups"), [("t5-3b", 2), ("whisper-large-v3", 1), ("gpt2", 1), ("vit-b-16", 0)]
)
def test_every_stack_sums_what_it_looks_up(model, lookups):
    # T5 shares one table between encoder and decoder, and both look their tokens up in it (arXiv:1910.10683);
    # Whisper's encoder takes spectrograms (arXiv:2212.04356, section 2.2), a vision transformer patches.
    ledger, ctx = run(model, degrees={"tp": 2})
    found = [float(np.ravel(ledger.axes[i.size])[0]) for i in collectives(ledger) if "embedding" in i.tags]
    assert found == [SEQ * ctx.model.hidden] * lookups


@pytest.mark.parametrize(("model", "sums"), [("olmo2-7b", 2), ("minimax-m2.5", 2), ("qwen3-8b", 0)])
def test_norms_over_all_heads_exchange_two_sums_per_token(model, sums):
    # vLLM's MiniMaxText01RMSNormTP: the fp32 variances of queries and keys in one all-reduce. Qwen3 norms each head.
    ledger, _ = run(model, degrees={"tp": 4}, sequence_parallel="true")
    found = [i for i in collectives(ledger) if "qk_norm" in i.what]
    assert sorted(i.phase for i in found) == (["backward", "forward"] if sums else [])
    assert {(float(np.ravel(ledger.axes[i.size])[0]), i.dtype) for i in found} == {(sums * SEQ, "fp32")} - {
        (0, "fp32")
    }


def test_an_indexer_sees_all_keys():
    # DeepSeek-V3.2: one key of 128 per token (config.json). Megatron-LM's dsa.py gathers keys over cp
    # (and scatters their gradients), and the indexer's inputs, hidden state and query latent, over tp.
    ledger, _ = run("deepseek-v3.2", degrees={"tp": 2, "cp": 4}, sequence_parallel="true")
    found = {
        (i.what, i.kind, i.phase): float(np.ravel(ledger.axes[i.size])[0])
        for i in collectives(ledger)
        if "indexer" in i.tags and i.block == "moe"
    }
    assert found == {
        ("attention.index_k.gather", "all_gather", "forward"): SEQ * 128,
        ("attention.index_k.scatter_gradient", "reduce_scatter", "backward"): SEQ * 128,
        ("attention.index_q.all_gather", "all_gather", "forward"): SEQ / 4 * 1536,
        ("attention.index_k.all_gather", "all_gather", "forward"): SEQ / 4 * 7168,
    }
    kept = {
        i.what: float(np.ravel(ledger.axes[i.size])[0])
        for i in ledger.of(Resident, block="moe")
        if "distant" in i.what
    }
    assert kept["attention.index_k.distant"] == 3 / 4 * SEQ * 128
    assert kept["attention.index_k.distant_input"] == SEQ / 4 * 7168 / 2


def test_a_shared_expert_is_scaled_by_one_sigmoid_per_token():
    # Megatron-LM moe/shared_experts.py: linear(hidden, gate of (1, h)), sigmoid, times the output; h = 3584.
    ledger, _ = run("qwen2-57b-a14b")
    (gate,) = [i for i in ledger.of(Matmul, phase="forward") if i.what == "shared_expert.gate"]
    assert [float(np.ravel(ledger.axes[s])[0]) for s in (gate.m, gate.n, gate.k)] == [SEQ, 1, 3584]
    (kept,) = [i for i in ledger.of(Resident) if i.what == "shared_expert.output"]
    assert float(np.ravel(ledger.axes[kept.size])[0]) * kept.bytes_per_element == 2 * SEQ * 3584


def sent(ledger, **fields):
    """Elements that a tensor rank sends in one dense block, per phase of a micro-batch."""
    items = [i for i in collectives(ledger, **fields) if i.group.name == "tp" and i.block == "dense"]
    return figures.sent_elements(ledger, lambda item: item in items and item.phase != "step")


def test_kept_gathers_send_what_tensor_parallelism_sends():
    # Korthikanti et al. 2022, section 4.2.2: reduce-scatter and all-gather in place of an all-reduce, the same bandwidth;
    # gathering two inputs of b·s·h again is what Megatron's form has on top.
    plain, again, kept = (
        run("llama3-8b", degrees={"tp": 4}, sequence_parallel=choice)[0]
        for choice in ("false", "true", "gathered")
    )
    assert sent(kept) == pytest.approx(sent(plain))
    assert sent(again) - sent(kept) == pytest.approx(2 * SEQ * 4096 * 3 / 4)


def test_kept_gathers_are_dropped_where_their_product_is_recomputed():
    # The input of fc1 is gathered again for the recomputation; that of the attention stays: 3/4 of 1024 · 4096 elements.
    ledger, _ = run("llama3-8b", degrees={"tp": 4}, sequence_parallel="gathered", recompute="mlp")
    distant = {
        i.what: i.lifetime for i in ledger.of(Resident, block="dense") if i.what.endswith("distant_input")
    }
    assert distant == {"attention.qkv.distant_input": "micro_batch", "mlp.fc1.distant_input": "recomputed"}
    (kept,) = [i for i in ledger.of(Resident) if i.what == "attention.qkv.distant_input"]
    assert float(np.ravel(ledger.axes[kept.size])[0]) == 3 / 4 * SEQ * 4096
    assert {i.what for i in collectives(ledger, phase="recompute")} >= {"mlp.fc1.all_gather"}


def test_scattered_hops_pay_between_nodes_alone():
    # t = 8 of a node of 8: stages lie in other nodes; t = 2, 2 stages and nothing else: four devices of one node.
    _, ctx = run("llama3-8b", rows=2, degrees={"tp": [8, 2], "pp": [4, 2]}, upto="pipeline")
    assert serve("pipeline", "scatter_gather").active(ctx).tolist() == [True, False]


def test_cross_attention_reduces_two_inputs():
    # A T5 decoder block: self-attention, cross-attention's queries and its keys and values, MLP.
    ledger, _ = run("t5-3b", degrees={"tp": 2})
    backward = {
        i.what for i in collectives(ledger, phase="backward") if i.block == "dense" and i.group.name == "tp"
    }
    assert backward == {f"{what}.all_reduce" for what in ("attention.qkv", "cross.q", "cross.kv", "mlp.fc1")}


def test_capacity_pads_and_imbalance_waits():
    workloads = (
        TrainWorkload(64, SEQ),
        TrainWorkload(64, SEQ, expert_load_factor=1.5),
        TrainWorkload(64, SEQ, capacity_factor=1.25),
    )
    rows = []
    for workload in workloads:
        before, ctx = run("mixtral-8x7b", upto="expert", degrees={"dp": 8, "ep": 8})
        ctx = Context(ctx.model, ctx.cluster, workload, ctx.stack, ctx.mesh, ctx.micro_batch_size, ctx.knobs)
        ledger = serve("expert", "folded").apply(before, ctx)
        (product,) = [i for i in ledger.items if i.what == "moe.fc2" and i.phase == "forward"]
        rows.append(float(np.ravel(ledger.axes[product.m])[0]))
    # 1024 tokens · top 2 of 8 experts, from 8 ranks: 2048 rows per expert in the mean.
    assert rows == [2048, 1.5 * 2048, 1.25 * 2048]


def checks(slot, value, model, **degrees):
    _, ctx = run(model, upto=slot, degrees=degrees, **{slot: value})
    return {check.reason for check in serve(slot, value).valid(ctx) if not np.all(check.ok)}


WHOLE_VOCABULARY = "fused linear cross-entropy needs the whole vocabulary on a rank (tp = 1)"


@pytest.mark.parametrize(
    ("slot", "value", "model", "degrees", "reason"),
    [
        ("tensor", "1d", "llama3-8b", {"tp": 3}, "attention heads not divisible by tp"),
        ("tensor", "1d", "falcon-40b", {"tp": 16}, ""),  # 128 heads, 8 KV heads: each is copied to two ranks
        ("tensor", "1d", "gpt2", {"tp": 5}, "feed-forward width not divisible by tp"),
        ("sequence_parallel", "true", "llama3-8b", {"tp": 3}, "sequence length not divisible by tp·cp (sequence parallel)"),
        ("context", "p2p", "llama3-8b", {"cp": 1024}, "sequence length not divisible among cp ranks"),
        ("context", "p2p", "mamba-1.4b", {"cp": 2}, "context parallelism of state-space layers is not modelled"),
        ("context", "a2a", "llama3-8b", {"tp": 8, "cp": 8}, "attention heads not divisible by tp·cp (Ulysses)"),
        ("expert", "folded", "mixtral-8x7b", {"dp": 3, "ep": 3}, "experts not divisible by ep"),
        ("expert", "folded", "mixtral-8x7b", {"tp": 2, "dp": 2}, "experts with tp > 1 need sequence parallelism"),
        ("expert", "folded", "mixtral-8x7b", {"dp": 2, "ep": 4}, "etp·ep does not divide tp·cp·dp"),
        ("expert", "folded", "llama3-8b", {"dp": 2, "ep": 2}, "expert degrees without experts"),
        ("tensor_overlap", "chunked", "llama3-8b", {"tp": 2}, "tensor-parallel overlap needs sequence parallelism"),
        ("precision", "fp8", "gpt2", {"tp": 128}, "feed-forward width per rank not a multiple of 16 (fp8)"),
        ("precision", "nvfp4", "llama3-8b", {}, "h100-sxm has no fp4 matrix rate"),
        ("recompute", "partitioned", "llama3-8b", {}, "partitioned checkpoints need tp > 1 without sequence parallelism"),
        ("loss_kernel", "linear_fused", "llama3-8b", {"tp": 2}, WHOLE_VOCABULARY),
        ("pipeline", "stages", "gpt2", {"pp": 16}, "more pipeline stages than layers"),
        ("pipeline", "scatter_gather", "gpt2", {"pp": 2}, "scattered stage messages need tp > 1 without sequence parallelism"),
        ("zero_group", "ranks", "gpt2", {"dp": 32}, "zero_group=ranks needs zero_group_ranks"),
        ("recompute", "modules", "gpt2", {}, "recompute=modules needs recompute_modules"),
        ("schedule", "interleaved", "gpt2", {"pp": 3, "dp": 32}, "fewer micro-batches than pp (interleaved)"),
    ],
)  # fmt: skip
def test_broken_rules_are_named(slot, value, model, degrees, reason):
    found = checks(slot, value, model, **degrees)
    assert reason in found if reason else not found


def test_inactive_choices_do_nothing():
    """Where a technique calls itself inactive, the plan is one that another choice gives as well."""
    for slot, value in (
        ("context", "a2a"),
        ("context", "all_gather"),
        ("context", "gathered_ring"),
        ("context", "a2a+p2p"),
        ("zero_stage", "1"),
        ("tensor_overlap", "chunked"),
    ):
        before, ctx = run("llama3-8b", upto=slot, **{slot: value})
        technique = serve(slot, value)
        assert not np.any(technique.active(ctx))
        assert amounts(technique.apply(before, ctx)) == amounts(before)


def test_gathers_before_row_wise_products_are_not_cut():
    """pytorch/pytorch#149990: of pairs with one scale per row, only a product and its scatter are found and pipelined."""
    for precision, windows in (("fp8", {"tp_gather", "tp_scatter"}), ("fp8_rowwise", {"tp_scatter"})):
        ledger, _ = run(
            "llama3-8b",
            degrees={"tp": 8},
            sequence_parallel="true",
            tensor_overlap="chunked",
            precision=precision,
        )
        cut = [item for item in collectives(ledger) if item.window.startswith("async.")]
        assert {tag for item in cut for tag in item.tags & {"tp_gather", "tp_scatter"}} == windows


def test_a_gathered_ring_sends_repeated_heads_and_gradients_in_fp32():
    """Llama-3 8B, 32 heads of queries and 8 of keys, on 4 ranks: two gathers of K and V, four sends of their gradients."""
    ledger, ctx = run("llama3-8b", degrees={"cp": 4}, context="gathered_ring", recompute="none")
    whole = 2 * ctx.workload.seq_len * 32 * 128 * float(np.ravel(ctx.micro_batch_size)[0])
    found = {
        (item.phase, item.kind, item.dtype): float(np.ravel(ledger.axes[item.size])[0])
        for item in collectives(ledger) if item.by == "torch_ring"
    }  # fmt: skip
    assert found == {
        ("forward", "all_gather", "bf16"): whole, ("backward", "all_gather", "bf16"): whole,
        ("backward", "point_to_point", "fp32"): whole,
    }  # fmt: skip


@pytest.mark.parametrize(("pp", "dp", "share"), [(2, 8, 0.5), (1, 8, 1.0), (2, 1, 1.0)])
def test_an_embedding_is_summed_once_only_between_both_ends_and_replicas(pp, dp, share):
    """Song et al. 2023 (arXiv:2301.09830), section 6: one sum over 2D ranks in place of one over D and one over 2."""

    def sent(apply: figures.Pass) -> float:
        ledger, _ = figures.run(
            "compression", apply, model="gpt2-xl", pp=pp, dp=dp, zero_stage="0", compression="fused_embedding"
        )
        return figures.sent_bytes(
            ledger, lambda i: i.block in ("embedding", "head") and {"data_parallel", "gradients"} <= i.tags
        )

    fused = next(t for t in MODELLED if "fused_embedding" in t.choices)
    assert sent(fused.apply) == pytest.approx(share * sent(lambda ledger, ctx: ledger))
