"""Releases in OCI registries (OCI distribution specification 1.1): push, pull, and who may.

Works with the standard library alone.
"""
