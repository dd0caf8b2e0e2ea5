"""Matching a call to its guidance branch by what its context tensors are and do."""

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ras_compile.sampling.branches import (
    Branches,
    Contents,
    Match,
    equal_prints,
    fingerprint,
    intact,
    same_tensor,
    tensor_mark,
)

pytestmark = pytest.mark.usefixtures("quick_collections")


def step(branches, *calls, alone=False):
    """Run one step's calls (each a context) through; returns (label, sure) of each."""
    used, told = [], []
    for order, context in enumerate(calls):
        match = branches.find(context, "graph", None, order, used, alone)
        branch = match.branch
        if branch is None:
            branch = branches.add(context, "graph", None, order, match.prints)
        else:
            branches.learn(match, context, order)
        used.append(branch)
        told.append((branch.label, match.sure))
    return told


def test_identity_is_enough_and_order_does_not_matter():
    branches, cond, uncond = Branches(), (torch.zeros(3),), (torch.zeros(3),)
    assert step(branches, cond, uncond) == [("0", True), ("1", True)]
    assert step(branches, uncond, cond) == [("1", True), ("0", True)]
    assert step(branches, uncond) == [("1", True)]


def test_identity_never_reads_the_content(monkeypatch):
    branches, shared = Branches(), torch.zeros(3)
    cond, uncond = (torch.zeros(3), shared), (torch.ones(3), shared)
    step(branches, cond, uncond)
    # residuals move: what they do is learned by reading them in the second step, and never again
    moving = Branches()
    for _ in range(2):
        step(moving, (*cond, torch.randn(2)), (*uncond, torch.randn(2)))
    monkeypatch.setattr(torch, "equal", None)
    for _ in range(2):
        assert step(branches, cond, uncond) == [("0", True), ("1", True)]
        assert step(moving, (*cond, torch.randn(2)), (*uncond, torch.randn(2))) == [("0", True), ("1", True)]


def test_fresh_objects_are_told_by_content():
    branches, values = Branches(), [torch.randn(3), torch.randn(3)]
    assert step(branches, *[(value.clone(),) for value in values]) == [("0", True), ("1", True)]
    assert step(branches, (values[1].clone(),)) == [("1", True)]
    assert step(branches, *[(value.clone(),) for value in values]) == [("0", True), ("1", True)]


def test_moving_content_alone_cannot_tell_two_branches():
    branches = Branches()
    step(branches, (torch.randn(3),), (torch.randn(3),))
    step(branches, (torch.randn(3),), (torch.randn(3),))
    assert step(branches, (torch.randn(3),))[0][1] is False


def test_moving_content_beside_a_held_object():
    branches, cond, uncond = Branches(), torch.randn(3), torch.randn(3)
    for _ in range(3):
        told = step(branches, (cond, torch.randn(2)), (uncond, torch.randn(2)))
    assert told == [("0", True), ("1", True)]
    assert step(branches, (uncond, torch.randn(2))) == [("1", True)]


def test_the_second_look_is_not_sure_yet():
    branches, held = Branches(), torch.randn(3)
    step(branches, (held, torch.randn(2)))
    assert step(branches, (held, torch.randn(2))) == [("0", False)]
    assert step(branches, (held, torch.randn(2))) == [("0", True)]


def test_a_held_object_that_changes_is_another_branch():
    branches, shared = Branches(), torch.randn(3)
    prompt = torch.randn(3)
    for _ in range(2):
        step(branches, (prompt, shared))
    assert step(branches, (torch.randn(3), shared)) == [("1", True)]


def test_an_equal_copy_of_a_held_object_only_matters_alone():
    branches, prompt = Branches(), torch.randn(3)
    for _ in range(2):
        step(branches, (prompt,))
    copy = (prompt.clone(),)
    assert branches.find(copy, "graph", None, 0, [], alone=False).sure
    assert branches.find(copy, "graph", None, 0, [], alone=True).branch is None


