"""`ras_compile.attach(pipe)`: compile a diffusers pipeline's transformer in place, and follow its scheduler."""

from __future__ import annotations

import inspect
import logging
import sys
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Unpack

from torch import OutOfMemoryError, nn

from ras_compile._torch import (
    OptimizedModule,
    compilations,
    compiled_call,
    forget_compilations,
    look_again_at,
    set_compiled_call,
)
from ras_compile.backend import compiled_graph, ras
from ras_compile.capture.inputs import check_timestep
from ras_compile.capture.sharding import settle_sharding_hooks
from ras_compile.capture.unusable import translate_dynamo_errors
from ras_compile.config import PRESETS, RASConfig
from ras_compile.dispatch.kept import with_loaded
from ras_compile.dispatch.traced import Exchangeable
from ras_compile.errors import ConfigError, RASError
from ras_compile.execute.compiling import uncollected
from ras_compile.execute.inner import known_backend
from ras_compile.history import Past, past_of
from ras_compile.notices import first_time, warn_once
from ras_compile.options import Options, RuntimeOptions
from ras_compile.pipelines.bars import follow_bars, unfollow_bars
from ras_compile.pipelines.casting import cast_by_hooks, cast_in_graph
from ras_compile.pipelines.clock import Clock
from ras_compile.pipelines.follow import (
    SchedulerFollower,
    follow_branches,
    follow_pictures,
    present_branch,
    unfollow_branches,
    unfollow_pictures,
)
from ras_compile.report.run import collect
from ras_compile.report.write import checked, write
from ras_compile.sampling.locate import AttachedCall, attached_call
from ras_compile.sampling.models import release, transformers_of
from ras_compile.summary import Summary, summarise

# Deterministic solvers of first order, and the one that measured best in their place (examples/quality).
_FIRST_ORDER, _SECOND_ORDER = ("EulerDiscreteScheduler", "DDIMScheduler"), "DPMSolverMultistepScheduler"
# Of first order, too; diffusers names none that may take its place, but the second order's may, if it is told of the flow.
_FLOW = "FlowMatchEulerDiscreteScheduler"

log = logging.getLogger(__name__)


