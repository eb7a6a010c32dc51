"""The DeepSpeed JSON with its "scmoe" section: read, checked and explained.

`loading` reads and validates a JSON once. `section` has the fields of "scmoe" (`overlap_section` those of "overlap",
`names` and `limits` their values), `messages` words its errors, and `schema` writes it for editors. For DeepSpeed's own
keys, `deepspeed_json` reads the file and `deepspeed_keys` knows which keys there are. `deepspeed_values` checks what
they hold, `batch_sizes` the batch size, `deepspeed_optimizers` the optimizer and the schedule. `deepspeed_refused` and
`deepspeed_gradients` have what ScMoE cannot run with. `deepspeed_settings` brings these together.
`unread_section` warns when plain DeepSpeed gets the section.
"""
