// Decisions about a control block in the memory of a GPU, each one launch of one block. Compiled without fused
// multiply-add: the numbers are to be those of the host.
#include <cuda_runtime.h>

#include "control/control_block.h"
#include "kernels/cuda_device.cuh"

namespace aca {
namespace {

constexpr int kThreads = 128;

__global__ void write_control_kernel(Control* to, Control from) { *to = from; }

// The block works on a copy close by: one thread decides, and all share the weights of the outputs.
__global__ void decide_kernel(Control* control, Decision decision) {
    static_assert(sizeof(Control) % sizeof(int64_t) == 0, "copied word by word");
    constexpr int kWords = sizeof(Control) / sizeof(int64_t);
    __shared__ int64_t words[kWords];
    auto* const there = reinterpret_cast<int64_t*>(control);
    Control& s = *reinterpret_cast<Control*>(words);
    for (int i = threadIdx.x; i < kWords; i += kThreads) words[i] = there[i];
    __syncthreads();
    if (threadIdx.x == 0) control::decide(s, decision);
    __syncthreads();
    for (int i = threadIdx.x; i < kWords; i += kThreads) there[i] = words[i];
    if (s.solve.is_accepted && s.degree)
        for (int64_t output = s.solve.first_due + threadIdx.x; output < s.solve.end_due; output += kThreads)
            control::write_weights(s, output);
}

}  // namespace

void write_control_on_cuda(const Target& target, uintptr_t to, const Control& from) {
    const DeviceGuard guard(target.device);
    write_control_kernel<<<1, 1, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(control::at<Control>(to), from);
    check(cudaGetLastError(), "kernel launch");
}

void decide_on_cuda(const Target& target, uintptr_t control, Decision decision) {
    const DeviceGuard guard(target.device);
    decide_kernel<<<1, kThreads, 0, reinterpret_cast<cudaStream_t>(target.stream)>>>(control::at<Control>(control),
                                                                                     decision);
    check(cudaGetLastError(), "kernel launch");
}

}  // namespace aca
