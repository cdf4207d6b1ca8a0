// Specification of a compiled solve, shared by repeated solves: method, tolerances, step control and times.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include "compiled/program.h"
#include "control/step_control.h"
#include "kernels/ops.h"

namespace aca {

struct Method {
    std::vector<double> c;
    bool fsal;
    std::vector<std::vector<double>> dense;  // coefficients of each b_i(theta), highest power first

    size_t stages() const { return c.size(); }

    // b_i(theta)
    double weight(size_t i, double theta) const {
        double w = 0;
        for (const double coefficient : dense[i]) w = (w + coefficient) * theta;
        return w;
    }
};

struct Tolerances {
    double rtol, atol;
    uintptr_t rtol_each, atol_each;  // one tolerance per element; 0: rtol and atol are used
    std::vector<int64_t> bounds;     // of the segments
    std::vector<int64_t> sizes;      // of the segments, in elements

    Tolerances(double relative, double absolute, uintptr_t relative_each, uintptr_t absolute_each,
               std::vector<int64_t> segments)
        : rtol(relative), atol(absolute), rtol_each(relative_each), atol_each(absolute_each), bounds(segments) {
        for (size_t s = 1; s < bounds.size(); ++s) sizes.push_back(bounds[s] - bounds[s - 1]);
    }

    int segments() const { return int(sizes.size()); }
};

struct AcceptedStep {
    double t, h, t_next;
    uintptr_t y;                                  // the state at t
    std::vector<std::pair<int, double>> outputs;  // index and theta
};

struct Specification {
    Target target;
    const Backend& backend;
    int64_t n;
    Method method;
    Tolerances tolerances;
    Controller control;
    double first_step;                        // 0: by Hairer's rule
    bool is_adaptive;                         // false: every step ends at the next stop
    std::vector<double> times, stops, jumps;  // the last stop is the end of the solve
    int64_t max_num_steps;
    Code slope, step;

    size_t bytes() const { return size_t(n) * (target.dtype == DType::f32 ? 4 : 8); }
    size_t scalars_bytes() const { return 8 * (method.stages() + 3); }
    size_t sums_bytes() const { return 8 * tolerances.bounds.size(); }

    bool jumps_at(double time) const { return std::find(jumps.begin(), jumps.end(), time) != jumps.end(); }

    // The number of the state's dtype next to `time`, in the direction of the sign of `towards`.
    double next_after(double time, double towards) const {
        const double far = towards * std::numeric_limits<double>::infinity();
        return target.dtype == DType::f32 ? double(std::nextafter(float(time), float(far))) : std::nextafter(time, far);
    }

    void write(uintptr_t scalars, size_t i, double value) const {
        if (target.dtype == DType::f32)
            reinterpret_cast<float*>(scalars)[i] = float(value);
        else
            reinterpret_cast<double*>(scalars)[i] = value;
    }

    // A stage at the end of a step gets its end time exactly. If f jumps at either end of the step, the stages there
    // get the next number inside the step.
    void write_scalars(uintptr_t scalars, double from, double step, double to) const {
        const double first = jumps_at(from) ? next_after(from, to - from) : from;
        const double last = jumps_at(to) ? next_after(to, from - to) : to;
        const size_t stages = method.stages();
        for (size_t i = 0; i < stages; ++i) {
            const double c = method.c[i];
            write(scalars, i, c == 0 ? first : control::stage_time(c, from, step, last));
        }
        write(scalars, stages, step);
        write(scalars, stages + 1, tolerances.rtol);
        write(scalars, stages + 2, tolerances.atol);
    }

    // to = to + factor·x
    void add(uintptr_t to, double factor, uintptr_t x) const {
        Sum sum{};
        sum.count = 1;
        sum.x[0] = x;
        sum.w[0] = 1.0;
        backend.weighted_sum(target, n, to, to, factor, sum);
    }

    bool is_finite(uintptr_t x) const {
        const auto all = [&](const auto* values) {
            return std::all_of(values, values + n, [](auto value) { return std::isfinite(value); });
        };
        return target.dtype == DType::f32 ? all(reinterpret_cast<const float*>(x))
                                          : all(reinterpret_cast<const double*>(x));
    }
};

inline char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }

}  // namespace aca
