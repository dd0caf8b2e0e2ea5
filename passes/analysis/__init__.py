"""What a captured graph means: one spelling, layouts of all values, which of them are spliced, and what a step costs."""
