"""Caches in the host's memory: a sparse program brings each one in before its first splice, and sends it back behind its last.

    splice(cache, rows, k); sdpa(q, cache, ..)

becomes

    here = ras_compile::from_host(cache); splice(here, rows, k); ras_compile::write_host(cache, here); sdpa(q, here, ..)

so that the device holds those of the layer at hand alone. A dense program sends out what it leaves behind as soon as it is there.
It comes behind all passes that look for splices into a cache, as the splices are no longer into an input of the program.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx

from ras_compile.passes.analysis.emit import Emitter, fake_mode
from ras_compile.passes.analysis.roles import Role, of_role
from ras_compile.passes.programs.aliases import root, writes

own = torch.ops.ras_compile


def leave_on_host(program: fx.GraphModule, places: Collection[int]) -> fx.GraphModule:
    """Sends some results of a dense program to the host's memory, in place."""
    emit = Emitter.of(program.graph)
    last = program.graph.output_node()
    results = list(last.args[0])
    for place in places:
        with program.graph.inserting_after(results[place]):
            results[place] = emit(own.to_host.default, results[place])
    last.args = (tuple(results),)
    return program


def bring_from_host(graph: fx.Graph, places: Collection[int]) -> int:
    """Brings some caches of a sparse program in from the host's memory; returns how many there were."""
    emit, caches = Emitter.of(graph), of_role(graph, Role.CACHE)
    for place in places:
        cache = caches[place]
        value = cache.meta["val"]
        with fake_mode(graph):
            cache.meta["val"] = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
        first = next(node for node in graph.nodes if node in cache.users)
        with graph.inserting_before(first):
            here = emit(own.from_host.default, cache, value.device)
        for user in [user for user in cache.users if user is not here]:
            user.replace_input_with(cache, here)
        put = [node for node in graph.nodes if any(root(target) is here for target in writes(node))][-1]
        with graph.inserting_after(put):
            emit(own.write_host.default, cache, here)
    return len(places)
