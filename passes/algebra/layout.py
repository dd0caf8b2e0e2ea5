"""Factor layouts: where the latent's token grid stands inside the dimensions of a tensor.

Every dimension is an ordered product of *factors*. A factor is an :class:`Axis` (a size, and the *atom* of the latent that
it is, if any) or a :class:`Concat` (segments behind one another: text | region). In einops' notation a packed joint
sequence ``b (text | h w) c`` has the dimensions ``(b)``, ``(Concat(text, h w))`` and ``(c)``.

Views only regroup factors. Where a view cuts an atom, the atom is refined everywhere and the propagation starts over
(:class:`Refine`); an atom that turns out not to be part of the region is dropped from it (:class:`Exclude`).

The *region* is the product of the remaining atoms of the latent, its batch apart. The row-sparse form of a tensor is the
same tensor with other sizes: the region's leading atom has A entries (the active rows) and every other region atom has
one. So an op that treats tokens alone is the same op at other sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

from ras_compile.passes.algebra.order import OWN, RANKS, Atom, Order, factors


@dataclass(frozen=True, slots=True)
class Axis:
    """A plain factor: ``size`` entries; ``atom`` is None where it carries no part of the latent's grid."""

    size: int
    atom: Atom | None = None


@dataclass(frozen=True, slots=True)
class Concat:
    """Segments behind one another in one dimension, each a product of factors."""

    segments: tuple[tuple[Factor, ...], ...]

    @property
    def size(self) -> int:
        return sum(dim_size(segment) for segment in self.segments)


@dataclass(frozen=True, slots=True)
class Clipped:
    """The first ``size`` entries of a product, of whose last patch a part is missing: 9 rows of a latent, in 5 patches of 2.

    In the sparse world a patch is whole; what is missing of it repeats its dimension's last entry.
    """

    inner: tuple[Factor, ...]
    size: int


Factor = Axis | Concat | Clipped
Dim = tuple[Factor, ...]


class ViewError(Exception):
    """A view that no regrouping of factors describes (its borders interleave with those of a factor)."""


class Restart(Exception):
    """A fact about the latent's atoms that changes every layout: the propagation starts over with ``apply(frame)``."""

    changes: Mapping[str, Any] = {}  # what the frame is to have

    def apply(self, frame: Frame) -> Frame:
        return replace(frame, **self.changes)


class Refine(Restart):
    """An atom of size n is cut into (outer, n // outer)."""

    def __init__(self, atom: Atom, outer: int) -> None:
        self.atom, self.outer = atom, outer

    def apply(self, frame: Frame) -> Frame:
        return frame.refined(self.atom, self.outer)


class Exclude(Restart):
    """Atoms that are no part of the region: channels, pixels of a patch, or a batch-like factor of factorised attention."""

    def __init__(self, atoms: Iterable[Atom]) -> None:
        self.atoms = frozenset(atoms)

    def apply(self, frame: Frame) -> Frame:
        return frame.without(self.atoms)


class Unbatch(Restart):
    """The latent's first dimension does not count independent samples: it is treated like the others.

    Args:
        apart: samples are taken apart, one by one: they are independent, and yet have to share their active rows.
    """

    def __init__(self, apart: bool = False) -> None:
        self.apart = apart

    def apply(self, frame: Frame) -> Frame:
        return frame.unbatched(self.apart)


class Shifted(Restart):
    """Windows are cut in two orders: each token is one, where windows of the one order alone would have been."""

    changes = {"shifted": True, "excluded": frozenset(), "cuts": ()}


class Coarsen(Restart):
    """Convolutions with strides that overlap take tokens together: the finer ones, left as they are, reach no output."""

    changes = {"coarse": True}


class Clip(Restart):
    """A side of the latent is padded to whole patches: ``outer`` patches of ``inner`` entries, the last one not full."""

    def __init__(self, atom: Atom, outer: int, inner: int) -> None:
        self.atom, self.outer, self.inner = atom, outer, inner

    def apply(self, frame: Frame) -> Frame:
        return frame.clipped(self.atom, self.outer, self.inner)


