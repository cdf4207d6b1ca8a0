"""engine="compiled" for independent samples: func as code on lanes of SIMD vectors, a sample in each lane."""
