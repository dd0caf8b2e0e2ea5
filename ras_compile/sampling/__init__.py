"""One generation: where a call stands in it, which step is dense, which tokens a sparse step computes."""
