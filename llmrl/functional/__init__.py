"""Pure tensor maths. Imports torch only."""
