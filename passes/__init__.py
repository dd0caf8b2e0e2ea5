"""Graph passes: layouts, rules, propagation, dense and sparse programs. Pure graph code."""
