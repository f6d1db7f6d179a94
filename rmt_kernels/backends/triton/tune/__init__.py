"""Measure other tiles on the GPU at hand and print rows for the table of ``configs``.

``python -m rmt_kernels.backends.triton.tune`` takes one key of the table after another, those that matter most first:
compiles every candidate, drops those that spill or do not fit, checks the results of the others, times them in turns,
and measures the fastest again beside the present configuration. Nothing is changed: the rows are yours to commit, in
front of the present rows of the same architecture and width, which they then hide.
"""
