"""Plans that differ in lengths alone, of the context or of a packed latent: they share one capture, one proof, and programs.

    length 5    static programs (Dynamo's first graph)
    length 9    a family: the graph is captured once with symbolic lengths, planned at this length and at two or three made
                up ones, and each program is compiled once, with the length as an argument (`passes/lowering/interpolate.py`)
    length 7    a member: nothing is captured, proved or compiled; only CUDA graphs are, which bake sizes in

Where the latent's tokens are a length, or its sides are (`grid.py`), all sizes of pictures share programs, and so do all
numbers of active rows: the sparse program takes that number as one more length.

What the inner compiler assumes of a length is checked for each member. Where it does not hold, that program is compiled
for that member alone.
"""

from __future__ import annotations

import copy
import logging
import math
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile.capture.inputs import GraphInput
from ras_compile.config import RASConfig
from ras_compile.errors import SpecViolation, UnsupportedGraph
from ras_compile.execute.compiling import compiling
from ras_compile.execute.inner import Compiled, compile_inner
from ras_compile.notices import fell_back
from ras_compile.passes.analysis.cost import Cost
from ras_compile.passes.lowering.interpolate import NotAffine, Point, interpolate
from ras_compile.passes.pipeline import for_all_lengths
from ras_compile.passes.rules.registry import nodes_in
from ras_compile.plans.grid import Grid
from ras_compile.plans.latent import is_fixed
from ras_compile.plans.lengths import Lengths, Region
from ras_compile.plans.plan import Plan
from ras_compile.plans.shared import Shared, Sized, all_fit
from ras_compile.plans.symbolic import SymbolicGraph, Symbols

log = logging.getLogger(__name__)

FAMILIES = 8  # of one graph: calls that differ in more than lengths, such as resolutions
KEPT = 4  # members whose caches and CUDA graphs stay when their generations end; prompts have many lengths


@dataclass(frozen=True)
class Sample:
    """A program at one point, from many of which the one for all lengths is made."""

    point: Point  # the lengths
    plan: Plan  # the plan at these lengths
    caches: list[Tensor]  # what its dense program leaves behind
    active: int | str  # ``"dense"``, ``"bare"``, or the active rows


