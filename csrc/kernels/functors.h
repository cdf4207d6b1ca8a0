// The arithmetic of a Runge-Kutta step and of its transpose, for a pack of V neighbouring elements.
// Both backends instantiate these functors; no formula is written anywhere else.
#pragma once
#include <cstdint>

#include "control/control_block.h"
#include "kernels/types.h"

#ifndef ACA_ISA  // CPU kernels are compiled once per instruction set, each time into another namespace
#define ACA_ISA portable
#endif

namespace aca::ACA_ISA {

// V elements loaded and stored together: 16 bytes on a GPU; one element on the CPU, where the compiler vectorises the
// loop.
template <typename T, int V>
struct alignas(sizeof(T) * V) Pack {
    T v[V];
    ACA_HD T& operator[](int i) { return v[i]; }
    ACA_HD const T& operator[](int i) const { return v[i]; }
};

template <int V, typename T>
ACA_HD Pack<T, V> load(const T* x, int64_t i) {
    return *reinterpret_cast<const Pack<T, V>*>(x + i);
}

template <int V, typename T>
ACA_HD void store(T* x, int64_t i, const Pack<T, V>& value) {
    *reinterpret_cast<Pack<T, V>*>(x + i) = value;
}

// a·b + c, fused if the target has the instruction. A compiler would choose by the surrounding code which product of a
// sum it fuses, and the last bit of the result would change with that code.
template <typename T>
ACA_HD T multiply_add(T a, T b, T c) {
#if defined(__CUDA_ARCH__)
    return fma(a, b, c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    if constexpr (sizeof(T) == sizeof(float))
        return __builtin_fmaf(a, b, c);
    else
        return __builtin_fma(a, b, c);
#else
    return a * b + c;
#endif
}

template <typename T>
ACA_HD T magnitude(T x) {
    return x < T(0) ? -x : x;
}

// Σ_j w[j]·x[j], added in the order of j, so that every path through the code rounds alike.
template <typename T, int N>
struct Terms {
    const T* x[N];
    T w[N];

    template <int V>
    ACA_HD Pack<T, V> sum(int64_t i) const {
        Pack<T, V> total = load<V>(x[0], i);
        for (int e = 0; e < V; ++e) total[e] *= w[0];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int j = 1; j < N; ++j) {
            const Pack<T, V> term = load<V>(x[j], i);
            for (int e = 0; e < V; ++e) total[e] = multiply_add(w[j], term[e], total[e]);
        }
        return total;
    }
};

// A functor's `width` is the largest number of elements per call. `of_row(step)` returns the functor of one row (a
// sample) with its own step size, so that a sample in a batch gets the same arithmetic as a sample alone.

// out = base + h·Σ_j w_j·x_j, or the same without base: stage states, solutions, dense output, and all sums of the
// transpose.
template <typename T, int N, bool HasBase>
struct WeightedSum {
    static constexpr int width = 16 / sizeof(T);
    Terms<T, N> terms;
    const T* base;
    T h;
    T* out;

    ACA_HD WeightedSum of_row(double step) const {
        WeightedSum f = *this;
        f.h = T(step);
        return f;
    }

    template <int V>
    ACA_HD void operator()(int64_t i) const {
        Pack<T, V> total = terms.template sum<V>(i);
        if constexpr (HasBase) {
            const Pack<T, V> start = load<V>(base, i);
            for (int e = 0; e < V; ++e) total[e] = multiply_add(h, total[e], start[e]);
        } else {
            for (int e = 0; e < V; ++e) total[e] *= h;
        }
        store<V>(out, i, total);
    }
};

// y1 = y + h·Σ_j b_j·k_j and error = h·Σ_j e_j·k_j from one read of the slopes.
template <typename T, int N>
struct SolutionAndError {
    static constexpr int width = 16 / sizeof(T);
    Terms<T, N> terms;  // the slopes, weighted by b
    T error_weight[N];
    const T* y;
    T h;
    T *y1, *error;

    ACA_HD SolutionAndError of_row(double step) const {
        SolutionAndError f = *this;
        f.h = T(step);
        return f;
    }

