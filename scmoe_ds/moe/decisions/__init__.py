"""What is decided about rows between the gate and the dispatch, by the rules of scmoe_ds.moe.early.

Rows that hardly matter are left out (`dropping`, `load_aware`, `halves`), overloaded ranks compute in low precision
(`low_precision`, `low_precision_expert`, `low_precision_formats`), rows of hot experts go to copies (`copies`,
`copied`), and the parts of experts have rows of their own (`partition`).
"""
