// The CUDA backend: grid-stride loops over 16-byte packs and a repeatable one-launch sum, on the caller's stream.
#include <cuda_runtime.h>

#include "kernels/cuda_device.cuh"
#include "kernels/ops_impl.h"

namespace aca {
namespace {

using namespace ACA_ISA;

constexpr int kThreads = 256;

// Number of thread blocks. It depends on the number of items alone, so that sums repeat bitwise.
int grid(int64_t items, int64_t limit) {
    const int64_t blocks = (items + kThreads - 1) / kThreads;
    return int(blocks < limit ? blocks : limit);
}

// Functor that reads its step size from memory when the kernel runs, for steps launched before the size is known.
template <typename F>
struct WithStepAt {
    static constexpr int width = F::width;
    F f;
    const double* step;

    template <int V>
    __device__ auto operator()(int64_t i) const {
        return f.of_row(*step).template operator()<V>(i);
    }
};

template <int V, typename F>
__global__ void __launch_bounds__(kThreads) for_each_kernel(int64_t n, F f) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t packs = n / V, tail = packs * V + thread;
    if (V > 1 && tail < n) f.template operator()<1>(tail);
#pragma unroll 1  // most threads have one pack; unrolling spills registers
    for (int64_t p = thread; p < packs; p += stride) f.template operator()<V>(p * V);
}

__device__ double sum_of_block(double value) {
    __shared__ double warp_sum[kThreads / 32];
    for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_down_sync(~0u, value, offset);
    __syncthreads();
    if (threadIdx.x % 32 == 0) warp_sum[threadIdx.x / 32] = value;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kThreads / 32; ++w) total += warp_sum[w];
    return total;
}

// Each block writes its partial sum. The block that finishes last adds them in order, so the result does not depend on
// which block that is.
template <int V, typename F>
__global__ void __launch_bounds__(kThreads)
    sum_kernel(int64_t n, F f, double* partial, unsigned* finished, double* out) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t packs = n / V, tail = packs * V + thread;
    double value = V > 1 && tail < n ? f.template operator()<1>(tail) : 0;
#pragma unroll 1  // one pack keeps enough loads in flight; unrolling spills registers around the division
    for (int64_t p = thread; p < packs; p += stride) value += f.template operator()<V>(p * V);
    value = sum_of_block(value);

    __shared__ bool last;
    if (threadIdx.x == 0) {
        partial[blockIdx.x] = value;
        __threadfence();
        last = atomicAdd(finished, 1u) == gridDim.x - 1;
        // By the thread that saw the count: a fence orders the accesses of its own thread, the barrier the block's.
        if (last) __threadfence();
    }
    __syncthreads();
    if (!last) return;

    value = 0;
    for (unsigned b = threadIdx.x; b < gridDim.x; b += blockDim.x) value += static_cast<volatile double*>(partial)[b];
    value = sum_of_block(value);
    if (threadIdx.x == 0) {
        *out = value;
        *finished = 0;
    }
}

template <int V, typename F>
__global__ void __launch_bounds__(kThreads)
    for_each_row_kernel(int64_t packs, int64_t packs_per_row, const double* each, F f) {
    const int64_t stride = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1  // unrolling spills registers
    for (int64_t p = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; p < packs; p += stride)
        f.of_row(each[p / packs_per_row]).template operator()<V>(p * V);
}

// Sums one segment of each row (a sample) with `Lanes` threads per row, more for longer segments. The order of the
// additions is fixed, as there are no atomics.
template <int Lanes, typename F>
__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(int64_t sums, int64_t length, int segments, int segment, int64_t start, int64_t n,
                    const double* each, F f, double* out) {
    constexpr int kPerBlock = kThreads / Lanes;
    const int lane = threadIdx.x % Lanes;
    const int64_t stride = int64_t(gridDim.x) * kPerBlock;
    for (int64_t row = int64_t(blockIdx.x) * kPerBlock + threadIdx.x / Lanes; row < sums; row += stride) {
        const F of_row = f.of_row(each[row]);
        double value = 0;
#pragma unroll 1
        for (int64_t i = lane; i < n; i += Lanes) value += of_row.template operator()<1>(row * length + start + i);
        if constexpr (Lanes == kThreads) {
            value = sum_of_block(value);
        } else if constexpr (Lanes == 32) {
            for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_down_sync(~0u, value, offset);
        } else {
            static_assert(Lanes == 1, "threads, warps or blocks");
        }
        if (lane == 0) out[row * segments + segment] = value;
    }
}

