"""Residuals to probabilities: the final norm and the lm_head, without holding a row of logits per layer."""
