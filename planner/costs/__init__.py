"""Closed forms of training and serving cost, each with its equation, units, range, source and an example.

Every function is pure, needs numpy alone, and broadcasts: the same call prices one plan or a million. Numbers
in give a float out, arrays in give an array. Units are SI base units and end the names; FLOP count 2 per
multiply–add; collective bytes are bytes sent per rank; bandwidth is per direction.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.costs.alignment import alignment_efficiency
    from planner.costs.attention import (
        all_gather_attention_elements,
        contiguous_imbalance,
        ring_attention_elements,
        ring_attention_s,
        ring_overlap_tokens,
        ulysses_elements,
        usp_elements,
    )
    from planner.costs.attention_kernel import (
        FLASH_BACKWARD_PASSES,
        attention_bytes,
        attention_flop,
        attention_s,
        causal_fraction,
    )
    from planner.costs.block_schedule import (
        BLOCK_PLACES,
        BlockLinks,
        BlockWork,
        block_layer_s,
        block_tokens_per_s,
    )
    from planner.costs.collectives import (
        CUSTOM_ALL_REDUCE,
        CUSTOM_ALL_REDUCE_BYTES,
        Level,
        MessageCost,
        Transport,
        all_gather_bytes,
        all_gather_s,
        all_reduce_bytes,
        all_reduce_s,
        all_to_all_bytes,
        all_to_all_s,
        broadcast_bytes,
        broadcast_s,
        collective_costs,
        custom_all_reduce_s,
        fastest_s,
        group_members,
        point_to_point_s,
        reduce_scatter_bytes,
        reduce_scatter_s,
    )
    from planner.costs.compute import (
        cool_compute_s,
        matmul_bytes,
        matmul_flop,
        matmul_s,
        matmul_waves,
        memory_bound_s,
        product_s,
        roofline_s,
        uncached_bytes,
    )
    from planner.costs.economics import device_hours, phases_run_s, rental_usd, tokens_run_s, usd_per_token
    from planner.costs.energy import average_power_w, emitted_kg, energy_j
    from planner.costs.expert_exchange import expert_exchange_s
    from planner.costs.flop import (
        dense_training_flop,
        gpt_iteration_flop,
        gpt_parameters,
        model_flop_utilization,
        training_s,
    )
    from planner.costs.kv_cache import (
        block_waste_tokens,
        iteration_activation_bytes,
        mean_held_tokens,
        overflow_probability,
    )
    from planner.costs.memory import (
        activation_bytes,
        checkpoint_bytes,
        checkpoint_segments,
        end_activation_bytes,
        flash_activation_bytes,
        fsdp_parameter_peak_bytes,
        interleaved_memory_factor,
        logits_bytes,
        megatron_state_bytes,
        zero_state_bytes,
    )
    from planner.costs.moe import (
        dispatch_bytes,
        distinct_domains,
        distinct_experts,
        expert_capacity,
        expert_flop,
        expert_parameters,
        expert_traffic_ratio,
        random_load_factor,
        router_flop,
        skewed_load_factor,
        zipf_shares,
    )
    from planner.costs.offload import (
        arithmetic_intensity,
        gathered_host_bytes_per_s,
        host_adam_s,
        interleaved_update_stride,
        offload_efficiency,
        offload_required_bytes_per_s,
        zero_offload_bytes,
        zero_offload_step_s,
    )
    from planner.costs.optimizer import (
        FUSED_UPDATES,
        KNOWN_OPTIMIZERS,
        muon_flop,
        muon_overhead,
        optimizer_state_bytes,
        optimizer_touched_bytes,
    )
    from planner.costs.overlap import (
        bucket_exposure_s,
        overlapped_s,
        pipelined_s,
        serial_finish_s,
        uniform_bucket_exposure_s,
    )
    from planner.costs.pipeline import (
        bubble_fraction_of_total,
        bubble_ratio_to_ideal,
        bubble_s,
        in_flight_1f1b,
        in_flight_gpipe,
        in_flight_interleaved,
        in_flight_zb_h1,
        in_flight_zb_h2,
        latency_1f1b_s,
        latency_alpa_s,
        span_bubble_zb_h1_s,
        span_bubble_zb_h2_s,
    )
    from planner.costs.pipeline_bounds import bound_1f1b_s, bound_flush_s, bound_interleaved_s
    from planner.costs.precision import FORMAT_BITS, block_bits, cast_bytes, dtype_bytes
    from planner.costs.queueing import (
        batch_response_s,
        clients_wait_s,
        erlang_b,
        erlang_c,
        gg1_wait_bound_s,
        ggc_wait_s,
        iteration_batching_s,
        many_servers_wait,
        mg1_wait_s,
        mmc_wait_s,
        priority_wait_s,
        processor_sharing_s,
        static_batch_occupancy,
        tandem_response_s,
        wait_quantile_s,
    )
    from planner.costs.reliability import (
        adjacent_mtbf_s,
        best_interval_s,
        checkpoint_stall_s,
        daly_interval_s,
        expected_slowdown,
        fleet_mtbf_s,
        out_share,
        resumed_s,
        useful_share,
        whole_replicas,
        young_interval_s,
    )
    from planner.costs.resharding import Layout, Step, reshard_bytes, resharding_steps
    from planner.costs.serving import kv_transfer_s, queue_load, replicas_needed
    from planner.costs.speculation import accepted_tokens, speculation_gain
    from planner.costs.state_sharding import (
        cross_host_traffic,
        hybrid_shard_traffic,
        zero_plus_plus_traffic,
        zero_traffic,
    )
    from planner.costs.tensor_parallel import (
        tensor_parallel_2d_elements,
        tensor_parallel_3d_elements,
        tensor_parallel_elements,
        tesseract_elements,
    )

__all__ = [
    "BLOCK_PLACES",
    "CUSTOM_ALL_REDUCE",
    "CUSTOM_ALL_REDUCE_BYTES",
    "FLASH_BACKWARD_PASSES",
    "FORMAT_BITS",
    "FUSED_UPDATES",
    "KNOWN_OPTIMIZERS",
    "BlockLinks",
    "BlockWork",
    "Layout",
    "Level",
    "MessageCost",
    "Step",
    "Transport",
    "accepted_tokens",
    "activation_bytes",
    "adjacent_mtbf_s",
    "alignment_efficiency",
    "all_gather_attention_elements",
    "all_gather_bytes",
    "all_gather_s",
    "all_reduce_bytes",
    "all_reduce_s",
    "all_to_all_bytes",
    "all_to_all_s",
    "arithmetic_intensity",
    "attention_bytes",
    "attention_flop",
    "attention_s",
    "average_power_w",
    "batch_response_s",
    "best_interval_s",
    "block_bits",
    "block_layer_s",
    "block_tokens_per_s",
    "block_waste_tokens",
    "bound_1f1b_s",
    "bound_flush_s",
    "bound_interleaved_s",
    "broadcast_bytes",
    "broadcast_s",
    "bubble_fraction_of_total",
    "bubble_ratio_to_ideal",
    "bubble_s",
    "bucket_exposure_s",
    "cast_bytes",
    "causal_fraction",
    "checkpoint_bytes",
    "checkpoint_segments",
    "checkpoint_stall_s",
    "clients_wait_s",
    "collective_costs",
    "contiguous_imbalance",
    "cool_compute_s",
    "cross_host_traffic",
    "custom_all_reduce_s",
    "daly_interval_s",
    "dense_training_flop",
    "device_hours",
    "dispatch_bytes",
    "distinct_domains",
    "distinct_experts",
    "dtype_bytes",
    "emitted_kg",
    "end_activation_bytes",
    "energy_j",
    "erlang_b",
    "erlang_c",
    "expected_slowdown",
    "expert_capacity",
    "expert_exchange_s",
    "expert_flop",
    "expert_parameters",
    "expert_traffic_ratio",
    "fastest_s",
    "flash_activation_bytes",
    "fleet_mtbf_s",
    "fsdp_parameter_peak_bytes",
    "gathered_host_bytes_per_s",
    "gg1_wait_bound_s",
    "ggc_wait_s",
    "gpt_iteration_flop",
    "gpt_parameters",
    "group_members",
    "host_adam_s",
    "hybrid_shard_traffic",
    "in_flight_1f1b",
    "in_flight_gpipe",
    "in_flight_interleaved",
    "in_flight_zb_h1",
    "in_flight_zb_h2",
    "interleaved_memory_factor",
    "interleaved_update_stride",
    "iteration_activation_bytes",
    "iteration_batching_s",
    "kv_transfer_s",
    "latency_1f1b_s",
    "latency_alpa_s",
    "logits_bytes",
    "many_servers_wait",
    "matmul_bytes",
    "matmul_flop",
    "matmul_s",
    "matmul_waves",
    "mean_held_tokens",
    "megatron_state_bytes",
    "memory_bound_s",
    "mg1_wait_s",
    "mmc_wait_s",
    "model_flop_utilization",
    "muon_flop",
    "muon_overhead",
    "offload_efficiency",
    "offload_required_bytes_per_s",
    "optimizer_state_bytes",
    "optimizer_touched_bytes",
    "out_share",
    "overflow_probability",
    "overlapped_s",
    "phases_run_s",
    "pipelined_s",
    "point_to_point_s",
    "priority_wait_s",
    "processor_sharing_s",
    "product_s",
    "queue_load",
    "random_load_factor",
    "reduce_scatter_bytes",
    "reduce_scatter_s",
    "rental_usd",
    "replicas_needed",
    "reshard_bytes",
    "resharding_steps",
    "resumed_s",
    "ring_attention_elements",
    "ring_attention_s",
    "ring_overlap_tokens",
    "roofline_s",
    "router_flop",
    "serial_finish_s",
    "skewed_load_factor",
    "span_bubble_zb_h1_s",
    "span_bubble_zb_h2_s",
    "speculation_gain",
    "static_batch_occupancy",
    "tandem_response_s",
    "tensor_parallel_2d_elements",
    "tensor_parallel_3d_elements",
    "tensor_parallel_elements",
    "tesseract_elements",
    "tokens_run_s",
    "training_s",
    "ulysses_elements",
    "uncached_bytes",
    "uniform_bucket_exposure_s",
    "usd_per_token",
    "useful_share",
    "usp_elements",
    "wait_quantile_s",
    "whole_replicas",
    "young_interval_s",
    "zero_offload_bytes",
    "zero_offload_step_s",
    "zero_plus_plus_traffic",
    "zero_state_bytes",
    "zero_traffic",
    "zipf_shares",
]


def __getattr__(name: str) -> Any:
    """Formulas are imported when first used: most of what runs needs a few of these modules."""
    from importlib import import_module
    from pkgutil import iter_modules

    if name in __all__:
        for info in iter_modules(__path__, f"{__name__}."):
            module = import_module(info.name)
            if name in module.__all__:
                value = globals()[name] = getattr(module, name)
                return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
