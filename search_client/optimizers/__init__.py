"""Optimizers: pure functions from costs and qualities to the next architecture. Neither torch nor httpx in here."""
