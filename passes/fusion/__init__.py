"""Peepholes over gathers and splices: what becomes one kernel. Each pass rewrites a program in place."""
