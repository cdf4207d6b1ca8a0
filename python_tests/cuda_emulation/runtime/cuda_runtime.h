// Stand-in for CUDA's runtime, which runs kernels on the CPU: what csrc uses of it, and no more.
#pragma once
#include <math.h>  // of C, for the overloads of fma, pow and sqrt in the global namespace

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <type_traits>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
#define __grid_constant__
#define CUDART_VERSION 13000

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
extern dim3 threadIdx, blockIdx, blockDim, gridDim;  // of the thread that runs

namespace emulation {

struct Graph;
struct Node;
struct Stream;

std::shared_ptr<const void> copied(const void* from, size_t bytes);

// A kernel with its arguments, which are copied at the launch as CUDA does.
struct Kernel {
    void (*call)(const void*) = nullptr;
    std::shared_ptr<const void> arguments;
    unsigned n_blocks = 1, n_threads = 1;
};

template <typename F>
void call_copy(const void* f) {
    (*static_cast<const F*>(f))();
}

template <typename F>
Kernel kernel_of(F f, dim3 grid, dim3 block) {
    static_assert(std::is_trivially_copyable_v<F>, "CUDA copies arguments as bytes");
    return {&call_copy<F>, copied(&f, sizeof f), grid.x, block.x};
}

void launch(Kernel kernel, Stream* stream);

// `kernel<<<grid, block, shared, stream>>>(arguments)` is rewritten as Launch(grid, block, shared,
// stream).of(kernel)(…).
struct Launch {
    dim3 grid, block;
    Stream* stream;

    Launch(dim3 grid, dim3 block, size_t, Stream* stream) : grid(grid), block(block), stream(stream) {}

    template <typename F>
    auto of(F f) const {
        return [f, on = *this](auto... arguments) {
            launch(kernel_of([=] { f(arguments...); }, on.grid, on.block), on.stream);
        };
    }
};

// The address of a kernel in the parameters of a graph node is rewritten as that of its Entry, which knows how to copy
// the arguments.
struct Entry {
    Kernel (*kernel)(dim3 grid, dim3 block, void** arguments);
};

template <auto kernel, typename... A, size_t... I>
Kernel kernel_from(dim3 grid, dim3 block, void** arguments, void (*)(A...), std::index_sequence<I...>) {
    const auto with = [&](A... a) { return kernel_of([=] { kernel(a...); }, grid, block); };
    return with(*static_cast<A*>(arguments[I])...);
}

template <auto kernel>
struct EntryOf;

template <typename... A, void (*kernel)(A...)>
struct EntryOf<kernel> {
    static Kernel make(dim3 grid, dim3 block, void** arguments) {
        return kernel_from<kernel>(grid, block, arguments, kernel, std::index_sequence_for<A...>());
    }
    static inline Entry entry{&make};
};

template <auto kernel>
void* entry() {
    return &EntryOf<kernel>::entry;
}

// Memory that the threads of a block share, named by the line of its declaration.
void* shared_memory(int line, size_t bytes);

template <typename T, int line>
T& shared() {
    return *static_cast<T*>(shared_memory(line, sizeof(T)));
}

uint64_t shuffle_down(unsigned mask, uint64_t value, unsigned offset);
void enter_atomic(void* address);

extern int fault;  // number of the planted fault that is active; 0: none
inline bool has_fault(int number) { return fault == number; }

}  // namespace emulation

void __syncthreads();
void __threadfence();

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    uint64_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    bits = emulation::shuffle_down(mask, bits, offset);
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename T>
T atomicAdd(T* address, T value) {
    emulation::enter_atomic(address);
    // Volatile, and so not part of the instrumented accesses of a kernel: an atomic operation is no race.
    const T before = __atomic_load_n(address, __ATOMIC_RELAXED);
    __atomic_store_n(address, before + value, __ATOMIC_RELAXED);
    return before;
}

#include "runtime_api.h"
