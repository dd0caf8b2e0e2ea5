"""The executable spec: what a legal graph is after each stage and after each pass, checked and never assumed."""
