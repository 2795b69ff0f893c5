"""Bundles in the forms that other servers load: one module for each, thin over :mod:`toolchain.exports.source`.

Needs numpy, and protobuf where Triton's configuration is written; no server, engine or compiler.
"""
