"""Every private thing of PyTorch that is used, held to what is relied on: on a version that changed it, its name fails here."""

from __future__ import annotations

import ast
import functools
import logging
import math
import operator
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import sympy
import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from ras_compile import _torch, canaries
from ras_compile.capture import functional as capture
from ras_compile.kernels import _torch as for_kernels

CANARIES = {}
aten = torch.ops.aten
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def canary(*names):
    """Marks a test as that of some names of `_torch.py` (or `kernels._torch`)."""

    def mark(test):
        for name in names:
            assert name not in CANARIES
            CANARIES[name] = test
        return pytest.mark.parametrize("name", names)(test)

    return mark


def held(module):
    """The names that a file of private things offers: what it imports within its `try`, and all that it defines."""
    found = set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        match node:
            case ast.Try(body=body):
                found |= {alias.asname or alias.name for each in body for alias in each.names}
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found.add(name)
            case ast.Assign(targets=[ast.Name(id=name)]):
                found.add(name)
    return {name for name in found if not name.startswith("_")}


def test_every_name_has_a_canary():
    assert set(CANARIES) == held(_torch) | {f"kernels.{name}" for name in held(for_kernels)}


def test_nothing_is_reported_as_changed():
    assert canaries.changed() == {}


def dynamo_graphs(function, *args, run=None, dynamic=None):
    """The graphs that Dynamo makes of a call, and what it returns."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return run or graph.forward

    torch._dynamo.reset()
    result = torch.compile(function, backend=backend, dynamic=dynamic)(*args)
    return graphs, result


def targets(graph):
    return [node.target for node in graph.nodes]


@canary("at_reset")
def test_a_backend_is_told_of_a_reset(name):
    told = []

    def backend(graph, inputs):
        return graph.forward

    _torch.at_reset(backend, lambda: told.append(1))
    torch.compile(torch.sin, backend=backend)(torch.ones(2))
    assert not told
    torch._dynamo.reset()
    assert told


@canary("vary_inputs")
def test_a_number_and_sizes_become_inputs_at_the_first_call(name):
    seen, graphs = [], []

    def backend(graph, inputs):
        wanted = {"L['x']": {1, 2}}
        _torch.vary_inputs(lambda source, number: seen.append((source, number)) or source == "L['time'][0]", wanted)
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lambda x, time, count: x * time[0] + count, backend=backend)
    results = [compiled(torch.ones(2), [time], 3).tolist() for time in (0.5, 0.25)]
    assert results == [[3.5, 3.5], [3.25, 3.25]] and len(graphs) == 1
    assert ("L['time'][0]", 0.5) in seen and ("L['count']", 3) in seen
    _torch.vary_inputs(lambda source, number: True, {})  # nothing is captured here
    for dynamic in (True, None):
        for view in (False, True):
            torch._dynamo.reset()
            graphs.clear()
            compiled = torch.compile(lambda x: x.sin(), backend=backend, dynamic=dynamic)
            for sides in ((6, 6), (6, 8), (10, 8)):
                compiled(torch.ones(1, *sides).expand(2, *sides) if view else torch.ones(2, *sides))
            assert len(graphs) == 1, "equal sizes are two symbols, of what a view is one of as well"


@canary("line_of_guard")
def test_an_assumption_has_its_line(name):
    graphs, _ = dynamo_graphs(lambda x: x * math.log(x.shape[0]), torch.ones(3), dynamic=True)
    (size,) = next(iter(graphs[0].graph.nodes)).meta["example_value"].shape
    assert any("math.log(x.shape[0])" in (_torch.line_of_guard(guard) or "") for guard in size.node.shape_env.guards)


# Ops


@canary("OpOverload")
def test_ops_are_overloads(name):
    assert isinstance(aten.add.Tensor, _torch.OpOverload) and not isinstance(aten.add, _torch.OpOverload)
    assert aten.add.Tensor.namespace == "aten" and torch.Tag.pointwise in aten.add.Tensor.tags
    graph = make_fx(lambda x: x + x)(torch.ones(2)).graph
    assert aten.add.Tensor in targets(graph)


@canary("schema_of")
def test_a_schema_tells_arguments_and_aliases(name):
    schema = _torch.schema_of(aten.add_.Tensor)
    assert schema.name == "aten::add_" and schema.is_mutable
    assert [(a.name, a.default_value, a.kwarg_only) for a in schema.arguments] == [
        ("self", None, False), ("other", None, False), ("alpha", 1, True)
    ]  # fmt: skip
    assert schema.arguments[0].alias_info.is_write and schema.arguments[1].alias_info is None
    assert _torch.schema_of(aten.view.default).returns[0].alias_info is not None
    assert not _torch.schema_of(aten.mm.default).is_mutable


@canary("is_composite")
def test_composite_ops_are_known(name):
    assert _torch.is_composite(aten.tensordot.default) and not _torch.is_composite(aten.mm.default)


# Dynamo


@canary("lookup_backend", "InvalidBackend")
def test_backends_are_found_by_name(name):
    graph = fx.symbolic_trace(nn.Identity())
    assert torch.equal(_torch.lookup_backend("eager")(graph, [torch.ones(1)])(torch.ones(1)), torch.ones(1))
    with pytest.raises(_torch.InvalidBackend):
        _torch.lookup_backend("no such backend")


@canary("compile_lock")
def test_dynamo_holds_the_lock_while_it_compiles(name):
    free = []

    def backend(graph, inputs):
        def attempt():
            free.append(_torch.compile_lock.acquire(blocking=False))

        other = threading.Thread(target=attempt)
        other.start()
        other.join()
        with _torch.compile_lock:  # may be nested
            return graph.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(1))
    assert free == [False]


@canary("compile_session")
def test_a_session_says_that_pytorch_compiles(name):
    with _torch.compile_session():
        assert torch.compiler.is_compiling()
    assert not torch.compiler.is_compiling()


@canary("OptimizedModule", "original")
def test_a_compiled_module_is_an_object_around_the_module(name):
    plain = nn.Linear(2, 2)
    compiled = torch.compile(plain, backend="eager")
    assert isinstance(compiled, _torch.OptimizedModule)
    assert _torch.original(compiled) is plain and _torch.original(plain) is plain
    compiled.forward = lambda x: "another"
    assert compiled(torch.ones(2)) == "another"


@canary("COMPILED_CALL", "compiled_call", "set_compiled_call", "call_uncompiled")
def test_a_module_calls_what_it_was_compiled_to(name):
    module = nn.Linear(2, 2)
    seen = []
    module.register_forward_hook(lambda *given: seen.append(1))
    assert _torch.compiled_call(module) is None
    module.compile(backend="eager")
    assert callable(_torch.compiled_call(module)) and _torch.COMPILED_CALL in vars(module)
    _torch.set_compiled_call(module, lambda x: "another")
    x = torch.ones(2)
    assert module(x) == "another" and not seen
    assert torch.equal(_torch.call_uncompiled(module, x), module.forward(x)) and seen == [1]
    _torch.set_compiled_call(module, None)
    assert torch.equal(module(x), module.forward(x)) and seen == [1, 1]


@canary("compilations", "forget_compilations")
def test_what_was_compiled_since_is_dropped_and_the_rest_stays(name):
    compiled = []

    def backend(graph, inputs):
        compiled.append(inputs[0].shape)
        return graph

    run = torch.compile(lambda x: x + 1, backend=backend, dynamic=False)
    run(torch.ones(2))
    before = _torch.compilations()
    run(torch.ones(3))
    _torch.forget_compilations(before)
    for size in (2, 3, 3):
        run(torch.ones(size))
    assert [list(shape) for shape in compiled] == [[2], [3], [3]]


@canary("programs_found")
def test_a_program_that_is_found_is_counted(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        before = _torch.programs_found()
        torch.compile(lambda x: torch.empty_like(x), backend="inductor")(torch.ones(3))
        found.append(_torch.programs_found() - before)
    assert found == [0, 1]


@canary("look_again_at")
def test_code_that_is_passed_over_is_looked_at_again(name):
    """Dynamo gives a function up whose loop breaks the graph, for whatever arguments it is called the next time."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    def function(x, broken):
        for _ in range(2):
            x = x + 1
            if broken:
                torch._dynamo.graph_break()
        return x

    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    run = torch.compile(wrapper, backend=backend)
    run(torch.ones(2), True)
    compiled.clear()
    run(torch.ones(2), False)
    assert not compiled
    _torch.look_again_at(wrapper)
    run(torch.ones(2), False)
    assert len(compiled) == 1


