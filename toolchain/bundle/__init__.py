"""Bundles: OCI image layouts that hold what ships for each target of a release.

Works with the standard library alone: neither torch, onnx nor a compiler is imported.
"""
