"""Rows in, tokenised examples and packed batches out."""
