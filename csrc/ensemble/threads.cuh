// Functions of a compiled library whose lanes are threads: the solve of all samples, its transpose, and func itself.
//
// nvcc makes them run on a GPU, a solve in one launch and its transpose in another. A C++ compiler makes loops of the
// same threads on the CPU, one after the other, for tests.
#pragma once
#define ACA_ONE_LANE
#include "ensemble/backward.h"
#include "ensemble/contractions.h"
#include "ensemble/evaluation.h"
#include "ensemble/exports.h"
#include "ensemble/forward.h"

namespace aca {

// Memory for accepted steps, of which threads take pieces. `used` goes beyond the size where that is too small; the
// solve is then complete except for its record, and is made again with more.
struct Arena {
    int64_t keep;  // a Keep, but no checkpoints
    char* memory;
    int64_t size;
    unsigned long long* used;
    const Entry** last;  // of each sample
};

// The accepted steps of the samples of a thread.
template <int n>
class ThreadRecord {
  public:
    static constexpr int64_t kBytes = 16 * int64_t(sizeof(Entry) + (n * sizeof(T) + 7) / 8 * 8);  // of a piece

    // All steps of a sample, since there are no checkpoints to start from.
    struct Round {
        static constexpr bool is_resumed = false;
        int64_t number = 0;
        ACA_HD bool has(int64_t) const { return number == 0; }
        ACA_HD bool is_last(int64_t) const { return true; }
    };
    using Memory = ThreadRecord;
    static constexpr bool has_checkpoints = false;

    ACA_HD explicit ThreadRecord(const Arena& arena) : keep(Keep(arena.keep)), arena_(arena) {}

    ACA_HD bool keeps_entries() const { return keep != Keep::nothing; }
    ACA_HD ThreadRecord& entries(int64_t) { return *this; }
    ACA_HD ThreadRecord& states(int64_t) { return *this; }
    ACA_HD const Entry*& last(int64_t sample) { return arena_.last[sample]; }
    ACA_HD const Entry* last(int64_t sample) const { return arena_.last[sample]; }

    ACA_HD void* add(size_t size) {
        const int64_t bytes = (int64_t(size) + 7) / 8 * 8;
        if (left_ < bytes) {
            next_ = take();
            left_ = kBytes;
        }
        left_ -= bytes;
        if (!next_) return nowhere_;
        char* const found = next_;
        next_ += bytes;
        return found;
    }

    const Keep keep;

  private:
    ACA_HD char* take() {
#ifdef __CUDA_ARCH__
        const int64_t start = int64_t(atomicAdd(arena_.used, (unsigned long long)(kBytes)));
#else
        const int64_t start = int64_t(*arena_.used);
        *arena_.used += kBytes;
#endif
        return start + kBytes <= arena_.size ? arena_.memory + start : nullptr;
    }

    const Arena& arena_;
    char* next_ = nullptr;
    int64_t left_ = 0;
    alignas(8) char nowhere_[kBytes / 16];  // for what finds no room
};

template <typename Field, typename Method>
struct ForwardOfThread {
    Task task;
    Arena arena;

    ACA_HD void operator()(const Share& share) const {
        using Record = ThreadRecord<Field::n>;
        Record record(arena);
        Forward<Field, Method, Record>(task, record).run(share);
    }
};

template <typename Field, typename Method>
struct BackwardOfThread {
    Task task;
    Arena arena;
    Cotangents to;

    ACA_HD void operator()(const Share& share) const {
        using Record = ThreadRecord<Field::n>;
        const Record record(arena);
        Backward<Field, Method, Record>(task, to).run(share, record, typename Record::Round(), nullptr);
    }
};

template <typename Field>
struct EvaluationOfThread {
    Operands operands;

    ACA_HD void operator()(const Share& share) const { Evaluation<Field>(operands).run(share); }
};

// Writes starts and ends of the accepted steps of each sample, first to last, before row `end` of the result.
struct BoundsOfThread {
    const Entry* const* last;
    const int64_t *count, *end;
    double* to;

