"""The choice of a backend: by preference, by force, by environment; and what it says of its
reasons."""

import os
import subprocess
import sys
import threading
import warnings
from typing import NamedTuple

import pytest
import torch

from lora_kernels import FallbackWarning, explain, lora_linear, use_backend, weight_norm
from lora_kernels.nn import LoRALinear
from lora_kernels.ops import missing_backends, registry
from lora_kernels.ops.registry import BACKENDS, choose_implementation, declare, implements, load_backends, note_plan, refusals
from lora_kernels.testing import make_problem


class Call(NamedTuple):
    x: torch.Tensor


@pytest.fixture
def op(monkeypatch):
    """An op with a reference that doubles and a cpu backend that refuses vectors of more than
    three."""
    name = "op_of_the_registry_test"
    if name not in registry._implementations:
        call = declare(name, Call, "Tensor", lambda call: call.x.new_empty(call.x.shape))
        implements(name, "reference")(lambda call: 2 * call.x)
        implements(name, "cpu", lambda call: f"x has {len(call.x)} elements, the limit is 3" if len(call.x) > 3 else None)(
            lambda call: call.x + call.x
        )
        registry._implementations[name]["call"] = call
    implementations = dict(registry._implementations[name])
    call = implementations.pop("call", None) or op.call
    op.call = call
    monkeypatch.setitem(registry._implementations, name, implementations)
    monkeypatch.setattr(registry, "_warned", set())
    return call


def test_the_first_that_accepts_runs(op):
    assert choose_implementation(op.name, Call(torch.ones(3))) is registry._implementations[op.name]["cpu"]
    with pytest.warns(FallbackWarning):
        assert choose_implementation(op.name, Call(torch.ones(4))) is registry._implementations[op.name]["reference"]


def test_a_fallback_warns_once_for_each_reason(op):
    def warned(n):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            assert op(Call(torch.ones(n))).equal(torch.full((n,), 2.0))
        return [str(w.message) for w in seen]

    assert warned(4) == [f"{op.name} runs on the slow reference. cpu: x has 4 elements, the limit is 3"]
    assert warned(4) == [] and warned(3) == []
    assert warned(5) == [f"{op.name} runs on the slow reference. cpu: x has 5 elements, the limit is 3"]
    with use_backend("reference"):
        assert warned(6) == []  # asked for


def test_a_warning_points_at_the_caller(monkeypatch):
    monkeypatch.setattr(registry, "_warned", set())
    p = make_problem(3, 8, 8, 2, torch.float32, torch.float64)
    with pytest.warns(FallbackWarning, match="lora_linear_forward runs on the slow reference. cpu: a is .*float64") as seen:
        lora_linear(*p.arguments())
    assert os.path.basename(seen[0].filename) == os.path.basename(__file__)


def test_float64_is_the_reference_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = make_problem(3, 8, 8, 2, torch.float64)
        decision = explain(lora_linear, *p.arguments()).decisions[0]
    assert decision.chosen == "reference" and "float64" in decision.others["cpu"]


def test_a_forced_backend_refuses_in_words(op):
    with use_backend("cpu"):
        assert op(Call(torch.ones(2))).equal(torch.full((2,), 2.0))
        with pytest.raises(NotImplementedError, match=f"^{op.name} cannot run on cpu: x has 4 elements, the limit is 3$"):
            op(Call(torch.ones(4)))
    with use_backend("cuda"), pytest.raises(NotImplementedError, match=f"^{op.name} cannot run on cuda: "):
        op(Call(torch.ones(2)))


def test_no_backend_at_all(op, monkeypatch):
    monkeypatch.delitem(registry._implementations[op.name], "reference")
    with pytest.raises(NotImplementedError, match="no backend accepts these arguments: .*'cpu': 'x has 4 elements"):
        op(Call(torch.ones(4)))


def test_use_backend_nests_and_restores():
    def chosen():
        return explain(lora_linear, *make_problem(3, 8, 8, 2).arguments()).decisions[0].chosen

    before = chosen()
    with use_backend("cpu"):
        with use_backend("reference"):
            assert chosen() == "reference"
        assert chosen() == "cpu"
        with pytest.raises(RuntimeError, match="leave"), use_backend("reference"):
            raise RuntimeError("leave")
        assert chosen() == "cpu"
    assert chosen() == before
    with pytest.raises(ValueError, match="backend must be one of reference, cpu, triton, cuda, found 'gpu'"):
        with use_backend("gpu"):
            pass
    with pytest.raises(ValueError, match="simulate is for triton and cuda, found 'cpu'"):
        with use_backend("cpu", simulate=True):
            pass


class Deep(torch.autograd.Function):
    """Its backward starts another one, and so on; after 60 autograd goes on in a thread of its own,
    as it does for a GPU."""

    @staticmethod
    def forward(ctx, x, depth, last):
        ctx.depth, ctx.last = depth, last
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            within = Deep.apply(torch.zeros((), requires_grad=True), ctx.depth - 1, ctx.last) if ctx.depth else ctx.last()
        # the engine itself: torch's backward() would keep the settings of the thread that it is in
        run = torch.autograd.Variable._execution_engine.run_backward
        run((within,), (torch.ones(()),), False, False, (), allow_unreachable=True, accumulate_grad=True)
        return dy, None, None


@pytest.mark.skipif(torch.__version__ < "2.13", reason="torch keeps the context of the call of backward() from 2.13 on")
def test_settings_reach_the_threads_of_autograd():
    p = make_problem(3, 5, 4, 2, torch.float32)
    x, a = p.x.requires_grad_(), p.a.requires_grad_()
    threads = []

    def last():
        threads.append(threading.get_ident())
        return y

    y = lora_linear(x, p.w, a, p.b).sum()
    start = Deep.apply(torch.zeros((), requires_grad=True), 70, last)
    with use_backend("reference"):
        explanation = explain(start.backward)
    assert threads != [threading.get_ident()]
    assert [(d.op, d.chosen) for d in explanation.decisions] == [("lora_linear_backward", "reference")]
    assert a.grad is not None


