"""What happened when, measured in the step itself.

`recorder.py`         marks and spans: how a pair is timed, forward and backward. The calibrator uses it, too.
`migrations.py`       the same for offloaded experts on their way to the device.
`spans.py`            what the spans of all ranks say: the hidden share of communication and migration.
`timeline.py`         one step as a trace file for ui.perfetto.dev.
`timeline_figure.py`  one step as a figure, a lane each for compute, communication and migration per rank.
"""
