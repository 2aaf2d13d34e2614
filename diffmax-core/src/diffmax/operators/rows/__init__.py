"""`diffmax_bisect`: the weights of rows of scores."""
