"""engine="compiled": whole steps, and their transpose, compiled by torch's compiler."""