def test_explain_says_what_ran_and_why_the_others_did_not():
    p = make_problem(3, 8, 8, 2)
    free = explain(lora_linear, *p.arguments())
    assert [(d.op, d.chosen) for d in free.decisions] == [("lora_linear_forward", "cpu")]
    assert str(free).splitlines()[0] == "lora_linear_forward: cpu"
    assert free.decisions[0].others["reference"] == "cpu comes first"
    assert set(free.decisions[0].others) == set(BACKENDS) - {"cpu"}
    assert all(free.decisions[0].others.values()) and "    reference: cpu comes first" in str(free)

    with use_backend("reference"):
        forced = explain(lora_linear, *p.arguments())
    assert forced.decisions[0].chosen == "reference" and forced.decisions[0].others["cpu"] == "reference is forced"


def test_explain_follows_a_whole_call():
    p = make_problem(3, 8, 8, 2, gain=True)

    def step():
        p.require_grad()
        weight_norm(p.w, p.a, p.b).sum().backward()
        lora_linear(*p.arguments()).sum().backward()

    ops = ["weight_norm_forward", "weight_norm_backward", "lora_linear_forward", "lora_linear_backward"]
    assert [d.op for d in explain(step).decisions] == ops
    assert str(explain(lambda: None)) == "no lora_kernels op ran"


def test_explain_takes_the_tensor_first():
    layer = LoRALinear(8, 8, r=2)
    x = torch.randn(3, 8)
    assert explain(x, layer) == explain(layer, x) and explain(x, layer).decisions
    p = make_problem(3, 8, 8, 2)
    assert explain(p.x, lora_linear, *p.arguments()[1:]).decisions[0].op == "lora_linear_forward"
    for nothing in ((x,), (x, x)):
        with pytest.raises(TypeError, match="explain: one of its first two arguments must be callable"):
            explain(*nothing)


def test_a_backend_notes_its_plan_below_its_own_decision(op, monkeypatch):
    def run(call):
        note_plan("first\n  of two lines" if len(call.x) == 1 else "second")
        return 2 * call.x

    implements(op.name, "cpu")(run)
    note_plan("nobody listens")
    run(Call(torch.ones(1)))
    told = explain(lambda: (op(Call(torch.ones(1))), op(Call(torch.ones(2)))))
    assert [d.plan for d in told.decisions] == ["first\n  of two lines", "second"]
    lines = str(told).splitlines()
    head = lines.index(f"{op.name}: cpu", 1)
    assert lines[head - 2 : head] == ["    first", "      of two lines"] and lines[-1] == "    second"
    assert "None" not in str(explain(lora_linear, *make_problem(3, 8, 8, 2).arguments()))
    assert explain(lambda: note_plan("no op ran")).decisions == []


def test_refusals_name_every_backend():
    p = make_problem(3, 8, 8, 2)
    found = refusals("row_norm_squared", (p.w,))
    assert found["reference"] is None and found["cpu"] is None
    assert set(found) == set(BACKENDS) and found.items() >= missing_backends().items()
    if "triton" not in missing_backends():
        assert found["triton"].startswith("its kernels run on a GPU; ")


def test_a_missing_backend_has_a_reason(tmp_path, monkeypatch):
    package = tmp_path / "package_of_the_registry_test"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "reference.py").touch()
    (package / "cpu.py").write_text("import a_module_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_missing", {})
    monkeypatch.setattr(registry, "_there", set())
    load_backends(package.name)
    assert registry.missing_backends() == {
        "cpu": "No module named 'a_module_that_is_not_there'",
        "triton": "this version has no such kernels",
        "cuda": "this version has no such kernels",
    }
    (package / "cpu.py").write_text("1 / 0\n")  # a broken file is no missing backend
    sys.modules.pop(f"{package.name}.cpu", None)
    with pytest.raises(ZeroDivisionError):
        load_backends(package.name)


CALL = """
import lora_kernels
shapes = (2, 3), (4, 3), (1, 3), (4, 1)
print(lora_kernels.explain(lora_kernels.lora_linear, *map(torch.ones, shapes)))
"""
# torch is imported once, which takes seconds, and each call has a process that begins behind that
FORKS = """
import os, sys, torch
for value in sys.argv[2:]:
    if not os.fork():
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{value}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        os.environ.pop("LORA_KERNELS_BACKEND", None)
        os.environ |= {"LORA_KERNELS_BACKEND": value[1:]} if value[0] == "=" else {}
        exec(sys.argv[1])
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
BY_VARIABLE = {
    "none": ("lora_linear_forward: cpu", ""),
    "=": ("lora_linear_forward: cpu", ""),
    "=cpu": ("lora_linear_forward: cpu", ""),
    "=reference": ("lora_linear_forward: reference", ""),
    "=gpu": ("", "ValueError: backend must be one of reference, cpu, triton, cuda, found 'gpu'"),
    "=triton": ("", "NotImplementedError: lora_linear_forward cannot run on triton: "),
}


def test_environment(tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", FORKS, CALL, *BY_VARIABLE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=True)
    for status, (value, (first_line, error)) in zip(done.stdout.split(), BY_VARIABLE.items(), strict=True):
        said, told = ((tmp_path / f"{value}.{name}").read_text() for name in ("out", "err"))
        assert (said.splitlines() or [""])[0] == first_line, (value, told)
        assert error in told and (status != "0") == bool(error), (value, told)
