"""Configurations of launchers from the command line: priced, checked, written, and refused with one clear message."""

import json
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "launchers"
JOB = ("--model", "llama3.1-8b", "--cluster", "h100-sxm:4x8", "--seq-len", "8192")
SMALL = ("--model", "gpt2", "--cluster", "a100-sxm-80gb:1x2", "--global-batch", "16", "--seq-len", "1024")


@pytest.fixture
def plans(planner, tmp_path):
    path = tmp_path / "plans.json"
    choices = ("zero_stage=2", "elementwise_kernel=eager", "loss_kernel=log_softmax", "micro_batch_size=8")
    done = planner(
        "estimate", *SMALL, *(word for choice in choices for word in ("--fix", choice)), "-o", path
    )
    assert done.code == 0
    return path


def test_check_prices_what_the_best_plan_gains(planner):
    found = planner("check", "--from", "deepspeed", EXAMPLES / "zero3_offload.json", *JOB)
    assert (found.code, found.err) == (0, "")
    text = " ".join(found.out.split())
    assert "0 wrong, 1 wasteful" in text
    assert "offload_optimizer without pin_memory" in text
    assert "optimizer offload cpu+gradients → none" in text


def test_check_as_json_adds_up(planner):
    found = json.loads(
        planner("check", "--from", "deepspeed", EXAMPLES / "zero3_offload.json", *JOB, "--json").out
    )
    gained = sum(step["before_s"] - step["after_s"] for step in found["steps"])
    step_s = [found[name]["estimate"]["step_time_s"] for name in ("plan", "best")]
    assert gained == pytest.approx(step_s[0] - step_s[1])


def test_stages_that_differ_are_checked_explained_drawn_and_written(planner, tmp_path):
    """torchtitan's own stages of Llama 3 70B on four devices, of 20, 21, 20 and 19 layers; Megatron-LM is told the same ones."""
    launch, path = tmp_path / "run.sh", tmp_path / "plans.json"
    launch.write_text(
        "torchrun --nproc_per_node=8 --nnodes=4 -m torchtitan.train --module llama3 --config llama3_70b "
        "--parallelism.pipeline_parallel_degree 4 --training.local_batch_size 16\n"
    )
    given = ("--from", "torchtitan", launch, "--cluster", "h100-sxm:4x8")
    assert planner("estimate", *given, "-o", path).code == 0
    checked = planner("check", *given)
    assert "0 wrong" in checked.out
    assert "20+21+20+19" in checked.out
    assert planner("explain", path).code == 0
    assert planner("trace", path, "-o", tmp_path / "step.json").code == 0
    fix = (
        "--fix",
        "pp=4",
        "--fix",
        "tp=8",
        "--fix",
        "pipeline_layout=20+21+20+19",
        "-o",
        tmp_path / "own.json",
    )
    assert planner("estimate", "--model", "llama3.1-70b", *JOB[2:], "--global-batch", "16", *fix).code == 0
    assert planner("export", tmp_path / "own.json", "--to", "megatron", "-o", tmp_path / "run").code == 0
    assert "Et*20|t*21|t*20|t*19L" in (tmp_path / "run" / "run.sh").read_text()


