"""Whether a fused op is faster than what it replaces: measured once for a size on a device, and kept on disk."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from ._torch import inductor
from .arguments import ScatterArguments
from .attention import Launch as AttentionLaunch
from .attention import attention_reference
from .attention import runs_kernel as runs_attention
from .fallbacks import fell_back
from .gather_linear import Launch as GatherLaunch
from .grouped import GroupedLaunch
from .launch import Launch, runs_kernel, runs_triton
from .many_linears import ManyLaunch, many_linears_reference, runs_many
from .reference import epilogue_reference
from .tiles import Answer, Postponed, milliseconds, timings

MEASURED_BYTES = 2**28  # of weights that are read in turn: many times what the cache of a device holds
# Of an op, in the order of its schema; of tensors only sizes, strides, dtypes and devices count.
Arguments = Sequence[Any]


def pays(ops: Sequence[Arguments]) -> bool:
    """Whether these `scatter_linear` ops together are faster than linears (cuBLAS) and one pass over their results.

    The pass reads each result and writes it elsewhere, without an index, a norm or a rotation: no code that Inductor
    writes for the rest of a site is faster. An op with a norm or a rotary embedding that is slower than that is compared
    with what Inductor does make of it, the scatter left out. So a site is fused only where that saves time.

    Args:
        ops: arguments of each op, as it takes them.
    """
    members = packed(ops)
    if not all(map(runs_kernel, members)):
        return False
    if not members[0].x.is_cuda:  # the interpreter: nothing to measure
        return True
    times = weighed(members)
    return times is not None and times[0] <= times[1]


def pays_grouped(sites: Sequence[Sequence[Arguments]], linears: Sequence[Arguments] = ()) -> bool:
    """Whether one launch of all these is faster than each of them in its best form.

    That is, for the ops of a site, what `pays` chooses; for a plain linear, cuBLAS.

    Args:
        sites: for each site, the arguments of its `scatter_linear` ops.
        linears: those of plain linears, as members of the launch: with the compact cache that each would write.
    """
    scatters, products = [packed(ops) for ops in sites], packed(linears)
    members = [member for ops in scatters for member in ops] + products
    if not all(map(runs_kernel, members)):
        return False
    if not members[0].x.is_cuda:
        return True
    alone = 0.0
    for ops in scatters:
        times = weighed(ops)
        if times is None:
            return False
        alone += min(times)
    for product in products:
        time = measured("linear", [product], _linear, 1)
        if time is None:
            return False
        alone += time[0]
    together = measured("grouped", members, measure_grouped, 1)
    return together is not None and together[0] <= alone


def packed(ops: Sequence[Arguments]) -> list[ScatterArguments[Tensor]]:
    """The arguments of `scatter_linear` ops, by name, with the defaults of what is not given."""
    return [ScatterArguments(*args) for args in ops]


def weighed(ops: Sequence[ScatterArguments[Tensor]]) -> tuple[float, float] | None:
    """Milliseconds of a site's ops fused, and as linears with one pass over their results; None where they cannot be had now."""
    fused = plain = 0.0
    for args in ops:
        times = measured("pays", [args], fused_and_plain)
        if times is None:
            return None
        fused, plain = fused + times[0], plain + times[1]
    return fused, plain


def gather_pays(args: Arguments) -> bool:
    """Whether a `gather_linear` of these arguments is faster than a copy of the active rows and a linear (cuBLAS).

    No gather that Inductor writes is faster than a copy of rows that lie side by side, no convolution over patches faster
    than the linear, and a table is added in a pass that Inductor makes anyway.
    """
    return _alone("gather", args, runs_triton, _measure_gather)


def attention_pays(args: Arguments) -> bool:
    """Whether an `attention` of these arguments is faster than `scaled_dot_product_attention`."""
    return _alone("attention", args, runs_attention, _measure_attention)