def test_another_graph_is_another_branch():
    branches, context = Branches(), (torch.randn(3),)
    step(branches, context)
    assert branches.find(context, "other graph", None, 0, [], alone=False).branch is None


def test_names_rule_and_need_not_be_checked():
    branches = Branches(check_named=False)
    branches.add((torch.zeros(3, device="meta"),), "graph", "cond", 0, None)
    match = branches.find((torch.ones(3, device="meta"),), "graph", "cond", 0, [], alone=False)
    assert match.branch.label == "cond" and match.sure and not match.changed
    assert branches.find((), "graph", "uncond", 0, [], alone=False).branch is None


def test_named_branches_notice_a_change_when_asked_to():
    branches, prompt = Branches(), torch.randn(3)
    match = branches.find((prompt,), "graph", "cond", 0, [], alone=False)
    branches.add((prompt,), "graph", "cond", 0, match.prints)
    for value, changed in ((prompt, False), (prompt.clone(), False), (prompt + 1, True)):
        match = branches.find((value,), "graph", "cond", 0, [], alone=False)
        assert match.sure and match.changed is changed


def test_contexts_are_held_weakly():
    branches = Branches()
    step(branches, (torch.randn(3),))
    step(branches, (torch.randn(3),))
    gc.collect()
    position = branches.known[0].positions[0]
    assert position.mark[0]() is None and all(mark[0]() is None for mark in position.past)


def test_a_mark_knows_object_and_version():
    tensor = torch.zeros(3)
    mark = tensor_mark(tensor)
    assert same_tensor(mark, tensor) and not same_tensor(mark, torch.zeros(3))
    tensor.add_(1)
    assert not same_tensor(mark, tensor)
    with torch.inference_mode():
        free = torch.zeros(3)
        mark = tensor_mark(free)
        free.add_(1)
        assert same_tensor(mark, free)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64])
def test_fingerprints(dtype):
    value = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0]).to(dtype)
    other = value.clone()
    assert equal_prints(fingerprint(value), fingerprint(other))
    other[[0, 1]] = other[[1, 0]]  # the same sums, in another place
    assert not equal_prints(fingerprint(value), fingerprint(other))
    assert not equal_prints(fingerprint(value), fingerprint(value.reshape(2, 4)))


def test_fingerprints_of_nothing_and_of_much():
    assert equal_prints(fingerprint(torch.zeros(0)), fingerprint(torch.zeros(0)))
    much = torch.zeros(3_000_000)
    before = fingerprint(much)
    much[2_999_999] = 1
    assert not equal_prints(before, fingerprint(much))


def test_much_is_summed_in_pieces():
    """On CUDA each sum in float64 makes a float64 copy of what it sums."""
    summed = []

    class Noting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.sum.default:
                summed.append(args[0].numel())
            return func(*args, **kwargs or {})

    much = torch.ones((1 << 23) + 3, dtype=torch.bfloat16)
    with Noting():
        found = fingerprint(much)
    assert max(summed) <= 1 << 22 and found[1][0] == much.numel()


def test_a_weight_where_another_one_was():
    """A new weight may have the id of the one that it replaces, which has died, and the same version."""
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    contents, same_id = Contents(weights), 0
    for value in range(1000):  # until the memory of the dead one is taken up again
        if same_id:
            break
        before, old = contents.mark(weights), id(weights[1])
        assert contents.mark(weights) == before
        data = torch.full((2,), float(value))
        weights[1] = None
        weights[1] = torch.nn.Parameter(data)
        same_id += id(weights[1]) == old
        assert contents.mark(weights) != before
    assert same_id, "nothing was tried"


def test_weights_are_not_kept_alive():
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    contents, ref = Contents(weights), weakref.ref(weights[0])
    contents.mark(weights)
    del weights
    gc.collect()
    assert ref() is None


