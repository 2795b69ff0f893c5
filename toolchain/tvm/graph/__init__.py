"""Passes over the whole graph, before operators become loop nests; one module a pass."""
