"""What this project knows about TVM: import, size variants, the compile pipeline, schedules, linking.

Nothing here imports TVM at module level; :func:`toolchain.tvm.library.load_tvm` does, without torch.
"""
