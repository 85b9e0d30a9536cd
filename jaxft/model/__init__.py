"""The decoder and its loss: pure maths on arrays; opens no file."""
