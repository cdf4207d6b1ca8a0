"""engine="graph": steps captured as CUDA graphs, which are launched again without the host in between."""
