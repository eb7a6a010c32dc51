"""What a machine does, measured in about a minute: the profile that `scmoe plan` takes.

`clock.py`       one call timed, with its weights out of the caches.
`trials.py`      what is timed, and the rounds in which all of it takes turns.
`products.py`    matrix products by size, and experts as this package computes them.
`attention.py`   sequences and windows.
`passes.py`      everything that memory bounds, and what a launch costs the host.
`groups.py`      which ranks exchange: of one node, of several.
`collectives.py` all-to-all, all-reduce, reduce-scatter, all-gather by size; the exchange of row counts.
`beside.py`      computation beside a running all-to-all.
`measure.py`     all of it, to the profile.
`text.py`        the profile as a table.
"""
