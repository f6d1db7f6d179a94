"""Everything there is to check and measure on a GPU: ``python -m benchmarks.gpu`` runs it in stages."""
