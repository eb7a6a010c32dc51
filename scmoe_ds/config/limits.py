"""Limits that several rooms share, without an import."""

MOST_CHUNKS = 8
"""Chunks of an expert computation: more never paid, and the planner tries every slot of every chunk."""
