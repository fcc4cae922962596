"""Does every wrong input end in one clear message, the right exit code, and never in a traceback?"""

import json
import os

import pytest

from planner.errors import SolverError
from tests.cli.conftest import SMALL

MODEL, CLUSTER, BATCH, LENGTH = (SMALL[i : i + 2] for i in (0, 2, 4, 6))
JOB_VERBS = ("train", "estimate", "explain")
HUGE = "1" + "0" * 40

NUMBERS = ("0", "-1", "nan", "inf", "-inf", "1.5", "ten", "", " ", "1e3", HUGE, "9" * 5000)
BAD_OPTIONS = {
    "--global-batch": NUMBERS,
    "--seq-len": NUMBERS,
    "--encoder-seq-len": NUMBERS,
    "--document-len": NUMBERS,
    "--expert-load-factor": ("0", "0.5", "-1", "nan", "inf", "x", "", "1e9"),
    "--capacity-factor": ("0", "-1", "nan", "inf", "x", ""),
    "--tokens": ("0", "-1", "nan", "inf", "15X", "", "1e30"),
    "--usd-per-hour": ("0", "-2", "nan", "inf", "x", ""),
    "--reserve": ("100%", "-1%", "200GiB", "5", "nan", "x%", "", "4 lightyears"),
    "--max-oom-risk": ("0", "-1%", "101%", "nan", "x", ""),
    "--precision": ("", ",", "fp7", "bf16,fp7"),
    "--optimizer": ("adm", ""),
    "--objective": ("speed", ""),
    "--model": ("", "no-such-model", "missing.toml", "missing.json", "\x00"),
    "--cluster": ("", "h100", "h100:0x8", "h100:8", "nope:1x8", "h100:1x9", "h100:99999999x8", "missing.toml", "h100:1x-8"),
    "--stack": ("nope", "missing.toml"),
    "--for": ("slurmy", ""),
    "--fix": ("tp", "tp=", "=8", "tp=0", "tp=-1", "tp=nan", "tp=1.5", f"tp={HUGE}", "nope=1", "tp=3", "zero_stage=9",
              "gradient_dtype=fp7", "recompute=modules", "zero_group=ranks", "parameter_offload=window", "loss_kernel=masked"),
    "--forbid": ("", "nothing_like_this", "tpp=8"),
}  # fmt: skip


def assert_refused(found, *codes):
    assert found.code in (codes or (2,)), found
    assert found.faults
    assert all(fault["where"] and fault["found"] for fault in found.faults)
    assert found.err == ""


@pytest.mark.parametrize(
    ("flag", "value"), [(f, v) for f, values in BAD_OPTIONS.items() for v in values], ids=lambda x: x[:20]
)
def test_bad_value_of_an_option(planner, flag, value):
    job = [part for option in (MODEL, CLUSTER, BATCH, LENGTH) if option[0] != flag for part in option]
    verb = "train" if flag in ("--forbid", "--for") else "estimate"
    assert_refused(planner(verb, *job, f"{flag}={value}", "--json"))


def test_a_detail_that_suits_no_mesh_is_one_message(planner):
    fixed = ("--fix", "zero_group=ranks", "--fix", "zero_group_ranks=3")  # of two replicas
    found = planner("train", *SMALL, *fixed, "--json")
    assert_refused(found, 3)
    assert "does not suit the degrees" in found.faults[0]["found"]


@pytest.mark.parametrize("top", ["0", "-1", "nan", "1.5", "x", "", HUGE])
def test_bad_number_of_plans(planner, top):
    found = planner("train", *SMALL, f"--top={top}", "--json")
    assert_refused(found)
    assert found.faults[0]["where"] == "--top"


@pytest.mark.parametrize("deadline", ["0", "0d", "-1d", "nan", "soon", "", "1e400d"])
def test_bad_deadline(planner, deadline):
    assert_refused(planner("train", *SMALL, "--tokens", "1B", f"--deadline={deadline}", "--json"))


def test_deadline_needs_tokens_and_a_cluster_of_sizes(planner, tmp_path):
    assert_refused(planner("train", *SMALL, "--deadline", "1d", "--json"))
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\n[[group]]\ndevice = "a100"\nnodes = 2\ndevices_per_node = 8\n')
    job = [*MODEL, *BATCH, *LENGTH, "--tokens", "1B", "--deadline", "1d", "--json"]
    assert_refused(planner("train", "--cluster", path, *job))
    assert_refused(planner("train", "--cluster", "a100:1x8+h100:1x8", *job))


@pytest.mark.parametrize("verb", JOB_VERBS)
def test_everything_that_is_wrong_is_said_at_once(planner, verb):
    found = planner(
        verb, "--model", "gpt9", "--cluster", "h1000:1x8", "--global-batch", "0", "--seq-len", "x", "--tokens", "many",
        "--optimizer", "adm", "--objective", "speed", "--fix", "tp", "--usd-per-hour", "nan", "--precision", "fp7", "--json",
    )  # fmt: skip
    assert_refused(found)
    assert len(found.faults) >= 10


