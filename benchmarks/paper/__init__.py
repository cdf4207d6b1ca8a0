"""The experiments of the ACA paper (Zhuang et al., ICML 2020), one module each: ``python -m benchmarks.paper NAME``."""
