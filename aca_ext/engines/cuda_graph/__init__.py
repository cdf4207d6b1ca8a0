"""engine="graph": steps captured as CUDA graphs and repeated by the device."""
