"""All of PyTorch that is used here and that PyTorch does not promise to keep: one name for each thing, in this file alone.

Each line says what a name is for, and what breaks without it. ``canaries.py`` looks at all of them on a PyTorch that has
not been tested; ``tests/test_torch_canaries.py`` holds each of them to what is relied on. What the kernels need stands in
``kernels/_torch.py``, as they import nothing else of this package.
"""

# ruff: noqa: F401, I001  (what is imported is for others; the imports stand by what they are for)

from __future__ import annotations

import logging
import pickle
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from operator import attrgetter
from types import CodeType
from typing import Any

import torch
from torch import Tensor, fx, nn

from ras_compile.versions import cannot_run

try:
    # What ops are. Without: no rule finds its op.
    from torch._ops import OperatorBase  # an op of any kind, those that take graphs among them
    from torch._ops import OpOverload  # one overload of an op: the target of every node of a captured graph

    # Dynamo. Without: a graph's inputs, its breaks and its caller are not known.
    from torch._dynamo.backends.registry import lookup_backend  # the option `inner_backend` by name
    from torch._dynamo.convert_frame import compile_lock  # held by who compiles; without it two threads mix their modes
    from torch._dynamo.eval_frame import OptimizedModule  # what `torch.compile(module)` returns
    from torch._dynamo.eval_frame import _TorchDynamoContext as DynamoContext  # its methods call what was compiled
    from torch._dynamo import exc as _exc  # what restarts a capture
    from torch._dynamo import symbolic_convert as _symbolic_convert  # the code that is being captured
    from torch._dynamo import convert_frame as _convert_frame  # which frames were compiled, and how often
    from torch._dynamo import guards as _guards  # what stands in the place of guards that are gone
    from torch._dynamo import types as _dynamo_types  # what is done with a frame: compile it, or pass it over
    from torch._C._dynamo import eval_frame as _eval_frame  # what was compiled of a frame
    from torch._dynamo import pgo as _pgo  # which numbers of a call were the same so far, and are constants for Dynamo
    from torch._dynamo.exc import InvalidBackend  # an unknown name of a backend; without it the error is Dynamo's own
    from torch._dynamo.exc import TorchRuntimeError  # a model that fails while it is traced; as above

    # names what is behind a break
    from torch._dynamo.resume_execution import TORCH_DYNAMO_RESUME_IN_PREFIX as RESUME_PREFIX

    # names a symbol of ours; without it lengths of prompts are compiled one by one
    from torch._dynamo.source import ConstantSource

    # Capture. Without: no graph is captured.
    from torch._dispatch.python import enable_python_dispatcher as python_dispatcher  # sizes that are symbols stay so
    from torch._dynamo.utils import counters as _counters  # what Inductor has found in its cache
    from torch._dynamo.utils import preserve_rng_state  # a model that seeds itself seeds nothing while it is captured
    from torch._functorch.compile_utils import fx_graph_cse  # equal nodes become one: facts are computed once

    # ends a vmap, as flex_attention's masks have
    from torch._functorch.predispatch import _vmap_decrement_nesting as close_vmap
    from torch._functorch.predispatch import _vmap_increment_nesting as open_vmap  # begins it

    # an op that writes, as Inductor reads it
    from torch._higher_order_ops.auto_functionalize import auto_functionalized_v2

    # a value is needed; the model is refused by line
    from torch._subclasses.fake_tensor import DataDependentOutputException
    from torch._subclasses.fake_tensor import DynamicOutputShapeException  # a size depends on values; as above
    from torch._subclasses.fake_tensor import FakeTensor  # a tensor with sizes and without values
    from torch._subclasses.fake_tensor import FakeTensorMode  # makes them; all shapes of nodes come from it

    from torch._subclasses.functional_tensor import FunctionalTensor  # what writes is captured as what it leaves
    from torch._subclasses.functional_tensor import FunctionalTensorMode  # makes it so; both stand below the tracer
    from torch.amp.autocast_mode import _enter_autocast as enter_autocast  # begins an autocast region in a graph
    from torch.amp.autocast_mode import _exit_autocast as exit_autocast  # ends it

    # in a graph; left out of captures
    from torch.autograd.grad_mode import _enter_inference_mode as enter_inference_mode
    from torch.autograd.grad_mode import _exit_inference_mode as exit_inference_mode  # as above
    from torch._C import DisableTorchFunction as no_torch_function  # what runs within is no op of the model's
    from torch._C import _set_grad_enabled as set_grad_mode  # both ends of no_grad in a graph; left out of captures
    from torch.fx.experimental.symbolic_shapes import DimDynamic  # says that a length varies
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode  # as DataDependentOutputException
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # symbols of lengths, and what was assumed of them

    # writes a graph's code when it is first run; plain modules write it each time that a graph is given to them
    from torch.fx._lazy_graph_module import _LazyGraphModule as LazyGraphModule
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as use_lazy_graph_module  # and the tracer's as well
    from torch.utils import _pytree as pytree  # arguments as lists of leaves
    from torch.utils._python_dispatch import TorchDispatchMode  # sees ops run: whether a scheduler draws random numbers

    # real tensors while something is traced
    from torch.utils._python_dispatch import _disable_current_modes as no_modes

    # a tensor made of others, such as quantised weights
    from torch.utils._python_dispatch import is_traceable_wrapper_subclass

    # Inductor. Without: programs are not compiled (`inner_backend="eager"` runs them).
    # a context for PyTorch's caches on disk, which are passed over without
    from torch._guards import TracingContext, tracing
    from torch._inductor import config as inductor_config  # its options, to name one that is misspelled
    from torch._inductor import list_mode_options  # what torch.compile's `mode` stands for
    from torch._inductor.async_compile import maybe_warm_pool  # starts the processes that compile kernels early
    from torch._inductor.compile_fx import compile_fx  # compiles one program
    from torch._inductor.custom_graph_pass import CustomGraphPass  # by which Inductor's caches know our sources
