"""How rows travel between ranks.

`all_to_all.py`       start and wait of one exchange as autograd functions. Read it first.
`transport.py`        the primitives that carry an exchange, and the probe that chooses one for "auto".
`hierarchical.py`     the primitive for groups that span nodes: inside the nodes, then across.
`counts.py`           how many rows each rank sends and receives.
`wire.py`             the number format of rows on the way.
`gather.py`           a blocking gather for tensor parallelism.
`side_stream.py`      a CUDA stream for work beside the computation.
"""
