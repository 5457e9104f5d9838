"""Batches of adapters for the tests of multi_lora, and the formula token by token."""

import torch

from lora_kernels.ops.multi_lora import BASE, PAGE, Slots

PAGES = 64  # of a slot: ranks to 512


def make_slots(n_in, outs, ranks, dtype, *, dora=(), biased=(), seed=0):
    """Slots for each of `outs`, slices of one weight: pages anywhere, NaN wherever no rank is."""
    torch.manual_seed(seed)
    found = []
    for n_out in outs:
        count = sum(-(-r // PAGE) for r in ranks) + 3
        a, b = torch.full((count * PAGE, n_in), torch.nan), torch.full((count * PAGE, n_out), torch.nan)
        table, free = torch.full((len(ranks), PAGES), -1, dtype=torch.int32), torch.randperm(count).tolist()
        for slot, r in enumerate(ranks):
            for first in range(0, r, PAGE):
                page, rows = free.pop(), min(PAGE, r - first)
                table[slot, first // PAGE] = page
                a[page * PAGE : page * PAGE + rows] = torch.randn(rows, n_in) * n_in**-0.5
                b[page * PAGE : page * PAGE + rows] = torch.randn(rows, n_out) * r**-0.5
        flags = torch.tensor([(i in dora) + 2 * (i in biased) for i in range(len(ranks))], dtype=torch.int32)
        # in another order than the slots
        row = torch.randperm(len(ranks) + 2, dtype=torch.int32)[: len(ranks)]
        gain, bias = (torch.randn(len(ranks) + each, n_out) for each in (2, 3))
        gain[sorted({*range(len(gain))} - {*row[flags & 1 == 1].tolist()})] = torch.nan
        bias[sorted({*range(len(bias))} - {*row[flags & 2 == 2].tolist()})] = torch.nan
        flags += row << 2
        rank = torch.tensor(ranks, dtype=torch.int32)
        generation = torch.arange(5, 5 + len(ranks), dtype=torch.int32)
        found.append(Slots(a.to(dtype), b.to(dtype), table, rank, torch.rand(len(ranks)) + 0.5, flags, gain, bias, generation))
    return found


def ids_of(slot, slots):
    """The ids of slots [tokens] or [tokens, k], -1 for none."""
    return torch.where(slot < 0, BASE, (slots[0].generation[slot.clamp(min=0)].long() << 32) + slot)


def with_wrong_ids(slots, slot):
    """The ids of slots [12, k] of three adapters, in the last column some that nobody gave:
    negative, out of range, stale. And the slots that are left, those gone."""
    ids, slot = ids_of(slot, slots), slot.clone()
    for t, each in {0: -2, 3: 1 << 40, 5: 3, 7: int(ids_of(torch.tensor(1), slots)) + (1 << 32), 8: -(1 << 62)}.items():
        ids[t, -1], slot[t, -1] = each, -1
    return ids, slot


def exact(x, w, slots, slot, weights=None, bias=None, size=False):
    """The formula in float64, token by token: slot [tokens, k]; or its size, that of the absolute
    values of all terms."""
    wide = (lambda t: t.double().abs()) if size else (lambda t: t.double())
    rows = [x.new_zeros(0, len(w)).double()]
    for t, row in enumerate(wide(x)):
        parts = []
        for s, of_w in zip(slots, wide(w).split([s.b.shape[1] for s in slots]), strict=True):
            z = of_w @ row
            y = z.clone()
            for i, each in enumerate(slot[t].tolist()):
                if each < 0:
                    continue
                j = torch.arange(int(s.rank[each]))
                at = s.table[each, j // PAGE].long() * PAGE + j % PAGE
                delta = float(s.scale[each]) * (wide(s.b[at]).T @ (wide(s.a[at]) @ row))
                if s.flags[each] & 1:
                    gain = wide(s.gain[s.flags[each] >> 2])
                    delta = (gain + 1 if size else gain - 1) * z + gain * delta
                if s.flags[each] & 2:
                    delta = delta + wide(s.bias[s.flags[each] >> 2])
                y += delta if weights is None else wide(weights)[t, i] * delta
            parts.append(y)
        rows.append(torch.cat(parts)[None])
    y = torch.cat(rows)
    return y if bias is None else y + wide(bias)
