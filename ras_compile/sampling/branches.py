"""Guidance branches: the model calls of one step differ in their context, and each keeps caches of its own.

A call is matched to a branch by the identity of its context tensors, seen through weak references. Some pipelines make
some of them anew at each step; how a position behaves is learned in the dense steps at the start:

    held     the same object at each step; once it changes, the context has changed
    fresh    a new object with equal content; compared by a fingerprint (on CUDA one host read)
    moving   content that has changed at every step so far, such as ControlNet residuals; says nothing

What still cannot be told apart is reported as not sure, and runs dense.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ras_compile._torch import version_of

# Fingerprints weigh at most about so many elements of a tensor by their position; plain sums take all of them.
_WEIGHED = 1 << 20
_AT_ONCE = 1 << 22  # elements


def tensor_mark(tensor: Tensor) -> tuple[weakref.ref, int | None]:
    """What tells a tensor object, and its content, from others: a weak reference and its version.

    Inference tensors have no version: a write into one of them goes unseen.
    """
    return weakref.ref(tensor), None if tensor.is_inference() else version_of(tensor)


def same_tensor(mark: tuple[weakref.ref, int | None], tensor: Tensor) -> bool:
    """Whether `tensor` is the very object of `mark` and has not been written since, as far as that can be known."""
    return mark[0]() is tensor and mark[1] == (None if tensor.is_inference() else version_of(tensor))


def intact(mark: tuple[weakref.ref, int | None]) -> bool:
    """Whether the object of `mark` is alive and has not been written since, as far as that can be known."""
    tensor = mark[0]()
    return tensor is not None and same_tensor(mark, tensor)


class Contents:
    """Tells whether what a graph's weights hold has changed; reads the device only where a buffer was exchanged.

    Seen are weights that are written in place (`load_state_dict`, an optimiser) or exchanged for others, and numbers that a
    module holds, such as an adapter's strength, which Dynamo hands over as 0-d tensors that are new at each call. A write
    through `.data` goes unseen, as it does for autograd.

    A move to another device and back is no change. A parameter stays the same object in a move, with the same version, but a
    buffer becomes a new one: offloading exchanges it, maybe at every step. So for buffers the content decides.
    """

    def __init__(self, weights: Sequence[Any]) -> None:
        self._numbers = [place for place, value in enumerate(weights) if value.ndim == 0 and not value.is_cuda]
        buffers = [place for place, value in enumerate(weights) if type(value) is Tensor]
        self._prints = {place: _print_or_none(weights[place]) for place in {*buffers} - {*self._numbers}}
        self._changes = 0
        values, _ = self._without_numbers(weights)
        self._see(values, versions_of(values))

    def mark(self, weights: Sequence[Any]) -> tuple[int, list[float]]:
        """What is equal as long as nothing changes. Without Python for each weight: there are hundreds, and calls wait."""
        values, numbers = self._without_numbers(weights) if self._numbers else (weights, [])
        versions = versions_of(values)
        # an id is another object's only when its first owner has died
        if self._dead or list(map(id, values)) != self._ids or versions != self._seen:
            self._changes += self._differ(values, versions)
            self._see(values, versions)
        return self._changes, numbers

    def _without_numbers(self, weights: Sequence[Any]) -> tuple[Sequence[Any], list[float]]:
        """The weights with what never changes in place of each number; and the numbers."""
        values = list(weights)
        for place in self._numbers:
            values[place] = _TAKEN
        return values, [weights[place].item() for place in self._numbers]

    def _see(self, values: Sequence[Tensor], versions: list[int | None]) -> None:
        self._dead: list[weakref.ref] = []  # those that have died since
        self._refs = [weakref.ref(value, self._dead.append) for value in values]
        self._ids, self._seen = list(map(id, values)), versions

    def _differ(self, values: Sequence[Tensor], versions: list[int | None]) -> bool:
        """Whether some weight is another one than the last time, and not a buffer that holds the same."""
        other = [
            place
            for place, value in enumerate(values)
            if self._refs[place]() is not value or self._seen[place] != versions[place]
        ]
        equal = 0
        for place in self._prints.keys() & other:
            before, now = self._prints[place], _print_or_none(values[place])
            equal += before is not None and now is not None and equal_prints(before, now)
            self._prints[place] = now
        return equal < len(other)


_TAKEN = torch.zeros(())  # stands where a number was


def versions_of(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often each was written; None for inference tensors, which do not count it."""
    try:
        return list(map(version_of, tensors))
    except RuntimeError:
        return [None if tensor.is_inference() else version_of(tensor) for tensor in tensors]


