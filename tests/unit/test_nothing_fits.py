"""What is said where nothing fits."""

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


def test_one_device_is_singular():
    with pytest.raises(SpecError, match="no mesh of 1 device has tp=2"):
        search(job(tp=2))
