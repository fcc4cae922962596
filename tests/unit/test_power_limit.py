"""How a generation's rates carry to parts with another power limit."""

import pytest

from planner.specs.device_file import load_device
from planner.specs.power_limit import with_power_limit


def fraction(name, constant="matmul"):
    return float(getattr(load_device(name).efficiency, constant))


def test_the_measured_part_keeps_its_own_fractions():
    device = load_device("h100-sxm")
    # 700 W over 989.4 TFLOP/s
    assert with_power_limit(device, 700 / 989.4e12, 0.55) == device
    assert device.efficiency.matmul.kind == "fitted"


def test_half_the_energy_slows_products_and_attention():
    device = load_device("h100-sxm")
    slower = with_power_limit(device, 2 * 700 / 989.4e12, 0.55).efficiency
    assert float(slower.matmul) == pytest.approx(float(device.efficiency.matmul) * 0.5**0.55)
    assert float(slower.attention) == pytest.approx(float(device.efficiency.attention) * 0.5**0.55)
    assert slower.matmul.kind == "assumed"
    # what a chip that is not throttled reaches does not depend on its limit
    assert float(slower.matmul) * float(slower.matmul_burst) == pytest.approx(
        float(device.efficiency.matmul) * float(device.efficiency.matmul_burst)
    )


def test_no_limit_makes_a_chip_faster_than_unthrottled():
    device = load_device("h100-sxm")
    faster = with_power_limit(device, 1e-15, 0.55).efficiency
    assert float(faster.matmul) == pytest.approx(
        float(device.efficiency.matmul) * float(device.efficiency.matmul_burst)
    )
    assert float(faster.matmul_burst) == pytest.approx(1.0)
    assert faster.attention == device.efficiency.attention


def test_a_format_pays_for_its_own_peak():
    # GB300 multiplies fp4 at six times its 16-bit rate, B200 at four times, and both at a quarter of the energy.
    assert fraction("gb300-nvl72") > fraction("b200-sxm")
    assert fraction("gb300-nvl72", "matmul_4bit") < fraction("b200-sxm", "matmul_4bit")


def test_what_a_file_states_itself_stays():
    device = load_device("h100-sxm")
    kept = with_power_limit(device, 2 * 700 / 989.4e12, 0.55, {"matmul", "matmul_burst"}).efficiency
    assert (kept.matmul, kept.matmul_burst) == (device.efficiency.matmul, device.efficiency.matmul_burst)
    assert float(kept.matmul_8bit) < float(device.efficiency.matmul_8bit)
    assert fraction("rtx-4090") == 0.92  # Ada's reach at half-rate accumulation: its file says so


def test_parts_of_one_generation_differ_by_their_limits():
    # Megatron-Bridge's Llama 3 8B in FP8: 1.22 times as fast on a GB300 as on a B200 (performance summary, 2026)
    products = [
        fraction(name, "matmul_8bit") * float(load_device(name).peak_flop_per_s["fp8"])
        for name in ("b200-sxm", "gb300-nvl72")
    ]
    assert 1.15 < products[1] / products[0] < 1.35
    # torchtitan's custom H100 draws 500 W
    assert fraction("h100-hbm2e-96gb") / fraction("h100-sxm") == pytest.approx((500 / 700) ** 0.55, rel=1e-2)