struct Cuda {
    template <typename F>
    static void for_each(const Target& target, int64_t n, bool vectorisable, F f) {
        if (n == 0) return;
        const DeviceGuard guard(target.device);
        const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
        constexpr int64_t kMaxBlocks = 1 << 20;
        constexpr int V = F::width;
        if (vectorisable)
            for_each_kernel<V><<<grid(n / V + 1, kMaxBlocks), kThreads, 0, stream>>>(n, f);
        else
            for_each_kernel<1><<<grid(n, kMaxBlocks), kThreads, 0, stream>>>(n, f);
        check(cudaGetLastError(), "kernel launch");
    }

    template <typename F>
    static void sum(const Target& target, int64_t n, bool vectorisable, F f, double* out) {
        const DeviceGuard guard(target.device);
        const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
        auto* const partial = reinterpret_cast<double*>(target.workspace);
        auto* const finished = reinterpret_cast<unsigned*>(partial + kMaxPartials);
        constexpr int V = F::width;
        if (vectorisable)
            sum_kernel<V><<<grid(n / V + 1, kMaxPartials), kThreads, 0, stream>>>(n, f, partial, finished, out);
        else
            sum_kernel<1><<<grid(n + 1, kMaxPartials), kThreads, 0, stream>>>(n, f, partial, finished, out);
        check(cudaGetLastError(), "kernel launch");
    }

    template <typename F>
    static void sum_row(const Target& target, int64_t n, bool vectorisable, F f, uintptr_t each, double* out) {
        sum(target, n, vectorisable, WithStepAt<F>{f, reinterpret_cast<const double*>(each)}, out);
    }

    template <typename F>
    static void for_each_row(const Target& target, const Samples& rows, bool vectorisable, F f) {
        const int64_t n = rows.count * rows.length;
        const auto* const each = reinterpret_cast<const double*>(rows.each);
        if (rows.count == 1) return for_each(target, n, vectorisable, WithStepAt<F>{f, each});
        if (n == 0) return;
        const DeviceGuard guard(target.device);
        const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
        constexpr int64_t kMaxBlocks = 1 << 20;
        constexpr int V = F::width;
        if (vectorisable && rows.length % V == 0)
            for_each_row_kernel<V><<<grid(n / V, kMaxBlocks), kThreads, 0, stream>>>(n / V, rows.length / V, each, f);
        else
            for_each_row_kernel<1><<<grid(n, kMaxBlocks), kThreads, 0, stream>>>(n, rows.length, each, f);
        check(cudaGetLastError(), "kernel launch");
    }

    template <typename F>
    static void sum_rows(const Target& target, const Samples& rows, int segments, const int64_t* bounds, F f,
                         double* out) {
        if (rows.count == 0) return;
        const DeviceGuard guard(target.device);
        const auto stream = reinterpret_cast<cudaStream_t>(target.stream);
        const auto* const each = reinterpret_cast<const double*>(rows.each);
        for (int s = 0; s < segments; ++s) {
            const int64_t start = bounds[s], n = bounds[s + 1] - bounds[s];
            const auto launch = [&](auto lanes) {
                constexpr int kLanes = decltype(lanes)::value;
                sum_rows_kernel<kLanes><<<grid(rows.count * kLanes, 1 << 20), kThreads, 0, stream>>>(
                    rows.count, rows.length, segments, s, start, n, each, f, out);
            };
            if (n <= 8)
                launch(Count<1>{});
            else if (n <= 1024)
                launch(Count<32>{});
            else
                launch(Count<kThreads>{});
            check(cudaGetLastError(), "kernel launch");
        }
    }

    static void write_control(const Target& target, uintptr_t to, const Control& from) {
        write_control_on_cuda(target, to, from);
    }
    static void decide(const Target& target, uintptr_t control, Decision decision) {
        decide_on_cuda(target, control, decision);
    }
};

}  // namespace

const Backend& cuda_backend() {
    static const Backend backend = make_backend<Cuda>("cuda");
    return backend;
}

int cuda_device_count() {
    int count = 0;
    return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace aca
