"""`diffmax_loss`: the Fenchel-Young loss of the weights."""
