"""Who computes: `process` makes a process a rank (`launchers` reads what started it),
`groups` and `tensor` divide the ranks, `agreement` makes them pass or fail together and `stopping` stop together.
`failures` says why a rank ends (`error_text`: in which words), `watch` and `guardian` notice ranks that hang or die,
`output` survives full disks, `compilation` and `shared_memory` guard DeepSpeed's compiled operators."""
