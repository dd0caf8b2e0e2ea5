"""From a call of the user's model to a functional graph with described inputs: Dynamo's graph or a trace, normalised."""
