"""Dense and sparse programs from an analysis: index tensors, gathers, splices, and the spec of a legal graph."""
