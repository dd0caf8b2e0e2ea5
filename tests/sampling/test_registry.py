"""Recognising a transformer by its weights, and telling what its calls did."""

import gc

import pytest
import torch
from fakes import CHANNELS, TOKENS
from torch import nn

import ras_compile
from ras_compile import RASConfig, notices
from ras_compile.errors import RASWarning
from ras_compile.sampling.calls import CallInfo
from ras_compile.sampling.registry import instances, state_for, states_of

pytestmark = pytest.mark.usefixtures("quick_collections")

CONFIG = RASConfig()


def model():
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(4)])


def weights(module):
    return list(module.parameters())


def test_instances_are_told_apart_and_known_again():
    one, two = model(), model()
    assert state_for(weights(one), CONFIG) is state_for(weights(one), CONFIG)
    assert state_for(weights(one), CONFIG) is not state_for(weights(two), CONFIG)


def test_graphs_that_use_some_of_the_weights_share_the_state():
    one = model()
    state = state_for(weights(one), CONFIG)
    assert state_for(weights(one)[2:5], CONFIG) is state and state_for(weights(one)[-1:], CONFIG) is state


def test_a_graph_seen_first_in_part():
    one = model()
    state = state_for(weights(one)[:4], CONFIG)
    assert state_for(weights(one), CONFIG) is state and state_for(weights(one)[4:], CONFIG) is state


def test_added_weights_join():
    one = model()
    state = state_for(weights(one), CONFIG)
    lora = [nn.Parameter(torch.zeros(2)) for _ in range(5)]
    assert state_for([lora[0], *weights(one), *lora[1:]], CONFIG) is state
    assert state_for(lora, CONFIG) is state


@pytest.mark.parametrize("where", [0, 4, 8])
def test_a_shared_embedding_does_not_make_two_models_one(where):
    one, two, shared = model(), model(), nn.Parameter(torch.zeros(2))
    state = state_for([shared, *weights(one)], CONFIG)
    others = weights(two)
    others.insert(where, shared)
    other = state_for(others, CONFIG)
    assert other is not state
    assert state_for(others, CONFIG) is other and state_for([shared, *weights(one)], CONFIG) is state


@pytest.mark.parametrize(("known", "new", "same"), [(2, 1, True), (2, 2, True), (2, 3, False), (4, 5, False)])
def test_half_of_the_weights_make_a_transformer_known(known, new, same):
    one = model()
    state = state_for(weights(one), CONFIG)
    others = [nn.Parameter(torch.zeros(2)) for _ in range(new)]
    mixed = [*others[:1], *weights(one)[:known], *others[1:]]
    assert (state_for(mixed, CONFIG) is state) == same and (state_for(others, CONFIG) is state) == same
    assert state_for(weights(one), CONFIG) is state and state_for(mixed, CONFIG) is state_for(mixed, CONFIG)


def test_each_config_has_its_own_state():
    one = model()
    assert state_for(weights(one), CONFIG) is state_for(weights(one), RASConfig(sample_ratio=CONFIG.sample_ratio))
    assert state_for(weights(one), CONFIG) is not state_for(weights(one), RASConfig(sample_ratio=0.25))


def test_models_are_not_kept_alive():
    one = model()
    before = len(instances)
    state_for(weights(one), CONFIG)
    assert len(instances) == before + 8
    del one
    gc.collect()
    assert len(instances) <= before


def test_without_weights_nothing_is_recognised():
    assert state_for([], CONFIG) is not state_for([], CONFIG)


def call(state, latent, graph="graph"):
    info = CallInfo(graph, latent, (), 1.0, 1, TOKENS)
    decision = state.decide(info)
    output = torch.randn(1, TOKENS, CHANNELS)
    state.record(info, decision, output.unsqueeze(2), (output,))
    return output, decision


def test_trace_finds_the_transformer():
    one, two = model(), model()
    state = state_for(weights(one), CONFIG)
    for _ in range(3):
        call(state, torch.randn(1, TOKENS, CHANNELS))
    call(state_for(weights(one), RASConfig(sample_ratio=0.25)), torch.randn(1, TOKENS, CHANNELS))
    assert len(ras_compile.trace(one)) == 1  # the config that ran last
    compiled = torch.compile(one, backend="eager")
    assert ras_compile.trace(compiled) == ras_compile.trace(one)
    assert ras_compile.trace(two) == [] and states_of(weights(two)) == []
    with pytest.raises(TypeError, match="compiled transformer"):
        ras_compile.trace(3)


def test_a_chain_of_instances_is_a_chain_of_blocks():
    notices.reset()
    states = [state_for(weights(model()), RASConfig(warmup_steps=1, reset_interval=None)) for _ in range(3)]
    kept = states  # states live as long as their weights; hold the instances through them
    with pytest.warns(RASWarning, match="one block of a transformer"), ras_compile.generation() as gen:
        for _ in range(4):
            gen.step()
            hidden = torch.randn(1, TOKENS, CHANNELS)
            for state in kept:
                hidden, decision = call(state, hidden, graph="block")
    assert decision.kind == "dense" and "block" in decision.reason
    # the same graph key stays known; another graph of the same models is not blamed
    with ras_compile.generation() as gen:
        for _ in range(3):
            gen.step()
            _, decision = call(states[0], torch.randn(1, TOKENS, CHANNELS), graph="whole")
    assert decision.kind == "sparse"


def test_a_model_fed_with_its_own_output_is_no_block():
    state = state_for(weights(model()), RASConfig(warmup_steps=1))
    with ras_compile.generation() as gen:
        hidden = torch.randn(1, TOKENS, CHANNELS)
        for _ in range(3):
            gen.step()
            hidden, decision = call(state, hidden, graph="own")
    assert decision.kind == "sparse"
