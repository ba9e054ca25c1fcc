"""The numerics room: every computation of the engine and of the trainer's forward is an op of this package.

`zerokl.kernels.ops` is the op table (the contract), `zerokl.kernels.dispatch` picks an implementation by device.
This file imports nothing: the scheduler and other pure modules may import `zerokl.kernels.ops` without the
C++ extension, Paddle or Triton being loaded.
"""
