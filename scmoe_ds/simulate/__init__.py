"""What a training step would take on a cluster that is not here. No torch, and of the package the planner alone.

A description of a cluster and one of a model become work, work becomes times, times become a step:

`gpu.py`       a GPU type: peaks, memory, efficiencies.
`cards.py`     those that are known by name. The only table of them.
`cluster.py`   nodes, GPUs, links (`interconnect.py`), each figure with its source; JSON (`json_files.py`) with units
               (`units.py`). `plausible.py` knows what no cluster is like, `schema.py` tells editors the fields.
`profile.py`   what `scmoe probe` measured on a machine.
`case.py`      what is priced with: a cluster in one of three cases, low, likely or high.
`machine.py`   a description and a profile to that: measured figures replace described ones (`measured_gpu.py`,
               `measured_links.py`).
`model.py`     sizes of a model, whoever wrote it.
`hugging_face.py` of a config.json; `model_files.py` of any file that describes a model.
`settings.py`  a DeepSpeed JSON as method and layout.
`method.py`    how its MoE layers run: the rows of every table.
`layout.py`    EP × DP × TP, ZeRO, micro-batch: one point of the search.
`work.py`      what one rank computes and sends in a step.
`step_work.py` model, method and layout to work: `pair_work.py` of a pair, `ground.py` the sizes that operators are made
               of, `operators*.py` the operators, `parameters.py` and `model_flops.py` their numbers, `refusals.py` what
               a model cannot run with.
`memory.py`    the bytes of a rank.
`routing.py`   how uneven the experts' loads are.
`kernels.py`   work of the computation to milliseconds.
`collectives.py` bytes between ranks to milliseconds.
`price.py`     work to times.
`times.py`     times of a step's parts: the planner's `OperatorTimes` of every pair, and what surrounds them.
`step_program.py` what a rank does in a micro-batch, as a program for lanes.
`two_in_flight.py` the same where a second micro-batch is on its way.
`step.py`      times to a whole step, on lanes.
`search.py`    the fastest layout of each method (`space.py` has all, `rows.py` a table's); `answers.py` what a plan
               says: `break_even.py`, `scaling.py`, `advice.py`; `timeline.py` draws a step.
`fit.py`       which figure of a description measured steps contradict.
"""
