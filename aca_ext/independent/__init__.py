"""Batches of independent problems: every sample has its own times, steps and accept decision.

The batch is evaluated together and steps together, each sample by its own step size; one that has reached its end takes
steps of length zero, which change nothing, until all have. ``problem`` checks the arguments, ``controller`` chooses the
steps of all samples at once, ``solver`` is the loop, ``gradients`` replays it backward.
"""
