"""engine="compiled" for samples and stiff problems: func as code on lanes of SIMD vectors, a sample in each lane."""
