"""When the routed experts run: `executor` is the paper's figure in one loop, `schedule` the data that it follows."""
