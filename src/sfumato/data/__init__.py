"""Place 1: records, their owners, how batches are drawn."""
