"""engine="compiled": whole steps and their transposes, compiled by torch's compiler."""
