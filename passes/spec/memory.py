"""Caches and rows, followed entry by entry: a program is run on the numbers of the entries instead of on the entries.

Active rows are drawn, and whatever is computed from them alone (index tensors) is computed. In the place of a cache stand the
numbers 0, 1, 2, .. of its entries, so that a view of it shows which entries it shows, and a write says which it writes. All
else is unknown. This needs no layout and none of the code that made the index tensors, and it sees, after every pass:

- a row outside of the cache that it is written to, or of the tensor that it is taken from;
- an entry that is written twice in one step (but for the last one, by a patch that reaches beyond it: what the patch misses is
  that entry once more, as `positions.py` says), or that no token of any draw and no context ever writes;
- an entry that is read before it is written (what is read would be a step old);
- a cache of the host's memory that is not sent back behind its last write;
- a write into anything but a cache or memory that the program has made, and a returned value in a cache's memory.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from ras_compile._torch import OpOverload, auto_functionalized_v2, memory_key, pytree, schema_of
from ras_compile.passes.analysis.roles import Role, of_role, role_of
from ras_compile.passes.programs.aliases import root, shows, subgraph, writes
from ras_compile.passes.rules.collectives import COLLECTIVES, WAIT
from ras_compile.passes.rules.registry import by_name, called
from ras_compile.passes.spec.demand import AMBIENT, demand

aten, own = torch.ops.aten, torch.ops.ras_compile
LARGEST = 1 << 22  # entries of all caches together: a larger program is not followed
DRAWS = 8  # draws of rows, at most; where these hold every token, every entry of a cache must have been written
INTEGERS = (torch.int64, torch.int32, torch.bool)


@dataclass
class Memory:
    """The entries of one cache, or of one tensor that a program makes and fills."""

    owner: fx.Node
    written: Tensor  # bool, by entry
    read: Tensor
    hosted: bool = False  # whether it is brought in from the host's memory
    away: bool = False  # and has not been sent back since

    @property
    def is_cache(self) -> bool:
        return self.owner.op == "placeholder"


@dataclass(frozen=True)
class Shown:
    """A view of memory: for each of its entries the number of the entry that it shows."""

    memory: Memory
    places: Tensor


@dataclass(frozen=True)
class Pending:
    """What a write would leave in memory, computed without writing: a `copy_` into the memory makes it true."""

    memory: Memory
    places: Tensor


@dataclass
class Step:
    """A program, followed through one sparse step on the active rows ``rows`` (int64 [B, A]; None: a dense step)."""

    rows: Tensor | None
    memories: list[Memory] = field(default_factory=list)
    # By its identity, an index tensor that was clamped to the last entry, and where it was beyond it.
    clamped: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    # What only computes with values that are not known, whichever the rows: found in the first draw, passed over in others.
    idle: set[fx.Node] = field(default_factory=set)

    def follow(self, graph: fx.Graph, given: dict[fx.Node, Any] | None = None) -> None:
        """Follows a graph, or a repeated block whose placeholders are ``given``.

        Raises:
            SpecViolation: see above.
        """
        env: dict[fx.Node, Any] = dict(given or {})
        made = {root(target) for node in graph.nodes if not _only_computes(node.target) for target in writes(node)}
        for node in graph.nodes:
            if given is None and node in self.idle:
                continue
            if node.op == "placeholder" and given is None:
                env[node] = self._input(node)
            elif node.op == "get_attr":
                env[node] = _table(node)
            elif node.op == "call_function":
                operands = node.all_input_nodes
                if operands and _only_computes(node.target) and all(env.get(one) is None for one in operands):
                    if given is None and node not in made:
                        self.idle.add(node)
                        continue
                    env[node] = None
                else:
                    env[node] = None if node.target in AMBIENT else self._call(node, env)
                if node in made and env[node] is None:
                    demand(node.target is aten.empty.memory_format, node, "is written into, and is no cache")
                    env[node] = self._memory(node)
            elif node.op == "output":
                for value in _known(node, env):
                    if isinstance(value, Shown):
                        owner = value.memory.owner
                        demand(not value.memory.is_cache, node, f"returns memory of `{owner.name}`, a cache")

    def _input(self, node: fx.Node) -> Any:
        role = role_of(node)
        if role is Role.ROWS:
            return self.rows
        return self._memory(node) if role is Role.CACHE else node.meta["val"] if role is Role.LENGTH else None

    def _memory(self, node: fx.Node) -> Shown:
        value = node.meta["val"]
        places = torch.arange(value.numel()).as_strided(value.shape, value.stride())
        memory = Memory(node, *(torch.zeros(value.numel(), dtype=torch.bool) for _ in "wr"))
        self.memories.append(memory)
        return Shown(memory, places)

    def _call(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        target = node.target
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), env.get)
        block = subgraph(node)
        if block is not None:
            inner = dict(zip(block.graph.find_nodes(op="placeholder"), args[2:], strict=True))
            self.follow(block.graph, inner)
            return None
        if target is operator.getitem:
            return args[0][args[1]] if isinstance(args[0], (tuple, list)) else None
        if target is auto_functionalized_v2:
            return self._functional(node, args[0], kwargs)
        if target is own.from_host.default:  # stands for the cache
            if isinstance(args[0], Shown):
                args[0].memory.hosted = args[0].memory.away = True
            return args[0]
        if writes(node):
            self._write(node, args, kwargs)
            return args[0] if shows(node) else None
        if target is aten.index.Tensor:
            self._in_range(node, node.args[0].meta["val"].shape, args[1])
        elif target is own.gather_linear.default:
            given = by_name(target, args, kwargs)
            self._rows_in_range(node, node.args[0].meta["val"].shape, given["rows"], given["grid_dims"])
        held = _known(node, env)
        if any(isinstance(value, Shown) for value in held):
            return self._show_or_read(node, env)
        return self._integers(node, args, kwargs, env)

    def _integers(self, node: fx.Node, args: tuple, kwargs: dict[str, Any], env: dict[fx.Node, Any]) -> Any:
        """A value that is computed from known integers alone; None for others."""
        if any(env.get(operand) is None for operand in node.all_input_nodes):
            return None
        value = node.meta["val"]
        whole = isinstance(value, Tensor) and value.dtype in INTEGERS and value.numel() <= LARGEST
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if not (whole or type(value) is int) or random:
            return None
        here = pytree.tree_map(lambda entry: torch.device("cpu") if isinstance(entry, torch.device) else entry, kwargs)
        if node.target in (*COLLECTIVES, *WAIT):  # of rows: those of another process are as good as these
            return args[0].repeat(value.shape[0] // args[0].shape[0], *[1] * (value.ndim - 1))
        result = called(node, args, here)
        if node.target is aten.clamp.default:
            self.clamped[id(result)] = result, args[0] > result
        return result

    def _show_or_read(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """A view of memory, or an op that reads what it is given."""
        operands = [operand for operand in node.all_input_nodes if isinstance(env.get(operand), Shown)]
        if set(operands) & set(shows(node, may=True)):
            value: Shown = env[operands[0]]
            numbered = {**env, operands[0]: value.places}
            result = called(node, *fx.node.map_arg((node.args, node.kwargs), numbered.get))
            same = [memory_key(part) == memory_key(value.places) for part in pytree.tree_leaves(result)]
            if all(same):
                return pytree.tree_map(lambda places: Shown(value.memory, places), result)
        for operand in operands:
            self._read(node, env[operand])
        return None

    def _read(self, node: fx.Node, value: Shown) -> None:
        memory, places = value.memory, value.places.reshape(-1)
        memory.read[places] = True
        if not memory.is_cache:
            filled = bool(memory.written[places].all())
            demand(filled, node, f"reads entries of `{memory.owner.name}` that are not written")

    def _written(self, node: fx.Node, memory: Memory, places: Tensor) -> None:
        places, name = places.reshape(-1), memory.owner.name
        now = torch.zeros_like(memory.written)
        now[places] = True
        demand(int(now.sum()) == places.numel(), node, f"writes an entry of `{name}` twice")
        demand(not bool(memory.written[places].any()), node, f"writes entries of `{name}` that are written already")
        demand(not bool(memory.read[places].any()), node, f"writes entries of `{name}` that have been read before")
        memory.written |= now
        memory.away |= memory.hosted and places.numel() > 0

    def _write(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> None:
        target = node.target
        if target is aten.copy_.default and isinstance(args[1], Pending):
            demand(isinstance(args[0], Shown) and args[0].memory is args[1].memory, node, "copies into another cache")
            self._written(node, args[1].memory, args[1].places)
            return
        held = dict(zip(_flat(node.args), _flat(args), strict=True))
        for operand in writes(node):
            demand(isinstance(held[operand], Shown), node, f"writes into `{root(operand).name}`, which is no cache")
        for memory, places in self._places(node, target, by_name(target, args, kwargs)):
            self._written(node, memory, places)

    def _places(self, node: fx.Node, target: Any, given: dict[str, Any]) -> list[tuple[Memory, Tensor]]:
        """What an op writes: the places of entries in memory, by the op's definition."""
        if target is aten.copy_.default:
            return [(given["self"].memory, given["self"].places)]
        if target is aten.index_put_.default:
            demand(not given["accumulate"], node, "adds to a cache instead of writing it")
            view, indices = given["self"], given["indices"]
            self._in_range(node, view.places.shape, indices, known=True)
            index = tuple(slice(None) if one is None else one for one in self._once(indices))
            return [(view.memory, view.places[index])]
        if target is own.scatter_linear.default:
            return [self._scattered(node, given["cache"], given["rows"], given["grid_dims"])]
        if target is own.grouped_scatter_linear.default:
            members = zip(given["caches"], given["rows"], given["grid_dims"], strict=True)
            return [self._scattered(node, *member) for member in members]
        if target is own.write_host.default:
            value = given["value"]
            same = isinstance(value, Shown) and value.memory is given["cache"].memory
            demand(same, node, "sends another value back into a cache")
            value.memory.away = False
            return []
        demand(False, node, "writes in place without being a splice")
        return []

    def _once(self, indices: Sequence[Any]) -> Sequence[Any]:
        """Indices of the entries that are written, without those that are the last entry once more."""
        beyond = [self.clamped[id(one)][1] for one in indices if id(one) in self.clamped]
        if not beyond:
            return indices
        *spread, missing = torch.broadcast_tensors(
            *(one for one in indices if one is not None), functools.reduce(torch.logical_or, beyond)
        )
        kept = iter([one[~missing] for one in spread])
        return [None if one is None else next(kept) for one in indices]

    def _scattered(self, node: fx.Node, cache: Shown, rows: Tensor | None, grid_dims: int) -> tuple[Memory, Tensor]:
        demand(isinstance(cache, Shown), node, "writes into what is no cache")
        demand(rows is not None, node, "writes rows of a cache that do not follow from the active rows")
        assert rows is not None
        self._rows_in_range(node, cache.places.shape, rows, grid_dims)
        samples = cache.places.shape[0]
        grid = cache.places.reshape(samples, math.prod(cache.places.shape[1 : 1 + grid_dims]), -1)
        return cache.memory, grid[torch.arange(samples)[:, None], rows.expand(samples, -1)]

    def _functional(self, node: fx.Node, target: Any, kwargs: dict[str, Any]) -> list[Any]:
        """An op that writes, spelled without writing: what it would leave in each of its bases."""
        given, bases = dict(kwargs), kwargs["_all_bases"]

        def view(prefix: str) -> Any:
            base = bases[given[f"{prefix}_base_index"]]
            demand(isinstance(base, Shown), node, "writes into what is no cache")
            size = given.get(f"{prefix}_size")
            if size is None:
                return base
            strided = base.places.as_strided(size, given[f"{prefix}_stride"], given[f"{prefix}_storage_offset"])
            return Shown(base.memory, strided)

        for argument in schema_of(target).arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                count = given.get(f"_{argument.name}_length")
                names = [f"_{argument.name}"] if count is None else [f"_{argument.name}_{k}" for k in range(count)]
                views = [view(name) for name in names]
                given[argument.name] = views[0] if count is None else views
        found: dict[int, list[Tensor]] = {}
        for memory, places in self._places(node, target, {**by_name(target, (), {}), **given}):
            found.setdefault(id(memory), []).append(places.reshape(-1))
        none = torch.zeros(0, dtype=torch.int64)
        pending = [Pending(base.memory, torch.cat(found.get(id(base.memory), [none]))) for base in bases]
        return [None, *pending]

    def _in_range(self, node: fx.Node, sizes: Sequence[int], indices: Sequence[Any], known: bool = False) -> None:
        for dim, index in enumerate(indices):
            demand(not known or index is None or isinstance(index, Tensor), node, "writes at rows that are not known")
            if isinstance(index, Tensor) and index.dtype is not torch.bool and index.numel():
                low, high = int(index.min()), int(index.max())
                reason = f"indices {low} to {high} for dimension {dim} of size {sizes[dim]}"
                lowest = 0 if known else -sizes[dim]  # a model may count from the end; our own rows never do
                demand(lowest <= low <= high < sizes[dim], node, reason)

    def _rows_in_range(self, node: fx.Node, sizes: Sequence[int], rows: Tensor | None, grid_dims: int) -> None:
        if rows is not None and rows.numel():
            count = math.prod(sizes[1 : 1 + grid_dims])
            low, high = int(rows.min()), int(rows.max())
            demand(0 <= low <= high < count, node, f"rows {low} to {high} of {count}")


