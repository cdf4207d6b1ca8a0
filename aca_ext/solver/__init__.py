"""The solver: loops over steps, one Runge-Kutta step and its transpose, checkpoints, failure messages."""