class Handle:
    """An attached pipeline. A context manager: leaving it detaches.

    Args:
        pipe: the pipeline.
        config: the options.
        transformers: the pipeline's transformers, by the names they have there.
        options: the options as `torch.compile` takes them.
        dynamic: as `torch.compile` takes it.
    """

    def __init__(
        self,
        pipe: Any,
        config: RASConfig,
        transformers: dict[str, nn.Module],
        options: dict,
        dynamic: bool | None = None,
    ) -> None:
        self.follower = SchedulerFollower(pipe, config, transformers)
        self._attached, self._ended = transformers, Summary()
        self._cast = [layer for module in transformers.values() for layer in cast_in_graph(module)]
        for name, module in transformers.items():
            _say_replaced(module)
            settle_sharding_hooks(module)
            module.compile(backend=ras, options=options, dynamic=dynamic)
            compiled = compiled_call(module)
            assert compiled is not None
            set_compiled_call(module, _Followed(compiled, self.follower, name, module, dynamic is True))
            follow_branches(module)
        self._pipe, self._kind = weakref.ref(pipe), type(pipe).__name__
        follow_pictures(pipe, self.follower)
        follow_bars(pipe)

    @property
    def transformers(self) -> list[nn.Module]:
        """The attached transformers, in the pipeline's order; none after `detach`."""
        return list(self._attached.values())

    @property
    def config(self) -> RASConfig:
        """The options of generations that begin now."""
        return self.follower.config

    def configure(self, **options: Unpack[RuntimeOptions]) -> None:
        """Replace runtime options from the next generation on; what is compiled stays.

        ::

            handle.configure(sample_ratio=0.25, warmup_steps=3)

        Each count of active tokens that has not been seen yet still compiles a program, once.

        Args:
            **options: some of :data:`ras_compile.config.RUNTIME_OPTIONS`.

        Raises:
            ConfigError: an option that changes what is compiled (the text names those that do not), a bad value, or a handle
                that is detached.
        """
        if not self._attached:
            raise ConfigError("this handle is detached, so that its options reach no picture; attach(pipe, ...) anew.")
        self.follower.config = self.config.with_runtime(**options)

    def summary(self) -> Summary:
        """What the last generation did and saved; waits for the device. It stays after `detach` and `release`.

        ::

            >>> print(handle.summary())
            28 steps in 3.1 s: 12 dense, 16 sparse at 6 to 50 % of 4,096 tokens; 2.1x by FLOPs, 1.9x by the clock ...
        """
        if not self._attached:
            return self._ended
        follower, past = self.follower, past_of(self.transformers, released=True)
        clock = follower.clock
        if (follower.exchanged or follower.passed) and not follower.reached:
            clock, past = Clock(), Past([], past.cache_bytes)  # what is known is of an earlier generation
        times = clock.seconds(), clock.compiled(), clock.changes()
        return summarise(past, self.config, *times, follower.exchanged, follower.passed)

    def report(self, path: str | PathLike[str], *, image: Any = None, dense: Any = None, prompt: str = "") -> Path:
        """Writes what the last generation did as one file that needs nothing else; waits for the device.

        ::

            handle.report("out.html", dense=dense_picture, prompt="a red apple")

        Args:
            path: a page (.html) to step through, with the tokens of each step, its time and the budget; a picture (.png) of
                how often each token was computed; an animation (.gif) of the steps; or the data of all (.json).
            image: the picture or the frames of the video, in any form that pipelines return; by default what the pipeline
                returned, which is held until the next generation begins. Of a batch the first is shown.
            dense: the same with all steps dense, to compare.
            prompt: what to write above.

        Returns:
            the path.

        Raises:
            ConfigError: no generation yet, no such folder or kind of file, what is no picture, or no Pillow.
        """
        found, follower = checked(path), self.follower
        picture, summary = follower.picture if image is None else image, self.summary()
        video = follower.video or len(summary.grid) == 3
        try:
            data = collect(summary, picture, dense, prompt, video)
        except ConfigError:
            if image is not None or picture is None or dense is not None:
                raise
            data = collect(summary, None, None, prompt, video)  # the pipeline was asked for latents
        write(data, found)
        return found

    def __str__(self) -> str:
        return str(self.summary())

    def __repr__(self) -> str:
        return f"<Handle of {self._kind}: {self}>"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def detach(self) -> None:
        """Restore the pipeline as it was: uncompiled transformers, a scheduler of its own class, no caches. May be repeated."""
        self._ended = self.summary()
        release(self)  # Dynamo keeps what it compiled for as long as the module lives
        for module in self._attached.values():
            set_compiled_call(module, None)
            unfollow_branches(module)
        unfollow_pictures(self._pipe())
        unfollow_bars(self._pipe())
        cast_by_hooks(self._cast)
        self.follower.stop()
        self._attached, self._cast = {}, []

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuses: whoever wrote ``pipe = attach(pipe)`` wants the pipeline to draw."""
        raise TypeError(
            "a Handle is not the pipeline, which attach(pipe) compiled in place; keep both names, as in "
            "`handle = ras_compile.attach(pipe)`, and call pipe(...)."
        )

    if not TYPE_CHECKING:  # a type checker knows a handle's attributes, and says of all others that there are none

        def __getattr__(self, name: str) -> NoReturn:
            """Says where that is to be found which was looked for in a handle."""
            pipe = None if name.startswith("_") else self._pipe()
            where = ""
            if name in ("release", "trace"):
                where = f"; it is a function: ras_compile.{name}(handle)"
            elif name in ("explain", "load", "save"):
                where = f"; it is a function: ras_compile.{name}(pipe, ...)"
            elif name in RASConfig.__dataclass_fields__:
                where = f"; it is an option: handle.config.{name}"
            elif hasattr(pipe, name):
                where = f"; it is the pipeline's, which attach(pipe) compiled in place: pipe.{name}"
            raise AttributeError(f"a Handle has no attribute {name!r}{where}", name=name, obj=self)

        def __setattr__(self, name: str, value: Any) -> None:
            if name == "config" or name in RASConfig.__dataclass_fields__:
                what = "sample_ratio=0.25" if name == "config" else f"{name}={value!r}"
                raise AttributeError(f"options are changed by handle.configure({what}), not by handle.{name} = ...")
            super().__setattr__(name, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refuses copies and pickles: a copied pipeline is a plain one, so that a copied handle would stand for nothing."""
        raise TypeError(
            "a Handle belongs to the pipeline that it is attached to, and cannot be copied or pickled; copy the pipeline and "
            "attach to the copy."
        )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.detach()


