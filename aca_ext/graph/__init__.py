"""engine="graph": a whole solve, and its transpose, repeated on the GPU from captured steps."""
