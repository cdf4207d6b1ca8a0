"""The operations of a Runge-Kutta step on tensors: by fused kernels, or in plain PyTorch."""
