"""Which of two clusters trains a model at the lower price, each with its own best plan.

The prices are inputs: put your own offers in their place.
"""

from planner import Problem, TrainWorkload, load_cluster, load_model, load_stack, search

USD_PER_DEVICE_HOUR = {"a100-sxm-80gb:16x8": 1.50, "h100-sxm:8x8": 2.50}  # assumed offers, not quotations
TOKENS = 1e12

model, stack = load_model("llama2-13b"), load_stack()
job = TrainWorkload(global_batch_size=1024, seq_len=4096, tokens=TOKENS)

for spec, usd_per_device_hour in USD_PER_DEVICE_HOUR.items():
    cluster = load_cluster(spec)
    best = search(Problem(model, cluster, job, stack, usd_per_device_hour=usd_per_device_hour), top=1).best
    steps = TOKENS / job.tokens_per_step
    assert best.estimate.usd_per_step is not None
    days = steps * best.estimate.step_time_s / 86400
    print(
        f"{spec}: {days:.1f} days, {steps * best.estimate.usd_per_step:,.0f} USD, {best.estimate.mfu:.1%} MFU"
    )
