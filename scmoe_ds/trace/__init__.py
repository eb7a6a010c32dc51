"""What happened when, measured in the step itself.

`recorder.py`         marks and spans: how a pair is timed, forward and backward. The calibrator uses it, too.
`spans.py`            what the spans of all ranks say: the hidden share of the communication.
`timeline.py`         one step as a trace file for ui.perfetto.dev.
`timeline_figure.py`  one step as a figure, a compute and a communication lane per rank.
"""
