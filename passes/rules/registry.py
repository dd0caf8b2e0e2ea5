"""The rule registry: one rule per op family, keyed by ATen overload.

A rule is a pure function ``rule(call) -> Step``: the layouts of the operands in, the layout of the result out, and for
each tensor operand how the sparse program uses it. An op with no region operand never reaches a rule.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import fx

from ras_compile._torch import OpOverload, schema_of
from ras_compile.errors import UnsupportedGraph
from ras_compile.passes.algebra.layout import Frame, Layout, Sizes

aten = torch.ops.aten

PYTORCH = str(Path(torch.__file__).parent)


class Use(Enum):
    """How the sparse program uses a tensor operand."""

    ROWS = "rows"  # the active rows of a value that carries the region
    WHOLE = "whole"  # the whole value: spliced from its cache and the active rows
    SAME = "same"  # a value without the region, as it is


@dataclass(frozen=True, slots=True)
class Gather:
    """Use the active rows of a dense operand, whose dimensions are read by ``layout``."""

    layout: Layout


Result = Layout | None | tuple["Layout | None", ...]


Rewrite = Callable[[Sizes], tuple[Callable, tuple, dict]]


@dataclass(frozen=True)
class Step:
    """What becomes of one node."""

    out: Result  # layout of the result (a tuple for an op with several), None where the result carries no region
    uses: tuple[Use | Gather, ...]  # one entry per tensor operand, in the order in which the operands appear
    whole: bool = False  # the node runs as it is, on whole operands, and its result is whole
    # ``(target, args, kwargs)`` for given sparse sizes, where the op's arguments name sizes; the tensor operands
    # stay the original nodes; those that take part are counted by ``uses``, in order
    rewrite: Rewrite | None = None


def nodes_in(given: Any) -> list[fx.Node]:
    """The nodes among some arguments, in order of appearance, repeats included."""
    found: list[fx.Node] = []
    fx.node.map_arg(given, found.append)
    return found


def operands(node: fx.Node) -> list[fx.Node]:
    """The tensor operands of a node in order of appearance, repeats included."""
    return nodes_in((node.args, node.kwargs))


def named_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call of an op by its schema's names, defaults filled in."""
    return by_name(node.target, node.args, node.kwargs)