class Sharded(Restart):
    """The model takes this process's tokens, ``start`` to ``stop``, out of those of the whole latent.

    Args:
        beside: atoms that the latent has beside its tokens, where nothing has shown yet that they are channels.
        outs: layouts of the parts that the tokens are taken apart into; None for those of other processes.
    """

    def __init__(self, start: int, stop: int, beside: Iterable[Atom], outs: tuple[Layout | None, ...]) -> None:
        self.start, self.stop, self.beside, self.outs = start, stop, frozenset(beside), outs

    def apply(self, frame: Frame) -> Frame:
        return frame.without(self.beside).sharded(self.start, self.stop)


class Padded(Restart):
    """What is padded onto the grid by its own entries may fill it up to whole patches: where it is cut, they are seen."""

    changes = {"padded": True}


class Group(NamedTuple):
    """The processes of a collective, as its graph names them, how many they are, and which of them this one is."""

    name: str
    size: int
    rank: int


def dim_size(dim: Iterable[Factor]) -> int:
    """Entries of a dimension: the product of its factors' sizes."""
    return math.prod(factor.size for factor in dim)


def atoms_of(dim: Iterable[Factor]) -> Iterator[Atom]:
    """Atoms in a dimension, those inside segments included."""
    for factor in dim:
        if isinstance(factor, Concat):
            for segment in factor.segments:
                yield from atoms_of(segment)
        elif isinstance(factor, Clipped):
            yield from atoms_of(factor.inner)
        elif factor.atom is not None:
            yield factor.atom


def leads(axis: Axis) -> bool:
    """Whether a factor of tokens that stand in an order is the first of its parts."""
    order = None if axis.atom is None else axis.atom.order
    return order is not None and axis.atom.stride * axis.size == order.size


def axes_of(dim: Iterable[Factor]) -> Iterator[Axis]:
    """The plain factors of a dimension, those inside segments included."""
    for factor in dim:
        if isinstance(factor, Axis):
            yield factor
        else:
            for part in factor.segments if isinstance(factor, Concat) else (factor.inner,):
                yield from axes_of(part)


def opaque(size: int) -> Dim:
    """A dimension of ``size`` entries that carries no part of the grid."""
    return (Axis(size),) if size != 1 else ()


def normal(factors: Iterable[Factor]) -> Dim:
    """The canonical form of a product: no factors of size one, neighbouring plain factors without an atom merged."""
    result: list[Factor] = []
    for factor in factors:
        if isinstance(factor, Clipped):
            result.append(factor if any(atoms_of(factor.inner)) else Axis(factor.size))
        elif isinstance(factor, Concat):
            if len(factor.segments) == 1:
                result = list(normal([*result, *factor.segments[0]]))
            else:
                result.append(factor)
        elif factor.size != 1:
            last = result[-1] if result else None
            if factor.atom is None and isinstance(last, Axis) and last.atom is None:
                result[-1] = Axis(last.size * factor.size)
            else:
                result.append(factor)
    return tuple(result)


def paired(first: Dim, second: Dim) -> Dim | None:
    """The dimension that two dimensions make whose entries meet one by one; None where they hold the grid differently.

    The order of the factors decides, not only which atoms there are: entry 1 of ``(2 n)`` is another token than entry 1 of
    ``(n 2)``, and meets it only where all tokens are there. One of a single entry is broadcast; one without atoms has the
    other's entries, and the caller gathers their rows.
    """
    if first == second or dim_size(second) == 1:
        return first
    if dim_size(first) == 1 or not any(atoms_of(first)):
        return second
    return None if any(atoms_of(second)) else first


def opened(dim: Dim) -> Dim:
    """The product behind a clipped dimension; any other dimension as it is."""
    return dim[0].inner if len(dim) == 1 and isinstance(dim[0], Clipped) else dim


def filled(dim: Dim, before: int, after: int) -> Dim | None:
    """The product that a clipped dimension becomes when it is padded to whole patches; None for anything else."""
    whole = opened(dim)
    return whole if whole != dim and before == 0 and dim_size(dim) + after == dim_size(whole) else None


