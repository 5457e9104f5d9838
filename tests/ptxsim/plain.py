"""What Triton's interpreter sees: run with TRITON_INTERPRET=1, which must be set before triton is
imported."""

import json

from tests.ptxsim.bugs import BUGS
from tests.ptxsim.corpus import CASES, by_plain_interpreter

if __name__ == "__main__":
    clean = {name: by_plain_interpreter(case)[0] for name, case in CASES.items() if case.interpreted}
    bugs = [by_plain_interpreter(CASES[bug.case], bug.old, bug.new)[0] if bug.interpreted else None for bug in BUGS]
    print(json.dumps({"clean": clean, "bugs": bugs}))
