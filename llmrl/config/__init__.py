"""Recipes: pydantic models, one file a concern."""
