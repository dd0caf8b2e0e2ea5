"""What becomes one kernel around gathers and splices. Each pass rewrites a program in place."""
