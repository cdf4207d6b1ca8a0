// The body of every operation, written once and compiled once per backend.
// A backend provides for_each(target, n, vectorisable, functor) and sum(target, n, vectorisable, functor, out), nothing
// more. No standard containers here: their inline code must not be emitted for an instruction set the processor may
// lack.
#pragma once
#include "functors.h"

namespace aca::ACA_ISA {

template <int N>
struct Count {
    static constexpr int value = N;
};

template <typename T, int N>
Terms<T, N> terms(const Sum& sum) {
    Terms<T, N> result;
    for (int j = 0; j < N; ++j) {
        result.x[j] = reinterpret_cast<const T*>(sum.x[j]);
        result.w[j] = T(sum.w[j]);
    }
    return result;
}

// Calls f with the number of terms as a compile-time constant; the caller has checked 1 ≤ n ≤ kMaxTerms.
template <int N = 1, typename F>
void with_count(int n, F&& f) {
    if constexpr (N < kMaxTerms) {
        if (n > N) return with_count<N + 1>(n, f);
    }
    f(Count<N>{});
}

template <typename F>
void with_dtype(DType dtype, F&& f) {
    if (dtype == DType::f32)
        f(float{});
    else
        f(double{});
}

inline bool aligned(uintptr_t address) { return address % 16 == 0; }

inline bool aligned(const Sum& sum) {
    for (int j = 0; j < sum.count; ++j)
        if (!aligned(sum.x[j])) return false;
    return true;
}

template <typename Device>
void weighted_sum(const Target& target, int64_t n, uintptr_t out, uintptr_t base, double h, const Sum& sum) {
    const bool vectorisable = aligned(out) && aligned(base) && aligned(sum);
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_count(sum.count, [&](auto count) {
            constexpr int N = decltype(count)::value;
            const auto x = terms<T, N>(sum);
            const auto start = reinterpret_cast<const T*>(base);
            const auto result = reinterpret_cast<T*>(out);
            if (base)
                Device::for_each(target, n, vectorisable, WeightedSum<T, N, true>{x, start, T(h), result});
            else
                Device::for_each(target, n, vectorisable, WeightedSum<T, N, false>{x, start, T(h), result});
        });
    });
}

template <typename Device>
void solution_and_error(const Target& target, int64_t n, uintptr_t y1, uintptr_t error, uintptr_t y, double h,
                        const Sum& sum, const double* error_weight) {
    const bool vectorisable = aligned(y1) && aligned(error) && aligned(y) && aligned(sum);
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        with_count(sum.count, [&](auto count) {
            constexpr int N = decltype(count)::value;
            SolutionAndError<T, N> f{
                terms<T, N>(sum),           {}, reinterpret_cast<const T*>(y), T(h), reinterpret_cast<T*>(y1),
                reinterpret_cast<T*>(error)};
            for (int j = 0; j < N; ++j) f.error_weight[j] = T(error_weight[j]);
            Device::for_each(target, n, vectorisable, f);
        });
    });
}

template <typename Device, typename T, typename Tolerance>
void sum_ratio(const Target& target, int64_t start, int64_t n, double* out, const ErrorRatio& r,
               const Tolerance& tolerance) {
    const auto at = [&](uintptr_t address) { return reinterpret_cast<const T*>(address) + start; };
    const bool vectorisable = aligned(r.partial) && aligned(r.k) && aligned(r.y0) && aligned(r.y1) &&
                              aligned(r.rtol_each) && aligned(r.atol_each) && aligned(start * sizeof(T));
    if (r.k)
        Device::sum(
            target, n, vectorisable,
            SquaredErrorRatio<T, Tolerance, true>{at(r.partial), at(r.k), T(r.w), at(r.y0), at(r.y1), tolerance}, out);
    else
        Device::sum(target, n, vectorisable,
                    SquaredErrorRatio<T, Tolerance, false>{at(r.partial), nullptr, T(0), at(r.y0), at(r.y1), tolerance},
                    out);
}

template <typename Device>
void squared_error_ratio(const Target& target, int segments, const int64_t* bounds, uintptr_t out,
                         const ErrorRatio& r) {
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        for (int s = 0; s < segments; ++s) {
            const int64_t start = bounds[s], n = bounds[s + 1] - bounds[s];
            double* const result = reinterpret_cast<double*>(out) + s;
            if (r.rtol_each) {
                const ElementTolerance<T> each{reinterpret_cast<const T*>(r.rtol_each) + start,
                                               reinterpret_cast<const T*>(r.atol_each) + start};
                sum_ratio<Device, T>(target, start, n, result, r, each);
            } else {
                sum_ratio<Device, T>(target, start, n, result, r, ScalarTolerance<T>{T(r.rtol), T(r.atol)});
            }
        }
    });
}

template <typename Device>
void write_scalars(const Target& target, int n, uintptr_t out, const double* value) {
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        Scalars<T> f{{}, reinterpret_cast<T*>(out)};
        for (int i = 0; i < n; ++i) f.value[i] = T(value[i]);
        Device::for_each(target, n, false, f);
    });
}

template <typename Device>
constexpr Backend make_backend(const char* name) {
    return {name, weighted_sum<Device>, solution_and_error<Device>, squared_error_ratio<Device>, write_scalars<Device>};
}

}  // namespace aca::ACA_ISA
