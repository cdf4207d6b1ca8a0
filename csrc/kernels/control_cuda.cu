// Decisions about a control block in GPU memory, one launch of one thread block each. Compiled without fused
// multiply-add, so that the results equal those of the host.
#include <cuda_runtime.h>

#include "control/control_block.h"
#include "kernels/cuda_device.cuh"

namespace aca {
namespace {

constexpr int kThreads = 128;

__global__ void write_control_kernel(Control* to, Control from) { *to = from; }

// Works on a copy in shared memory. One thread decides; all threads write the weights of the outputs.
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
