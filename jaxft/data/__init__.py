"""Turn sources into tokens, rows and batches, and account for every token."""
