"""The two ops that a backend has from one function: the result in memory of its own, or in
`out`."""

import torch

from lora_kernels.ops.registry import implements


def implements_merge(backend, refusal=lambda _: None):
    """Adds a backend to both; decorates `merge(call, out)`, which fills out."""

    def register(merge):
        def merged_weight(call):
            out = torch.empty_like(call.w)
            merge(call, out)
            return out

        implements("merged_weight", backend, refusal)(merged_weight)
        implements("merge_into", backend, refusal)(lambda call: merge(call, call.out))
        return merge

    return register
