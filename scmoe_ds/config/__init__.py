"""The DeepSpeed JSON with its "scmoe" section: read, checked and explained.

`loading` reads and validates a JSON once. `section` has the fields of "scmoe" (`overlap_section` those of "overlap",
`names` their values), `schema` writes them for editors. Of DeepSpeed's own keys, `deepspeed_keys` knows which there
are, `deepspeed_values` checks what they hold, `deepspeed_optimizers` the optimizer and the schedule,
`deepspeed_refused` what ScMoE cannot run with, and `deepspeed_settings` brings these together.
"""
