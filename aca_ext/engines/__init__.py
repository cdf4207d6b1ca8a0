"""Engines: the eager one, dispatched from here, and those that compile or capture whole steps."""