def _alone(
    what: str, args: Arguments, runs: Callable[[Tensor], bool], measure: Callable[[Arguments], tuple[float, float]]
) -> bool:
    """Whether one op is faster fused than plain, by the times that ``measure`` gives for both."""
    if not runs(args[0]):
        return False
    if not args[0].is_cuda:  # the interpreter: nothing to measure
        return True
    key = f"{what} pays {[_words(value) for value in args]}"
    times = remembered(key, args[0].device, partial(measure, args))
    return times is not None and times[0] <= times[1]


def many_pays(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether `many_linears` of these is faster than the linears (cuBLAS) one after the other.

    Members of one size are alike, and no more of them are measured than it takes to leave the caches of the device behind.
    Arguments are those of the op; only sizes, dtypes and devices count.
    """
    if not runs_many(x, weights, biases):
        return False
    if not x.is_cuda:  # the interpreter: nothing to measure
        return True
    sizes = Counter((weight.shape[0], bias is not None) for weight, bias in zip(weights, biases, strict=True))
    key = f"many pays {x.dtype} {list(x.shape)} {sorted(sizes.items())}"
    times = remembered(key, x.device, partial(measure_many, x, sizes))
    return times is not None and times[0] <= times[1]


def measured(
    what: str,
    ops: Sequence[ScatterArguments[Tensor]],
    measure: Callable[[list[ScatterArguments[Tensor]]], tuple[float, ...]],
    count: int = 2,
) -> tuple[float, ...] | None:
    """Milliseconds of launches of these `scatter_linear` ops, infinite where no tile runs; None: they cannot be had now."""
    key = f"{what} {[[_words(value) for value in args] for args in ops]}"
    return remembered(key, ops[0].x.device, lambda: measure(real_arguments(ops)), count)


def remembered(
    key: str, device: torch.device, measure: Callable[[], tuple[float, ...]], count: int = 2
) -> tuple[float, ...] | None:
    """The times that ``measure`` gives, or gave on this device before.

    None where they cannot be had now, zeros where measuring is `postponed`.

    Args:
        count: how many times there are.
    """

    def measured() -> list[float | None]:
        # What is drawn for a timing must not move the caller's random numbers: a cold start would give another picture.
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            torch.cuda.device(device),
            torch.no_grad(),
            torch.inference_mode(False),
        ):
            return [time if math.isfinite(time) else None for time in measure()]

    def fits(found: Answer) -> bool:
        return isinstance(found, list) and len(found) == count

    try:
        times = timings(device).recall(key, fits, measured)
    except torch.OutOfMemoryError as error:
        fell_back("a kernel left out for now, without memory to time it", error)
        return None
    except Postponed:
        return (0.0,) * count
    return tuple(math.inf if time is None else time for time in times) if isinstance(times, list) else None


def _words(value: Any) -> object:
    return (str(value.dtype), tuple(value.shape), value.stride()) if isinstance(value, Tensor) else value


def fused_and_plain(ops: list[ScatterArguments[Tensor]]) -> tuple[float, float]:
    """Of the op, and of what it replaces."""
    (given,) = ops
    x, weight, bias, launch = given.x, given.weight, given.bias, Launch(given)
    tile = launch.fastest()
    result = F.linear(x, weight, bias)
    copy = torch.empty_like(result)
    fused = math.inf if tile is None else milliseconds(lambda: launch(tile))
    plain = milliseconds(lambda: torch.neg(F.linear(x, weight, bias), out=copy))
    if launch.D and plain < fused < math.inf:
        made = milliseconds(_by_inductor(given))
        plain = made if math.isfinite(made) else plain
    return fused, plain


def _by_inductor(given: ScatterArguments[Tensor]) -> Callable[[], Any]:
    """Linear, norm and rotary embedding as Inductor makes them, with a compact result; compiled at the first call."""
    optional = {name: getattr(given, name) for name in ("bias", "norm_weight", "norm_bias", "cos", "sin")}
    names = [name for name, tensor in optional.items() if tensor is not None]
    tensors = [given.x, given.weight, *(optional[name] for name in names)]

    def site(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
        more = dict(zip(names, others, strict=True))
        y = F.linear(x, weight, more.pop("bias", None))
        return epilogue_reference(y, given.head_dim, given.norm, eps=given.eps, rope=given.rope, **more)

    compiled: list[Any] = []

    def run() -> Any:
        if not compiled:
            compiled.append(inductor(make_fx(site)(*tensors), tensors))
        return compiled[0](*tensors)

    return run


def _measure_gather(args: Arguments) -> tuple[float, float]:
    rest: list[Any]
    x, weight, bias, rows, *rest = (_real(value) if isinstance(value, Tensor) else value for value in args)
    _number(rows, x, *rest[:1])
    launch = GatherLaunch(x, weight, bias, rows, *rest)
    tile = launch.fastest()
    if tile is None:
        return math.inf, 0.0
    taken = torch.randn(*launch.lead, weight.shape[1], dtype=x.dtype, device=x.device)
    copy = torch.empty_like(taken)
    return (
        milliseconds(lambda: launch(tile)),
        milliseconds(lambda: F.linear(torch.neg(taken, out=copy), weight, bias)),
    )


def _measure_attention(args: Arguments) -> tuple[float, float]:
    q, k, v = map(_real, args[:3])
    launch = AttentionLaunch(q, k, v, args[3])
    cut = launch.fastest() if launch.fits else None
    if cut is None:
        return math.inf, 0.0
    return milliseconds(lambda: launch(cut)), milliseconds(lambda: attention_reference(q, k, v, args[3]))


def measure_many(x: Tensor, sizes: Counter[tuple[int, bool]]) -> tuple[float, float]:
    def made(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=x.dtype, device=x.device)

    K = x.shape[-1]
    share = min(1.0, MEASURED_BYTES / sum(count * N * K * x.element_size() for (N, _), count in sizes.items()))
    members = [size for size, count in sizes.items() for _ in range(math.ceil(count * share))]
    given, weights = made(*x.shape), [made(N, K) for N, _ in members]
    biases = [made(N) if biased else None for N, biased in members]
    launch = ManyLaunch(given, weights, biases)
    tile = launch.fastest()
    return (
        math.inf if tile is None else milliseconds(lambda: launch(tile)),
        milliseconds(lambda: many_linears_reference(given, weights, biases)),
    )


def _real(value: Tensor) -> Tensor:
    """A tensor of the same sizes and strides, filled with numbers of a usual size."""
    made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
    return made.normal_() if made.is_floating_point() else made.zero_()


def _linear(ops: list[ScatterArguments[Tensor]]) -> tuple[float]:
    (given,) = ops
    return (milliseconds(lambda: F.linear(given.x, given.weight, given.bias)),)


def measure_grouped(ops: list[ScatterArguments[Tensor]]) -> tuple[float]:
    """Of one launch of all these; infinite where they do not fit into one."""
    launch = GroupedLaunch(ops)
    tile = launch.fastest() if launch.fits else None
    return (math.inf if tile is None else milliseconds(lambda: launch(tile)),)


def real_arguments(ops: Sequence[ScatterArguments[Tensor]]) -> list[ScatterArguments[Tensor]]:
    """Tensors as :func:`_real` makes them, one for all that were one, and rows that are unique."""
    made: dict[int, Tensor] = {}

    def real(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if id(value) not in made:
            made[id(value)] = _real(value)
        return made[id(value)]

    result = [ScatterArguments(*map(real, given)) for given in ops]
    for given in result:
        _number(given.rows, given.cache, given.grid_dims)
    return result


def _number(rows: Tensor, grid: Tensor, grid_dims: int = 1) -> None:
    """Fills rows with numbers of a tensor [B, *grid, ...] that are unique within a sample."""
    places = math.prod(grid.shape[1 : 1 + grid_dims])
    for row in rows:
        row.copy_(torch.randperm(places, device=rows.device)[: rows.shape[1]])
