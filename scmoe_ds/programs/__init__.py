"""What is started: each program is a module with a `main`, and `scmoe PROGRAM` starts it.

`run` is what all of them do around their job: log, process group, errors in one sentence. `flags` has the command
lines.
"""