def attach(
    pipe: Any, config: RASConfig | None = None, *, dynamic: bool | None = None, **options: Unpack[Options]
) -> Handle:
    """Make a diffusers pipeline sample region-adaptively.

    Compiles `pipe.transformer` (and `transformer_2`, ...) in place with `module.compile()`, so that the pipeline's
    code, hooks and LoRA loading go on working with the same module objects. The scheduler is followed wherever
    `pipe.scheduler` points to at a call; pipelines that share this transformer and scheduler (`from_pipe`) are
    followed too. One with a scheduler of its own (a copy for each thread) is not: its steps are inferred, as they are
    without `attach`; let its runs not take turns with this one's, step by step in one thread.
    The scheduler stays what it is; where one that needs fewer steps may take its place, the log says so at level INFO.

    Args:
        pipe: the pipeline.
        config: options all at once; those given by name rule over it.
        dynamic: that of `torch.compile`. None: the first size is compiled for itself, and the second one for all others;
            True: already the first one is for all; False: each for itself.
        **options: see :class:`RASConfig`; `mode` is handed to the inner backend.

    Returns:
        A handle with `.detach()`, `.configure()`, `.config` and `.transformers`, for `ras_compile.trace` too.

    Raises:
        ConfigError: a bad option, what is no pipeline, one without a transformer, or one that is compiled already.
    """
    chosen: dict[str, Any] = {**_chosen(config), **options}
    if "options" in chosen:
        raise ConfigError(
            "attach takes options by name: attach(pipe, sample_ratio=0.5), not attach(pipe, options={...})."
        )
    arguments = inspect.signature(type(pipe).__call__).parameters if callable(pipe) else ()
    for name in options.keys() - Options.__annotations__:
        meant = next((known for known in arguments if known == name or known.endswith(f"_{name}")), None)
        if meant is not None:
            raise ConfigError(f"{name} is no option, but an argument of the pipeline: pipe(..., {meant}=...).")
    if not (dynamic is None or isinstance(dynamic, bool)):
        raise ConfigError(f"option dynamic takes None, True or False, not {dynamic!r}.")
    config = RASConfig.from_options(chosen)
    known_backend(config)
    if isinstance(pipe, type):
        name = pipe.__name__
        raise ConfigError(f"attach takes a loaded pipeline, and {name} is a class: give {name}.from_pretrained(...).")
    if isinstance(pipe, (str, PathLike)):
        raise ConfigError(
            f"attach takes a loaded diffusers pipeline, not {type(pipe).__name__}; load it with "
            f"DiffusionPipeline.from_pretrained({str(pipe)!r})."
        )
    if isinstance(pipe, nn.Module) or pipe is None:
        raise ConfigError(
            f"attach takes a loaded diffusers pipeline, not {'None' if pipe is None else type(pipe).__name__}; a model alone is "
            "compiled by torch.compile(model, backend='ras')."
        )
    found = transformers_of(pipe)
    if not found:
        what = type(pipe).__name__
        if getattr(pipe, "unet", None) is not None:
            raise ConfigError(
                f"{what} denoises with a UNet, and region-adaptive sampling takes diffusion transformers alone; use a pipeline "
                "that has one, such as SD3, Flux or Wan."
            )
        raise ConfigError(
            f"{what} has no transformer to attach to, as a diffusers pipeline has; use torch.compile(model, backend='ras') on its "
            "denoiser, with ras_compile.generation() to tell the steps."
        )
    for name, module in found.items():
        what, call = f"{type(pipe).__name__}.{name}", compiled_call(module)
        if isinstance(call, _Followed):
            raise ConfigError(
                f"{what} is attached already; give options to its handle's configure(), or call detach() on that handle first."
            )
        if isinstance(module, OptimizedModule) or call is not None:
            raise ConfigError(
                f"{what} is compiled already; leave torch.compile out, since attach compiles the plain module."
            )
        check_timestep(config.timestep, type(module))
    _advise(getattr(pipe, "scheduler", None))
    return Handle(pipe, config, found, chosen, dynamic)