def clip_of(factor: Factor, inner: int) -> Clip | None:
    """The fact behind a cut into patches of ``inner`` of one whole dimension of the latent with something behind it."""
    if not isinstance(factor, Concat) or len(factor.segments) != 2 or factor.size % inner:
        return None
    first, behind = factor.segments
    axis = first[0] if len(first) == 1 else None
    if not isinstance(axis, Axis) or axis.atom is None or axis.atom.stride != 1 or not 0 < dim_size(behind) < inner:
        return None
    return Clip(axis.atom, factor.size // inner, inner)


def concat(segments: Iterable[Dim]) -> Dim:
    """Segments behind one another; those without entries go, neighbours without an atom become one, nested ones are flattened."""
    flat: list[Dim] = []
    for segment in map(normal, segments):
        parts = segment[0].segments if len(segment) == 1 and isinstance(segment[0], Concat) else (segment,)
        for part in parts:
            if not dim_size(part):
                continue
            if flat and not any(atoms_of(part)) and not any(atoms_of(flat[-1])):
                flat[-1] = opaque(dim_size(flat[-1]) + dim_size(part))
            else:
                flat.append(part)
    return normal([Concat(tuple(flat))]) if flat else (Axis(0),)


@dataclass(frozen=True, slots=True)
class Layout:
    """The layout of one tensor that carries the region."""

    dims: tuple[Dim, ...]  # one product of factors per dimension
    # True until the first contraction on the way from the latent; what that one contracts is a channel
    raw: bool = False

    @staticmethod
    def of(dims: Iterable[Iterable[Factor]], raw: bool = False) -> Layout:
        return Layout(tuple(normal(dim) for dim in dims), raw)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(dim_size(dim) for dim in self.dims)

    def replace(self, index: int, dim: Dim) -> Layout:
        """The layout with dimension ``index`` replaced."""
        dims = list(self.dims)
        dims[index] = normal(dim)
        return Layout(tuple(dims), self.raw)

    def reshape(self, shape: Sequence[int]) -> Layout:
        """The layout after a view to ``shape`` (all sizes given, their product unchanged).

        Raises:
            Refine: the view cuts an atom.
            ViewError: no regrouping of factors gives this view.
        """
        factors = list(normal(factor for dim in self.dims for factor in dim))[::-1]
        dims: list[list[Factor]] = []
        for size in shape:
            dim: list[Factor] = []
            left = size
            while left > 1:
                if not factors:
                    raise ViewError(f"cannot view {self} as {tuple(shape)}")
                factor = factors.pop()
                if left % factor.size == 0:
                    dim.append(factor)
                    left //= factor.size
                elif isinstance(factor, Axis) and factor.size % left == 0:
                    if factor.atom in (RANKS, OWN):
                        raise ViewError(f"cannot view {self} as {tuple(shape)}")
                    if factor.atom is not None:
                        raise Refine(factor.atom, left)
                    dim.append(Axis(left))
                    factors.append(Axis(factor.size // left))
                    left = 1
                else:
                    clip = clip_of(factor, factor.size // left) if self.raw and factor.size % left == 0 else None
                    raise clip or ViewError(f"cannot view {self} as {tuple(shape)}")
            dims.append(dim)
        return Layout.of(dims, self.raw)

    def permute(self, order: Sequence[int]) -> Layout:
        return Layout(tuple(self.dims[index] for index in order), self.raw)

    @property
    def ranked(self) -> bool:
        """Whether a dimension counts processes, each with tokens of its own."""
        return any(atom == RANKS for dim in self.dims for atom in atoms_of(dim))

    def __str__(self) -> str:
        return f"[{', '.join(describe(dim) for dim in self.dims)}]"


def describe(dim: Dim) -> str:
    """A dimension in notation: ``(d2/2 d3/2)``, ``(77 | d1)``."""
    words = []
    for factor in dim:
        if isinstance(factor, Concat):
            words.append(" | ".join(describe(segment) for segment in factor.segments))
        elif isinstance(factor, Clipped):
            words.append(f"{factor.size} of {describe(factor.inner)}")
        elif factor.atom is None:
            words.append(str(factor.size))
        elif factor.atom == RANKS:
            words.append(f"ranks:{factor.size}")
        else:
            stride = f"/{factor.atom.stride}" if factor.atom.stride > 1 else ""
            side = f"d{factor.atom.dim}" if factor.atom.order is None else str(factor.atom.order)
            words.append(f"{side}{stride}:{factor.size}")
    return f"({' '.join(words)})" if len(words) != 1 else words[0]


@dataclass(frozen=True)
class Frame:
    """What is known of the latent: how its dimensions fall into atoms, and which of them are the region."""

    shape: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]  # for each dimension the sizes of its atoms, outermost first
    excluded: frozenset[Atom] = frozenset()  # atoms that are not part of the region
    batch_dim: int | None = 0  # dimension of the latent that counts the samples, or None
    # ``(start, stop)`` along the region's dimension 1, where the latent's other tokens are context
    window: tuple[int, int] | None = None
    coarse: bool = False  # what a convolution's stride takes together is one token, also where its kernels overlap
    # whether what pads the grid with its own entries is looked at as context, until it is cut into patches
    padded: bool = False
    shared_rows: bool = False  # the model takes the samples apart, so that all of them have the same active rows
    # orders in which tokens stand, with the sizes of the parts that views cut them into, outermost first
    cuts: tuple[tuple[Order, tuple[int, ...]], ...] = ()
    # windows of tokens are cut in two orders, so that attention in windows takes no token for a part of another
    shifted: bool = False
    shards: Group | None = None  # the processes that exchange tokens, each with tokens and active rows of its own
    # the processes that add up features of the same tokens, all with the active rows of the first of them
    replicas: Group | None = None
    # ``(start, stop)`` among all tokens of the latent, counted row by row, where every process has the whole
    # latent and takes tokens of its own out of it. These alone are the region.
    stretch: tuple[int, int] | None = None

    @staticmethod
    def of(shape: Sequence[int], batch_dim: int | None = 0, window: tuple[int, int] | None = None) -> Frame:
        """Every dimension of the latent is one atom to begin with."""
        sizes = list(shape)
        if window is not None:
            sizes[1] = window[1] - window[0]
        return Frame(tuple(shape), tuple((size,) for size in sizes), batch_dim=batch_dim, window=window)

    def atoms(self, dim: int) -> tuple[Axis, ...]:
        """The atoms of one latent dimension, excluded ones without their atom."""
        axes, stride = [], math.prod(self.parts[dim])
        for size in self.parts[dim]:
            stride //= size
            atom = Atom(dim, stride)
            axes.append(Axis(size, None if atom in self.excluded else atom))
        return tuple(axes)

    def ordered(self, order: Order) -> tuple[Axis, ...]:
        """The factors of tokens that stand in an order."""
        axes, stride = [], order.size
        for size in dict(self.cuts).get(order, (order.size,)):
            stride //= size
            axes.append(Axis(size, Atom(-1, stride, order)))
        return tuple(axes)

    def refined(self, atom: Atom, outer: int) -> Frame:
        if atom.order is not None:
            return self._refined_order(atom.order, atom.stride, outer)
        parts, stride = list(self.parts[atom.dim]), math.prod(self.parts[atom.dim])
        for index, size in enumerate(parts):
            stride //= size
            if stride == atom.stride:
                parts[index : index + 1] = [outer, size // outer]
                break
        return replace(self, parts=self.parts[: atom.dim] + (tuple(parts),) + self.parts[atom.dim + 1 :])

    def _refined_order(self, order: Order, stride: int, outer: int) -> Frame:
        parts = [axis.size for axis in self.ordered(order)]
        index = next(k for k, axis in enumerate(self.ordered(order)) if axis.atom and axis.atom.stride == stride)
        inner = parts[index] // outer
        if len(parts) == 1 and len(order.base) == 1 and factors(order.places, inner):
            return self.refined(order.base[0][0], outer)  # patches in another order, and their pixels
        parts[index : index + 1] = [outer, inner]
        return replace(self, cuts=tuple({**dict(self.cuts), order: tuple(parts)}.items()))

    def plain(self, atoms: Iterable[Atom]) -> frozenset[Atom] | None:
        """The latent's own atoms that are behind these; None where an order has only some of its parts among them."""
        found: set[Atom] = set()
        for atom in (given := set(atoms)):
            if atom.order is None:
                found.add(atom)
            elif {axis.atom for axis in self.ordered(atom.order)} <= given:
                found |= {base for base, _ in atom.order.base}
            else:
                return None
        return frozenset(found)

    def without(self, atoms: frozenset[Atom]) -> Frame:
        return replace(self, excluded=self.excluded | atoms)

    def unbatched(self, apart: bool = False) -> Frame:
        return replace(self, batch_dim=None, shared_rows=apart)

    def clipped(self, atom: Atom, outer: int, inner: int) -> Frame:
        return replace(self, parts=self.parts[: atom.dim] + ((outer, inner),) + self.parts[atom.dim + 1 :])

    @property
    def group(self) -> Group | None:
        """The processes that the model's collectives join."""
        return self.shards or self.replicas

    def across(self, shards: Group | None, replicas: Group | None) -> Frame:
        return replace(self, shards=shards, replicas=replicas)

    def sharded(self, start: int, stop: int) -> Frame:
        return replace(self, stretch=(start, stop))

    @cached_property
    def everyone(self) -> Frame:
        """The frame whose region are the tokens of all processes, where this one's is a stretch of them."""
        return self if self.stretch is None else replace(self, stretch=None)

    def gathered(self, dim: Iterable[Factor]) -> Dim:
        """A product in which the tokens of all processes, one's behind another's, are those of the whole latent."""
        found, whole = normal(dim), [Axis(size, atom) for atom, size in self.everyone.region]
        for index, pair in enumerate(zip(found, found[1:], strict=False)):
            if self.stretch is not None and [axis.atom for axis in pair if isinstance(axis, Axis)] == [RANKS, OWN]:
                return normal([*found[:index], *whole, *found[index + 2 :]])
        return found

    def clip(self, dim: Dim, stop: int) -> Dim | None:
        """A product of which the first ``stop`` entries are a side of the latent that its patches do not fill; else None."""
        for index, size in enumerate(self.shape):
            if stop == size < math.prod(self.parts[index]) and dim == normal(self.atoms(index)):
                return (Clipped(dim, stop),)
        return None

    def layout(self) -> Layout:
        """The latent's own layout."""
        dims: list[Dim] = [self.atoms(dim) for dim in range(len(self.shape))]
        for index, (size, parts) in enumerate(zip(self.shape, self.parts, strict=True)):
            if size < math.prod(parts):
                dims[index] = (Clipped(normal(dims[index]), size),)
        if self.window is not None:
            start, stop = self.window
            dims[1] = concat([(Axis(start),), dims[1], (Axis(self.shape[1] - stop),)])
        return Layout.of(dims, raw=True)

    @property
    def batch(self) -> Atom | None:
        """The atom that counts the samples, or None where there is a single sample."""
        if self.batch_dim is None or self.shape[self.batch_dim] == 1:
            return None
        return Atom(self.batch_dim, 1)

    @property
    def samples(self) -> int:
        return 1 if self.batch_dim is None else self.shape[self.batch_dim]

    @cached_property
    def region(self) -> tuple[tuple[Atom, int], ...]:
        """The region's atoms with their sizes, in the order in which rows count them (the last one fastest)."""
        if self.stretch is not None:
            return ((OWN, self.stretch[1] - self.stretch[0]),)
        return tuple(
            (axis.atom, axis.size)
            for dim in range(len(self.shape))
            if dim != self.batch_dim
            for axis in self.atoms(dim)
            if axis.atom is not None and axis.size > 1
        )

    @cached_property
    def _own(self) -> frozenset[Atom]:
        return frozenset(atom for atom, _ in self.region)

    def counts_pictures(self, atom: Atom | None) -> bool:
        """Whether an atom counts what has active rows of its own: samples, or processes that hold tokens of their own."""
        return atom is not None and atom in (self.batch, RANKS)

    def counts_tokens(self, atom: Atom | None) -> bool:
        """Whether an atom is a part of the region, in the latent's order or in another one."""
        return atom is not None and (atom in self._own or atom.order is not None and atom.order.base[0][0] in self._own)

    def tokens_in(self, dims: Iterable[Dim]) -> list[Atom]:
        """The region's own atoms in these dimensions, as often as they stand there: behind an order are those that it has."""
        found: list[Atom] = []
        for axis in (axis for dim in dims for axis in axes_of(dim)):
            if axis.atom in self._own:
                found.append(axis.atom)
            elif leads(axis):
                found += [atom for atom, _ in axis.atom.order.base]
        return found

    def twice(self, dims: Sequence[Dim]) -> bool:
        """Whether an atom stands twice in these dimensions, be it in two orders: what has one entry for all pairs of tokens."""
        atoms, tokens = [atom for dim in dims for atom in atoms_of(dim)], self.tokens_in(dims)
        return len(atoms) != len(set(atoms)) or len(tokens) != len(set(tokens))

    def carries(self, layout: Layout) -> bool:
        """Whether a tensor read by ``layout`` has entries of its own for each token (of a part of the grid, at least)."""
        return any(self.counts_tokens(atom) for dim in layout.dims for atom in atoms_of(dim))

    def separable(self, layout: Layout) -> bool:
        """Whether a tensor holds each token once: no atom twice, and beside other segments all of the region in one."""
        found = self.tokens_in(layout.dims)
        for factor in (factor for dim in layout.dims for factor in dim if isinstance(factor, Concat)):
            held = [atoms for atoms in (set(self.tokens_in([segment])) for segment in factor.segments) if atoms]
            if held and (len(held) > 1 or held[0] != set(found)):
                return False
        own = [atom for dim in layout.dims for atom in atoms_of(dim) if self.counts_tokens(atom)]
        return len(found) == len(set(found)) and len(own) == len(set(own))

    @cached_property
    def tokens(self) -> int:
        """N: the number of rows of the region in one sample."""
        return math.prod(size for _, size in self.region)

    @cached_property
    def grid(self) -> tuple[int, ...]:
        """The region's extent along each latent dimension that it has atoms of."""
        extent: dict[int, int] = {}
        for atom, size in self.region:
            extent[atom.dim] = extent.get(atom.dim, 1) * size
        return tuple(extent.values())


class Sizes:
    """Sizes in the sparse world: the leading region atom counts the active rows, the other region atoms count one.

    Args:
        active: A, the number of active rows; an int, or a sympy symbol for the cost model.
        context: whether the segments beside the region are there; without them (a frozen context) they have no entries.
    """

    def __init__(self, frame: Frame, active: Any, *, context: bool = True) -> None:
        self.frame, self.active, self.context = frame, active, context
        self._lead = frame.region[0][0]

    def leads(self, axis: Axis) -> bool:
        """Whether a factor is the one that counts the active rows: of tokens in an order, the first part of the order."""
        return axis.atom == self._lead or leads(axis) and self._lead in dict(axis.atom.order.base)

    def axis(self, axis: Axis) -> Any:
        if not self.frame.counts_tokens(axis.atom):
            return axis.size
        return self.active if self.leads(axis) else 1

    def dim(self, dim: Dim) -> Any:
        size: Any = 1
        for factor in dim:
            if isinstance(factor, Concat):
                size = size * sum(self.segment(segment) for segment in factor.segments)
            elif isinstance(factor, Clipped):
                size = size * self.dim(factor.inner)
            else:
                size = size * self.axis(factor)
        return size

    def segment(self, segment: Dim) -> Any:
        """Entries of one segment of a concatenated dimension."""
        return self.dim(segment) if self.context or any(map(self.frame.counts_tokens, atoms_of(segment))) else 0

    def shape(self, layout: Layout) -> tuple[Any, ...]:
        return tuple(self.dim(dim) for dim in layout.dims)