@pytest.mark.parametrize("verb", JOB_VERBS)
def test_missing_options_are_named(planner, verb):
    found = planner(verb, "--model", "gpt2", "--json")
    assert_refused(found)
    assert {fault["where"] for fault in found.faults} == {"--cluster", "--global-batch", "--seq-len"}


def test_same_message_for_people(planner):
    found = planner("train", *MODEL, *CLUSTER, *LENGTH, "--global-batch", "0")
    assert (found.code, found.out) == (2, "")
    assert found.err == "error: --global-batch: 0; expected a whole number from 1 to 10,000,000\n"


BROKEN = {
    "empty.json": "", "list.json": "[]", "number.json": "3", "null.json": "null", "cut.json": '{"plans": [',
    "binary.json": b"\xff\xfe\x00", "deep.json": "[" * 100_000, "other.json": '{"plans": {}}',
    "none.json": '{"plans": []}', "wrong.json": '{"plans": [3]}',
    "future.json": '{"schema_version": "2.0"}', "bare.json": '{"schema_version": "1.0"}',
    "nan.json": '{"schema_version": "1.0", "mesh": NaN}', "table.toml": "a = 1", "cut.toml": "[", "binary.toml": b"\xff\xfe\x00",
}  # fmt: skip
READERS = {
    "explain": ("explain", "{}"),
    "compare": ("compare", "{}", "{}"),
    "export": ("export", "{}", "--to", "megatron"),
    "estimate --model": ("estimate", *CLUSTER, *BATCH, *LENGTH, "--model", "{}"),
    "estimate --cluster": ("estimate", *MODEL, *BATCH, *LENGTH, "--cluster", "{}.toml"),
    "estimate --stack": ("estimate", *SMALL, "--stack", "{}.toml"),
    "estimate --from-megatron": ("estimate", *CLUSTER, "--from-megatron", "{}"),
    "hardware show": ("hardware", "show", "{}"),
    "hardware check": ("hardware", "check", "{}"),
    "models show": ("models", "show", "{}"),
    "models import": ("models", "import", "{}"),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", [*BROKEN, "missing.json", "folder"])
def test_bad_file(planner, tmp_path, reader, name):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif name in BROKEN:
        content = BROKEN[name]
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert_refused(planner(*(part.format(path) for part in READERS[reader]), "--json"))


MUTATIONS = {
    "no mesh": lambda p: p.pop("mesh"),
    "mesh of text": lambda p: p["mesh"].update(tp="two"),
    "mesh of zero": lambda p: p["mesh"].update(tp=0),
    "mesh of another size": lambda p: p["mesh"].update(dp=3),
    "mesh of a list": lambda p: p.update(mesh=[1, 2]),
    "no knobs": lambda p: p.update(knobs={}),
    "unknown knob": lambda p: p["knobs"].update(warp_drive="on"),
    "unknown value": lambda p: p["knobs"].update(recompute="everything"),
    "unknown model": lambda p: p.update(model="gpt9"),
    "model of a number": lambda p: p.update(model=3),
    "unknown cluster": lambda p: p.update(cluster="h1000:1x8"),
    "cluster of null": lambda p: p.update(cluster=None),
    "unknown stack": lambda p: p.update(stack="nope"),
    "no workload": lambda p: p.update(workload={}),
    "workload of text": lambda p: p["workload"].update(global_batch_size="many"),
    "workload of zero": lambda p: p["workload"].update(seq_len=0),
    "formats of a number": lambda p: p["workload"].update(precisions=3),
    "no estimate": lambda p: p.pop("estimate"),
    "estimate of null": lambda p: p["estimate"].update(step_time_s=None),
    "memory of text": lambda p: p["estimate"].update(memory_bytes="much"),
    "no memory": lambda p: p["estimate"].update(memory_bytes={}),
    "budget of text": lambda p: p["estimate"].update(memory_budget_bytes="much"),
    "stages of a number": lambda p: p.update(stages=3),
}  # fmt: skip


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_plan_that_was_tampered_with(planner, plans, tmp_path, mutation):
    """Explaining prices a plan again and refuses what cannot be; comparing may still serve what it can read."""
    content = json.loads(plans.read_text())
    MUTATIONS[mutation](content["plans"][0])
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(content))
    assert_refused(planner("explain", f"{path}:1", "--json"))
    assert planner("compare", f"{path}:1", f"{path}:2", "--json").code in (0, 2)
    assert planner("export", f"{path}:1", "--to", "torchrun", "--json").code in (0, 2, 5)


@pytest.mark.parametrize("which", ["0", "99", "nope", "-1", "", "1.5"])
def test_plan_that_is_not_in_the_file(planner, plans, which):
    assert_refused(planner("explain", f"{plans}:{which}", "--json"))


@pytest.mark.parametrize("reference", ["", ":", ":1", "\x00", "x" * 5000])
def test_bad_reference_to_a_plan(planner, reference):
    assert_refused(planner("explain", reference, "--json"))


def test_explain_wants_a_plan_or_a_job_and_not_both(planner, plans):
    assert_refused(planner("explain", "--json"))
    assert_refused(planner("explain", f"{plans}:1", *SMALL, "--json"))