except ImportError as error:
    raise cannot_run(str(error).split(" (")[0]) from error  # without the file


# What PyTorch has in some builds or versions only, and what is done where it is missing.

try:
    # Capture ahead of the first call, with guards that can be written to disk. Without: a loaded start captures anew.
    from torch._dynamo.aot_compile import aot_compile_fullgraph as _aot_compile_fullgraph

    # what a backend returns to it
    from torch._dynamo.aot_compile_types import SerializableCallable as _SerializableCallable
    from torch._dynamo.hooks import Hooks as _Hooks  # chooses the guards

    # what a function's globals hold of Python's own
    from torch._dynamo.output_graph import get_builtins_dict as _builtins_of
    from torch._dynamo.package import SerializedCode  # bytecode on disk
    from torch._dynamo.package import load_guard_manager as _load_guard_manager  # guards from disk
except ImportError:
    pass
# Whether all of that is there.
CAPTURES_AHEAD = "_load_guard_manager" in globals()


def _copy_each(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


# Compares the addresses of some tensors of a list with known ones, in CUDA builds: 0.26 ms for 682 weights on the host of an
# H200, 0.16 ms less than to ask for each.
addresses_equal: Callable[..., bool] | None = getattr(torch._C, "_tensors_data_ptrs_at_indices_equal", None)
# The number of a device's current stream, in CUDA builds: to make an object of the stream costs the host 20 us.
current_raw_stream: Callable[[int], int] = getattr(
    torch._C, "_cuda_getCurrentRawStream", lambda index: torch.cuda.current_stream(index).cuda_stream
)
# Copies a list of tensors in one launch; one by one without.
copy_tensors: Callable[[Sequence[Tensor], Sequence[Tensor]], Any] = getattr(torch, "_foreach_copy_", _copy_each)
# Add a list of tensors, `alpha` times, to another one, and multiply a list by a number, each in one launch.
add_tensors: Callable[..., Any] = torch._foreach_add_
scale_tensors: Callable[..., Any] = torch._foreach_mul_


@contextmanager
def compile_session() -> Iterator[None]:
    """`torch.compiler.is_compiling()` is True meanwhile; while FX traces, other threads could call no compiled function without."""
    before, torch.compiler._is_compiling_flag = torch.compiler._is_compiling_flag, True
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def clear_cublas_workspaces() -> None:
    """Drops cuBLAS's workspaces, so that each CUDA graph gets its own; without it programs run without CUDA graphs."""
    torch._C._cuda_clearCublasWorkspaces()


# Those of them that this PyTorch lacks, though it could have them.
MISSING: list[str] = [
    name
    for home, name, wanted in (
        (torch._C, "_tensors_data_ptrs_at_indices_equal", torch.version.cuda),
        (torch._C, "_cuda_getCurrentRawStream", torch.version.cuda),
        (torch._C, "_cuda_clearCublasWorkspaces", torch.version.cuda),
        (torch, "_foreach_copy_", True),
    )
    if wanted and not hasattr(home, name)
]


# What is looked up on PyTorch's objects.

# The attribute of a module that `module.compile()` sets; `attach` works through it.
COMPILED_CALL = "_compiled_call_impl"
# How often a tensor was written; without it a latent that was written passes for the old.
version_of = attrgetter("_version")
# What a tensor is a view of, or None; without it a table of places is compiled anew where rows and columns were equal at first.
base_of = attrgetter("_base")


def hash_compilers() -> threading.Thread:
    """Reads and hashes the files of PyTorch and Triton in another thread: Inductor's caches ask for that once in a process, and
    without it the first program waits half a second for it."""
    from torch._inductor.codecache import torch_key
    from torch._inductor.runtime.triton_compat import triton_key

    def hash_all() -> None:
        torch_key()
        if find_spec("triton"):
            triton_key()

    thread = threading.Thread(target=hash_all, daemon=True)
    thread.start()
    return thread


def at_reset(backend: Callable[..., Any], forget: Callable[[], None]) -> None:
    """Calls ``forget`` at Dynamo's reset, if ``backend`` was used before; without it, plans from before a reset serve behind it."""
    vars(backend)["reset"] = forget


def compilations() -> dict:
    """How often each frame has been compiled so far; for :func:`forget_compilations`."""
    return dict(_convert_frame.FRAME_COMPILE_COUNTER)


def forget_compilations(before: dict) -> None:
    """Drops what Dynamo compiled since :func:`compilations` said `before`; what it compiled earlier stays.

    A call that raises while it is captured leaves a part of a graph, under guards that other calls may meet, too, or has Dynamo
    pass over the frame from now on: those calls would then run in parts for good. Frames that are passed over for another
    reason are looked at once more.
    """
    for seen in list(_convert_frame.input_codes.seen):
        code = seen()
        if code is None:
            continue
        _look_again(code)
        for entry in _eval_frame._debug_get_cache_entry_list(code):
            made, guards = entry.compile_id, entry.guard_manager
            if made.frame_compile_id >= before.get(made.frame_id, 0) and guards.extra_state is not None:
                gone = _guards.DeletedGuardManagerWrapper("the call that it was compiled in raised an error")
                guards.extra_state.invalidate(entry, gone)


def look_again_at(function: Callable[..., Any] | None) -> None:
    """Lets Dynamo capture a function, and what it wraps, though it passes over it because of another model of its class.

    Dynamo passes over the code of a function for good once it could not capture it, whatever module it belonged to.
    """
    while function is not None:
        code = getattr(function, "__code__", None)
        if isinstance(code, CodeType):
            _look_again(code)
        function = getattr(function, "__wrapped__", None)


def _look_again(code: CodeType) -> None:
    action = _dynamo_types.FrameAction.DEFAULT
    _eval_frame.set_code_exec_strategy(code, _dynamo_types.FrameExecStrategy(action, action))


def programs_found() -> int:
    """How many programs Inductor has found in its cache so far and did not have to compile."""
    return _counters["inductor"]["fxgraph_cache_hit"]


def compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    """What a module calls in place of its forward since `module.compile()`; without it `attach` finds nothing to follow."""
    return getattr(module, COMPILED_CALL)


def set_compiled_call(module: nn.Module, call: Callable[..., Any] | None) -> None:
    """Lets a module call something else in place of its forward; None: what its class says."""
    setattr(module, COMPILED_CALL, call)


def call_uncompiled(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Calls a module with its hooks and without what it was compiled to; a traced model would call itself without."""
    return module._call_impl(*args, **kwargs)


def original(module: Any) -> Any:
    """The user's module behind what `torch.compile` returned; anything else itself."""
    return getattr(module, "_orig_mod", module)


def has_forward_hooks(module: nn.Module) -> bool:
    """Whether hooks run before or after a module's forward; without it tracing would leave them out."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def tables_of(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The dictionaries of a module's own parameters and buffers; without it weights that are exchanged go unseen."""
    return module._parameters, module._buffers


def memory_key(tensor: Tensor) -> int:
    """Equal for tensors that share memory, fake ones too, while both live; without it writes through views go unseen."""
    return tensor.untyped_storage()._cdata


def schema_of(op: Any) -> Any:
    """Names, defaults and aliases of an overload's arguments and results; no rule reads its arguments without."""
    return op._schema


def is_composite(op: OpOverload) -> bool:
    """Whether PyTorch puts an op together from others; without it ops that have no rule are not spelled out."""
    return op.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)


def source_of(placeholder: fx.Node) -> str | None:
    """Dynamo's expression of what a placeholder stands for, such as ``L['kwargs']['timestep']``; all inputs are named by it."""
    source = getattr(placeholder, "_dynamo_source", None)
    if source is None and (held := placeholder.meta.get("grapharg")) is not None:
        source = held.source
    name = getattr(source, "name", None)
    name = name() if callable(name) else name
    return name if isinstance(name, str) else None


def set_source(placeholder: fx.Node, name: str) -> None:
    """Gives a placeholder of ours such an expression."""
    placeholder._dynamo_source = _Source(name)


@dataclass(frozen=True)
class _Source:
    name: str


def keeps_dispatch(kind: type[Tensor]) -> bool:
    """Whether a class of tensors leaves ops as they are, below its functions; with its own, a plain tensor means another thing."""
    own = kind.__mro__[: kind.__mro__.index(Tensor)]
    return not any("__torch_dispatch__" in vars(base) for base in own)


def process_group(name: Any) -> tuple[tuple[int, ...], int]:
    """The members of the group of processes that a collective names, and this one's place among them; without it no model on
    several devices is sparse."""
    resolve: Callable[[Any], Any] = torch.distributed.distributed_c10d._resolve_process_group
    group = resolve(name) if isinstance(name, str) else name
    return tuple(torch.distributed.get_process_group_ranks(group)), group.rank()


def process_store() -> Any:
    """The store by which all processes found each other; without it they agree on nothing."""
    return torch.distributed.distributed_c10d._get_default_store()


def why_graph_ends(graph: fx.GraphModule) -> Any:
    """Dynamo's reason (``reason``, ``user_stack``, ``graph_break``) for a graph's end; without it parts pass for models."""
    return getattr(graph, "compile_subgraph_reason", None)


def copy_reason(graph: fx.GraphModule, copy: fx.GraphModule) -> fx.GraphModule:
    """Gives a copy of Dynamo's graph the reason of the graph's end, and returns it."""
    reason = why_graph_ends(graph)
    if reason is not None:
        copy.compile_subgraph_reason = reason
    return copy


def is_transform(target: Any) -> bool:
    """Whether a node's target belongs to a `torch.func` transform; tracing one a second time leaves its stack open."""
    return (getattr(target, "__module__", None) or "").startswith(("torch._functorch", "torch._dynamo._trace_wrapped"))


def vary_inputs(number: Callable[[str, Any], bool], sizes: Mapping[str | None, Collection[int]]) -> None:
    """Restarts the present capture where Dynamo took for constants, or for one symbol, what is to vary from call to call.

    Without it Dynamo finds out at a later call that a number or a size varies, and makes another graph.

    Args:
        number: whether a number is to be an input; takes Dynamo's expression of it, and its value.
        sizes: dimensions of tensors, by Dynamo's expressions of them, whose sizes are to be symbols of their own.
    """
    capture, found = getattr(_symbolic_convert.tls, "current_tx", None), False
    if capture is None:  # somebody else's graph
        return
    place = capture.f_code.co_filename, capture.f_code.co_firstlineno, capture.f_code.co_name
    for known, state in _pgo.get_code_state().items():
        if (known.filename, known.firstlineno, known.name) == place:
            for name, entry in state.automatic_dynamic.items():
                if isinstance(entry.scalar, int | float) and number(name, entry.scalar):
                    entry.scalar, found = _pgo.auto_dynamic, True
                of, base, _ = name.partition("._base")  # what a view is one of has sizes for itself
                vary = sizes.get(of)
                if vary and isinstance(entry.size, tuple):
                    varied = tuple(_pgo.auto_dynamic if base or dim in vary else n for dim, n in enumerate(entry.size))
                    entry.size, found = varied, found or varied != entry.size
    if found:
        capture.speculation_log.clear()  # the same code may be run by other steps where a number is a symbol
        raise _exc.TensorifyScalarRestartAnalysis(restart_reason="what varies from call to call is an input")


def unwritable_guards() -> frozenset[str]:
    """Kinds of guards that cannot be written to disk: of functions, classes and modules, which are others in each process."""
    return frozenset(_guards.CheckFunctionManager.UNSUPPORTED_SERIALIZATION_GUARD_TYPES)


@dataclass(frozen=True)
class CapturedAhead:
    """What is captured of a call ahead of time.

    Attributes:
        guards: those that can be written.
        code: Dynamo's code, which calls the graph.
        backend: what that code calls the graph.
        imports: modules by what that code and guards call them.
        modules: those whose code was followed.
    """

    guards: bytes
    code: CodeType
    backend: str
    imports: dict[str, str]
    modules: set[str]


def capture_ahead(
    forward: Callable[..., Any],
    args: tuple,
    kwargs: dict[str, Any],
    chosen: Callable[[Sequence[Any]], list[bool]],
    backend: Callable[[fx.GraphModule, Sequence[Any]], None],
) -> CapturedAhead:
    """Captures a call ahead of time with fixed sizes.

    Args:
        chosen: which guards are written.
        backend: takes the graph and its inputs.
    """

    class Uncalled(_SerializableCallable):
        """What capture ahead of time is given for a compiled graph: nobody calls it."""

        @classmethod
        def serialize_compile_artifacts(cls, fn: Any) -> bytes:
            return b""

        @classmethod
        def deserialize_compile_artifacts(cls, data: bytes) -> Any:
            return cls()

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError

    def take(graph: fx.GraphModule, inputs: Sequence[Any]) -> Uncalled:
        backend(graph, inputs)
        return Uncalled()

    config: Any = torch._dynamo.config
    with config.patch(automatic_dynamic_shapes=False):
        found = _aot_compile_fullgraph(forward, (args, kwargs), hooks=_Hooks(guard_filter_fn=chosen), backend=take)
    told = found._artifacts
    modules = {each.module for each in told.source_info.inlined_sources}
    env = told.runtime_env
    return CapturedAhead(told.guards_state, env.bytecode, told.backend_id, dict(env.import_sources), modules)


def guards_on_disk(content: bytes, code: CodeType, scope: dict[str, Any]) -> Any:
    """What checks the guards that capture ahead of time has written; ``scope`` gets Python's own functions by Dynamo's name.

    PyTorch's own function for it imports all of FSDP first, which takes a second, to hold its modules still.
    """
    if "torch.distributed.fsdp" in sys.modules:
        from torch._dynamo.package import load_guards_state

        state = load_guards_state(content)
    else:
        state = pickle.loads(content)
    own = state.output_graph.name_of_builtins_dict_key_in_fglobals
    if own:
        scope[own] = _builtins_of(scope)
    return _load_guard_manager(state, code, scope)


def names_in_guards() -> dict[str, Any]:
    """What Dynamo's expressions may speak of beside arguments and globals, such as `torch`."""
    return dict(_guards._get_closure_vars())


def sizes_seen(code: CodeType) -> dict[str, Any]:
    """What Dynamo has seen of the arguments of a function's calls so far, by its expressions; may be written to, and pickled."""
    return _pgo.get_code_state()[_pgo.CodeId.make(code)].automatic_dynamic


def runs_plain() -> bool:
    """Whether the user wants what was compiled to run uncompiled, or other than it says (`torch.compiler.set_stance`)."""
    config: Any = torch._dynamo.config
    return bool(config.disable) or torch._dynamo.eval_frame._stance.stance != "default"


def globally_hooked() -> bool:
    """Whether hooks are set that run around each module's forward."""
    known = torch.nn.modules.module
    return bool(known._global_forward_hooks or known._global_forward_pre_hooks)


def backend_of(compiled: OptimizedModule) -> Callable[..., Any]:
    """What `torch.compile` was told to call with a graph and its inputs, options included."""
    found: Any = compiled.dynamo_ctx.callback
    while (inner := getattr(found, "_torchdynamo_orig_backend", None)) is not None:
        found = inner
    return found


def line_of_guard(guard: Any) -> str | None:
    """The user's line because of which Dynamo assumed something of a size; a size that it holds is told without it."""
    return getattr(getattr(guard, "sloc", None), "maybe_user_loc", None)


def raise_recompile_limit(count: int) -> None:
    """At least so many compilations of one function at a time, and 64 times as many ever; without it transformers after the
    eighth run uncompiled, and so do all in a process that has attached to a few hundred.
    """
    config: Any = torch._dynamo.config
    for name, least in (("recompile_limit", count), ("accumulated_recompile_limit", 64 * count)):
        entry = config._config[name]  # what is set is of this thread alone: the others read the default
        entry.default = max(entry.default, least)
        if getattr(config, name) < least:
            setattr(config, name, least)


def at_recompile_limit(backend: Callable[..., Any], tell: Callable[[str, int, str], None]) -> None:
    """Has ``tell`` called with the limit's name, its value and a function when Dynamo stops compiling that by ``backend``.

    Dynamo writes that to its log alone, and the function runs plain from then on; without it models of ours do so unnoticed.
    """

    def look(record: logging.LogRecord) -> bool:
        frame = sys._getframe() if str(record.msg).startswith("torch._dynamo hit config.") else None
        while frame is not None and "compiler_fn" not in frame.f_locals:
            frame = frame.f_back
        found = frame and frame.f_locals["compiler_fn"]
        while (inner := getattr(found, "_torchdynamo_orig_backend", getattr(found, "compiler_fn", None))) is not None:
            found = inner
        if found is backend and isinstance(record.args, tuple):
            name, value, function = record.args[:3]
            tell(str(name), int(str(value)), str(function))
        return True

    logging.getLogger("torch._dynamo.convert_frame").addFilter(look)


def trace_gathered_parts() -> None:
    """Dynamo of PyTorch 2.11 passes over a function that a gathering collective calls to join its parts, and so breaks the graph.

    Later ones have this rule of their own.
    """
    rules, name = torch._dynamo.trace_rules, "torch._utils._maybe_view_chunk_cat"
    if name not in rules.manual_torch_name_rule_map and hasattr(torch._utils, name.rpartition(".")[2]):
        rules.manual_torch_name_rule_map[name] = torch._dynamo.variables.UserFunctionVariable
        rules.clear_lru_cache()


def ignore_warning_once() -> None:
    """Dynamo passes over `logger.warning_once`, which is not Python's own; a hook that calls it breaks a model's graph without."""
    config, told = torch._dynamo.config, getattr(logging.Logger, "warning_once", None)
    if told is not None:
        named = hasattr(config, "ignore_logging_functions")
        (config.ignore_logging_functions if named else config.ignore_logger_methods).add(told)
