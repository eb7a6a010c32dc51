"""Trains a model with a DeepSpeed engine. `loop` has the steps, `images` the same for image classifiers, `settings` the
settings and the summary of a run, `log` its log, `health` the checks for NaN and overflow."""