def test_one_plan_runs_on_one_cluster(planner):
    assert_refused(planner("estimate", *SMALL, "--cluster", "h100:1x8", "--json"))


WRITERS = {
    "train": ("train", *SMALL, "-o"),
    "estimate": ("estimate", *SMALL, "-o"),
    "models import": ("models", "import", "tests/data/hf_configs/openai--gpt-oss-20b.json", "-o"),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "place", ["{tmp}/no/such/folder/out.toml", "{tmp}", "/dev/null", "/proc/out.toml", "", "\x00.toml"]
)
def test_output_that_cannot_be_written(planner, tmp_path, request, monkeypatch, writer, place):
    monkeypatch.chdir(request.config.rootpath)
    path = place.format(tmp=tmp_path)
    assert_refused(planner(*WRITERS[writer], path, "--json"))
    assert list(tmp_path.iterdir()) == []
    assert not os.path.isfile("/dev/null")


def test_unwritable_output_is_refused_before_the_search(planner, tmp_path, monkeypatch):
    monkeypatch.setattr("planner.solve.fleet.search_strictly", lambda *_: pytest.fail("searched"))
    assert_refused(planner("train", *SMALL, "-o", tmp_path, "--json"))


def test_failed_search_leaves_the_old_file_alone(planner, tmp_path):
    path = tmp_path / "plans.json"
    path.write_text("old")
    assert (
        planner(
            "train",
            *MODEL,
            "--cluster",
            "a100:1x4",
            "--global-batch",
            "7",
            *LENGTH,
            "--fix",
            "dp=4",
            "-o",
            path,
        ).code
        != 0
    )
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["plans.json"]


def test_exports_go_to_a_folder(planner, plans, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert_refused(planner("export", f"{plans}:1", "--to", "torchrun", "-o", blocked, "--json"))
    assert_refused(planner("export", f"{plans}:1", "--to", "nothing", "--json"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--nope"],
        ["train", "--nope"],
        ["nope"],
        ["compare", "a"],
        ["export", "a"],
        ["hardware", "nope"],
        ["models", "show"],
    ],
)
def test_usage_errors(planner, arguments):
    assert_refused(planner(*arguments, "--json"))
    found = planner(*arguments)
    assert (found.code, found.out) == (2, "")
    assert found.err.startswith("error: arguments:")


@pytest.mark.parametrize("group", [(), ("hardware",), ("models",)])
def test_no_command_is_answered_with_those_there_are(planner, group):
    found = planner(*group)
    assert (found.code, found.err) == (2, "")
    assert found.out.startswith(" ".join(["Usage: planner", *group, ""]))
    assert "Commands:" in found.out


def test_usage_error_leads_to_the_help_of_its_command(planner):
    assert planner("compare", "a").err.endswith("See planner compare --help.\n")
    assert planner("nope").err.endswith("See planner --help.\n")


def test_unknown_hardware_is_told_what_is_like_it(planner):
    found = planner("hardware", "show", "h10", "--json")
    assert_refused(found)
    assert "h100" in found.faults[0]["try"]


def test_job_that_nothing_can_hold(planner):
    """405e9 parameters with their gradients and optimizer states do not go into one device of 80 GB and its host's memory."""
    job = ("--model", "llama3.1-405b", "--cluster", "h100:1x1", "--global-batch", "1", "--seq-len", "8192")
    found = planner("train", *job, "--json")
    assert found.code == 3
    assert found.json["error"]["kind"] == "infeasible"
    assert "memory" in found.faults[0]["found"]


def test_solver_failure_has_its_own_code(planner, monkeypatch):
    from planner.errors import Problem

    def fail(*_):
        raise SolverError(Problem("HiGHS", "time limit"))

    monkeypatch.setattr("planner.solve.fleet.search_strictly", fail)
    found = planner("train", *SMALL, "--json")
    assert (found.code, found.json["error"]["kind"]) == (4, "solver")


def test_our_bugs_are_short_and_honest(planner, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr("planner.solve.fleet.search_strictly", fail)
    found = planner("train", *SMALL, "--json")
    assert (found.code, found.json["error"]["kind"]) == (70, "internal")
    assert "PLANNER_TRACEBACK=1" in found.err
    monkeypatch.setenv("PLANNER_TRACEBACK", "1")
    with pytest.raises(ZeroDivisionError):
        __import__("planner.cli").cli.main(["train", *SMALL])


@pytest.mark.parametrize(
    ("where", "arguments"),
    [
        ("planner.specs.models.list_models", ("models", "list")),
        ("planner.specs.models.load_model", ("train", *SMALL)),
        ("planner.cli.app.command", ("techniques",)),
    ],
)
def test_interruption_is_said_wherever_it_comes(planner, monkeypatch, where, arguments):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, press)
    found = planner(*arguments)
    assert (found.code, found.out) == (130, "")
    assert found.err.startswith("interrupted")


def test_no_number_makes_json_invalid(planner):
    """The smallest job: one sequence of one token on one device."""
    found = planner(
        "train", *MODEL, "--cluster", "a100:1x1", "--global-batch", "1", "--seq-len", "1", "--json"
    )
    assert found.code == 0
    assert found.json["plans"]
