"""Training through many segments, weighed and timed: ``python -m benchmarks.recurrence``."""
