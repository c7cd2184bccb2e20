"""``python -m slowfast_kernels``: what this machine can run, and why not the rest."""

from ._extension import report

print(report())
