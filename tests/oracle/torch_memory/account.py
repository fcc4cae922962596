"""PyTorch's memory trackers, and who made each tensor that they count."""

import torch
import torch.distributed.tensor._sharding_prop
from torch.distributed._tools.common_utils import get_untyped_storages
from torch.distributed._tools.fsdp2_mem_tracker import FSDPMemTracker
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# DTensor works out the shapes of its results on fake tensors of whole size. The trackers leave out what happens in another fake
# mode than the step's own, so that this has to be one.
torch.distributed.tensor._sharding_prop.detect_fake_mode = lambda: None


def tracker_of(module, optimizer, *inputs):
    """The tracker that knows how the module is sharded."""
    if isinstance(module, FSDPModule):
        tracker = FSDPMemTracker(module, optimizer)
        tracker.track_inputs(inputs)
    else:
        tracker = MemTracker()
        tracker.track_external(module, optimizer, *inputs)
    return tracker


class Makers(TorchDispatchMode):
    """Remembers of every new storage in which module, by which operator and with which dtype it was made."""

    def __init__(self, tracker):
        super().__init__()
        self.tracker, self.made_by, self.stretches = tracker, WeakIdKeyDictionary(), []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented
        result = func(*args, **kwargs or {})
        operator = func.__name__.partition(".")[0]
        for tensor in tree_leaves(result):
            for storage in get_untyped_storages(tensor) if isinstance(tensor, torch.Tensor) else ():
                if storage not in self.made_by:
                    module = max(self.tracker._mod_tracker.parents, key=lambda name: name.count("."))
                    self.made_by[storage] = (module, operator, str(tensor.dtype).removeprefix("torch."))
        if self.stretches:
            self.stretches[-1].look()
        return result

    def begin(self, name):
        """Begins a stretch of the step."""
        self.stretches.append(Stretch(name, self))

    def alive(self):
        """What is alive: the tracker's account of it, where it was made, and its bytes."""
        found = []
        for storage, (info, _) in list(self.tracker._WINFO.items()):
            if info.mem_consumed:
                found.append((info, *self.made_by.get(storage, ("", "", "")), info.mem_consumed))
        return found


class Stretch:
    """A part of the step, and what is alive when most is."""

    def __init__(self, name, makers):
        self.name, self.makers, self.most_bytes = name, makers, -1
        self.look()

    def look(self):
        """Remembers what is alive if it is more than ever before in this stretch."""
        n_bytes = sum(held.get("Total", 0) for held in self.makers.tracker._curr_mem_snap.values())
        if n_bytes > self.most_bytes:
            self.most_bytes, self.peak = n_bytes, self.makers.alive()

    def as_list(self):
        """The peak as :func:`as_list` has it; trackers learn late that a tensor is a gradient, which therefore is one here."""
        return as_list(self.peak)


def as_list(alive):
    """``[category, module, operator, dtype, bytes]`` of each tensor, module names without what wraps modules."""
    wrappers = ("FSDP", "._checkpoint_wrapped_module")
    found = []
    for info, module, *rest in alive:
        for wrapper in wrappers:
            module = module.replace(wrapper, "")
        found.append([info.reftype.value, module, *rest])
    return found
