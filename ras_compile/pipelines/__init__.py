"""diffusers pipelines: attaching to one, following its scheduler, what its sampler implies."""