class Family:
    """The plans of one graph for calls that differ in lengths alone.

    Raises:
        UnsupportedGraph: there is no such family: the latent's size depends on a length that is not the number of its tokens,
            or a plan cannot be proved right.
        NotAffine: what the plans keep or compute is not of one form at all lengths.
    """

    def __init__(
        self, graph: SymbolicGraph, inputs: Sequence[GraphInput], values: Sequence[Any], config: RASConfig
    ) -> None:
        self.graph, self.inputs, self.config = graph, inputs, config
        self.grid = Grid(graph, graph.lengths.at(values))
        self.points = self.grid.points
        self._as_static = replace(config, cuda_graphs=False)  # of plans that are looked at and not run
        pairs = zip(inputs, values, strict=True)
        self._described = [described(v) if isinstance(v, Tensor) and not is_fixed(i, v) else v for i, v in pairs]
        first = self.exact(self.points[0], proved=False)
        self.grows = first.latent in graph.lengths.sizes  # the latent's tokens are a length
        if self.grows and not (first.packed or any(graph.lengths.sides)):
            raise UnsupportedGraph("the latent's size depends on a length that is not the number of its tokens")
        # later plans are of the same kind, whatever else may look like a latent at another length
        context = config.context if first.sparse.live else "fresh"
        self._as_static = replace(self._as_static, latent=inputs[first.latent].path, context=context)
        self.samples = [first, *(self.exact(point, proved=False) for point in self.points[1:])]
        alike = {(plan.latent, plan.noise, len(plan.sparse.splices), len(plan.sparse.frozen)) for plan in self.samples}
        if len(alike) > 1:
            raise UnsupportedGraph("other values are spliced at another length")
        self._dense = dense = [plan.dense_graph() for plan in self.samples]
        interpolate(dense, self.points)
        self._caches = [
            plan.caches_among([node.meta["val"] for node in nodes_in(program.graph.output_node().args)])
            for program, plan in zip(dense, self.samples, strict=True)
        ]
        self.programs: dict[int | str, Shared | None] = {}
        self.members: list[Member] = []
        self.lock = threading.RLock()

    def exact(self, point: Point, *, proved: bool = True) -> Plan:
        """The plan for these lengths alone."""
        graph = self.graph.at(self.grid.lengths_at(point))
        return Plan(graph, self.inputs, self._inputs_at(point), self._as_static, proved=proved)

    def _inputs_at(self, point: Point) -> list[Any]:
        """Inputs of these lengths, without what is in them."""
        lengths, made, point = self.graph.lengths, list(self._described), self.grid.lengths_at(point)
        for index in lengths.sizes:
            if isinstance(made[index], Tensor):
                made[index] = described(made[index], *lengths.described(index, point))
            else:
                made[index] = lengths.number(index, point)
        return made

    def member(self, values: Sequence[Any]) -> Plan | None:
        """The plan for a call; None where its lengths are not ones that the captured graph is right for."""
        lengths = self.graph.lengths.at(values)
        if not (self.graph.lengths.fits(values, lengths) and self.graph.holds(lengths) and self.grid.fits(lengths)):
            return None
        member = Member(self, self.grid.point_at(lengths), values)
        if self.grows or self.graph.orders:
            try:
                self.check(member)
            except NotAffine as error:
                fell_back("a plan for each length or size", error)
                return None
        return member

    def check(self, member: Member) -> None:
        """Whether a member's own programs are those of the family, at its lengths.

        Rules decide by values that lengths give (what stands where, an order of tokens) and by what is smaller; at the
        samples that may come out otherwise.

        Raises:
            NotAffine: they differ.
        """
        if member.point == self.points[0]:  # a sample itself
            return
        # a member whose tokens are no length needs no analysis of its own, and keeps none
        exact = member.exact if self.grows else self.exact(member.point)
        points = [*self.points[:-1], member.point]
        interpolate([*self._dense[:-1], exact.dense_graph()], points)
        interpolate([*self._sparse[:-1], self._of_few_rows(exact)], points)

    @cached_property
    def _sparse(self) -> list[fx.GraphModule]:
        return list(map(self._of_few_rows, self.samples))

    def _of_few_rows(self, plan: Plan) -> fx.GraphModule:
        """A plan's sparse program before the passes, for as few rows as all plans have."""
        return plan.sparse_graph(min(2, *(each.analysis.frame.tokens for each in self.samples)))

    def entering(self, member: Member) -> None:
        """A member runs a dense step: of those that ran before, the ones used longest ago give up what they keep."""
        if self.members[-1:] == [member]:
            return
        with self.lock:
            self.members = [*(other for other in self.members if other is not member), member]
            for other in self.members[:-KEPT]:
                other.kept.give_up()
            del self.members[:-KEPT]

    def cache_bytes(self, point: Point) -> int:
        """Bytes of the caches of one guidance branch."""
        total = 0
        for tensors in zip(*self._caches, strict=True):
            sizes, _ = Sized.of(self.points, tensors).at(point)
            total += math.prod(sizes) * tensors[0].element_size()
        return total

    def program(self, active: int | str, point: Point, inputs: Sequence[Any]) -> Compiled | None:
        """A program of a member, which takes what those of other plans take; None where it has to have its own.

        Args:
            active: ``"dense"``, or the active rows of a sparse one.
        """
        key = active
        if self.grows and isinstance(active, int):
            if active < 2:  # a size of one is another program
                return None
            key, point = "sparse", (*point, active)
        with compiling():
            if key not in self.programs:
                try:
                    self.programs[key] = self.share(active, point, inputs)
                except SpecViolation:
                    raise
                except Exception as error:  # whatever the inner compiler does not do with symbols, it does without
                    fell_back("programs compiled for each length or size", error)
                    self.programs[key] = None
            shared = self.programs[key]
        if shared is None:
            return None
        if not shared.fits(point, inputs):
            log.info("a program is compiled apart for lengths %s", point)
            return None
        return partial(shared.compiled, *point)

    def share(self, active: int | str, point: Point, inputs: Sequence[Tensor]) -> Shared:
        """Compiles a program for all lengths.

        Raises:
            NotAffine: there is no such program.
        """
        samples = self.samples_for(active)
        points = [sample.point for sample in samples]
        builds, sized = self.builds(samples), self.sized(samples, inputs)
        if not all_fit(sized, point, inputs):
            raise NotAffine("an input has other strides than the dense program was to leave")
        if self.config.inner_backend == "inductor":
            try:
                program = for_all_lengths(builds, points, outline_blocks=True)
                shared = self.compile(program, points[0], sized, inputs)
                if all(map(shared.symbols.holds, points)):
                    return shared
                log.info("compiling outlined blocks has fixed a length, compiling them one by one")
            except SpecViolation:
                raise
            except Exception as error:
                fell_back("blocks compiled one by one", error)
        return self.compile(for_all_lengths(builds, points, outline_blocks=False), points[0], sized, inputs)

    def samples_for(self, active: int | str) -> list[Sample]:
        """What a program is made from. Where the active rows are a length, their number is moved as well.

        Raises:
            NotAffine: there are too few tokens for that.
        """
        found = [Sample(*one, active) for one in zip(self.points, self.samples, self._caches, strict=True)]
        if not self.grows or isinstance(active, str):
            return found
        least = min(plan.analysis.frame.tokens for plan in self.samples)
        count = min(active, least - 1)
        other = count - 1 if count > 2 else count + 2
        if count < 2 or other > least:
            raise NotAffine(f"{least} tokens are too few to tell how a program depends on the active ones")
        base, *moved, check = [
            replace(one, point=(*one.point, now), active=now)
            for one, now in zip(found, [*[count] * (len(found) - 1), other], strict=True)
        ]
        again = copy.copy(base.plan)
        vars(again).pop(
            "fusion", None
        )  # it finds the sites of its fusions again, so that it asks what the first one asked
        more = replace(base, point=(*self.points[0], count + 1), plan=again, active=count + 1)
        return [base, *moved, more, check]

    def compile(self, program: fx.GraphModule, base: Point, sized: Sequence[Sized], inputs: Sequence[Tensor]) -> Shared:
        symbols = Symbols(base)
        given = [
            symbols.tensor(*one.at(symbols.lengths), like=tensor) if one.varies else symbols.fake(tensor)
            for one, tensor in zip(sized, inputs, strict=True)
        ]
        return Shared(compile_inner(program, [*symbols.lengths, *given], self.config), symbols, list(sized))

    def builds(self, samples: Sequence[Sample]) -> list[fx.GraphModule]:
        """The program at each point. What is fused is decided at the first one."""
        first, *others = samples
        answers: list[bool] = []

        def choose(choice: Callable[..., bool], *ops: Any) -> bool:
            answers.append(choice(*ops))
            return answers[-1]

        first.plan.chosen = choose
        programs = [first.plan.build(first.active, outline_blocks=False)]
        for sample in others:
            sample.plan.chosen = partial(_told, iter(answers))
            programs.append(sample.plan.build(sample.active, outline_blocks=False))
        return programs

    def sized(self, samples: Sequence[Sample], inputs: Sequence[Tensor]) -> list[Sized]:
        """The inputs of a program: the graph's, then for a sparse one its rows and the caches."""
        points = [sample.point for sample in samples]
        given = [sample.plan.captured.graph.find_nodes(op="placeholder") for sample in samples]
        taken = [[node.meta["val"] for node in nodes] for nodes in zip(*given, strict=True)]
        if not isinstance(samples[0].active, str):
            rows = inputs[len(taken)]
            taken.append([described(rows, (len(rows), int(one.active)), (int(one.active), 1)) for one in samples])
            taken += map(list, zip(*(sample.caches for sample in samples), strict=True))
        return [Sized.of(points, tensors) for tensors in taken]


