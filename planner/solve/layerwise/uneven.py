"""Virtual stages of an interleaved pipeline where layers do not divide: which get one more."""

from __future__ import annotations

from functools import lru_cache

from planner.pipeline.layout import Layout, deal_layers

__all__ = ["uneven_layout"]


@lru_cache(maxsize=1024)
def uneven_layout(
    order: tuple[str, ...], kinds: tuple[str, ...], pp: int, virtual_stages: int
) -> Layout | None:
    """Virtual stages that are equal but for one layer; the longer ones on devices in the middle, from the last chunk on."""
    small, longer = divmod(len(order), pp * virtual_stages)
    if not small:
        return None
    sizes = [small] * (pp * virtual_stages)
    for stage in _middle_first(pp, virtual_stages)[:longer]:
        sizes[stage] += 1
    return deal_layers(order, kinds, pp, virtual_stages, sizes)


def _middle_first(pp: int, virtual_stages: int) -> list[int]:
    """Virtual stages by chunk from the last, and by their device's distance from the middle of the pipeline."""
    devices = sorted(range(pp), key=lambda device: (abs(2 * device - (pp - 1)), device))
    return [chunk * pp + device for chunk in reversed(range(virtual_stages)) for device in devices]
