"""Runs one training step of every case given as JSON on stdin on fake tensors; prints what PyTorch's trackers counted as JSON.

Input: ``{"models": {name: dims}, "batch": of one data-parallel rank, "seq": ..., "cases": {name: case}}``, a case being
``{"model", "kernels", "dp", "tp", "sequence_parallel", "fsdp", "recompute", "precision"}``. Output, per case, lists of tensors
(:func:`account.as_list`): alive after the ``forward``, when most is while the ``head`` and the ``layer`` in the middle are at
work in the backward, and after the ``step``; and as ``traffic`` what :func:`traffic.traffic` counts.
"""

import json
import sys
import warnings
from contextlib import nullcontext

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import loss_parallel
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

from .account import Makers, as_list, tracker_of
from .decoder import Decoder
from .sharding import shard
from .traffic import traffic


def measure(case, models, batch, seq):
    """One step on the first rank of a world of fake ranks."""
    model = models[case["model"]] | {"seq": seq}
    dp, tp = case["dp"], case["tp"]
    dist.init_process_group("fake", rank=0, world_size=dp * tp, store=FakeStore())
    whole = init_device_mesh("cpu", (dp, tp), mesh_dim_names=("dp", "tp"))
    mesh = {name: whole[name] for name in ("dp", "tp")}  # slicing needs real tensors
    with FakeTensorMode(allow_non_fake_inputs=True):
        # FSDP holds fp32 shards and casts them; without it, the whole model is in one precision.
        torch.set_default_dtype(
            torch.float32 if case["fsdp"] or case["precision"] == "fp32" else torch.bfloat16
        )
        decoder = shard(Decoder(model, case["kernels"]), case, mesh)
        torch.set_default_dtype(torch.float32)
        found = step(decoder, model, batch, seq, loss_parallel if tp > 1 else nullcontext)
    dist.destroy_process_group()
    return found


def step(decoder, model, batch, seq, loss_context):
    """Forward, loss, backward and update."""
    optimizer = torch.optim.AdamW(decoder.parameters(), foreach=False)
    tokens = torch.zeros(batch, seq, dtype=torch.int64)
    places = torch.arange(seq)
    if model["llama"]:
        places = torch.empty(seq, model["head_dim"] // 2, dtype=torch.complex64)
    tracker = tracker_of(decoder, optimizer, tokens, places)
    with loss_context(), tracker, Makers(tracker) as makers:
        logits = decoder(tokens, places)
        for index, x in enumerate(decoder.between):
            x.register_hook(lambda _, index=index: makers.begin(f"layer {index}"))
        decoder.between.clear()
        del x
        makers.begin("head")
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())
        del logits
        found = {"forward": as_list(makers.alive())}
        loss.backward()
        del loss
        makers.begin("update")
        optimizer.step()
        found["step"] = as_list(makers.alive())
    middle = f"layer {model['layers'] // 2}"
    peaks = {stretch.name: stretch.as_list() for stretch in makers.stretches}
    return found | {"head": peaks["head"], "layer": peaks[middle]}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    job = json.load(sys.stdin)
    cases = job.pop("cases")
    with FakeTensorMode():
        moved = traffic(rows=1024, width=256, vocab=512)
    json.dump({"traffic": moved} | {name: measure(case, **job) for name, case in cases.items()}, sys.stdout)
