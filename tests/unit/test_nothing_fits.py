"""What is said where nothing fits."""

from dataclasses import replace

import pytest

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search
from planner.errors import Infeasible, SpecError
from planner.solve.named import estimate

# 8.03e9 parameters: 16 bytes of states each are 128e9, their weights alone 16e9 (Llama 3, config.json).
ONE_DEVICE = {"optimizer_offload": "none", "parameter_offload": "none"}


def job(cluster="h100-sxm:1x1", **fixed):
    return Problem(
        load_model("llama3-8b"), load_cluster(cluster), TrainWorkload(8, 2048), load_stack(), fixed={**ONE_DEVICE, **fixed}
    )  # fmt: skip


def test_adapters_are_named_where_they_would_fit():
    with pytest.raises(Infeasible, match=r"--fix adaptation=lora.* would need \d+\.\d GiB"):
        search(job())
    assert estimate(job(adaptation="lora", recompute="full")).estimate.fits


def test_adapters_are_not_named_where_they_would_not_help():
    """On 24 GB, four times the sequence: the frozen weights and the activations of one layer are more than that."""
    with pytest.raises(Infeasible) as caught:
        search(Problem(
            load_model("llama3-70b"), load_cluster("h100-sxm:1x1"), TrainWorkload(8, 2048), load_stack(), fixed=ONE_DEVICE
        ))  # fmt: skip
    assert "adaptation" not in str(caught.value)


def test_narrower_gradients_are_named_where_they_would_fit():
    """13e9 parameters on 32 GB: gradients of fp32 alone are 52e9 bytes; of fp16 26e9, all else on the host."""
    one = Problem(
        load_model("gpt3-13b"), load_cluster("examples/one_v100.toml"), TrainWorkload(64, 1024, precisions=("fp16",)),
        load_stack(),
    )  # fmt: skip
    with pytest.raises(Infeasible, match=r"--fix gradient_dtype=fp16, .* would need 2\d\.\d GiB there"):
        search(one)
    assert search(replace(one, fixed={"gradient_dtype": "fp16"}), top=1).best.estimate.fits
    with pytest.raises(Infeasible) as caught:
        search(replace(one, fixed={"optimizer_offload": "none"}))
    assert "gradient_dtype" not in str(caught.value)


def test_one_device_is_singular():
    with pytest.raises(SpecError, match="no mesh of 1 device has tp=2"):
        search(job(tp=2))
