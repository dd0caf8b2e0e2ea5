"""The inner compiler: Inductor by default, eager and aot_eager for debugging."""

from __future__ import annotations

import difflib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import (
    CustomGraphPass,
    FakeTensor,
    FakeTensorMode,
    InvalidBackend,
    ShapeEnv,
    TracingContext,
    compile_fx,
    inductor_config,
    list_mode_options,
    lookup_backend,
    maybe_warm_pool,
    programs_found,
    tracing,
)
from ras_compile.config import RASConfig
from ras_compile.errors import ConfigError, RASError, UnsupportedGraph, first_line
from ras_compile.kernels.tiles import sources
from ras_compile.notices import fell_back, warn_once

log = logging.getLogger(__name__)
_LAST_PASS = "post_grad_custom_post_pass"  # an option of Inductor
Compiled = Callable[..., Sequence[Any]]


class _OurSources(CustomGraphPass):
    """Changes nothing; with it Inductor's caches on disk know that our ops mean what their source says.

    A tag of these caches (`torch.compiler.config.cache_key_tag`) would say so, too, but Inductor's worker processes do not have
    it, and look up by it which variant of a kernel was the fastest: each process would then measure all of them anew.

    Args:
        given: a pass of the user's own, which is run.
    """

    def __init__(self, given: CustomGraphPass | None) -> None:
        self._given = given

    def __call__(self, graph: fx.Graph) -> None:
        if self._given is not None:
            self._given(graph)

    def uuid(self) -> Any:
        own = f"ras_compile {sources()}"
        if self._given is None:
            return own
        other = self._given.uuid()
        return other and (own, other)  # None: the user's pass is in no cache


def start_workers(inputs: Sequence[Any], config: RASConfig) -> None:
    """Starts Inductor's processes that compile Triton kernels, so that the first program finds them ready.

    They take seconds to come up; until they have, kernels are compiled one after the other in this process.
    """
    if config.inner_backend == "inductor" and any(isinstance(value, Tensor) and value.is_cuda for value in inputs):
        maybe_warm_pool()


def compile_inner(module: fx.GraphModule, inputs: Sequence[Any], config: RASConfig) -> Compiled:
    """Compiles one program.

    Args:
        module: the program; its ops are ATen and it may write into its last inputs (the caches).
        inputs: example inputs; real tensors, whose sizes are baked in, or fake ones, which may have symbolic sizes.

    Raises:
        ConfigError: there is no such backend, or Inductor has no such option.
    """
    if config.inner_backend == "eager":
        return module
    began = time.perf_counter()
    log.info("compiling a program of %s operations with %s", len(module.graph.nodes), config.inner_backend)
    found = programs_found()
    compiled = _compiled(module, inputs, config)
    how = "found it in PyTorch's cache, and took it from there" if programs_found() > found else "compiled it"
    log.info("%s in %.1f s", how, time.perf_counter() - began)
    return compiled


def _compiled(module: fx.GraphModule, inputs: Sequence[Any], config: RASConfig) -> Compiled:
    compiled: Any
    if config.inner_backend == "inductor":
        options = dict(config.inner_options)
        mode = options.pop("mode", None)
        if mode is not None:
            options = {**list_mode_options(mode), **options}
        known = inductor_config.get_config_copy()
        for name in options:
            if name not in known:
                near = ", ".join(map(repr, difflib.get_close_matches(name, known)))
                takes = near or f"those of {inductor_config.__name__}"
                raise ConfigError(f"option inner_options: {name!r} is no option of Inductor; it takes {takes}.")
        options.pop("triton.cudagraphs", None)  # CUDA graphs of the programs are ours: `cuda_graphs`
        # Outside of Dynamo there is no tracing context, and without one PyTorch's caches on disk are passed over. Inputs are
        # made fake here: with a context, others would get symbolic sizes.
        modes = (value.fake_mode for value in inputs if isinstance(value, FakeTensor))
        fake = next(modes, None) or FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True)
        examples = [
            fake.from_tensor(value) if isinstance(value, Tensor) and not isinstance(value, FakeTensor) else value
            for value in inputs
        ]
        known_pass = options.get(_LAST_PASS, getattr(inductor_config, _LAST_PASS))
        if known_pass is None or isinstance(known_pass, CustomGraphPass):
            options[_LAST_PASS] = _OurSources(known_pass)
        with tracing(TracingContext(fake)):
            compiled = compile_fx(module, examples, config_patches=options)
        return compiled
    return known_backend(config)(module, list(inputs), **config.inner_options)


def known_backend(config: RASConfig) -> Callable[..., Any]:
    """The inner backend that the options name, if it is not Inductor itself.

    Raises:
        ConfigError: there is none of that name.
    """
    try:
        return lookup_backend(config.inner_backend)
    except InvalidBackend:
        known = ["eager", "aot_eager", *(name for name in torch.compiler.list_backends() if name != "ras")]
        near = difflib.get_close_matches(str(config.inner_backend), known, 1)
        meant = f" (did you mean {near[0]!r}?)" if near else ""
        names = ", ".join(map(repr, known))
        raise ConfigError(
            f"option inner_backend={config.inner_backend!r} is no backend{meant}; it takes {names}."
        ) from None


def compile_or_run(make: Callable[[], fx.GraphModule], inputs: Sequence[Any], config: RASConfig) -> Compiled:
    """Compiles a program; where the inner compiler fails, the program runs as it is, op by op, and that is said once.

    Args:
        make: gives the program: once more, if it is needed, as a compiler that fails may have changed the first one.

    Raises:
        UnsupportedGraph: the inner compiler fails, and the option ``unsupported`` is "error".
    """
    try:
        return compile_inner(make(), inputs, config)
    except RASError:
        raise
    except Exception as error:  # of whatever kind: a compiler's defects are no reason to give no picture
        _failed(error, config)
        return make()


class Program:
    """A compiled program; once it raises while it runs, it runs as it is, op by op, which is said once.

    Args:
        compiled: the program.
        make: gives its graph, without kernels of ours.
        config: see :func:`compile_inner`.
    """

    def __init__(self, compiled: Compiled, make: Callable[[], fx.GraphModule], config: RASConfig) -> None:
        self._compiled, self._make, self._config = compiled, make, config
        self._plain: fx.GraphModule | None = None

    def __call__(self, *inputs: Any) -> Sequence[Any]:
        """Runs it.

        Raises:
            UnsupportedGraph: the compiled program raised, and the option ``unsupported`` is "error".
        """
        if self._plain is not None:
            return self._plain(*inputs)
        try:
            return self._compiled(*inputs)
        except (torch.OutOfMemoryError, RASError):
            raise
        except Exception as error:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise
            failed = error
        # A step that was half done is done again from the start: what it writes depends on the inputs and on inactive rows.
        plain = self._make()
        results = plain(*inputs)  # what raises here, too, is the model's own error
        _failed(failed, self._config)
        self._plain = plain
        return results


def _failed(error: Exception, config: RASConfig) -> None:
    """Counts and says that a program runs op by op.

    Raises:
        UnsupportedGraph: the option ``unsupported`` is "error".
    """
    why = f"the inner compiler {config.inner_backend!r} fails on it ({type(error).__name__}: {first_line(error)})"
    if config.unsupported == "error":
        raise UnsupportedGraph(
            f"a program cannot be compiled: {why}; inner_backend='eager' runs it as it is"
        ) from error
    fell_back("a program run op by op", error)
    warn_once(f"ras_compile: a program runs uncompiled: {why}; the picture is right, and takes longer")
