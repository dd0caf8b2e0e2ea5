"""What a call may be, and what answers it: the model through its plan, or the model as it is."""
