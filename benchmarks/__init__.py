"""Benchmarks of rmt_kernels against stock PyTorch: ``python -m benchmarks`` runs them and writes a report."""