class Families:
    """The families of one Dynamo graph.

    Args:
        users: positions of the inputs that tell calls apart.
    """

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[GraphInput], users: Sequence[int]) -> None:
        self._graph, self._inputs, self._users = graph, inputs, users
        self._captured: dict[Hashable, SymbolicGraph | None] = {}
        self._found: dict[Hashable, list[Family | None]] = {}

    def plan(
        self,
        values: Sequence[Any],
        config: RASConfig,
        numbers: Sequence[int],
        fixed: int | None = None,
        *,
        new: bool = True,
    ) -> Plan | None:
        """The plan for a call as a member of a family; None where it has to have a plan of its own.

        Args:
            numbers: positions of integers that are tensors among the values.
            fixed: which values the whole numbers among the weights have.
            new: whether a family may be made.
        """
        for part in Region:
            lengths = Lengths.of(self._graph, self._inputs, values, numbers, part)
            if lengths is not None and (part is Region.NOTHING or not config.region):
                plan = self._member(lengths, values, config, fixed, new)
                if plan is not None:
                    return plan
        return None

    def _member(
        self, lengths: Lengths, values: Sequence[Any], config: RASConfig, fixed: int | None, new: bool
    ) -> Plan | None:
        key: Hashable = (lengths.key_without_lengths(values, self._users), fixed)
        region = config.region and (config.region.start, config.region.stop, config.region.step)
        known = self._found.setdefault((key, region), [])
        point = lengths.at(values)
        family = next((each for each in known if each is None or each.grid.takes(point)), None)
        if new and family is None and None not in known and sum(map(len, self._found.values())) < FAMILIES:
            family = self.make(key, lengths, values, config)
            known.append(family)
        return None if family is None else family.member(values)

    def make(self, key: Hashable, lengths: Lengths, values: Sequence[Any], config: RASConfig) -> Family | None:
        try:
            if key not in self._captured:
                self._captured[key] = None
                self._captured[key] = SymbolicGraph(self._graph, lengths, values)
            graph = self._captured[key]
            return None if graph is None else Family(graph, self._inputs, values, config)
        except SpecViolation:
            raise
        except Exception as error:  # a plan of its own will say what is wrong with the call, if anything is
            fell_back("a plan for each length or size", error)
            return None