def test_a_named_branch_tells_when_nothing_of_a_context_that_stayed_is_there_any_more():
    branches, kept, found = Branches(check_named=False), torch.zeros(3), []
    match = branches.find((kept, torch.zeros(2)), "graph", "cond", 0, [], False)
    branches.add((kept, torch.zeros(2)), "graph", "cond", 0, match.prints)
    stays, moves = [(kept, torch.zeros(2)) for _ in range(2)], [(torch.zeros(3), torch.zeros(2)) for _ in range(2)]
    for context in (*stays, *moves):
        match = branches.find(context, "graph", "cond", 0, [], False)
        found.append(match.replaced)
        branches.learn(match, context, 0)
    assert found == [False, False, True, False], "what is new at every call never stayed"


def test_a_tensor_that_was_written_or_is_gone_is_not_intact():
    tensor = torch.zeros(3)
    mark = tensor_mark(tensor)
    assert intact(mark)
    tensor.add_(1)
    assert not intact(mark)
    mark = tensor_mark(tensor)
    del tensor
    assert not intact(mark)


def test_a_changed_context_is_what_the_next_one_is_compared_with():
    branches, prompt = Branches(), torch.randn(3)
    branches.add((prompt,), "graph", "cond", 0, branches.find((prompt,), "graph", "cond", 0, [], False).prints)
    changed = []
    for value in (prompt, prompt + 1, prompt + 1, prompt + 1, prompt.clone()):
        match = branches.find((value,), "graph", "cond", 0, [], alone=False)
        branches.learn(match, (value,), 0)
        changed.append(match.changed)
    assert changed == [False, True, False, False, True]


def test_a_context_whose_tensors_go_one_after_the_other_has_stayed():
    branches, (a, b, c, d) = Branches(check_named=False), torch.zeros(4, 3).unbind()
    branches.add((a, b), "graph", "cond", 0, None)
    found = []
    for context in ((a, b), (a, c), (d, c), (a, b)):
        match = branches.find(context, "graph", "cond", 0, [], False)
        found.append(match.replaced)
        branches.learn(match, context, 0)
    assert found == [False, False, False, True]


def buffer(*values: float) -> torch.Tensor:
    return torch.tensor(values)


def test_what_weights_hold():
    """A parameter that is exchanged has changed, and so has one that was written; a buffer, where its content has."""
    parameter, first, second, number = torch.nn.Parameter(torch.zeros(2)), buffer(1, 2), buffer(3, 4), torch.tensor(0.5)
    weights = [parameter, first, second, number]
    contents = Contents(weights)

    def changes(*now: torch.Tensor) -> bool:
        before = contents.mark(weights)
        weights[:] = now
        return contents.mark(weights) != before

    assert not changes(parameter, first, second, torch.tensor(0.5)), "numbers are new at each call"
    assert changes(parameter, first, second, torch.tensor(0.25))
    assert changes(torch.nn.Parameter(torch.zeros(2)), *weights[1:])
    assert not changes(weights[0], buffer(1, 2), *weights[2:]), "it was moved, and back"
    assert not changes(weights[0], buffer(1, 2), buffer(3, 4), weights[3])
    assert changes(weights[0], buffer(2, 1), *weights[2:])
    assert not changes(weights[0], buffer(2, 1), *weights[2:]), "it is what it was before"
    assert changes(weights[0], buffer(2, 1), buffer(4, 3), weights[3]), "one of two"
    assert changes(torch.nn.Parameter(torch.zeros(2)), buffer(2, 1), *weights[2:]), "a parameter beside it"
    for place in range(3):
        before = contents.mark(weights)
        with torch.no_grad():
            weights[place].add_(1)
        assert contents.mark(weights) != before and contents.mark(weights) == contents.mark(weights)


