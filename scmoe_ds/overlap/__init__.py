"""When the routed experts are computed and sent: asynchronous all-to-all, schedules and the executor."""
