"""Kernels for CUDA devices, each with an XLA form of the same function; and the packed layout.

A kernel is a folder with the same files in each:

    api         what callers use: picks the backend, else the same as both
    xla         written from the formulas, for any backend
    mosaic_gpu  the Pallas kernel; a package where one file would be long
    configs     how it is laid on the chip, measured or by rule, where there is a choice

    products    what products of a few rows have in common: what stands around them
    layout      how 4-bit codes lie in bytes
    ptx         what kernels are written with: thread-level code
    devices     what kernels may count on, a record a generation of GPUs
    dispatch    which backend runs a kernel
    tuned       measured configurations, a file a device in configs/
    timing      time on the device, from the profiler
"""