def test_check_exits_1_where_something_is_wrong(planner, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(
        '{"train_batch_size": 256, "train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1}'
    )
    found = planner("check", "--from", "deepspeed", path, *JOB)
    assert found.code == 1
    assert "does not fit" in found.out


def test_what_a_file_leaves_open_is_asked_for(planner, tmp_path):
    path = tmp_path / "ds.json"
    path.write_text('{"train_batch_size": 256, "train_micro_batch_size_per_gpu": "auto"}')
    found = planner("estimate", "--from", "deepspeed", path, *JOB)
    assert found.code == 2
    assert (
        "micro_batch_size: train_micro_batch_size_per_gpu is auto; expected --fix micro_batch_size=N"
        in found.err
    )


def test_another_number_of_devices_is_refused(planner):
    found = planner(
        "estimate", "--from", "deepspeed", EXAMPLES / "zero3_offload.json", *JOB[:3], "h100-sxm:2x8", *JOB[4:]
    )
    assert found.code == 2
    assert "16 devices; expected 32" in found.err


def test_an_unknown_reader(planner):
    found = planner("check", "--from", "deepsped", "x.json", *JOB)
    assert found.code == 2
    assert "Did you mean deepspeed?" in found.err


def test_a_folder_is_written_whole(planner, plans, tmp_path):
    out = tmp_path / "run"
    found = planner("export", f"{plans}:1", "--to", "accelerate", "--with", "slurm", "-o", out)
    assert (found.code, found.err) == (0, "")
    assert {path.name for path in out.iterdir()} == {
        "README.md", "accelerate.yaml", "config.json", "job.sbatch", "measure.py", "plan.json", "run.sh", "train.py",
    }  # fmt: skip
    assert (out / "run.sh").stat().st_mode & 0o100
    assert not list(tmp_path.glob(".run*"))


def test_nothing_is_left_where_a_file_cannot_be_placed(planner, plans, tmp_path):
    (tmp_path / "run" / "run.sh").mkdir(parents=True)
    found = planner("export", f"{plans}:1", "--to", "accelerate", "-o", tmp_path / "run")
    assert found.code == 2
    assert "run.sh is a folder" in found.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.sh"]
    assert not list(tmp_path.glob(".run*"))


def test_a_refusal_names_the_closest_plan(planner, plans):
    found = planner("export", f"{plans}:1", "--to", "megatron")
    assert found.code == 5
    assert "Closest plan that it can run: elementwise_kernel eager → fused" in found.err


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--to", "megatorn"), "Did you mean megatron"),
        (("--to", "accelerate", "--with", "slrum"), "Did you mean slurm?"),
        (("--to", "accelerate", "--launcher-version", "0.9"), "expected 1.15"),
    ],
)
def test_mistakes_in_options(planner, plans, options, why):
    found = planner("export", f"{plans}:1", *options)
    assert found.code == 2
    assert why in found.err


def test_a_machine_describes_itself(planner, tmp_path):
    out = tmp_path / "mine.toml"
    report = EXAMPLES / "topology.txt"
    found = planner(
        "hardware", "import", report, "--device", "h100-sxm", "--nodelist", "gpu[001-016]", "-o", out
    )
    assert (found.code, found.err) == (0, "")
    # Five adapters, one of which shares no switch with a GPU.
    assert "4 adapters per node" in found.out
    assert "Adapters that share no PCIe switch with a GPU: 1" in found.out
    assert "128 devices" in planner("hardware", "show", out).out


