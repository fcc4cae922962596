"""Does the ledger hold what PyTorch holds? Bytes of a small decoder's training step against PyTorch's own memory trackers.

One process runs every case on fake tensors on the first rank of a fake process group (``torch_memory/``); here the same recipe is
applied to the ledger of the same model, and the two are compared exactly: parameters, gradients and optimizer states between
steps, what every operator keeps for the backward, and what is alive when most is while a layer and the loss are at work. A
difference is either one of ``KNOWN`` or a failure.
"""

import importlib.metadata
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from planner.ledger import Resident, Stream
from planner.specs.model import Attention, Block, Mlp, Model
from planner.techniques import figures

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.skipif(
        not importlib.util.find_spec("torch"), reason="torch is not installed (extra: oracle)"
    ),
]

BATCH, SEQ = (
    2,
    1024,
)  # of one data-parallel rank; tokens outnumber every width, so that weights' gradients are small
TOKENS = BATCH * SEQ
LLAMA = {"hidden": 256, "heads": 32, "kv_heads": 8, "head_dim": 8, "ffn": 704, "vocab": 1024, "layers": 3}
GPT = {"hidden": 256, "heads": 16, "kv_heads": 16, "head_dim": 16, "ffn": 1024, "vocab": 1024, "layers": 3}
MODELS = {
    "llama": LLAMA | {"llama": True, "qk_norm": False, "dropout": 0.0},
    "qwen": LLAMA | {"llama": True, "qk_norm": True, "dropout": 0.0},
    "gpt": GPT | {"llama": False, "qk_norm": False, "dropout": 0.0},
    "gpt dropout": GPT | {"llama": False, "qk_norm": False, "dropout": 0.1},
}
BYTES = {"fp32": 4, "bf16": 2}


def case(
    model, *, kernels="fused", dp=1, tp=1, sp=False, fsdp="", recompute="none", precision="bf16"
):  # fmt: skip
    return {
        "model": model, "kernels": kernels, "dp": dp, "tp": tp, "sequence_parallel": sp, "fsdp": fsdp,
        "recompute": recompute, "precision": precision,
    }  # fmt: skip


CASES = {
    "llama": case("llama"),
    "llama fp32": case("llama", precision="fp32"),
    "llama eager": case("llama", kernels="eager"),
    "llama eager fp32": case("llama", kernels="eager", precision="fp32"),
    "qwen": case("qwen"),
    "qwen eager": case("qwen", kernels="eager"),
    "gpt": case("gpt"),
    "gpt dropout": case("gpt dropout"),
    "gpt fp32": case("gpt dropout", precision="fp32"),
    "fsdp2": case("llama", dp=2, fsdp="reshard"),
    "fsdp8 eager": case("llama", kernels="eager", dp=8, fsdp="reshard"),
    "fsdp64": case("gpt dropout", dp=64, fsdp="reshard"),
    "fsdp4 kept": case("llama", dp=4, fsdp="kept"),
    "fsdp32 kept": case("gpt", dp=32, fsdp="kept"),
    "tp2": case("llama", tp=2),
    "tp4": case("gpt dropout", tp=4),
    "tp8 fp32": case("llama", tp=8, precision="fp32"),
    "tp2 sp": case("gpt dropout", tp=2, sp=True),
    "tp4 sp": case("llama", tp=4, sp=True),
    "tp8 sp": case("gpt", tp=8, sp=True),
    "fsdp4 tp2": case("llama", dp=4, tp=2, fsdp="reshard"),
    "fsdp8 tp4 sp": case("llama", dp=8, tp=4, sp=True, fsdp="reshard"),
    "fsdp4 tp8 sp kept": case("gpt dropout", dp=4, tp=8, sp=True, fsdp="kept"),
    "per op": case("llama", recompute="per_op"),
    "fsdp8 per op eager": case("llama", kernels="eager", dp=8, fsdp="reshard", recompute="per_op"),
    "tp4 per op": case("llama", tp=4, recompute="per_op"),
    "tp4 sp per op": case("llama", tp=4, sp=True, recompute="per_op"),
    "recompute": case("llama", recompute="full"),
    "recompute eager": case("llama", kernels="eager", recompute="full"),
    "fsdp8 recompute": case("gpt dropout", dp=8, fsdp="reshard", recompute="full"),
    "tp4 sp recompute": case("llama", tp=4, sp=True, recompute="full"),
    "fsdp2 tp2 recompute": case("llama", dp=2, tp=2, fsdp="reshard", recompute="full"),
}


