"""Seconds after which a guardian acts."""

TICK_S = 0.5
SILENT_S = 3.0
"""A rank is named to the others after this long without a sign of life."""
GRACE_S = 10.0
"""From the job's death to the end of ranks that did not end by themselves."""
LINGER_S = 15.0
