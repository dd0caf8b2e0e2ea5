"""Following diffusers' schedulers: the step of every model call, from host values alone."""

import concurrent.futures
import copy
import inspect
import pickle
import weakref

import diffusers
import pytest
import torch
from schedulers import SCHEDULERS

from ras_compile.pipelines.follow import SchedulerFollower


class Pipe:
    def __init__(self, name="FlowMatchEulerDiscreteScheduler"):
        self.scheduler = getattr(diffusers, name)(**SCHEDULERS[name])


def tick(follower):
    said = follower.locate()
    return said.key, said.step, said.num_steps


def told(pipe, follower, steps=12, start=0, begin=False, stop=None):
    """The ticks that a pipeline's loop sees, one for each model call."""
    scheduler, ticks = pipe.scheduler, []
    scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(start)
    latent = torch.randn(1, 4, 4, 4)
    for index, time in enumerate(scheduler.timesteps[start:]):
        if index == stop:
            break
        ticks.append(tick(follower))
        scaled = scheduler.scale_model_input(latent, time) if hasattr(scheduler, "scale_model_input") else latent
        latent = scheduler.step(0.1 * scaled, time, latent, return_dict=False)[0]
    return ticks


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_entry_of_timesteps_is_a_step(name):
    pipe = Pipe(name)
    follower = SchedulerFollower(pipe)
    keys = []
    for steps in (12, 12, 5):
        ticks = told(pipe, follower, steps)
        count = len(pipe.scheduler.timesteps)
        assert [tick[1:] for tick in ticks] == [(step, count) for step in range(count)]
        assert all(tick[0] is ticks[0][0] for tick in ticks)
        keys.append(ticks[0][0])
    assert len({id(key) for key in keys}) == 3


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("stop", [1, 6])
def test_an_aborted_run_is_another_generation(name, stop):
    pipe = Pipe(name)
    follower = SchedulerFollower(pipe)
    aborted = told(pipe, follower, stop=stop)
    ticks = told(pipe, follower, 12)
    assert [tick[1] for tick in aborted] == list(range(stop))
    assert ticks[0][0] is not aborted[0][0] and [tick[1] for tick in ticks] == list(range(len(ticks)))


@pytest.mark.parametrize("begin", [False, True])
@pytest.mark.parametrize(
    "name", ["FlowMatchEulerDiscreteScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_image_to_image_starts_late(name, begin):
    pipe = Pipe(name)
    ticks = told(pipe, SchedulerFollower(pipe), 12, start=5, begin=begin)
    assert [tick[1] for tick in ticks] == list(range(7))
    if begin:
        assert {tick[2] for tick in ticks} == {7}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_other_loops_are_told_nothing(name):
    """Neither one after the run, nor one of another thread: they have a scheduler of their own, or none."""
    pipe = Pipe(name)
    follower = SchedulerFollower(pipe)
    told(pipe, follower)
    assert follower.locate() is None
    told(pipe, follower, stop=3)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        assert pool.submit(follower.locate).result() is None
    assert follower.locate().step == 3


def test_a_swapped_scheduler_is_followed():
    pipe = Pipe("DDIMScheduler")
    follower = SchedulerFollower(pipe)
    told(pipe, follower)
    pipe.scheduler = Pipe("PNDMScheduler").scheduler
    ticks = told(pipe, follower)
    assert [tick[1] for tick in ticks] == list(range(len(ticks))) and len(ticks) == 13


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
@pytest.mark.parametrize("name", ["DDIMScheduler", "FlowMatchEulerDiscreteScheduler"])
def test_a_copy_is_a_plain_scheduler(name, copied):
    pipe = Pipe(name)
    follower = SchedulerFollower(pipe)
    pipe.scheduler.set_timesteps(12)
    twin = copied(pipe.scheduler)
    assert type(twin) is getattr(diffusers, name)
    assert follower.locate().step == 0
    twin.step(torch.zeros(1, 4), twin.timesteps[0], torch.zeros(1, 4))
    assert follower.locate().step == 0
    pipe.scheduler.step(torch.zeros(1, 4), pipe.scheduler.timesteps[0], torch.zeros(1, 4))
    assert follower.locate().step == 1


def test_a_followed_scheduler_looks_the_same_and_is_given_back():
    pipe = Pipe("DDIMScheduler")
    kind, signature = type(pipe.scheduler), inspect.signature(pipe.scheduler.step)
    state = set(vars(pipe.scheduler))
    one, two = SchedulerFollower(pipe), SchedulerFollower(pipe)
    assert isinstance(pipe.scheduler, kind) and inspect.signature(pipe.scheduler.step) == signature
    assert type(pipe.scheduler).__name__ == kind.__name__ and type(pipe.scheduler).__module__ == kind.__module__
    assert "DDIMScheduler" in pipe.scheduler.to_json_string()
    one.stop()
    assert [tick[1] for tick in told(pipe, two, 3)] == [0, 1, 2]
    two.stop()
    assert type(pipe.scheduler) is kind and set(vars(pipe.scheduler)) == state


@pytest.mark.parametrize("scheduler", [None, object()])
def test_what_is_no_scheduler_says_nothing(scheduler):
    pipe = Pipe()
    follower = SchedulerFollower(pipe)
    pipe.scheduler = scheduler
    assert follower.locate() is None
    follower.stop()


def test_a_scheduler_without_timesteps_says_nothing():
    pipe = Pipe("DPMSolverMultistepScheduler")
    follower = SchedulerFollower(pipe)
    pipe.scheduler.timesteps = None
    assert follower.locate() is None


def test_the_pipeline_is_not_kept_alive():
    pipe = Pipe("DDIMScheduler")
    scheduler = pipe.scheduler
    follower = SchedulerFollower(pipe)
    told(pipe, follower, 3)
    alive = weakref.ref(pipe)
    del pipe
    assert alive() is None
    other = Pipe("DDIMScheduler")
    other.scheduler = scheduler  # from_pipe shares the scheduler
    assert [tick[1] for tick in told(other, follower, 3)] == [0, 1, 2]


def test_the_class_of_a_followed_scheduler_makes_plain_ones():
    """`type(pipe.scheduler).from_config(...)`, for this pipeline or for another one."""
    pipe = Pipe()
    follower = SchedulerFollower(pipe)
    other = Pipe()
    other.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other.scheduler.set_timesteps(3)
    for time in other.scheduler.timesteps:
        other.scheduler.step(torch.ones(1, 4), time, torch.ones(1, 4))
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert [step for _, step, _ in told(pipe, follower, steps=5)] == [0, 1, 2, 3, 4]
    follower.stop()
    assert type(pipe.scheduler) is diffusers.FlowMatchEulerDiscreteScheduler
