"""One module per way of computing segment attention. Each says what it can serve, or why not."""