    ACA_HD void operator()(const Share& share) const {
        for (int64_t sample = share.first; sample < share.end; sample += share.stride) {
            const Entry* entry = last[sample];
            double* row = to + 2 * end[sample];
            for (int64_t i = 0; i < count[sample]; ++i, entry = entry->previous)
                *--row = entry->t_next, *--row = entry->t;
        }
    }
};

#ifdef __CUDACC__

constexpr int kBlock = 64;  // threads; small, so that few samples spread over all multiprocessors

template <typename Body>
__global__ void __launch_bounds__(kBlock)
    for_each_thread(const __grid_constant__ Body body, int64_t n, int64_t threads) {
    const int64_t thread = int64_t(blockIdx.x) * kBlock + threadIdx.x;
    if (thread < threads) body(Share{thread, thread, n, threads});
}

// Makes a device current for a scope, then restores the caller's.
class OnDevice {
  public:
    explicit OnDevice(int device) {
        error = cudaGetDevice(&previous_);
        if (error == cudaSuccess) error = cudaSetDevice(device);
    }
    ~OnDevice() { cudaSetDevice(previous_); }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

    cudaError_t error;

  private:
    int previous_ = 0;
};

// Starts threads that share n samples; returns an error of CUDA, or 0.
template <typename Body>
int launch(const Body& body, int64_t n, int64_t threads, int device, void* stream) {
    const OnDevice on(device);
    if (on.error != cudaSuccess) return on.error;
    const auto blocks = unsigned((threads + kBlock - 1) / kBlock);
    for_each_thread<<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(body, n, threads);
    return cudaGetLastError();
}

// Threads that a device runs at once; 0 if it cannot run any.
template <typename Body>
int64_t most_threads(int device) {
    const OnDevice on(device);
    int blocks = 0, processors = 0;
    if (on.error != cudaSuccess ||
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, for_each_thread<Body>, kBlock, 0) != cudaSuccess ||
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess)
        return 0;
    return int64_t(blocks) * processors * kBlock;
}

inline const char* name_of_error(int error) { return cudaGetErrorString(cudaError_t(error)); }

#else

template <typename Body>
int launch(const Body& body, int64_t n, int64_t threads, int, void*) {
    for (int64_t thread = 0; thread < threads; ++thread) body(Share{thread, thread, n, threads});
    return 0;
}

template <typename>
int64_t most_threads(int) {
    return 7;  // fewer than samples, and not a divisor of their number
}

inline const char* name_of_error(int) { return ""; }

#endif

}  // namespace aca

#define ACA_FORWARD(Field, Method)                                                                                  \
    ACA_EXPORT int64_t bytes_of_piece() { return aca::ThreadRecord<Field::n>::kBytes; }                             \
    ACA_EXPORT int64_t most_threads_forward(int device) {                                                           \
        return aca::most_threads<aca::ForwardOfThread<Field, Method>>(device);                                      \
    }                                                                                                               \
    ACA_EXPORT const char* name_of_error(int error) { return aca::name_of_error(error); }                           \
    ACA_EXPORT int forward(const aca::Task* task, const aca::Arena* arena, int64_t threads, int device,             \
                           void* stream) {                                                                          \
        const aca::ForwardOfThread<Field, Method> body{*task, *arena};                                              \
        return aca::launch(body, task->n_samples, threads, device, stream);                                         \
    }                                                                                                               \
    ACA_EXPORT int bounds(const aca::Arena* arena, const int64_t* count, const int64_t* end, double* to, int64_t n, \
                          int device, void* stream) {                                                               \
        return aca::launch(aca::BoundsOfThread{arena->last, count, end, to}, n, n, device, stream);                 \
    }

#define ACA_BACKWARD(Field, Method)                                                                                    \
    ACA_EXPORT int64_t most_threads_backward(int device) {                                                             \
        return aca::most_threads<aca::BackwardOfThread<Field, Method>>(device);                                        \
    }                                                                                                                  \
    ACA_EXPORT int backward(const aca::Task* task, const aca::Arena* arena, const aca::Cotangents* to,                 \
                            int64_t threads, int device, void* stream) {                                               \
        const aca::BackwardOfThread<Field, Method> body{*task, *arena, *to};                                           \
        return aca::launch(body, task->n_samples, threads, device, stream);                                            \
    }                                                                                                                  \
    ACA_EXPORT int evaluate(int64_t n, const T* t, const T* y, const T* p, const T* w, const T* g, T* k, T* gy, T* gp, \
                            double* gw, int64_t threads, int device, void* stream) {                                   \
        const aca::EvaluationOfThread<Field> body{{n, t, y, p, w, g, k, gy, gp, gw}};                                  \
        return aca::launch(body, n, threads, device, stream);                                                          \
    }
