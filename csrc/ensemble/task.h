// A solve of a batch as Python describes it, the sums of a step with the weights of a method, and norms.
#pragma once
#include <utility>

#include "control/step_control.h"
#include "ensemble/lanes.h"
#include "ensemble/record.h"

namespace aca {

constexpr int kChunk = 32 * kLanes;  // samples that lanes share; fixed, so that sums over samples have one order

enum Failure : int64_t {
    none,
    step_limit,
    step_size,
    not_finite,
    state_not_finite,
    slope_not_finite,
    no_tolerance,
    unsolved  // implicit stages
};

// Counts of a sample, and where it stopped if it failed.
struct Outcome {
    int64_t n_steps, n_accepted, failure;
    double t, h, ratio;
    int64_t n_restarts;  // first slopes evaluated again, after jumps
};

// Counts of an implicit solve of a sample, its last step size, and the last change of Newton's method in it.
struct NewtonCounts {
    int64_t n_jacobians, n_factorizations, n_iterations;
    double h, residual;
};

// Arrays have a row for each sample; outputs and their cotangents a batch for each time.
struct Task {
    Controller controller;
    double first_step;                                      // 0: by Hairer's rule
    int64_t max_num_steps, n_samples, n_times, times_step;  // times_step: from one sample to the next, 0 for one row
    const double* times;                                    // NaN pads the end of a row with fewer
    int64_t n_stops, stops_step;  // as of times; the last stop is the end, and NaN comes first where there are fewer
    const double* stops;
    const bool* is_jump;  // of each stop; null: none is
    double rtol, atol;
    const T *rtol_each, *atol_each;  // null: the numbers count
    int64_t forbids_error;           // some tolerance is zero
    const T *y0, *by_sample, *shared;
    T* outputs;
    Outcome* outcomes;
    double newton_tolerance;  // this and the next two: of implicit methods
    NewtonCounts* newton_counts;
    T* ends;  // states at the ends of the samples; null: not wanted

    ACA_HD int64_t count_times(int64_t sample) const {
        return control::count_times(times + sample * times_step, n_times);
    }
};

struct Cotangents {
    const T* outputs;
    T *y0, *by_sample;       // null: not wanted
    double* shared;          // a row for each chunk
    int64_t* most_slopes;    // that a sample of the chunk needed
    int64_t* replay_faults;  // of each chunk; see implicit_backward.h
};

// Stands for Newton's method in an explicit method.
struct NoNewton {
    ACA_HD bool has_failed(int) const { return false; }
};

// Samples that one thread solves, with sums over them of their own: `first`, `first` + `stride`, ... before `end`.
struct Share {
    int64_t number, first, end, stride;
};

// The time of a stage at a jump: the next number inside the step, which has this sign.
ACA_HD T beside(double time, double sign) { return math::nextafter(T(time), T(sign * kInfinity)); }

// A number that the compiler knows; the one of C++ is not for device code.
template <int i>
struct Known {
    static constexpr int value = i;
    ACA_HD constexpr operator int() const { return i; }
};

template <int... i, typename F>
ACA_HD void for_each_of(std::integer_sequence<int, i...>, F f) {
    (f(Known<i>()), ...);
}

// Calls f with 0, 1, ..., n - 1 as constants. A recursion would leave calls, which hold vectors in memory.
template <int n, typename F>
ACA_HD void for_each(F f) {
    for_each_of(std::make_integer_sequence<int, n>(), f);
}

// Weighted sums of the slopes of a step, without those whose weight is zero.
template <typename Method>
struct Sums {
    static constexpr int s = Method::stages;

    template <int i>
    struct Stage {
        static constexpr double weight(int j) { return j < i ? Method::a[i][j] : 0; }
    };
    struct Solution {
        static constexpr double weight(int j) { return Method::b[j]; }
    };
    struct Error {  // but for the slope at the solution, which comes last
        static constexpr double weight(int j) { return j < s - Method::fsal ? Method::error[j] : 0; }
    };
    template <int i, int count>
    struct Later {  // stages after number i, each with its weight of slope i
        static constexpr double weight(int j) { return j > i && j < count ? Method::a[j][i] : 0; }
    };

    template <typename Weights, typename Term>
    ACA_HD static V of(Term term) {
        V sum = K(0);
        for_each<s>([&](auto j) {
            constexpr double w = weight_of<Weights, j>;
            if constexpr (w != 0) sum = comes_first<Weights, j> ? K(w) * term(j) : fma(K(w), term(j), sum);
        });
        return sum;
    }

  private:
    template <typename Weights>
    static constexpr bool is_first(int i) {
        for (int j = 0; j < i; ++j)
            if (Weights::weight(j) != 0) return false;
        return true;
    }

    // Variables, since device code does not call functions of the host, even where the compiler knows the result.
    template <typename Weights, int i>
    static constexpr double weight_of = Weights::weight(i);
    template <typename Weights, int i>
    static constexpr bool comes_first = is_first<Weights>(i);
};

// b_i(theta)
template <typename Method, int i, typename Real>
ACA_HD Real dense_weight(Real theta) {
    Real w{};
    for_each<Method::degree>([&](auto p) {
        constexpr double coefficient = Method::dense[i][p];
        w = (w + coefficient) * theta;
    });
    return w;
}

// States at positions in steps from y0 to y1 with slopes k.
template <typename Method, int n>
ACA_HD void interpolate(V (&y)[n], const Reals& theta, V step, const V* y0, const V* y1, const V (*k)[n]) {
    M is_end;
    for (int part = 0; part < kParts; ++part) set_truths(is_end, part, theta.parts[part] == 1);
    V w[Method::stages];
    for_each<Method::stages>([&](auto i) { w[i] = rounded<V>(dense_weight<Method, i>(all_of(theta))); });
    for (int c = 0; c < n; ++c) {
        V sum = K(0);
        for (int i = 0; i < Method::stages; ++i) sum = fma(w[i], k[i][c], sum);
        y[c] = select(is_end, y1[c], fma(step, sum, y0[c]));
    }
}

// Norms of x over the tolerance, which goes by the larger of two states; NaN where the second is not finite.
template <typename Field>
ACA_HD R norms(const V* x, const V* y0, const V* y1, const V* tolerance) {
    Reals sums[Field::segments], norm;
    int sizes[Field::segments];
    for_each<Field::segments>([&](auto i) {
        constexpr int first = Field::bounds[i], last = Field::bounds[i + 1];
        R sum{};
        sizes[i] = last - first;
        for (int c = first; c < last; ++c) {
            const V before = magnitude(y0[c]), after = magnitude(y1[c]);
            const V scale = fma(tolerance[c], select(before < after, after, before), tolerance[Field::n + c]);
            const V ratio = x[c] / select(x[c] == K(0), K(1), scale);
            const R r = rounded<R>(ratio), wrong = rounded<R>(y1[c] - y1[c]);
            sum += r * r + wrong;
        }
        sums[i] = parts_of(sum);
    });
    for (int part = 0; part < kParts; ++part) {
        Doubles of_part[Field::segments];
        for (int i = 0; i < Field::segments; ++i) of_part[i] = sums[i].parts[part];
        norm.parts[part] = root(control::largest_mean(of_part, sizes, Field::segments));
    }
    return all_of(norm);
}

}  // namespace aca
