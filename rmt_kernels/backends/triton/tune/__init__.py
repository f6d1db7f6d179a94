"""Measure other tiles on the GPU at hand and print rows for the tables of ``configs``.

``python -m rmt_kernels.backends.triton.tune`` takes one key of the tables after another, those that matter most first:
compiles every candidate, drops those that spill or do not fit, checks the results of the others, times them in turns,
and measures the fastest again beside the present configuration. Nothing is changed: the rows are yours to commit, each
in front of the row that it is printed for, which it then hides.
"""
