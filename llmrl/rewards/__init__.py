"""Verifiers and graders, and the runner that keeps them bounded. Imports no torch."""
