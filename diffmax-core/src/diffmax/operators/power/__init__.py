"""Power attention: weights (q . k)^p for an even p, computed in linear time through symmetric powers."""
