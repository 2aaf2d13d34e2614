"""Threshold attention: weights relu(u - theta)^p of scores, or of their softmax or diffmax."""
