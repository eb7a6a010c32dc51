"""From measured times to a schedule.

`times.py`            what is measured of a pair: one number per operator and pass.
`plan.py`             the planner: times in, schedule out. It imports neither torch nor a process group.
`simulation.py`       what a schedule takes, on two simulated lanes. No torch either.
`pair_program.py`     what the executor does for a pair, as a program for these lanes.
`lanes.py`            their simulation: ranks run a program and meet in transfers; several classes and lanes.
`link.py`             transfers on lanes that share a link.
`schedule_text.py`    a schedule as the log shows it.
`plan_text.py`        times and plan as the log shows them.
`speed_text.py`       two speeds compared in words.
`rounds.py`           times whole steps of several variants, interleaved.
`calibration.py`      which passes are timed, and recorded spans of all ranks to times.
`kinds.py`            the pairs of a model, sorted into kinds that share their times.
`calibration_file.py` times on disk and in checkpoints.
`comparison.py`       with overlap or without: times whole micro-batches of both, and keeps the faster.
`calibrator.py`       times the first passes, plans, sets the schedules: for training, serving and benchmarks.
`step_trace.py`       has one step recorded and drawn, of training or generation.
`auto.py`             every "auto" of the section: first schedule, numbers of chunks, all-to-all.
"""
