"""Operations of a Runge-Kutta step on tensors: by the fused kernels, or by plain torch."""