    template <int V>
    ACA_HD void operator()(int64_t i) const {
        Pack<T, V> k = load<V>(terms.x[0], i), advance, deviation;
        for (int e = 0; e < V; ++e) advance[e] = terms.w[0] * k[e], deviation[e] = error_weight[0] * k[e];
#ifdef __CUDA_ARCH__
#pragma unroll
#endif
        for (int j = 1; j < N; ++j) {
            k = load<V>(terms.x[j], i);
            for (int e = 0; e < V; ++e) {
                advance[e] = multiply_add(terms.w[j], k[e], advance[e]);
                deviation[e] = multiply_add(error_weight[j], k[e], deviation[e]);
            }
        }
        const Pack<T, V> start = load<V>(y, i);
        for (int e = 0; e < V; ++e) advance[e] = multiply_add(h, advance[e], start[e]), deviation[e] *= h;
        store<V>(y1, i, advance);
        store<V>(error, i, deviation);
    }
};

template <typename T>
struct ScalarTolerance {
    T rtol, atol;
    template <int V>
    ACA_HD Pack<T, V> scale(int64_t, const Pack<T, V>& size) const {
        Pack<T, V> result;
        for (int e = 0; e < V; ++e) result[e] = multiply_add(rtol, size[e], atol);
        return result;
    }
};

template <typename T>
struct ElementTolerance {
    const T *rtol, *atol;
    template <int V>
    ACA_HD Pack<T, V> scale(int64_t i, const Pack<T, V>& size) const {
        const Pack<T, V> relative = load<V>(rtol, i);
        Pack<T, V> result = load<V>(atol, i);
        for (int e = 0; e < V; ++e) result[e] = multiply_add(relative[e], size[e], result[e]);
        return result;
    }
};

// (error / (atol + rtol·max(|y0|, |y1|)))² with error = partial + w·k, the summand of the squared RMS error ratio.
// A y1 that is not finite makes the sum NaN, so a step to infinity is never accepted.
template <typename T, typename Tolerance, bool HasSlope>
struct SquaredErrorRatio {
    static constexpr int width = 16 / sizeof(T);
    const T *partial, *k;
    T w;
    const T *y0, *y1;
    Tolerance tolerance;

    ACA_HD SquaredErrorRatio of_row(double slope_weight) const {
        SquaredErrorRatio f = *this;
        f.w = T(slope_weight);
        return f;
    }

    template <int V>
    ACA_HD double operator()(int64_t i) const {
        Pack<T, V> error = load<V>(partial, i), size = load<V>(y0, i);
        const Pack<T, V> end = load<V>(y1, i);
        if constexpr (HasSlope) {
            const Pack<T, V> slope = load<V>(k, i);
            for (int e = 0; e < V; ++e) error[e] = multiply_add(w, slope[e], error[e]);
        }
        for (int e = 0; e < V; ++e) {
            const T before = magnitude(size[e]), after = magnitude(end[e]);
            size[e] = before < after ? after : before;
        }
        const Pack<T, V> scale = tolerance.template scale<V>(i, size);
        double total = 0;
        for (int e = 0; e < V; ++e) {
            const T divisor = error[e] == T(0) ? T(1) : scale[e];  // an error of 0 counts 0, even at tolerance 0
            const T ratio = error[e] / divisor;
            const T not_finite = end[e] - end[e];  // 0, or NaN at an infinity or NaN
            total += double(ratio) * double(ratio) + double(not_finite);
        }
        return total;
    }
};

// The next two functors go back to single elements if an array is misaligned whose address only the control block has.
// The host checks all others, and that the rows of outputs and checkpoints keep the alignment of the first.

// End of an accepted step: writes its outputs, its checkpoint, and the state and first slope of the next step.
template <typename T>
struct FinishStep {
    static constexpr int width = 16 / sizeof(T);
    const Control* control;
    T* y;
    const T* y1;
    int stages;
    const T* k[kMaxTerms];
    T* k_first;

