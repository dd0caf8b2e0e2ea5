"""The presets under solvers of second order, one that evaluates a step twice, and other predictions; with guidance."""

import diffusers
import pytest
import torch
from contract import error
from pipelines import draw_sd3, kinds, sd3

import ras_compile
from ras_compile.config import PRESETS
from ras_compile.sampling.schedule import Schedule

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SOLVERS = {
    "Heun": lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    "UniPC": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "DPM-Solver++": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "DPM-Solver++ singlestep": lambda: diffusers.DPMSolverSinglestepScheduler(**FLOW),
    "DDIM": lambda: diffusers.DDIMScheduler(prediction_type="v_prediction", clip_sample=False),
}
STEPS = 10


@pytest.mark.parametrize("solver", SOLVERS)
def test_each_preset_under_each_solver(solver):
    """All tokens give the dense picture; without them the schedule is kept, and the picture stays near, twice the same."""
    pipe = sd3(scheduler=SOLVERS[solver]())
    pipe.set_progress_bar_config(disable=True)
    torch._dynamo.reset()
    plain = draw_sd3(pipe, steps=STEPS)
    with ras_compile.attach(pipe, inner_backend="eager", unsupported="error") as handle:
        for preset in (*PRESETS, None):
            schedule_of_sigmas = {} if preset else {"ratio_schedule": "sigmas"}
            handle.configure(preset=preset, **schedule_of_sigmas)
            found = draw_sd3(pipe, steps=STEPS)
            records, levels = ras_compile.trace(handle), handle.follower.noise_levels()
            calls, schedule = len(pipe.scheduler.timesteps), Schedule(handle.config, levels)
            assert len(levels) == calls + 1 and all(0 <= level <= 1 for level in levels)
            assert kinds(records) == "".join(schedule.kind(step, calls)[0] for step in range(calls))
            wanted = [schedule.active(r.step, 16, calls) for r in records if r.kind == "sparse"]
            assert [r.active for r in records if r.kind == "sparse"] == wanted and wanted
            assert torch.equal(draw_sd3(pipe, steps=STEPS), found)
            assert 1e-5 < error([found], [plain]) < 1.5, preset
            handle.configure(sample_ratio=1.0)
            assert error([draw_sd3(pipe, steps=STEPS)], [plain]) < 1e-4, preset