def _print_or_none(tensor: Tensor) -> tuple | None:
    """The fingerprint of a buffer; None where its dtype has no sums, such as uint4."""
    try:
        return fingerprint(tensor)
    except NotImplementedError:
        return None


class _Prints:
    """Fingerprints of one call's context, made when first asked for."""

    def __init__(self, context: Sequence[Any]) -> None:
        self._context, self._made = context, {}  # type: Sequence[Any], dict[int, tuple]

    def __getitem__(self, position: int) -> tuple:
        if position not in self._made:
            value = self._context[position]
            self._made[position] = fingerprint(value) if isinstance(value, Tensor) else (None, value)
        return self._made[position]


def fingerprint(tensor: Tensor) -> tuple:
    """Shape, dtype, device, and three sums of a tensor's content; made without a host read."""
    flat = tensor.detach()
    flat = (torch.view_as_real(flat) if flat.is_complex() else flat).flatten()
    head = (tensor.shape, tensor.dtype, tensor.device)
    few = flat[:: max(1, flat.numel() // _WEIGHED)].double()
    weights = torch.linspace(1, 2, few.numel(), dtype=torch.float64, device=few.device)
    # CUDA makes a float64 copy of what it sums: in pieces, since that of a table of positions may be as large as all caches
    whole = torch.stack([piece.sum(dtype=torch.float64) for piece in flat.split(_AT_ONCE)]).sum()
    return head, torch.stack([whole, few.abs().sum(), (few * weights).sum()])


def equal_prints(first: tuple, second: tuple) -> bool:
    """Whether two fingerprints are equal; on CUDA a host read."""
    if first[0] != second[0]:
        return False
    if isinstance(first[1], Tensor):
        return torch.equal(first[1], second[1])
    return bool(first[1] == second[1])


@dataclass
class _Position:
    """One place in a branch's context: what stood there last, and how it behaved from call to call."""

    mark: Any
    print: tuple
    same: int = 0
    fresh: int = 0
    moved: int = 0
    past: list[Any] = field(default_factory=list)  # marks of earlier objects that are still alive

    def compare(self, value: Any, prints: _Prints, at: int, held_counts: bool, read: bool) -> str:
        """ "same", "equal", "moving", "unsure" or "differs"; "unread" where only the content tells and `read` is off.

        `held_counts`: a held object that is replaced differs.
        """
        if isinstance(value, Tensor) and isinstance(self.mark, tuple) and same_tensor(self.mark, value):
            return "same"
        if any(mark[0]() is value for mark in self.past):
            return "differs"  # what moves does not come back: two runs or two branches take turns
        if self.moved and not self.same and not self.fresh:
            return "moving"
        if not read and isinstance(value, Tensor):
            return "unread"
        if equal_prints(self.print, prints[at]):
            return "differs" if held_counts and self.same and not self.fresh else "equal"
        return "unsure" if not self.same and not self.fresh else "differs"

    def learn(self, value: Any, verdict: str, prints: _Prints, at: int) -> None:
        self.same += verdict == "same"
        self.fresh += verdict == "equal"
        self.moved += verdict in ("moving", "unsure", "differs")
        if verdict != "same" and isinstance(value, Tensor):
            self.past = [mark for mark in (*self.past, self.mark) if mark and mark[0]() is not None]
            self.mark = tensor_mark(value)
        if verdict in ("unsure", "differs"):
            self.print = prints[at]


def _refs(context: Sequence[Any]) -> list[weakref.ref | None]:
    return [weakref.ref(value) if isinstance(value, Tensor) else None for value in context]


def _shared(before: Sequence[weakref.ref | None], context: Sequence[Any]) -> bool:
    """Whether some tensor stands at its place as before; also where there are no tensors."""
    refs = [(ref, value) for ref, value in zip(before, context, strict=True) if ref is not None]
    return not refs or any(ref() is value for ref, value in refs)


class Slots(dict):
    """What a plan keeps for one branch. Can be referred to weakly, so that whoever drops the plan finds it."""

    __slots__ = ("__weakref__",)


@dataclass(eq=False)
class Branch:
    """One guidance branch of one graph: `slots` holds the backend's caches of it."""

    label: str  # the name that somebody gave it, or "0", "1", ... by order of appearance.
    name: str | None  # the given name, or None
    graph: Hashable  # identity of the compiled plan
    positions: list[_Position]
    order: int  # place among the calls of the last step that had this branch
    last_step: int | None = None  # last step in which the branch was run to its end
    kept: bool = False  # whether that call left its caches and its noise, without which the next one cannot be sparse
    slots: dict = field(default_factory=Slots)
    spare: dict | None = None
    given: list[weakref.ref | None] = field(default_factory=list)  # the last context, where it is not compared
    contents: Any = None  # mark of what the weights held at the last call
    held: int = 0  # calls in a row that had some of the tensors of the call before


@dataclass
class Match:
    """The branch that a call belongs to (None: not seen yet), and how far that can be trusted."""

    branch: Branch | None
    sure: bool = True
    changed: bool = False
    verdicts: list[str] = field(default_factory=list)
    prints: Any = None
    replaced: bool = False  # not one tensor of a context that has stayed until now is there any more

    @property
    def known(self) -> bool:
        """Whether the context ties the call to the branch: by a held object where other positions move."""
        if self.branch is None or "differs" in self.verdicts:
            return False
        return not self.verdicts or "same" in self.verdicts or set(self.verdicts) == {"equal"}


class Branches:
    """The branches of one run.

    Args:
        check_named: whether a change of context matters where somebody named the branch. If not, such a branch's
            context is not looked at, so that nothing is ever read from the device.
    """

    def __init__(self, check_named: bool = True) -> None:
        self._check_named = check_named
        self.known: list[Branch] = []

    def find(
        self, context: Sequence[Any], graph: Hashable, name: str | None, order: int, used: list[Branch], alone: bool
    ) -> Match:
        """Match a call.

        Args:
            context: the call's context, in a fixed order: tensors, or numbers that tell branches apart.
            graph: identity of the compiled plan.
            name: the branch's name, where somebody gave it; then the context is only checked for changes.
            order: the call's place within its step.
            used: branches already called in this step.
            alone: nobody says where steps end: a used branch may come again (and so ends the step), and a held object
                that is replaced means another context. Else a second call in a step is another branch.
        """
        given, context = context, context if name is None or self._check_named else ()
        prints = _Prints(context)
        fitting = [
            branch
            for branch in self.known
            if branch.graph == graph
            and branch.name == name
            and len(branch.positions) == len(context)
            and (alone or branch not in used)
        ]

        def look(read: bool) -> list[tuple[tuple, Match]]:
            found = []
            for branch in fitting:
                verdicts = [
                    position.compare(value, prints, at, alone, read)
                    for at, (position, value) in enumerate(zip(branch.positions, context, strict=True))
                ]
                if "differs" in verdicts and name is None:
                    continue
                changed = "differs" in verdicts or "unsure" in verdicts
                match = Match(branch, name is not None or "unsure" not in verdicts, changed, verdicts, prints)
                rank = (match.sure, verdicts.count("same"), verdicts.count("equal"), branch not in used)
                found.append(((*rank, branch.order == order), match))
            return sorted(found, key=lambda entry: entry[0], reverse=True)

        # identity first: the content is read only where it could point to another branch
        found = look(read=False)
        unread = [rank[1] for rank, match in found if "unread" in match.verdicts]
        found = [entry for entry in found if "unread" not in entry[1].verdicts]
        if unread and (not found or max(unread) >= found[0][0][1]):
            found = look(read=True)
        if not found:
            return Match(None, prints=prints)
        rank, best = found[0]
        # two branches fit equally well, and what moves cannot tell them apart
        if name is None and len(found) > 1 and found[1][0][:3] == rank[:3] and "moving" in best.verdicts:
            best.sure = False
        if name is not None and best.branch is not None:
            best.replaced = best.branch.held > 0 and not _shared(best.branch.given, given)
        return best

    def add(self, context: Sequence[Any], graph: Hashable, name: str | None, order: int, prints: _Prints) -> Branch:
        """A branch that has not been seen before."""
        given, context = context, context if name is None or self._check_named else ()
        positions = [
            _Position(tensor_mark(value) if isinstance(value, Tensor) else None, prints[at])
            for at, value in enumerate(context)
        ]
        label = name if name is not None else str(sum(branch.name is None for branch in self.known))
        branch = Branch(label, name, graph, positions, order, given=_refs(given))
        self.known.append(branch)
        return branch

    @staticmethod
    def learn(match: Match, context: Sequence[Any], order: int) -> None:
        """Take note of how the positions of a matched branch behaved."""
        assert match.branch is not None
        match.branch.order = order
        if match.branch.name is not None:
            match.branch.held = match.branch.held + 1 if _shared(match.branch.given, context) else 0
            match.branch.given = _refs(context)
        for at, (position, verdict) in enumerate(zip(match.branch.positions, match.verdicts, strict=True)):
            position.learn(context[at], verdict, match.prints, at)