# -- the closed list of differences: each says what PyTorch holds beyond the ledger, as signed bytes ------------------------


def adam_counts_steps(case):
    """PyTorch's AdamW keeps a 4-byte count of steps for every weight."""
    return Counter({("held", "optimizer"): 4 * sum(count for count, _ in weights(case))})


def no_master_weights(case):
    """A model wholly in bf16 is updated in bf16: two moments of 2 bytes instead of fp32 weights and two fp32 moments."""
    if case["precision"] == "fp32" or case["fsdp"]:
        return Counter()
    return Counter({("held", "optimizer"): (4 - 12) * parameters(case)})


def gradient_of_the_embedding_is_whole(case):
    """DTensor leaves the gradient of a vocabulary-parallel embedding replicated; FSDP2 splits it like every other."""
    if case["fsdp"]:
        return Counter()
    dims, tp = MODELS[case["model"]], case["tp"]
    lacking = dims["vocab"] * dims["hidden"] * (tp - 1) // tp
    return Counter({("held", "gradients"): lacking * BYTES[case["precision"]]})


def norms_keep_statistics(case):
    """1/RMS of each token, or mean and 1/deviation: fp32, but LayerNorm's on CPU of its input's precision.

    Published counts of activations (arXiv:2205.05198 §4.1) leave them out: 4 bytes beside a hidden state of thousands.
    """
    dims = MODELS[case["model"]]
    per_row = 4 if dims["llama"] else 2 * BYTES[case["precision"]]
    layer = 2 * residual_tokens(case) * per_row
    if dims["qk_norm"]:
        layer += TOKENS * (dims["heads"] + dims["kv_heads"]) // case["tp"] * per_row
    final = residual_tokens(case) * per_row
    kept = 0 if case["recompute"] != "none" else dims["layers"]
    return Counter({("saved", "statistics"): kept * layer + final, ("layer", "work"): layer})


