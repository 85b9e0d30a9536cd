"""Data: sources -> tokens -> rows -> batches, with every token accounted for."""
