"""The decoder and its loss: pure functions of arrays, without file access."""