def _advise(scheduler: Any) -> None:
    """Log once, at level INFO, that a solver of second order may be put in the place of this scheduler of first order."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", {})
    known = {kind.__name__ for kind in getattr(scheduler, "compatibles", None) or ()}
    told = name in _FIRST_ORDER and _SECOND_ORDER in known
    more = ""
    if name == _FLOW and not config.get("use_dynamic_shifting"):  # else the pipeline hands it noise levels of its own
        more = f', use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift={config.get("shift", 1.0)}'
    if (told or more) and first_time((_SECOND_ORDER, name)):
        log.info(
            "%s needs fewer steps for the same quality than %s, and may take its place here: pipe.scheduler = "
            "diffusers.%s.from_config(pipe.scheduler.config%s)",
            *(_SECOND_ORDER, name, _SECOND_ORDER, more),
        )


def _chosen(config: RASConfig | None) -> dict[str, Any]:
    """The options of a config that are not the default ones.

    Raises:
        ConfigError: it is no config, or that of another version.
    """
    if config is None:
        return {}
    if not isinstance(config, RASConfig):
        such = f"preset={config!r}" if isinstance(config, str) and config in PRESETS else "sample_ratio=0.5"
        raise ConfigError(
            f"attach takes a RASConfig as its second argument, not {type(config).__name__}; options are given by name: "
            f"attach(pipe, {such})."
        )
    names = set(vars(config))
    default = vars(RASConfig.from_options({"metric": config.metric} if "metric" in names else {}))
    if names != set(default):
        strange = ", ".join(sorted(names ^ set(default)))
        raise ConfigError(f"this RASConfig is of another version of ras_compile ({strange}); make it anew.")
    changed = {
        name: value for name, value in vars(config).items() if value is not default[name] and value != default[name]
    }
    return changed if config.metric == RASConfig().metric else {"metric": config.metric, **changed}


def _say_replaced(module: nn.Module) -> None:
    """Says once that what was compiled by parts is compiled as a whole now; the parts stay as they are, for `detach`."""
    if any(isinstance(part, OptimizedModule) or compiled_call(part) is not None for part in module.modules()):
        warn_once(
            f"ras_compile: parts of {type(module).__name__} are compiled by themselves, as compile_repeated_blocks() does; the "
            "whole model is compiled in their place until detach()."
        )


class _Followed(Exchangeable):
    """The compiled call, made as a call of this pipeline; says so once when it never reaches the backend."""

    def __init__(
        self, compiled: Callable[..., Any], follower: SchedulerFollower, name: str, model: nn.Module, dynamic: bool
    ) -> None:
        self.compiled, self._follower, self._name, self._kind = compiled, follower, name, type(model).__name__
        self._model, self._dynamic = weakref.ref(model), dynamic
        self._captured = False  # a call has come to its end, and so Dynamo has captured the model

    @property
    def config(self) -> RASConfig:
        """The options of generations that begin now."""
        return self._follower.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        said = self._follower.locate()
        aside = not self._follower.sites.is_loop(self._name, sys._getframe(1))
        call = AttachedCall(self._follower, self._name, present_branch(), None if aside else said, aside)
        before, compiled = compilations(), self.compiled
        try:
            if not self._captured:
                look_again_at(getattr(self._model(), "forward", None))
                self.compiled = self._with_loaded()
            first = nullcontext() if self._captured else uncollected()
            with first, translate_dynamo_errors(args, kwargs), attached_call(call):
                result = self.compiled(*args, **kwargs)
            self._captured = True
        except Exception as error:
            if not isinstance(error, (RASError, OutOfMemoryError)):
                forget_compilations(before)  # else one bad call would make good ones dense
                self.compiled = compiled
            raise
        self._follower.reached |= call.reached
        if not call.reached:
            self._follower.passed += 1
            warn_once(
                f"ras_compile: a call of {self._kind} ran uncompiled, past the attached backend. Either torch.compile is "
                "disabled, or Dynamo gave up at its recompile limit (run with TORCH_LOGS=recompiles)."
            )
        return result

    def _with_loaded(self) -> Callable[..., Any]:
        """What is compiled, with captures of another process in front of it, if `load` has brought any."""
        model, config = self._model(), self._follower.config
        if model is None or self._dynamic:  # captures are of fixed sizes
            return self.compiled
        return with_loaded(self.compiled, model, lambda graph, inputs: compiled_graph(graph, inputs, config))
