// The CPU backend for one instruction set: loops that the compiler vectorises, shared among threads.
// CMake compiles this file once per instruction set, with ACA_ISA naming the namespace it lands in.
#include "kernels/ops_impl.h"

namespace aca::ACA_ISA {
namespace {

constexpr int64_t kChunk = 4096;  // elements that one thread handles at a time

// One chunk of a loop. The functor is passed by value, so that the compiler sees that the operands' addresses stay in
// registers; it does not vectorise otherwise.
template <typename F>
void apply(int64_t start, int64_t end, F f) {
#pragma omp simd
    for (int64_t i = start; i < end; ++i) f.template operator()<1>(i);
}

template <typename F>
double add_up(int64_t start, int64_t end, F f) {
    double total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t i = start; i < end; ++i) total += f.template operator()<1>(i);
    return total;
}

// Size of the chunks of a sum. It depends on n alone, and the chunks are added in order, so that the result is the same
// bit for bit at any number of threads, and for a sample alone or in a batch.
int64_t sum_chunk(int64_t n) {
    const int64_t share = (n + kMaxPartials - 1) / kMaxPartials;
    return share > kChunk ? (share + 63) / 64 * 64 : kChunk;
}

template <typename F>
double sum_in_order(int64_t start, int64_t n, F f) {
    const int64_t chunk = sum_chunk(n);
    double total = 0;
    for (int64_t c = 0; c < n; c += chunk) total += add_up(start + c, start + (c + chunk < n ? c + chunk : n), f);
    return total;
}

struct Cpu {
    template <typename F>
    static void for_each([[maybe_unused]] const Target& target, int64_t n, bool, F f) {
        const int64_t chunks = (n + kChunk - 1) / kChunk;
#pragma omp parallel for schedule(static) num_threads(target.threads) if (target.threads > 1)
        for (int64_t c = 0; c < chunks; ++c) apply(c * kChunk, c + 1 < chunks ? (c + 1) * kChunk : n, f);
    }

    template <typename F>
    static void sum([[maybe_unused]] const Target& target, int64_t n, bool, F f, double* out) {
        const int64_t chunk = sum_chunk(n), chunks = (n + chunk - 1) / chunk;
        double partial[kMaxPartials];
#pragma omp parallel for schedule(static) num_threads(target.threads) if (target.threads > 1)
        for (int64_t c = 0; c < chunks; ++c) partial[c] = add_up(c * chunk, c + 1 < chunks ? (c + 1) * chunk : n, f);
        double total = 0;
        for (int64_t c = 0; c < chunks; ++c) total += partial[c];
        *out = total;
    }

    template <typename F>
    static void sum_row(const Target& target, int64_t n, bool vectorisable, F f, uintptr_t each, double* out) {
        sum(target, n, vectorisable, f.of_row(*reinterpret_cast<const double*>(each)), out);
    }

    template <typename F>
    static void for_each_row([[maybe_unused]] const Target& target, const Samples& rows, bool, F f) {
        const auto* const each = reinterpret_cast<const double*>(rows.each);
        const int64_t length = rows.length, parts = (length + kChunk - 1) / kChunk, all = rows.count * parts;
#pragma omp parallel for schedule(static) num_threads(target.threads) if (target.threads > 1)
        for (int64_t p = 0; p < all; ++p) {
            const int64_t row = p / parts, part = p % parts, start = row * length;
            const int64_t end = part + 1 < parts ? (part + 1) * kChunk : length;
            apply(start + part * kChunk, start + end, f.of_row(each[row]));
        }
    }

    template <typename F>
    static void sum_rows([[maybe_unused]] const Target& target, const Samples& rows, int segments,
                         const int64_t* bounds, F f, double* out) {
        const auto* const each = reinterpret_cast<const double*>(rows.each);
#pragma omp parallel for schedule(static) num_threads(target.threads) if (target.threads > 1)
        for (int64_t row = 0; row < rows.count; ++row) {
            const F of_row = f.of_row(each[row]);
            for (int s = 0; s < segments; ++s)
                out[row * segments + s] =
                    sum_in_order(row * rows.length + bounds[s], bounds[s + 1] - bounds[s], of_row);
        }
    }

    static void write_control(const Target&, uintptr_t to, const Control& from) { write_control_on_cpu(to, from); }
    static void decide(const Target&, uintptr_t control, Decision decision) { decide_on_cpu(control, decision); }
};

}  // namespace

extern const Backend backend;
const Backend backend = make_backend<Cpu>("cpu");

}  // namespace aca::ACA_ISA
