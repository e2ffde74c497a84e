"""How per-record gradients of one parameter are measured and summed, one file for each form they come in."""