def _table(node: fx.Node) -> Tensor | None:
    """A constant of few integers, such as an order of tokens; None for any other."""
    value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    few = isinstance(value, Tensor) and value.dtype in INTEGERS and value.numel() <= LARGEST
    return value.cpu() if few else None


@functools.cache
def _only_computes(target: Any) -> bool:
    """Whether a function is an op that writes nowhere: most are, and what such an op makes of unknown values is unknown."""
    return isinstance(target, OpOverload) and not schema_of(target).is_mutable


def _known(node: fx.Node, env: dict[fx.Node, Any]) -> list[Any]:
    """The values of a node's operands, those in lists one by one."""
    return _flat([env.get(operand) for operand in node.all_input_nodes])


def _flat(given: Any) -> list[Any]:
    if isinstance(given, (tuple, list)):
        return [entry for part in given for entry in _flat(part)]
    return [given]


def draws(rows: fx.Node) -> tuple[list[Tensor], bool]:
    """Active rows to follow a program on, and whether they name every token of every sample."""
    (samples, active), tokens = rows.meta["val"].shape, rows.meta["tokens"]
    generator = torch.Generator().manual_seed(0)
    order = torch.stack([torch.randperm(tokens, generator=generator) for _ in range(samples)])
    starts = [min(start, tokens - active) for start in range(0, tokens, max(active, 1))]
    if len(starts) <= DRAWS:
        return [order[:, start : start + active] for start in starts], True
    ends = [torch.arange(tokens)[:active], torch.arange(tokens - active, tokens)]
    return [order[:, :active], *(end.expand(samples, -1) for end in ends)], False