    template <int V>
    ACA_HD void operator()(int64_t i) const {
        const Control& s = *control;
        // Read before the first write, after which the compiler would read them again.
        const int64_t first = s.solve.first_due;
        const bool is_due = first < s.solve.end_due;
        const uintptr_t slot = s.slot;
        if (!s.solve.is_accepted) return;
        if constexpr (V > 1) {
            if ((slot | s.outputs) % 16 != 0) {
                for (int e = 0; e < V; ++e) (*this).template operator()<1>(i + e);
                return;
            }
        }
        const Pack<T, V> end = load<V>(y1, i);
        if (is_due) write_outputs<V>(i, first, end);
        if (slot) store<V>(control::at<T>(slot), i, end);
        store<V>(y, i, end);
        if (k_first) store<V>(k_first, i, load<V>(k[stages - 1], i));
    }

    template <int V>
    ACA_HD void write_outputs(int64_t i, int64_t first, const Pack<T, V>& end) const {
        const Control& s = *control;
        const Pack<T, V> start = load<V>(y, i);
        const T h = T(s.solve.h_done);
        for (int64_t o = first; o < s.solve.end_due; ++o) {  // read again, which saves a register
            T* const out = control::at<T>(s.outputs + uintptr_t(o * s.row_bytes));
            if (control::at<const double>(s.solve.times)[o] == s.solve.t_done) {
                store<V>(out, i, end);
                continue;
            }
            const double* const weight = control::at<const double>(s.weights) + o * kMaxTerms;
            Pack<T, V> total{};
            for (int j = 0; j < stages; ++j) {
                if (weight[j] == 0) continue;
                const Pack<T, V> slope = load<V>(k[j], i);
                for (int e = 0; e < V; ++e) total[e] = multiply_add(T(weight[j]), slope[e], total[e]);
            }
            for (int e = 0; e < V; ++e) total[e] = multiply_add(h, total[e], start[e]);
            store<V>(out, i, total);
        }
    }
};

// Start of a transposed step: loads the state that it started from, and adds the cotangents of its outputs to that of
// its end (g), or, for outputs inside the step, of its start (inside) and its slopes (without the factor h).
template <typename T>
struct RestoreStep {
    static constexpr int width = 16 / sizeof(T);
    const Control* control;
    T *y, *g, *inside;
    int stages;
    T* slope[kMaxTerms];

    template <int V>
    ACA_HD void operator()(int64_t i) const {
        const Control& s = *control;
        const int64_t first = s.solve.first_due;
        const uintptr_t slot = s.slot;
        if constexpr (V > 1) {
            if ((slot | s.grad_outputs) % 16 != 0) {
                for (int e = 0; e < V; ++e) (*this).template operator()<1>(i + e);
                return;
            }
        }
        store<V>(y, i, load<V>(control::at<const T>(slot), i));
        Pack<T, V> sum{};
        if (inside)
            for (int j = 0; j < stages; ++j) store<V>(slope[j], i, sum);
        for (int64_t o = first; o < s.solve.end_due; ++o) {  // read again, which saves a register
            const Pack<T, V> grad = load<V>(control::at<const T>(s.grad_outputs + uintptr_t(o * s.row_bytes)), i);
            if (control::at<const double>(s.solve.times)[o] == s.solve.t_done) {
                add<V>(g, T(1), grad, i);
                continue;
            }
            for (int e = 0; e < V; ++e) sum[e] += grad[e];
            const double* const weight = control::at<const double>(s.weights) + o * kMaxTerms;
            for (int j = 0; j < stages; ++j)
                if (weight[j] != 0) add<V>(slope[j], T(weight[j]), grad, i);
        }
        if (inside) store<V>(inside, i, sum);
    }

    template <int V>
    ACA_HD static void add(T* to, T weight, const Pack<T, V>& grad, int64_t i) {
        Pack<T, V> total = load<V>(to, i);
        for (int e = 0; e < V; ++e) total[e] = multiply_add(weight, grad[e], total[e]);
        store<V>(to, i, total);
    }
};

// out[i] = value[i]: the stage times of a step, passed as kernel arguments instead of copied from the host.
template <typename T>
struct Scalars {
    static constexpr int width = 1;
    T value[kMaxTerms];
    T* out;

    template <int V>
    ACA_HD void operator()(int64_t i) const {
        out[i] = value[i];
    }
};

}  // namespace aca::ACA_ISA
