"""A small process beside each rank: it sees whether the rank lives, tells the other ranks, and ends one that hangs.

A rank that is stopped, or whose interpreter hangs, can do nothing of this itself. `scmoe_ds.parallel.watch` starts this
directory as a program of its own (scmoe_ds is not imported: 20 ms, 8 MB), in a session of its own. All guardians are
connected to the one of rank 0, the hub, which repeats what one of them reports to all others.

A rank that gives no sign of life for the timeout is killed: its connections close, and its peers and its launcher
notice. When a rank has ended without having said "done", the job is dead: ranks that do not end by themselves are
killed after a grace. When the launcher is gone, or stopped for the timeout, the rank gets SIGTERM (save and stop).

Time is counted in ticks of this process, so that a machine that slept has not been silent.
"""