def check_memory(program: fx.GraphModule) -> None:
    """Raises SpecViolation where a program reads, writes or returns memory in another way than the spec says."""
    caches = of_role(program.graph, Role.CACHE)
    if sum(cache.meta["val"].numel() for cache in caches) > LARGEST:
        return
    given = of_role(program.graph, Role.ROWS)
    if not given:
        Step(None).follow(program.graph)
        return
    (rows,) = given
    chosen, all_tokens = draws(rows)
    counts: dict[fx.Node, Tensor] = {}
    idle: set[fx.Node] = set()
    for draw in chosen:
        step = Step(draw, idle=idle)
        step.follow(program.graph)
        for memory in step.memories:
            owner = memory.owner
            demand(not memory.away, owner, "is brought in from the host's memory, and what is written not sent back")
            if memory.is_cache:
                counts[owner] = counts.get(owner, torch.zeros(1, dtype=torch.int64)) + memory.written.long()
    for cache, count in counts.items():
        demand(bool(count.any()), cache, "a cache that is never written")
        if all_tokens and rows.meta["context"]:
            missing = int((count == 0).sum())
            demand(not missing, cache, f"{missing} of {count.numel()} entries are written for no token")
        if all_tokens and rows.meta["tokens"] % rows.meta["val"].shape[1] == 0:
            once = (count <= 1) | (count == len(chosen))
            demand(bool(once.all()), cache, "entries are written for several tokens")
