"""Every choice that depends on shapes, in one place: backends (``backends``), the configurations of Triton's kernels
(``triton``), of a decode step's linear layers (``gemv``), and how CUDA's kernels are cut (``cuda``). Pure Python,
printable, tested on a CPU.

A choice is a function of shapes, dtype and GPU alone, never of data on the device, so nothing here syncs and a CUDA
graph captured for a shape stays right for new data.
"""
