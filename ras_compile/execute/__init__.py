"""Running programs: the inner compiler, CUDA graphs, replayed selections, and the memory that branches keep."""