def test_detect_asks_what_is_there(planner, tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    topology = EXAMPLES / "topology.txt"
    table = "name, memory.total [MiB], power.limit [W]\n" + "NVIDIA H100 80GB HBM3, 81559 MiB, 700.00 W\n" * 8
    (tmp_path / "gpus").write_text(table)
    tool.write_text(f'#!/bin/sh\ncase "$1" in topo) cat {topology};; *) cat {tmp_path}/gpus;; esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "gpu[01-04]")
    found = planner("hardware", "detect", "--json")
    assert found.code == 0
    assert "nodes = 4\ndevices_per_node = 8" in found.json["cluster"]
    assert any("ibstat did not answer" in sentence for sentence in found.json["assumed"])


def test_detect_says_what_is_missing_without_a_driver(planner, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    found = planner("hardware", "detect")
    assert found.code == 2
    assert "nvidia-smi: cannot be asked" in found.err


def test_headers_of_weights_are_held_against_the_model(planner, tmp_path):
    from planner.export.hf_model import hf_model
    from planner.specs.models import load_model

    (tmp_path / "config.json").write_text(json.dumps(hf_model(load_model("gpt2")).config))
    header = json.dumps({"w": {"dtype": "F32", "shape": [124_439_808], "data_offsets": [0, 0]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    found = planner("models", "import", tmp_path)
    assert found.code == 0
    # GPT-2 small has 124,439,808 parameters (Hugging Face's gpt2, without the tied head).
    assert "as many as the model has" in " ".join(found.out.split())


def headers(path, **tensors):
    """A safetensors file of BF16 tensors without their bytes (safetensors, docs/source/metadata_parsing)."""
    entries = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": [0, 0]} for name, shape in tensors.items()
    }
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


def test_weights_that_are_there_in_part_or_twice(planner, tmp_path):
    """Hugging Face's folders: an index beside pointers of Git LFS, the same weights under two names, no config at all."""
    from planner.export.hf_model import hf_model
    from planner.specs.models import load_model

    index = {
        "metadata": {"total_size": 248_879_616},
        "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"},
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    alone = planner("models", "import", tmp_path)
    assert alone.code == 2
    assert "no such file, beside 2 tensors of 248,879,616 bytes" in alone.err
    assert "download the config.json" in alone.err

    (tmp_path / "config.json").write_text(json.dumps(hf_model(load_model("gpt2")).config))
    for name in ("model-1.safetensors", "model-2.safetensors"):
        (tmp_path / name).write_text(
            "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 124439808\n"
        )
    # 124,439,808 parameters of 2 bytes.
    assert "2 for each of the model's parameters" in " ".join(
        planner("models", "import", tmp_path).out.split()
    )

    (tmp_path / "model.safetensors.index.json").unlink()
    found = planner("models", "import", tmp_path)
    assert (found.code, "is a pointer of Git LFS" in found.err) == (2, True)
    for name in ("model-1.safetensors", "model-2.safetensors", "consolidated.safetensors"):
        headers(tmp_path / name, w=[62_219_904])
    assert "in 2 files: 124,439,808 BF16; as many as the model has" in " ".join(
        planner("models", "import", tmp_path).out.split()
    )


@pytest.mark.parametrize(
    "arguments", [("estimate", "--from", "deepspeed", "/dev/zero", *JOB), ("hardware", "import", "/dev/zero")]
)
def test_a_file_without_an_end_is_one_message(planner, arguments):
    found = planner(*arguments)
    assert (found.code, found.err.count("error: ")) == (2, 1)
    assert "/dev/zero: holds 1,048,577 bytes" in found.err


def test_what_does_not_fit_is_never_as_fast_as_the_best(planner, tmp_path):
    """8.03e9 parameters with bf16 weights and gradients, fp32 copies and Adam's two moments: 128 GB on every device of 80."""
    file = {
        "train_batch_size": 64,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 8,
        "bf16": {"enabled": True},
    }
    (tmp_path / "ds.json").write_text(json.dumps(file))
    job = ("--model", "llama3.1-8b", "--cluster", "h100-sxm:1x8", "--seq-len", "2048")
    for verb in ("check", "estimate"):
        said = " ".join(planner(verb, "--from", "deepspeed", tmp_path / "ds.json", *job).out.split())
        assert "as fast as the best" not in said
        assert (
            "The best plan that fits takes" in said or "and it fits. Plan 2 is yours, which does not." in said
        )


def test_the_batch_follows_from_the_devices(planner, tmp_path):
    """Transformers: per_device_train_batch_size · gradient_accumulation_steps on every device (2 · 4 · 8)."""
    (tmp_path / "sft.yaml").write_text(
        "bf16: true\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 4\nmax_seq_length: 512\nfsdp: true\n"
        "fsdp_config:\n  version: 2\n"
    )
    found = planner(
        "estimate",
        "--from",
        "transformers",
        tmp_path / "sft.yaml",
        "--model",
        "gpt2",
        "--cluster",
        "a100-sxm-80gb:1x8",
        "--json",
    )
    assert found.code == 0
    assert found.json["plans"][0]["workload"]["global_batch_size"] == 64