def positions_are_integers(case):
    """The embedding of positions keeps its indices, which are cut with the sequence."""
    if MODELS[case["model"]]["llama"] or not case["sequence_parallel"]:
        return Counter()
    return Counter({("saved", "indices"): 8 * SEQ // case["tp"]})


def input_stays_beside_its_copy(case):
    """A recomputed block keeps its input, from which eager RMSNorm makes an fp32 copy; the ledger has the copy in its place."""
    if case["kernels"] != "eager" or case["recompute"] == "none" or case["precision"] == "fp32":
        return Counter()
    hidden = residual_tokens(case) * MODELS[case["model"]]["hidden"]
    return Counter({("layer", "work"): BYTES[case["precision"]] * hidden})


def kept_result_is_used_up(case):
    """Where operators are recomputed one by one, attention's scattered output is freed as soon as the residual has it again."""
    if case["recompute"] != "per_op" or not case["sequence_parallel"]:
        return Counter()
    hidden = residual_tokens(case) * MODELS[case["model"]]["hidden"]
    return Counter({("layer", "work"): -BYTES[case["precision"]] * hidden})


def sharded_loss_has_indices_and_masks(case):
    """Over a sharded vocabulary, a token has 33 bytes of them.

    Three int64, two fp32, one bool (torch/distributed/tensor/parallel/loss.py).
    """
    return Counter({("head", "work"): 33 * TOKENS}) if case["tp"] > 1 else Counter()


def gradients_inside_a_layer(case):
    """The ledger counts the gradient of the activation's input, which has most in one device's fused products (``fused``).

    Elsewhere another moment of the network's backward can have more: the output's gradient gathered along the sequence, and
    copied behind the batch (a recomputed block has nothing else yet); that gradient, or dropout's, beside that of the second
    product's input; two partial gradients of the input of gate and up, which are two products. Dropout's mask is gone by then. Of
    the layer's weights, only the second product's have a gradient yet, which FSDP2 keeps beside the buffer that it reduces.
    """
    dims, tp, width = MODELS[case["model"]], case["tp"], BYTES[case["precision"]]
    hidden, ffn, gathered = dims["hidden"], dims["ffn"] // tp, case["sequence_parallel"]
    dropped = residual_tokens(case) * hidden if dims["dropout"] else 0
    moments = {
        "activation": (2 if dims["llama"] else 1) * ffn * TOKENS,
        "second product": ffn * TOKENS + (hidden * TOKENS if gathered else dropped),
        "gate and up": 2 * (hidden - ffn) * TOKENS if dims["llama"] else 0,
        "gather": 2 * hidden * TOKENS + dropped if gathered and case["recompute"] == "none" else 0,
    }
    most = max(moments, key=moments.get)
    begun = case["fsdp"] and most != "gather"
    return Counter(
        {
            ("layer", "work"): width * (moments[most] - moments["activation"]) - dropped,
            ("layer", "weight_gradients"): width * hidden * ffn if begun else 0,
        }
    )


KNOWN = (
    adam_counts_steps,
    no_master_weights,
    gradient_of_the_embedding_is_whole,
    norms_keep_statistics,
    positions_are_integers,
    input_stays_beside_its_copy,
    kept_result_is_used_up,
    gradients_inside_a_layer,
    sharded_loss_has_indices_and_masks,
)


def residual_tokens(case):
    return TOKENS // (case["tp"] if case["sequence_parallel"] else 1)


def weights(case):
    """All weights of a rank's model, FSDP aside: ``(tensors, elements)`` of each group."""
    dims, tp = MODELS[case["model"]], case["tp"]
    hidden, heads, kv = (
        dims["hidden"],
        *(dims[name] * dims["head_dim"] // tp for name in ("heads", "kv_heads")),
    )
    ffn, vocab = dims["ffn"] // tp, dims["vocab"] // tp
    norm = (1 if dims["llama"] else 2, (1 if dims["llama"] else 2) * hidden)
    layer = [
        norm,
        norm,
        (4, 2 * hidden * (heads + kv)),
        (3, 3 * hidden * ffn) if dims["llama"] else (2, 2 * hidden * ffn),
    ]
    if not dims["llama"]:
        layer += [(4, heads + 2 * kv + hidden), (2, ffn + hidden)]
    if dims["qk_norm"]:
        layer.append((2, 2 * dims["head_dim"]))
    ends = [(2, 2 * vocab * hidden), norm] + ([] if dims["llama"] else [(1, SEQ * hidden)])
    return layer * dims["layers"] + ends


def parameters(case):
    return sum(elements for _, elements in weights(case))


# -- the tests -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("part", ["held", "saved", "layer", "head"])
def test_every_byte(trackers, name, part):
    """Held between steps; saved for the backward; alive when most is, while a layer and while the loss is at work."""
    case = CASES[name]
    expected = Counter(ours(case))
    for difference in KNOWN:
        expected.update(difference(case))
    found = theirs(case, trackers[name])
    assert of(part, found) == of(part, expected)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize(
    ("operator", "name", "what"),
    [
        ("LayerNorm", "gpt", "norm1"),
        ("GELU", "gpt", "mlp.act"),
        ("RMSNorm", "llama eager", "norm1"),
        ("rotation", "llama eager", "attention.rope"),
        ("SwiGLU", "llama eager", "mlp.act"),
        ("loss", "llama eager", "head.cross_entropy"),
    ],
)
def test_traffic_of_an_operator(trackers, operator, name, what, phase):
    """Bytes moved per element of 16 bits, and kernels."""
    (ours,) = ledger_of(CASES[name]).of(Stream, what=what, phase=phase)
    assert [ours.bytes_per_element, ours.launches] == trackers["traffic"][operator][phase]


def of(part, amounts):
    return {key: amount for key, amount in amounts.items() if key[0] == part and amount}


@pytest.mark.parametrize("difference", KNOWN, ids=lambda difference: difference.__name__)
def test_every_known_difference_is_seen(difference):
    assert any(any(difference(case).values()) for case in CASES.values())


# -- PyTorch's side --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trackers():
    """What PyTorch's trackers counted in every case."""
    job = json.dumps({"models": MODELS, "batch": BATCH, "seq": SEQ, "cases": CASES})
    command = [sys.executable, "-m", "torch_memory"]
    here = Path(__file__).parent
    done = subprocess.run(command, input=job, capture_output=True, text=True, check=False, cwd=here)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


POOLS = {
    "Parameter": "parameters", "Sharded Param": "parameters", "Gradient": "gradients", "Sharded Grad": "gradients",
    "Optstate": "optimizer", "OptState": "optimizer",
}  # fmt: skip
ACTIVATIONS = ("Activation", "Temp")
GATHERED = {
    "reshard": ("Unsharded Param", "All Gather", "Reduce Scatter"),
    "kept": ("Reduce Scatter",),
    "": (),
}


def theirs(case, found):
    amounts = Counter()
    for category, *_, n_bytes in found["step"]:
        if category in POOLS:
            amounts["held", POOLS[category]] += n_bytes
    saved = Counter()
    for module, operator, dtype, n_bytes in activations(found["forward"]):
        saved[place(module, operator, dtype, n_bytes)] += n_bytes
    for where, n_bytes in saved.items():
        amounts["saved", where] = n_bytes
    before = sum(
        n_bytes for module, _, dtype, n_bytes in activations(found["forward"])
        if ".layers.0" in module or (".layers" not in module and dtype in ("bool", "int64"))
    )  # fmt: skip
    for part, other in (("layer", before), ("head", saved.total() - saved["logits"])):
        amounts[part, "work"] = sum(n for *_, n in activations(found[part])) - other
        for category, _, operator, _, n_bytes in found[part]:
            if category in GATHERED[case["fsdp"]]:
                amounts[part, "gathered"] += n_bytes
            elif (
                category == "Unsharded Grad" and operator == "mm"
            ):  # of a matrix: vectors are a few hundred bytes
                amounts[part, "weight_gradients"] += n_bytes
    if case["fsdp"] == "kept":
        amounts["saved", "weights"] = sum(
            n for category, *_, n in found["forward"] if category == "Unsharded Param"
        )
    return amounts


def activations(tensors):
    """Module, operator, dtype and bytes of activations and of their gradients, scalars left out."""
    return [tensor for category, *tensor in tensors if category in ACTIVATIONS and tensor[-1] > 16]


def place(module, operator, dtype, n_bytes):
    """Where the ledger has a tensor that PyTorch keeps, by the module and the operator that made it."""
    last = module.rpartition(".")[2]
    if dtype == "int64":
        return "indices"
    if operator == "native_dropout" and dtype == "bool":
        return "dropout"
    if last in ("norm", "norm1", "norm2", "q_norm", "k_norm"):
        if operator in ("linalg_vector_norm", "rsqrt") or (
            operator == "native_layer_norm" and n_bytes <= 8 * TOKENS
        ):
            return "statistics"
        if operator == "_to_copy" and dtype == "float32":  # the input
            return "qkv" if last in ("q_norm", "k_norm") else "residual"
        return "norm"
    if operator == "cat":  # gathered along the sequence
        return "norm"
    if last == "fc2" or (operator == "reduce_scatter_tensor" and ".layers" in module):
        return "result"
    if last in ("q", "k", "v"):
        return "qkv"
    if last == "attention":
        return "core" if operator.startswith("_scaled_dot_product") else "qkv"
    if last in ("fc1", "up"):
        return "act_input"
    if last == "mlp":
        return "act"
    if last == "Global" and operator in ("_log_softmax", "sub"):
        return "logits"
    assert operator in ("add", "embedding", "all_reduce", "reduce_scatter_tensor", "native_dropout"), (
        module,
        operator,
    )
    return "residual"


# -- the ledger's side -----------------------------------------------------------------------------------------------------

OURS = {
    "residual": (
        "norm1.input",
        "norm2.input",
        "final_norm.input",
        "norm1.input_copy",
        "norm2.input_copy",
        "final_norm.input_copy",
    ),
    "norm": ("attention.qkv_input", "mlp.fc1_input", "head.input", "distant_input", "normalised"),
    "qkv": (
        "attention.q",
        "attention.k",
        "attention.v",
        "attention.qk_norm_input",
        "attention.qk_norm.input_copy",
    ),
    "core": ("attention.core_output", "attention.log_sum_exp"),
    "act_input": ("mlp.act_input", "mlp.act_input.gate", "mlp.act_input.up"),
    "result": (".result",),
    "act": ("mlp.fc2_input", "mlp.act.activated_gate"),
    "dropout": ("dropout_mask",),
    "logits": ("head.logits",),
}


def ours(case):
    ledger, amounts = ledger_of(case), Counter()
    n_layers = MODELS[case["model"]]["layers"]
    for item in ledger.of(Resident):
        if item.lifetime == "apart":  # what an allocator keeps, not what is alive
            continue
        n_bytes = float(np.ravel(ledger.axes[item.size])[0]) * item.bytes_per_element
        n_blocks = n_layers if item.block == "layer" else 1
        if item.lifetime == "always":
            # Sharded weights are the fp32 ones; those in use are whole between forward and backward.
            pool = item.pool
            if case["fsdp"]:
                pool = "parameters" if "master_weights" in item.what else pool
                if item.pool == "parameters":
                    amounts["saved", "weights"] += n_blocks * n_bytes
                    continue
            amounts["held", pool] += n_blocks * n_bytes
        if item.lifetime == "micro_batch" or item.what == "head.logits":
            where = next(where for where, ends in OURS.items() if item.what.endswith(ends))
            amounts["saved", where] += n_blocks * n_bytes
        if item.block == "layer" and item.lifetime != "always":
            amounts["layer", "gathered" if item.pool == "gathered" else "work"] += n_bytes
        if item.block == "head" and item.lifetime == "block":
            amounts["head", "gathered" if item.pool == "gathered" else "work"] += n_bytes
    return amounts


def ledger_of(case):
    """The ledger after the passes of the case's recipe."""
    model = MODELS[case["model"]]
    mixed = bool(case["fsdp"])
    ledger, _ = figures.run(
        "schedule", lambda ledger, ctx: ledger, model=model_of(model), seq=SEQ, micro_batch_size=BATCH,
        cluster="a100-sxm-80gb:64x8", dp=case["dp"], tp=case["tp"], precision=case["precision"], attention_kernel="flash",
        gradient_dtype="fp32" if mixed else case["precision"],
        sequence_parallel="gathered" if case["sequence_parallel"] else "false",
        zero_stage={"reshard": "fsdp", "kept": "2", "": "0"}[case["fsdp"]],
        recompute=case["recompute"], elementwise_kernel=case["kernels"], loss_kernel="log_softmax",
    )  # fmt: skip
    return ledger


def model_of(dims):
    biased = not dims["llama"]
    attention = Attention(
        dims["heads"],
        dims["kv_heads"],
        dims["head_dim"],
        qkv_bias=biased,
        out_bias=biased,
        qk_norm=dims["qk_norm"],
    )
    kind = "rmsnorm" if dims["llama"] else "layernorm"
    block = Block(attention=attention, mlp=Mlp(dims["ffn"], gated=dims["llama"], bias=biased), norm=kind)
    return Model(
        name="decoder", family="decoder", arch="decoder", hidden=dims["hidden"], vocab=dims["vocab"], max_seq_len=SEQ,
        blocks={"layer": block}, layers=(("layer", dims["layers"]),), learned_positions=0 if dims["llama"] else SEQ,
        final_norm=kind, dropout=dims["dropout"] > 0, tied_embeddings=False,
    )  # fmt: skip
