// The body of every operation, written once and compiled once per backend.
// A backend provides for_each(target, n, vectorisable, functor) and sum(target, n, vectorisable, functor, out); the
// same for rows (samples) as for_each_row and sum_rows, and for a single row as sum_row; and write_control and decide.
// No standard containers here: the linker could keep their inline code in a version that this processor cannot run.
#pragma once
#include <type_traits>

#include "kernels/functors.h"
#include "kernels/ops.h"

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

// Calls launch(vectorisable, functor) with the functor of the operation.
template <typename Launch>
void with_weighted_sum(DType dtype, uintptr_t out, uintptr_t base, double h, const Sum& sum, Launch&& launch) {
    const bool vectorisable = aligned(out) && aligned(base) && aligned(sum);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        with_count(sum.count, [&](auto count) {
            constexpr int N = decltype(count)::value;
            const auto x = terms<T, N>(sum);
            const auto start = reinterpret_cast<const T*>(base);
            const auto result = reinterpret_cast<T*>(out);
            if (base)
                launch(vectorisable, WeightedSum<T, N, true>{x, start, T(h), result});
            else
                launch(vectorisable, WeightedSum<T, N, false>{x, start, T(h), result});
        });
    });
}

template <typename Launch>
void with_solution_and_error(DType dtype, uintptr_t y1, uintptr_t error, uintptr_t y, double h, const Sum& sum,
                             const double* error_weight, Launch&& launch) {
    const bool vectorisable = aligned(y1) && aligned(error) && aligned(y) && aligned(sum);
    with_dtype(dtype, [&](auto zero) {
        using T = decltype(zero);
        with_count(sum.count, [&](auto count) {
            constexpr int N = decltype(count)::value;
            SolutionAndError<T, N> f{
                terms<T, N>(sum),           {}, reinterpret_cast<const T*>(y), T(h), reinterpret_cast<T*>(y1),
                reinterpret_cast<T*>(error)};
            for (int j = 0; j < N; ++j) f.error_weight[j] = T(error_weight[j]);
            launch(vectorisable, f);
        });
    });
}

template <typename Device>
void weighted_sum(const Target& target, int64_t n, uintptr_t out, uintptr_t base, double h, const Sum& sum) {
    with_weighted_sum(target.dtype, out, base, h, sum,
                      [&](bool vectorisable, auto f) { Device::for_each(target, n, vectorisable, f); });
}

template <typename Device>
void weighted_sum_rows(const Target& target, const Samples& rows, uintptr_t out, uintptr_t base, const Sum& sum) {
    with_weighted_sum(target.dtype, out, base, 0, sum,
                      [&](bool vectorisable, auto f) { Device::for_each_row(target, rows, vectorisable, f); });
}

template <typename Device>
void solution_and_error(const Target& target, int64_t n, uintptr_t y1, uintptr_t error, uintptr_t y, double h,
                        const Sum& sum, const double* error_weight) {
    with_solution_and_error(target.dtype, y1, error, y, h, sum, error_weight,
                            [&](bool vectorisable, auto f) { Device::for_each(target, n, vectorisable, f); });
}

template <typename Device>
void solution_and_error_rows(const Target& target, const Samples& rows, uintptr_t y1, uintptr_t error, uintptr_t y,
                             const Sum& sum, const double* error_weight) {
    with_solution_and_error(target.dtype, y1, error, y, 0, sum, error_weight,
                            [&](bool vectorisable, auto f) { Device::for_each_row(target, rows, vectorisable, f); });
}

// Calls launch(vectorisable, functor) with the squared error ratio of the elements from `start` on.
template <typename T, typename Launch>
void with_error_ratio(const ErrorRatio& r, int64_t start, Launch&& launch) {
    const auto at = [&](uintptr_t address) { return reinterpret_cast<const T*>(address) + start; };
    const bool vectorisable = aligned(r.partial) && aligned(r.k) && aligned(r.y0) && aligned(r.y1) &&
                              aligned(r.rtol_each) && aligned(r.atol_each) && aligned(start * sizeof(T));
    const auto with_tolerance = [&](const auto& tolerance) {
        using Tolerance = std::decay_t<decltype(tolerance)>;
        if (r.k)
            launch(vectorisable, SquaredErrorRatio<T, Tolerance, true>{at(r.partial), at(r.k), T(r.w), at(r.y0),
                                                                       at(r.y1), tolerance});
        else
            launch(vectorisable,
                   SquaredErrorRatio<T, Tolerance, false>{at(r.partial), nullptr, T(0), at(r.y0), at(r.y1), tolerance});
    };
    if (r.rtol_each)
        with_tolerance(ElementTolerance<T>{at(r.rtol_each), at(r.atol_each)});
    else
        with_tolerance(ScalarTolerance<T>{T(r.rtol), T(r.atol)});
}

