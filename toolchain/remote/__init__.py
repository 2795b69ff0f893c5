"""Devices reached over SSH: who they are, a folder on them, and programs run there."""
