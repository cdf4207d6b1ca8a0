// Functions of a compiled library: the solve of chunks of samples, its transpose, and func itself for checks.
#pragma once
#include "ensemble/backward.h"
#include "ensemble/contractions.h"
#include "ensemble/evaluation.h"
#include "ensemble/exports.h"
#include "ensemble/forward.h"

namespace aca {

// An object on the heap, since it may be large; <memory> would take a tenth of the time of a compilation.
template <typename Object>
class Own {
  public:
    template <typename... Arguments>
    explicit Own(Arguments&&... arguments) : object_(new Object(arguments...)) {}
    Own(const Own&) = delete;
    ~Own() { delete object_; }
    Object* operator->() const { return object_; }

  private:
    Object* const object_;
};

// Runs f on chunks `first` to `last` of the batch, on so many threads; false where memory ran out.
template <typename F>
bool for_each_chunk(int64_t first, int64_t last, int64_t n_samples, int threads, F f) {
    int has_failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && last - first > 1)
    for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t start = chunk * kChunk, end = start + kChunk;
        try {
            f(Share{chunk, start, end < n_samples ? end : n_samples, 1});
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            has_failed = 1;
        }
    }
    return !has_failed;
}

// Solves a round of a chunk of samples again. The forward part of the library has it, and alone compiles the solve.
void repeat(const Task& task, Record& record, const Round& round, int64_t* n_slopes, const Share& share);

template <typename Field, typename Method>
struct Library {
    static bool forward(const Task& task, Record& record, int64_t first, int64_t last, int threads) {
        return for_each_chunk(first, last, task.n_samples, threads, [&](const Share& share) {
            const Own<Forward<Field, Method, Record>> solve(task, record);
            solve->run(share);
        });
    }

    static bool backward(const Task& task, const Record& record, const Cotangents& to, int64_t first, int64_t last,
                         int threads) {
        return for_each_chunk(first, last, task.n_samples, threads, [&](const Share& share) {
            const Own<Backward<Field, Method, Record>> transpose(task, to);
            int64_t n_slopes[kChunk] = {};
            if (record.keep != Keep::checkpoints) {
                transpose->run(share, record, Round(), n_slopes);
                return;
            }
            for (Round round{&record, 0}; has_samples(round, share); ++round.number) {
                Record part(share.first, share.end - share.first, share.number, 1, Keep::states);
                repeat(task, part, round, n_slopes, share);
                transpose->run(share, part, round, n_slopes);
            }
        });
    }

    static void evaluate(const Operands& operands) {
        Own<Evaluation<Field>>(operands)->run(Share{0, 0, operands.n_samples, 1});
    }

  private:
    static bool has_samples(const Round& round, const Share& share) {
        bool found = round.number == 0;  // which has those that failed, too
        for (int64_t sample = share.first; sample < share.end; ++sample) found |= round.has(sample);
        return found;
    }
};

}  // namespace aca

#define ACA_FORWARD(Field, Method)                                                                                     \
    ACA_EXPORT int vector_bytes() { return ACA_VECTOR_BYTES; }                                                         \
    ACA_EXPORT int number_bytes() { return sizeof(T); }                                                                \
    ACA_EXPORT int64_t chunk() { return aca::kChunk; }                                                                 \
    ACA_EXPORT void* share_spare(void* other) {                                                                        \
        return other ? aca::spare = static_cast<aca::Spare*>(other) : aca::spare;                                      \
    }                                                                                                                  \
    ACA_EXPORT void* new_record(int64_t samples, int64_t chunks, int keep, int64_t most) {                             \
        return new aca::Record(0, samples, 0, chunks, aca::Keep(keep), size_t(most));                                  \
    }                                                                                                                  \
    ACA_EXPORT void free_record(void* record) { delete static_cast<aca::Record*>(record); }                            \
    ACA_EXPORT void free_states(void* record) { static_cast<aca::Record*>(record)->free_states(); }                    \
    ACA_EXPORT int forward(const aca::Task* task, void* record, int64_t first, int64_t last, int threads) {            \
        return aca::Library<Field, Method>::forward(*task, *static_cast<aca::Record*>(record), first, last, threads);  \
    }                                                                                                                  \
    void aca::repeat(const Task& task, Record& record, const Round& round, int64_t* n_slopes, const Share& share) {    \
        Own<Forward<Field, Method, Record>>(task, record, round, n_slopes)->run(share);                                \
    }                                                                                                                  \
    /* Starts and ends of the accepted steps of a sample, first to last. */                                            \
    ACA_EXPORT void bounds(const void* record, int64_t sample, int64_t count, double* to) {                            \
        const aca::Entry* entry = static_cast<const aca::Record*>(record)->last(sample);                               \
        for (int64_t i = count; i-- > 0; entry = entry->previous) to[2 * i] = entry->t, to[2 * i + 1] = entry->t_next; \
    }

#define ACA_BACKWARD(Field, Method)                                                                               \
    ACA_EXPORT int backward(const aca::Task* task, void* record, const aca::Cotangents* to, int64_t first,        \
                            int64_t last, int threads) {                                                          \
        return aca::Library<Field, Method>::backward(*task, *static_cast<aca::Record*>(record), *to, first, last, \
                                                     threads);                                                    \
    }                                                                                                             \
    ACA_EXPORT void evaluate(int64_t n, const T* t, const T* y, const T* p, const T* w, const T* g, T* k, T* gy,  \
                             T* gp, double* gw) {                                                                 \
        aca::Library<Field, Method>::evaluate({n, t, y, p, w, g, k, gy, gp, gw});                                 \
    }
