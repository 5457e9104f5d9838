"""Faults at every step of the pool's own code, and what must be as it was after them."""

import copy
import sys

from tests.serving.pools import same_state, state


class Fault(Exception):
    pass


def with_fault_at(step, call, fault, opcodes=False):
    """Calls, and raises at that step of the pool's own code: before a line, or an instruction of
    it. Whether it was reached."""
    left = step

    def trace(frame, event, _):
        nonlocal left
        if "lora_kernels/serving/" not in frame.f_code.co_filename or frame.f_code.co_name == "__del__":
            return None
        frame.f_trace_opcodes = opcodes
        if event == ("opcode" if opcodes else "line"):
            left -= 1
            if not left:
                raise fault("injected")
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except fault as error:
        # its traceback keeps what the call had
        del error
        return True
    finally:
        sys.settrace(before)
    return False


def everything(pool):
    """What is where: tensors, and the books."""
    held = pool._held
    held.settle()
    books = [list(held.names), sorted(held.by_slot), sorted(held.free), sorted(held.host), list(held.generations)]
    books += [[(r.name, r.id, sorted(r.modules), sorted(r.magnitudes)) for r in held.by_slot.values()]]
    for name in held.names.keys() & held.host.keys():
        assert held.names[name].version == held.host[name].version
    books += [[(sorted(s.free), s.held, s._vectors, s._entries) for s in pool.sites.values()]]
    columns = [site.columns.clone() for site in pool.sites.values() if hasattr(site, "columns")]
    return [*state(pool), *columns], copy.deepcopy(books)


def same(one, other):
    return one[1] == other[1] and same_state(one[0], other[0])
