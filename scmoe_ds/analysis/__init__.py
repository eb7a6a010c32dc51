"""Measures representations, gates and gradients of a trained model, as the paper does to justify its design.

`similarity` compares intermediate representations (paper figures 10, 14, 15), `gating` the gate's choices at both ends
of a shortcut (figure 9; `gating_monitor` during training), `gradients` norms and signal-to-noise ratios (appendix A.1).
`feasibility` predicts whether ScMoE pays. `probes` captures representations, `tokens` and `swin` have the input,
`subjects` loads models, and `records`, `figures`, `feasibility_page` and `markdown` write the results.
`dashboard` draws the record of a training run.
"""