def by_name(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that an op is called with, by its schema's names, defaults filled in."""
    schema = schema_of(target).arguments
    given = {argument.name: argument.default_value for argument in schema}
    given.update(zip((argument.name for argument in schema), args, strict=False))
    return given | dict(kwargs)


def called(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What the function that a node calls gives on other arguments than its own."""
    assert callable(node.target)
    return node.target(*args, **kwargs)


def source_line(node: fx.Node) -> str | None:
    """The user's source line of a node: ``file:line in function: code``, of the last frame outside of PyTorch, if any."""
    frames = re.findall(r'File "([^"]*)", line (\d+), in (\S+)\n\s*(.*)', node.meta.get("stack_trace") or "")
    frames = [frame for frame in frames if not frame[0].startswith(PYTORCH)] or frames
    return "{}:{} in {}: {}".format(*frames[-1]) if frames else None


class Call:
    """A node as a rule sees it: its arguments by name, its operands' layouts, its result's shape.

    Attributes:
        layouts: layout of every value that carries the region, by node (a tuple for a node with several results).
        kv_cache: False attends among the active tokens alone (an ablation): keys and values are not spliced.
        mixed: values without a layout in which tokens stand in places that are not known.
    """

    def __init__(
        self,
        node: fx.Node,
        layouts: dict[fx.Node, Result],
        frame: Frame,
        *,
        kv_cache: bool = True,
        mixed: Set[fx.Node] = frozenset(),
    ) -> None:
        self.node, self.layouts, self.frame, self.kv_cache, self.mixed = node, layouts, frame, kv_cache, mixed
        self._bound: dict[str, Any] | None = None

    @property
    def args(self) -> dict[str, Any]:
        """Arguments by the schema's names, defaults filled in."""
        if self._bound is None:
            self._bound = named_arguments(self.node)
        return self._bound

    def layout(self, operand: Any) -> Layout | None:
        """Layout of an operand, None where it carries no region."""
        found = self.layouts.get(operand) if isinstance(operand, fx.Node) else None
        if isinstance(found, tuple):
            raise self.unsupported("several results are used as one operand")
        return found

    @staticmethod
    def shape_of(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result; of several, that of the first."""
        value = self.node.meta["val"]
        return tuple((value[0] if isinstance(value, (tuple, list)) else value).shape)

    @property
    def operands(self) -> list[fx.Node]:
        return operands(self.node)

    def uses(self, choose: Callable[[fx.Node], Use | Gather] | None = None) -> tuple[Use | Gather, ...]:
        """One use per operand: ``choose(operand)`` or, without it, rows where the operand carries the region."""
        choose = choose or (lambda operand: Use.ROWS if self.layouts.get(operand) is not None else Use.SAME)
        return tuple(choose(operand) for operand in self.operands)

    def each(self, out: Layout | None) -> Result:
        """The same layout for each of the op's results."""
        value = self.node.meta["val"]
        return (out,) * len(value) if isinstance(value, (tuple, list)) else out

    def as_view(self, out: Layout) -> Step:
        """The node only regroups its first operand: a reshape to the sizes of ``out``."""
        operand = self.operands[0]
        use = self.uses()[:1]
        return Step(out, use, rewrite=lambda sizes: (aten.reshape.default, (operand, list(sizes.shape(out))), {}))

    def with_args(self, **changes: Any) -> tuple[Callable, tuple, dict]:
        """``(target, args, kwargs)`` with some arguments replaced."""
        target: Any = self.node.target
        schema = [argument.name for argument in schema_of(target).arguments]
        args, kwargs = list(self.node.args), dict(self.node.kwargs)
        for name, value in changes.items():
            index = schema.index(name)
            if index < len(args):
                args[index] = value
            elif not schema_of(target).arguments[index].kwarg_only and index == len(args):
                args.append(value)
            else:
                kwargs[name] = value
        return target, tuple(args), kwargs

    def whole(self, out: Result = None) -> Step:
        """The node runs on whole operands; with ``out`` its whole result still carries the region."""
        uses = self.uses(lambda operand: Use.WHOLE if self.layouts.get(operand) is not None else Use.SAME)
        return Step(out, uses, whole=True)

    def unsupported(self, reason: str) -> UnsupportedGraph:
        return UnsupportedGraph(reason, op=str(self.node.target), source=source_line(self.node))


Rule = Callable[[Call], Step]

RULES: dict[OpOverload, Rule] = {}
NAMED: dict[str, Rule] = {}  # by the names of ops of libraries that may not be installed


def rule_for(*targets: OpOverload) -> Callable[[Rule], Rule]:
    """Registers the rule that it decorates for some overloads; each has one rule.

    Raises:
        TypeError: one of them is no overload of an op.
        ValueError: one has a rule already.
    """

    def register(rule: Rule) -> Rule:
        for target in targets:
            if not isinstance(target, OpOverload):
                raise TypeError(
                    f"a rule is registered for an overload of an op, such as aten.add.Tensor, not for {target!r}"
                )
            if target in RULES:
                raise ValueError(f"{target} has a rule already: {RULES[target].__name__}")
            RULES[target] = rule
        return rule

    return register


def rule_for_name(*names: str) -> Callable[[Rule], Rule]:
    """Registers the rule that it decorates for ops of libraries that need not be installed, such as "quanto::qbytes_mm"."""

    def register(rule: Rule) -> Rule:
        NAMED.update(dict.fromkeys(names, rule))
        return rule

    return register


def rule_of(target: object) -> Rule | None:
    """The rule that is registered for an op, if there is one."""
    if not isinstance(target, OpOverload):
        return None
    return RULES.get(target) or NAMED.get(schema_of(target).name)