template <typename Device>
void squared_error_ratio(const Target& target, int segments, const int64_t* bounds, uintptr_t out,
                         const ErrorRatio& r) {
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        for (int s = 0; s < segments; ++s)
            with_error_ratio<T>(r, bounds[s], [&](bool vectorisable, auto f) {
                double* const result = reinterpret_cast<double*>(out) + s;
                Device::sum(target, bounds[s + 1] - bounds[s], vectorisable, f, result);
            });
    });
}

template <typename Device>
void squared_error_ratio_rows(const Target& target, const Samples& rows, int segments, const int64_t* bounds,
                              uintptr_t out, const ErrorRatio& r) {
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        double* const result = reinterpret_cast<double*>(out);
        if (rows.count == 1) {  // all threads share the one row, as in squared_error_ratio
            for (int s = 0; s < segments; ++s)
                with_error_ratio<T>(r, bounds[s], [&](bool vectorisable, auto f) {
                    Device::sum_row(target, bounds[s + 1] - bounds[s], vectorisable, f, rows.each, result + s);
                });
            return;
        }
        with_error_ratio<T>(r, 0, [&](bool, auto f) { Device::sum_rows(target, rows, segments, bounds, f, result); });
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

// Tells whether the buffers are aligned, and rows of n elements keep the alignment of the first.
inline bool is_vectorisable(const Target& target, int64_t n, const DecidedStep& step) {
    bool result = aligned(step.y) && n * (target.dtype == DType::f32 ? 4 : 8) % 16 == 0;
    for (int j = 0; j < step.stages; ++j) result = result && aligned(step.k[j]);
    return result;
}

template <typename Device>
void finish_step(const Target& target, int64_t n, const DecidedStep& step, uintptr_t y1, uintptr_t k_first) {
    const bool vectorisable = is_vectorisable(target, n, step) && aligned(y1) && aligned(k_first);
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        FinishStep<T> f{reinterpret_cast<const Control*>(step.control),
                        reinterpret_cast<T*>(step.y),
                        reinterpret_cast<const T*>(y1),
                        step.stages,
                        {},
                        reinterpret_cast<T*>(k_first)};
        for (int j = 0; j < step.stages; ++j) f.k[j] = reinterpret_cast<const T*>(step.k[j]);
        Device::for_each(target, n, vectorisable, f);
    });
}

template <typename Device>
void restore_step(const Target& target, int64_t n, const DecidedStep& step, uintptr_t g, uintptr_t inside) {
    const bool vectorisable = is_vectorisable(target, n, step) && aligned(g) && aligned(inside);
    with_dtype(target.dtype, [&](auto zero) {
        using T = decltype(zero);
        RestoreStep<T> f{reinterpret_cast<const Control*>(step.control),
                         reinterpret_cast<T*>(step.y),
                         reinterpret_cast<T*>(g),
                         reinterpret_cast<T*>(inside),
                         step.stages,
                         {}};
        for (int j = 0; j < step.stages; ++j) f.slope[j] = reinterpret_cast<T*>(step.k[j]);
        Device::for_each(target, n, vectorisable, f);
    });
}

template <typename Device>
constexpr Backend make_backend(const char* name) {
    return {name,
            weighted_sum<Device>,
            solution_and_error<Device>,
            squared_error_ratio<Device>,
            weighted_sum_rows<Device>,
            solution_and_error_rows<Device>,
            squared_error_ratio_rows<Device>,
            write_scalars<Device>,
            Device::write_control,
            Device::decide,
            finish_step<Device>,
            restore_step<Device>};
}

}  // namespace aca::ACA_ISA
