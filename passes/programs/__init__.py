"""Dense and sparse programs from an analysis: index tensors, gathers, splices, roles of inputs, and who shares memory."""
