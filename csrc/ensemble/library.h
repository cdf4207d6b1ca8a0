// Functions of a compiled library: the solve of chunks of samples, its transpose, and func itself for checks.
#pragma once
#include "ensemble/backward.h"
#include "ensemble/contractions.h"
#include "ensemble/forward.h"

namespace aca {

// Runs f on chunks `first` to `last` of the batch, on so many threads; false where memory ran out.
template <typename F>
bool for_each_chunk(int64_t first, int64_t last, int64_t n_samples, int threads, F f) {
    int has_failed = 0;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1 && last - first > 1)
    for (int64_t chunk = first; chunk < last; ++chunk) {
        const int64_t start = chunk * kChunk, end = start + kChunk;
        try {
            f(start, end < n_samples ? end : n_samples);
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            has_failed = 1;
        }
    }
    return !has_failed;
}

template <typename Field, typename Method>
struct Library {
    static bool forward(const Task& task, Record& record, int64_t first, int64_t last, int threads) {
        return for_each_chunk(first, last, task.n_samples, threads, [&](int64_t start, int64_t end) {
            const auto solve = std::make_unique<Forward<Field, Method>>(task, record);
            solve->run(start, end);
        });
    }

    static bool backward(const Task& task, const Record& record, const Cotangents& to, int64_t first, int64_t last,
                         int threads) {
        return for_each_chunk(first, last, task.n_samples, threads, [&](int64_t start, int64_t end) {
            const auto transpose = std::make_unique<Backward<Field, Method>>(task, to);
            int64_t n_slopes[kChunk] = {};
            if (record.keep != Keep::checkpoints) {
                transpose->run(start, end, record, Round(), n_slopes);
                return;
            }
            for (Round round{&record, 0}; has_samples(round, start, end); ++round.number) {
                Record part(start, end - start, start / kChunk, 1, Keep::states);
                std::make_unique<Forward<Field, Method>>(task, part, round, n_slopes)->run(start, end);
                transpose->run(start, end, part, round, n_slopes);
            }
        });
    }

    // func at a state and a time of each sample, and what it pulls back: rows as in the task.
    static void evaluate(int64_t n_samples, const T* t, const T* y, const T* p, const T* w, const T* g, T* k, T* gy,
                         T* gp, double* gw) {
        constexpr int n = Field::n, np = Field::n_by_sample, nw = Field::n_learnt;
        auto lanes = std::make_unique<Evaluation>();
        Evaluation& e = *lanes;
        for (int64_t start = 0; start < n_samples; start += kLanes) {
            const auto sample = [&](int l) { return start + l < n_samples ? start + l : start; };
            V time;
            for (int l = 0; l < kLanes; ++l) time[l] = t[sample(l)];
            read(e.y, y, n, sample), read(e.p, p, np, sample), read(e.g, g, n, sample);
            for (V& x : e.gp) x = V{};
            for (V& x : e.gw) x = V{};
            Field::slope(time, e.y, e.p, w, e.k);
            Field::pull(time, e.y, e.p, w, e.g, e.gy, e.gp, e.gw);
            for (int l = 0; l < kLanes && start + l < n_samples; ++l) {
                const int64_t row = start + l;
                for (int c = 0; c < n; ++c) k[row * n + c] = e.k[c][l], gy[row * n + c] = e.gy[c][l];
                for (int i = 0; i < np; ++i) gp[row * np + i] = e.gp[i][l];
                for (int i = 0; i < nw; ++i) gw[i] += double(e.gw[i][l]);
            }
        }
    }

  private:
    static bool has_samples(const Round& round, int64_t start, int64_t end) {
        bool found = round.number == 0;  // which has those that failed, too
        for (int64_t sample = start; sample < end; ++sample) found |= round.has(sample);
        return found;
    }

    struct Evaluation {
        V y[Field::n], g[Field::n], k[Field::n], gy[Field::n], p[Field::n_by_sample + 1], gp[Field::n_by_sample + 1],
            gw[Field::n_learnt + 1];
    };

    template <typename Sample>
    static void read(V* to, const T* from, int count, Sample sample) {
        for (int i = 0; i < count; ++i)
            for (int l = 0; l < kLanes; ++l) to[i][l] = from[sample(l) * count + i];
    }
};

}  // namespace aca

// All else is hidden, so that libraries loaded side by side share nothing.
#define ACA_EXPORT extern "C" __attribute__((visibility("default")))

#define ACA_LIBRARY(Field, Method)                                                                                     \
    ACA_EXPORT int vector_bytes() { return ACA_VECTOR_BYTES; }                                                         \
    ACA_EXPORT int number_bytes() { return sizeof(T); }                                                                \
    ACA_EXPORT int64_t chunk() { return aca::kChunk; }                                                                 \
    ACA_EXPORT void* new_record(int64_t samples, int64_t chunks, int keep, int64_t most) {                             \
        return new aca::Record(0, samples, 0, chunks, aca::Keep(keep), size_t(most));                                  \
    }                                                                                                                  \
    ACA_EXPORT void free_record(void* record) { delete static_cast<aca::Record*>(record); }                            \
    ACA_EXPORT void free_states(void* record) { static_cast<aca::Record*>(record)->free_states(); }                    \
    ACA_EXPORT int forward(const aca::Task* task, void* record, int64_t first, int64_t last, int threads) {            \
        return aca::Library<Field, Method>::forward(*task, *static_cast<aca::Record*>(record), first, last, threads);  \
    }                                                                                                                  \
    ACA_EXPORT int backward(const aca::Task* task, void* record, const aca::Cotangents* to, int64_t first,             \
                            int64_t last, int threads) {                                                               \
        return aca::Library<Field, Method>::backward(*task, *static_cast<aca::Record*>(record), *to, first, last,      \
                                                     threads);                                                         \
    }                                                                                                                  \
    ACA_EXPORT void evaluate(int64_t n, const T* t, const T* y, const T* p, const T* w, const T* g, T* k, T* gy,       \
                             T* gp, double* gw) {                                                                      \
        aca::Library<Field, Method>::evaluate(n, t, y, p, w, g, k, gy, gp, gw);                                        \
    }                                                                                                                  \
    /* Starts and ends of the accepted steps of a sample, first to last. */                                            \
    ACA_EXPORT void bounds(const void* record, int64_t sample, int64_t count, double* to) {                            \
        const aca::Entry* entry = static_cast<const aca::Record*>(record)->last(sample);                               \
        for (int64_t i = count; i-- > 0; entry = entry->previous) to[2 * i] = entry->t, to[2 * i + 1] = entry->t_next; \
    }
