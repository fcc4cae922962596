"""Energy of a run and what it emits."""

from __future__ import annotations

from planner.costs.arrays import Real

__all__ = ["average_power_w", "emitted_kg", "energy_j"]


def average_power_w(idle_w: Real, peak_w: Real, utilization: Real) -> Real:
    """Watts of a part that is busy a fraction of the time: ``P_idle + u(P_max − P_idle)``.

    Linear in utilisation: X. Fan, W.-D. Weber, L. A. Barroso, "Power Provisioning for a Warehouse-sized
    Computer", ISCA 2007, section 4. Range: ``0 <= utilization <= 1``.

    >>> average_power_w(100.0, 700.0, 0.5)
    400.0
    """
    return idle_w + utilization * (1.0 * peak_w - idle_w)


def energy_j(power_w: Real, seconds: Real, devices: Real = 1.0, pue: Real = 1.0) -> Real:
    """Joules at the meter: ``P·t·n·PUE``; the power usage effectiveness is the data centre's, at least 1.

    >>> energy_j(400.0, 3600.0, 8, 1.25) / 3.6e6  # 8 * 0.4 kWh * 1.25
    4.0
    """
    return 1.0 * power_w * seconds * devices * pue


def emitted_kg(energy: Real, kg_per_kwh: Real) -> Real:
    """Kilograms of CO₂-equivalent of an energy in joules, at a grid's carbon intensity.

    >>> emitted_kg(3.6e9, 0.4)  # 1 MWh
    400.0
    """
    return energy / 3.6e6 * kg_per_kwh