def test_buffers_without_sums_or_versions(monkeypatch):
    weights = [buffer(1, 2)]
    monkeypatch.setattr("ras_compile.sampling.branches.fingerprint", lambda tensor: raising())
    contents = Contents(weights)
    before = contents.mark(weights)
    weights[0] = buffer(1, 2)
    assert contents.mark(weights) != before, "nobody knows that it is the same"
    monkeypatch.undo()
    with torch.inference_mode():
        weights = [buffer(1, 2), buffer(3, 4)]
        contents = Contents(weights)
        before = contents.mark(weights)
        assert contents.mark([buffer(1, 2), weights[1]]) == before != contents.mark([buffer(0, 2), weights[1]])


def raising():
    raise NotImplementedError


def test_every_entry_of_a_small_tensor_has_its_place_in_the_fingerprint():
    value = torch.arange(6.0)
    for first in range(6):
        for second in range(first):
            other = value.clone()
            other[[first, second]] = other[[second, first]]
            assert not equal_prints(fingerprint(value), fingerprint(other))
    assert not equal_prints(fingerprint(value), fingerprint(value.double()))
    assert not equal_prints(fingerprint(torch.tensor([1.0, -1.0])), fingerprint(torch.tensor([0.0, 0.0])))


def test_numbers_tell_branches_apart():
    branches = Branches()
    assert step(branches, (1.0,), (2.0,)) == [("0", True), ("1", True)]
    assert step(branches, (2.0,), (1.0,)) == [("1", True), ("0", True)]
    assert step(branches, (3.0,))[0][0] == "2"


def test_branches_with_equal_contexts_are_told_by_their_order():
    branches, value = Branches(), torch.randn(3)
    for _ in range(3):
        assert step(branches, (value.clone(),), (value.clone(),)) == [("0", True), ("1", True)]
        assert step(branches, (value.clone(),)) == [("0", True)]


def test_contexts_of_other_lengths_are_other_branches():
    branches, value = Branches(), torch.randn(3)
    assert step(branches, (value,), (value, value)) == [("0", True), ("1", True)]
    assert step(branches, (value, value), (value,)) == [("1", True), ("0", True)]


def test_what_has_moved_does_not_come_back():
    branches, values = Branches(), [torch.randn(3) for _ in range(3)]
    for value in values:
        step(branches, (value,))
    assert [branch.label for branch in branches.known] == ["0"]
    assert step(branches, (values[0],)) == [("1", True)], "two runs take turns"
    assert step(branches, (torch.randn(3),))[0][0] in ("0", "1")


def test_a_used_branch_may_come_again_where_nobody_says_the_steps():
    branches, value = Branches(), torch.randn(3)
    step(branches, (value,))
    (known,) = branches.known
    assert branches.find((value,), "graph", None, 1, [known], alone=True).branch is known
    assert branches.find((value,), "graph", None, 1, [known], alone=False).branch is None
    branches.add((value,), "graph", None, 1, branches.find((value,), "graph", None, 1, [known], alone=False).prints)
    assert branches.find((value,), "graph", None, 0, [known], alone=True).branch is branches.known[1], "the other first"


@pytest.mark.parametrize(
    ("verdicts", "known"),
    [
        ([], True), (["same"], True), (["equal"], True), (["equal", "equal"], True), (["same", "moving"], True),
        (["moving"], False), (["equal", "moving"], False), (["same", "differs"], False), (["unsure"], False),
    ],
)  # fmt: skip
def test_what_ties_a_call_to_its_branch(verdicts, known):
    branches = Branches()
    branch = branches.add((), "graph", None, 0, None)
    assert Match(branch, verdicts=verdicts).known == known and not Match(None, verdicts=verdicts).known
    fresh = Match(branch)
    assert (fresh.sure, fresh.changed, fresh.replaced) == (True, False, False)


def test_labels_count_the_branches_that_nobody_has_named():
    branches = Branches()
    labels = [branches.add((), "graph", name, 0, None).label for name in (None, "cond", None, "uncond", None)]
    assert labels == ["0", "cond", "1", "uncond", "2"]
