"""What a machine does, measured in about a minute: the profile that `scmoe plan` takes.

`clock.py`       one call timed, with its weights out of the caches.
`sizes.py`       which sizes.
`trials.py`      what is timed, and the rounds in which all of it takes turns.
`bench.py`       a device in one precision.
`products.py`    matrix products, and experts as this package computes them.
`attention.py`   sequences and windows.
`passes.py`      everything that memory bounds, and what a launch costs the host.
`groups.py`      which ranks exchange: of one node, of several.
`collectives.py` all-to-all, all-reduce, reduce-scatter, all-gather; the exchange of row counts.
`beside.py`      computation beside a running all-to-all.
`measure.py`     all of it.
`results.py`     samples to a profile.
`environment.py` what machine this is.
`text.py`        the profile as a table.
"""
