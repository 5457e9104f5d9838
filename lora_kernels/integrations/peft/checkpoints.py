"""Which groups were there when a checkpoint's forward ran.

torch.utils.checkpoint without reentrance compares what its recomputation saves for backward with
what the forward saved, tensor by tensor. A group saves others than its layers do alone. So the
recomputation does as the forward did, whatever was learned in between.
"""

from inspect import unwrap
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary

import torch
from torch.utils import checkpoint

UNKNOWN = object()
_epoch = 0
_epochs: "WeakKeyDictionary[Any, int]" = WeakKeyDictionary()  # of the frames of checkpoints
# torch's own; without it all hooks are unknown
_Frame: Any = getattr(checkpoint, "_CheckpointFrame", None)
_top_hooks = torch._C._autograd._top_saved_tensors_default_hooks


def next_epoch() -> int:
    """Begins another: a group is formed or given up."""
    global _epoch
    _epoch += 1
    return _epoch


def epoch_of_checkpoint() -> Any:
    """The epoch in which the checkpoint that now runs, or runs again, ran first; None where there
    is none, UNKNOWN under other hooks for saved tensors."""
    hooks = _top_hooks(False) if torch.is_grad_enabled() else None
    if hooks is None:
        return None
    # its hooks are closures over their frame, in the recomputation over a weak reference to it
    for cell in unwrap(hooks[0]).__closure__ or () if hasattr(hooks[0], "__code__") else ():
        held = cell.cell_contents
        frame = held() if isinstance(held, ReferenceType) else held
        if type(frame) is _Frame:
            return _epochs.setdefault(frame, _epoch)
    return UNKNOWN