@canary("DynamoContext")
def test_its_methods_call_what_was_compiled(name):
    called = []

    def run(*values):
        frame = sys._getframe()
        while frame is not None:
            called.append(frame.f_code.co_qualname)
            frame = frame.f_back
        return (values[0] + 1,)

    dynamo_graphs(lambda x: x + 1, torch.ones(1), run=run)
    assert any(where.startswith(_torch.DynamoContext.__name__ + ".") for where in called)


class Broken(nn.Module):
    def forward(self, x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2


@canary("why_graph_ends", "RESUME_PREFIX", "copy_reason")
def test_a_break_tells_its_line_and_what_is_resumed(name):
    (first, second), _ = dynamo_graphs(Broken(), torch.ones(2))
    before, after = _torch.why_graph_ends(first), _torch.why_graph_ends(second)
    line = Broken.forward.__code__.co_firstlineno
    assert before.graph_break and before.reason and before.user_stack[-1].lineno == line + 2
    assert before.user_stack[-1].filename == __file__ and before.user_stack[-1].name == "forward"
    assert _torch.why_graph_ends(_torch.copy_reason(first, fx.GraphModule(first, first.graph))) is before
    assert not after.graph_break and after.user_stack[-1].name.startswith(_torch.RESUME_PREFIX)
    assert after.user_stack[-1].name.rpartition("_")[2] == str(line + 2)


@canary("TorchRuntimeError")
def test_a_model_that_fails_while_it_is_traced(name):
    with pytest.raises(_torch.TorchRuntimeError, match=r"got \w+\("):
        dynamo_graphs(lambda x: x @ torch.ones(3, 3), torch.ones(2, 2))


@canary("source_of", "set_source")
def test_placeholders_tell_where_they_come_from(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

        def forward(self, x, more=None):
            return x * self.weight + more["y"]

    (graph,), _ = dynamo_graphs(Model(), torch.ones(2), {"y": torch.ones(2)})
    found = {_torch.source_of(node) for node in graph.graph.find_nodes(op="placeholder")}
    ours = fx.Graph().placeholder("ours")
    assert _torch.source_of(ours) is None
    _torch.set_source(ours, "L['x'].part")
    assert _torch.source_of(ours) == "L['x'].part"
    assert {"L['x']", "L['more']['y']"} < found
    assert any("_parameters" in source and "weight" in source for source in found)
    assert all("example_value" in node.meta for node in graph.graph.find_nodes(op="placeholder"))
    assert all("stack_trace" in node.meta for node in graph.graph.nodes if node.op == "call_function")


@canary("raise_recompile_limit")
def test_the_recompile_limit_is_raised_and_never_lowered(name):
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        _torch.raise_recompile_limit(64)
        assert torch._dynamo.config.recompile_limit == 64
        _torch.raise_recompile_limit(9)
        assert torch._dynamo.config.recompile_limit == 64
        assert torch._dynamo.config.accumulated_recompile_limit == 64 * 64
    _torch.raise_recompile_limit(64)  # PyTorch 2.11 puts back for all threads what a patch has found
    with ThreadPoolExecutor(1) as other:
        assert other.submit(lambda: torch._dynamo.config.recompile_limit).result() >= 64
        assert other.submit(lambda: torch._dynamo.config.accumulated_recompile_limit).result() >= 64 * 64


@canary("at_recompile_limit")
def test_dynamo_tells_whose_function_it_stops_to_compile(name):
    told = []

    def ours(graph, examples):
        return graph

    def others(graph, examples):
        return graph

    _torch.at_recompile_limit(ours, lambda *what: told.append(what))
    with torch._dynamo.config.patch(recompile_limit=2):
        for backend in (ours, others):
            torch._dynamo.reset()

            @torch.compile(backend=backend, dynamic=False)
            def called(x):
                return x + 1

            for length in range(1, 5):
                called(torch.ones(length))
    ((limit, value, function),) = told
    assert (limit, value) == ("recompile_limit", 2) and "called" in function


@canary("ignore_warning_once")
def test_a_log_that_warns_once_breaks_no_graph(name, monkeypatch):
    monkeypatch.setattr(logging.Logger, "warning_once", lambda self, text: self.warning(text), raising=False)
    log = logging.getLogger(name)

    def noted(x):
        log.warning_once("a line for the log")
        return x + 1

    _torch.ignore_warning_once()
    assert torch.compile(noted, backend="eager", fullgraph=True)(torch.zeros(1)) == 1


@canary("trace_gathered_parts")
def test_joining_gathered_parts_breaks_no_graph(name):
    _torch.trace_gathered_parts()
    join = getattr(torch._utils, "_maybe_view_chunk_cat", None)
    if join is None:
        pytest.skip("collectives join their parts in another way")
    parts = torch.arange(12.0).reshape(4, 3)
    joined = torch.compile(lambda value: join(value, 2, 1) + 1, backend="eager", fullgraph=True)(parts)
    assert torch.equal(joined, torch.cat(parts.chunk(2), 1) + 1)


@canary("ConstantSource", "DimDynamic", "ShapeEnv")
def test_symbols_of_our_own_and_what_is_assumed_of_them(name):
    env = _torch.ShapeEnv()
    source = _torch.ConstantSource("length")
    symbol = env.create_symbol(7, source, _torch.DimDynamic.DYNAMIC)
    length = env.create_symintnode(symbol, hint=7, source=source)
    mode = _torch.FakeTensorMode(shape_env=env, static_shapes=True)
    with mode:
        made = torch.empty_strided([length * 2], [1])
    assert made.shape[0].node.expr == 2 * symbol and made.shape[0].node.expr.xreplace({symbol: 3}) == 6
    assert bool(length > 4)
    (guard,) = env.guards
    assert guard.expr.xreplace({symbol: sympy.Integer(9)}) == sympy.true
    assert guard.expr.xreplace({symbol: sympy.Integer(3)}) == sympy.false
    assert 7 in env.var_to_range[symbol] and env.replacements.get(symbol, symbol) == symbol


# Capture


class Writes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("table", torch.ones(2))

    def forward(self, x, y):
        y.add_(1)
        with torch.autocast("cpu", torch.bfloat16):
            result = self.layer(x + self.table)
        return (result.mul_(2),)


def functional(module, *given):
    """The graph of a module as it is captured, and its nodes that write into inputs."""
    with torch.no_grad():
        return capture.functional(module, given, {**dict(module.named_parameters()), **dict(module.named_buffers())})


@canary(
    "FunctionalTensor", "FunctionalTensorMode", "python_dispatcher", "enter_autocast", "exit_autocast", "use_lazy_graph_module"
)  # fmt: skip
def test_capture_is_functional_and_before_dispatch(name):
    captured, written = functional(Writes(), torch.ones(2), torch.ones(2))
    found = targets(captured.graph)
    assert aten.linear.default in found and aten.mul.Tensor in found and aten.mul_.Tensor not in found
    assert _torch.enter_autocast in found and _torch.exit_autocast in found
    assert [*written] == [1] and written[1].target is aten.add.Tensor
    placeholders = captured.graph.find_nodes(op="placeholder")
    assert len(placeholders) == 2 + 3 and all(isinstance(node.meta["val"], _torch.FakeTensor) for node in placeholders)
    assert isinstance(captured, _torch.LazyGraphModule) and not hasattr(captured, "_code")
    assert "tolist" in vars(_torch.FunctionalTensor)  # it answers by itself


@canary("preserve_rng_state")
def test_what_is_seeded_within_is_as_it_was(name):
    torch.manual_seed(1)
    with _torch.preserve_rng_state():
        torch.manual_seed(2)
    assert torch.initial_seed() == 1


@canary("fx_graph_cse")
def test_equal_nodes_become_one(name):
    graph = make_fx(lambda x: x.sin() + x.sin())(torch.ones(2)).graph
    assert targets(_torch.fx_graph_cse(graph)).count(aten.sin.default) == 1


@canary("open_vmap", "close_vmap", "is_transform")
def test_a_vmap_in_a_graph_has_borders(name):
    (graph,), _ = dynamo_graphs(torch.vmap(lambda x: x * 2), torch.ones(3, 2))
    found = targets(graph.graph)
    assert found.count(_torch.open_vmap) == found.count(_torch.close_vmap) == 1
    assert _torch.is_transform(_torch.open_vmap) and _torch.is_transform(_torch.close_vmap)
    assert not any(map(_torch.is_transform, (operator.mul, torch.mul, aten.mul.Tensor, "output")))
    begins = next(node for node in graph.graph.nodes if node.target is _torch.open_vmap)
    assert begins.args[0] == 3
    _torch.open_vmap(*begins.args)
    _torch.close_vmap()


@canary("auto_functionalized_v2")
def test_an_op_that_writes_is_spelled_without_the_write(name):
    with torch.library._scoped_library("canary", "DEF") as library:
        library.define("add_one(Tensor(a!) x) -> ()")
        library.impl("add_one", lambda x: [x.add_(1)].clear(), "CPU")
        before = torch.zeros(2)
        _, written = _torch.auto_functionalized_v2(
            torch.ops.canary.add_one.default, _x_base_index=0, _all_bases=[before]
        )
    assert torch.equal(written, torch.ones(2)) and torch.equal(before, torch.zeros(2))


@canary("FakeTensor", "FakeTensorMode")
def test_fake_tensors_have_sizes_and_no_values(name):
    mode = _torch.FakeTensorMode(shape_env=_torch.ShapeEnv(), static_shapes=True)
    fake = mode.from_tensor(torch.ones(2, 3))
    assert isinstance(fake, _torch.FakeTensor) and fake.fake_mode is mode and fake.shape == (2, 3)
    assert (fake @ fake.t()).shape == (2, 2)
    with _torch.FakeTensorMode(allow_non_fake_inputs=True):
        assert isinstance(torch.ones(2) + 1, _torch.FakeTensor)


@canary("DataDependentOutputException", "DynamicOutputShapeException", "GuardOnDataDependentSymNode")
def test_values_of_fake_tensors_are_refused(name):
    with _torch.FakeTensorMode():
        with pytest.raises(_torch.DataDependentOutputException):
            torch.ones(1).item()
        with pytest.raises(_torch.DynamicOutputShapeException):
            torch.ones(1).nonzero()
    with _torch.FakeTensorMode(shape_env=_torch.ShapeEnv()), pytest.raises(_torch.GuardOnDataDependentSymNode):
        bool(torch.ones(1).long().item() > 3)


@canary("no_torch_function")
def test_modes_do_not_see_what_runs_without_them(name):
    class Seen(torch.overrides.TorchFunctionMode):
        ops = 0

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.ops += 1
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        with _torch.no_torch_function():
            assert torch.add(torch.ones(1), 1) == 2
        before = seen.ops
        torch.add(torch.ones(1), 1)
    assert not before and seen.ops == 2


@canary("set_grad_mode")
def test_gradient_modes_stand_in_a_graph(name):
    class Within(nn.Module):
        def forward(self, x):
            with torch.enable_grad():
                return (x * 2,)

    captured, _ = functional(Within(), torch.ones(2))
    assert _torch.set_grad_mode in {node.target for node in captured.graph.nodes}


@canary("enter_inference_mode", "exit_inference_mode")
def test_inference_mode_in_a_graph(name):
    def function(x):
        with torch.inference_mode():
            return x + 1

    (graph,), _ = dynamo_graphs(function, torch.ones(1))
    found = targets(graph.graph)
    assert _torch.enter_inference_mode in found and _torch.exit_inference_mode in found


@canary("LazyGraphModule")
def test_code_is_written_when_it_is_run(name):
    graph = fx.symbolic_trace(lambda x: torch.neg(x)).graph
    module = _torch.LazyGraphModule(nn.Module(), graph)
    assert isinstance(module, fx.GraphModule) and not hasattr(module, "_code")
    assert torch.equal(module(torch.ones(1)), -torch.ones(1)) and "neg" in module.code
    next(iter(graph.find_nodes(op="call_function", target=torch.neg))).target = torch.abs
    module.recompile()
    assert torch.equal(module(-torch.ones(1)), torch.ones(1))


@canary("pytree")
def test_arguments_are_trees_of_leaves(name):
    tree = ([1, {"a": torch.ones(1)}], None)
    leaves, spec = _torch.pytree.tree_flatten(tree)
    assert leaves[0] == 1 and leaves[2] is None and isinstance(spec, _torch.pytree.TreeSpec)
    assert _torch.pytree.tree_leaves(tree)[1] is leaves[1]
    assert _torch.pytree.tree_unflatten(leaves, spec) == tree
    assert _torch.pytree.tree_map(lambda leaf: leaf, tree) == tree
    assert _torch.pytree.tree_map_only(int, lambda leaf: leaf + 1, [1, "a"]) == [2, "a"]
    pairs, _ = _torch.pytree.tree_flatten_with_path(tree)
    assert [_torch.pytree.keystr(path) for path, _ in pairs] == ["[0][0]", "[0][1]['a']", "[1]"]


@canary("TorchDispatchMode")
def test_a_mode_sees_ops(name):
    seen = []

    class Sees(_torch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Sees():
        torch.randn(1)
    assert any(torch.Tag.nondeterministic_seeded in func.tags for func in seen)


@canary("no_modes")
def test_modes_can_be_left(name):
    with _torch.FakeTensorMode():
        with _torch.no_modes():
            assert not isinstance(torch.ones(1), _torch.FakeTensor)
        assert isinstance(torch.ones(1), _torch.FakeTensor)


@canary("is_traceable_wrapper_subclass", "keeps_dispatch")
def test_tensors_made_of_tensors_are_known(name):
    from torch.testing._internal.two_tensor import TwoTensor

    one = torch.ones(1)
    assert _torch.is_traceable_wrapper_subclass(TwoTensor(one, one))
    assert not _torch.is_traceable_wrapper_subclass(nn.Parameter(one))
    assert _torch.keeps_dispatch(nn.Parameter) and not _torch.keeps_dispatch(TwoTensor)


# What is looked up on objects


@canary("has_forward_hooks")
def test_hooks_are_known(name):
    module = nn.Linear(2, 2)
    assert not _torch.has_forward_hooks(module)
    for register in (module.register_forward_hook, module.register_forward_pre_hook):
        handle = register(lambda *given: None)
        assert _torch.has_forward_hooks(module)
        handle.remove()
        assert not _torch.has_forward_hooks(module)


@canary("tables_of")
def test_weights_stand_in_two_dictionaries(name):
    module = nn.BatchNorm1d(2)
    parameters, buffers = _torch.tables_of(module)
    assert parameters == dict(module.named_parameters()) and buffers == dict(module.named_buffers())
    parameters["weight"] = new = nn.Parameter(torch.zeros(2))
    assert module.weight is new


@canary("memory_key")
def test_views_share_memory(name):
    with _torch.FakeTensorMode():
        fake = torch.ones(4)
        assert _torch.memory_key(fake) == _torch.memory_key(fake[1:].view(1, 3)) != _torch.memory_key(fake.clone())
    real = torch.ones(4)
    assert _torch.memory_key(real) == _torch.memory_key(real[2:]) != _torch.memory_key(real.clone())


@canary("version_of")
def test_writes_are_counted(name):
    tensor = torch.zeros(2)
    before = _torch.version_of(tensor)
    tensor[0] = 1
    assert _torch.version_of(tensor) > before


@canary("base_of")
def test_a_view_has_a_base(name):
    tensor = torch.zeros(2, 3)
    assert _torch.base_of(tensor) is None and _torch.base_of(tensor.view(6)) is tensor


# Inductor, and CUDA


@canary("TracingContext", "tracing")
def test_a_context_is_the_present_one(name):
    context = _torch.TracingContext(_torch.FakeTensorMode())
    with _torch.tracing(context):
        assert _torch.TracingContext.try_get() is context
    assert _torch.TracingContext.try_get() is None


@canary("hash_compilers")
def test_compilers_are_hashed_beside(name):
    from torch._inductor.codecache import torch_key

    _torch.hash_compilers().join()
    assert torch_key() is torch_key()  # known from then on


@canary("inductor_config", "list_mode_options", "maybe_warm_pool")
def test_options_of_inductor(name):
    known = _torch.inductor_config.get_config_copy()
    assert "max_autotune" in known and set(_torch.list_mode_options("max-autotune")) <= set(known)
    assert callable(_torch.maybe_warm_pool)  # starting processes is left to those who need them


@canary("compile_fx", "kernels.inductor")
def test_inductor_compiles_a_graph(name):
    graph, x = make_fx(lambda x: (x + 1,))(torch.ones(4)), torch.ones(4)
    compiled = (
        for_kernels.inductor(graph, [x])
        if name.startswith("kernels")
        else _torch.compile_fx(graph, [x], config_patches={"max_autotune": False})
    )
    assert torch.equal(compiled(x)[0], x + 1)


@canary("copy_tensors")
def test_lists_of_tensors_are_copied(name):
    targets = [torch.zeros(2), torch.zeros(3)]
    _torch.copy_tensors(targets, [torch.ones(2), torch.ones(3)])
    assert all(bool(target.all()) for target in targets)


@canary("add_tensors", "scale_tensors")
def test_lists_of_tensors_are_added_and_scaled(name):
    targets = [torch.ones(2), torch.ones(3, dtype=torch.bfloat16)]
    _torch.scale_tensors(targets, 0.5)
    _torch.add_tensors(targets, [torch.ones(2), torch.ones(3, dtype=torch.bfloat16)], alpha=2.0)
    assert all(target.tolist() == [2.5] * len(target) for target in targets)


class Doubled(nn.Module):
    """What is captured ahead of time below."""

    def forward(self, x, y=2):
        return x * y + FACTOR


FACTOR = 1


@canary(
    "CAPTURES_AHEAD", "capture_ahead", "CapturedAhead", "SerializedCode", "guards_on_disk", "unwritable_guards", "names_in_guards",
    "sizes_seen",
)  # fmt: skip
def test_a_capture_is_kept(name):
    from ras_compile.capture.kept import Kept, keep

    model, x = Doubled(), torch.ones(3)
    content = keep(model, (x,), {})
    kept = Kept(model, content, (x,), {}, lambda graph, values: graph)
    assert kept.fits(model, (x,), {}) and torch.equal(kept(model, (x,), {}), 2 * x + 1)
    assert not kept.fits(model, (torch.ones(4),), {}) and not kept.fits(model, (x, 3), {})
    assert "FUNCTION_MATCH" in _torch.unwritable_guards() and _torch.names_in_guards()["torch"] is torch
    assert isinstance(_torch.sizes_seen(Doubled.forward.__code__), dict)


@canary("globally_hooked")
def test_hooks_of_all_modules_are_seen(name):
    assert not _torch.globally_hooked()
    handle = nn.modules.module.register_module_forward_hook(lambda *given: None)
    assert _torch.globally_hooked()
    handle.remove()


@canary("runs_plain")
def test_a_stance_is_seen(name):
    assert not _torch.runs_plain()
    with torch.compiler.set_stance("force_eager"):
        assert _torch.runs_plain()


@canary("backend_of")
def test_the_backend_behind_what_was_compiled(name):
    seen = []
    compiled = torch.compile(
        nn.Identity(), backend=lambda graph, inputs, options: seen.append(options), options={"a": 1}
    )
    _torch.backend_of(compiled)(None, [])
    assert seen == [{"a": 1}]


@canary("CustomGraphPass")
def test_a_pass_is_known_by_what_it_says(name):
    class Pass(_torch.CustomGraphPass):
        def __call__(self, graph):
            pass

        def uuid(self):
            return "known"

    graph, x = make_fx(lambda x: (x - 1,))(torch.ones(4)), torch.ones(4)
    compiled = _torch.compile_fx(graph, [x], config_patches={"post_grad_custom_post_pass": Pass()})
    assert torch.equal(compiled(x)[0], x - 1)


@canary("OperatorBase")
def test_ops_of_any_kind(name):
    assert isinstance(aten.add.Tensor, _torch.OperatorBase)
    assert isinstance(torch.ops.higher_order.invoke_subgraph, _torch.OperatorBase)


@canary("kernels.launched_by_inductor")
def test_what_inductor_launches(name, monkeypatch, tmp_path):
    pytest.importorskip("triton")
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tuner, folder = CachingAutotuner.__new__(CachingAutotuner), tmp_path / ("A" * 52)
    tuner.launchers = [SimpleNamespace(cache_hash=folder.name)]
    folder.mkdir()
    for file in ("k.cubin", "k.json", "__grp__k.json", "k.ttir"):
        (folder / file).write_bytes(b"{}")
    monkeypatch.setattr(PyCodeCache, "modules", [SimpleNamespace(kernel=tuner)])
    assert sorted(for_kernels.launched_by_inductor()) == [folder / "k.cubin", folder / "k.json"]


@canary("MISSING")
def test_nothing_that_could_be_there_is_missing(name):
    assert not _torch.MISSING


@canary("addresses_equal", "current_raw_stream", "clear_cublas_workspaces")
@needs_cuda
def test_cuda_builds_look_at_addresses_and_streams(name):
    one, two = torch.ones(1, device="cuda"), torch.ones(1, device="cuda")
    assert _torch.addresses_equal([one, two], [0, two.data_ptr()], [1])
    assert not _torch.addresses_equal([one, two], [0, one.data_ptr()], [1])
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        assert _torch.current_raw_stream(one.device.index) == stream.cuda_stream
    one.view(1, 1) @ two.view(1, 1)
    _torch.clear_cublas_workspaces()


@canary("process_group", "process_store")
def test_a_group_by_its_name(name, tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        world = torch.distributed.group.WORLD
        assert _torch.process_group(world.group_name) == _torch.process_group(world) == ((0,), 0)
        store = _torch.process_store()
        store.set("a", "1")
        assert store.get("a") == b"1"
    finally:
        torch.distributed.destroy_process_group()


# The kernels' own


@canary("kernels.cache_folder")
def test_inductor_has_a_folder(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert for_kernels.cache_folder() == tmp_path


def double(x, SIZE: tl.constexpr):  # noqa: F821
    """A kernel; Triton reads its source."""
    o_x = tl.arange(0, SIZE)  # noqa: F821
    tl.store(x + o_x, tl.load(x + o_x) * 2)  # noqa: F821


@canary("kernels.compiled_by_triton", "kernels.give_to_triton")
def test_what_triton_has_compiled_is_found_and_taken(name, monkeypatch, tmp_path):
    """It compiles for a GPU that is not here, and reads the sources of the kernel again in another folder."""
    triton = pytest.importorskip("triton")
    monkeypatch.setitem(globals(), "tl", triton.language)
    made = triton.JITFunction(double)
    source = triton.compiler.ASTSource(made, signature={"x": "*fp32", "SIZE": "constexpr"}, constexprs={(1,): 16})
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "one"))
    variant = triton.compile(source, target=target)
    made.device_caches[0] = ({"a key": variant}, {}, target, None, None)  # as a launch leaves it
    monkeypatch.setattr(sys.modules["ras_compile.kernels.gemm"], "double", made, raising=False)
    files = for_kernels.compiled_by_triton()
    assert sorted(path.suffix for path in files) == [".cubin", ".json"]
    (folder,) = {path.parent.name for path in files}
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "two"))
    for_kernels.give_to_triton(folder, {path.name: path.read_bytes() for path in files}, 0)
    monkeypatch.setattr(source, "make_ir", None)  # nothing can be compiled any more
    again = triton.compile(source, target=target)
    assert again.kernel == variant.kernel and again.metadata == variant.metadata


@canary("kernels.linear_gelu_tanh")
def test_a_product_and_its_gelu(name):
    x, weight, bias = torch.randn(3, 4), torch.randn(5, 4), torch.randn(5)
    linear = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(  # CPUs take the exact form: `linear_gelu` runs this on CUDA alone
        for_kernels.linear_gelu_tanh(x, weight, bias), nn.functional.gelu(linear), rtol=0, atol=2e-3
    )
