"""Loading, building and calling models."""
