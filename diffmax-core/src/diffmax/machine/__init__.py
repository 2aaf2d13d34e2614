"""How a call reaches a kernel: plugins are found, checked and listed, and one is chosen for each call."""