class Member(Plan):
    """A plan of a family."""

    def __init__(self, family: Family, point: Point, values: Sequence[Any]) -> None:
        self.family, self.point = family, point
        # where tokens and their layouts are others, the analysis is, too
        like = self.exact if family.grows else family.samples[0]
        super().__init__(like.captured, family.inputs, values, family.config, like=like)

    def _cache_bytes(self) -> int:
        return self.family.cache_bytes(self.point)

    def dense(self, values: Sequence[Any], slots: dict, spare: dict | None = None) -> list[Any]:
        self.family.entering(self)
        return super().dense(values, slots, spare)

    @cached_property
    def exact(self) -> Plan:
        """The plan for this member's lengths alone, made when it is needed; that of the family's own lengths is there."""
        family = self.family
        return family.samples[0] if self.point == family.points[0] else family.exact(self.point)

    def static_graph(self) -> fx.GraphModule:
        return self.captured if self.family.grows else self.family.graph.at(self.point)

    @cached_property
    def cost(self) -> Cost:
        return self.exact.cost

    def _compile(self, active: int | str, inputs: Sequence[Any]) -> Compiled:
        shared = self.family.program(active, self.point, inputs)
        return self.exact._compile(active, inputs) if shared is None else shared

    def build(self, active: int | str, *, outline_blocks: bool = True) -> fx.GraphModule:
        return self.exact.build(active, outline_blocks=outline_blocks)

    def plain(self, active: int | str) -> fx.GraphModule:
        return self.exact.plain(active)


def described(tensor: Tensor, sizes: Sequence[int] | None = None, strides: Sequence[int] | None = None) -> Tensor:
    """A tensor without values: of the sizes and strides of another one, or of those that are given."""
    sizes, strides = (tensor.shape, tensor.stride()) if sizes is None or strides is None else (sizes, strides)
    return torch.empty_strided(list(sizes), list(strides), dtype=tensor.dtype, device="meta")


def _told(answers: Iterator[bool], choice: Callable[..., bool], *ops: Any) -> bool:
    return next(answers, False)
