"""Two nodes in one machine: network namespaces joined by a link whose rate is chosen (`nodes.py`)."""
