"""What is computed: gate, dispatch layouts, experts, merges, and the layers made of them."""
