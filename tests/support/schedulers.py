"""Schedulers of diffusers that are followed, with options that make them predict what a DiT does."""

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}

SCHEDULERS = {
    "FlowMatchEulerDiscreteScheduler": {},
    "FlowMatchHeunDiscreteScheduler": {},
    "EulerDiscreteScheduler": {},
    "EulerAncestralDiscreteScheduler": {},
    "HeunDiscreteScheduler": {},
    "KDPM2DiscreteScheduler": {},
    "KDPM2AncestralDiscreteScheduler": {},
    "LMSDiscreteScheduler": {},
    "DPMSolverMultistepScheduler": FLOW,
    "DPMSolverSinglestepScheduler": {},
    "UniPCMultistepScheduler": FLOW,
    "DEISMultistepScheduler": {},
    "SASolverScheduler": {},
    "LCMScheduler": {},
    "TCDScheduler": {},
    "DDIMScheduler": {},
    "DDPMScheduler": {},
    "PNDMScheduler": {"skip_prk_steps": True},
    "CogVideoXDDIMScheduler": {},
}
