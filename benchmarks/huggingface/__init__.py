"""RMT around models of transformers, against the same models in stock PyTorch's loops over segments."""
