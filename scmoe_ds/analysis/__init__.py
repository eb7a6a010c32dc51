"""What a trained model's representations, gates and gradients look like: the measurements behind the paper's design.

`similarity`: intermediate representations against each other (paper figures 10, 14, 15); `gating`: the gate's choices
on both ends of a shortcut (figure 9); `gradients`: their norms and signal-to-noise ratios (appendix A.1). `probes` says
where a model's representations are, `tokens` what is read, `subjects` loads models, `figures` draws the records.
"""
