// Step control: the state of a solve between two steps and the decisions about it, for host and device. Every loop over
// steps is: propose a trial, make the step, measure its error, judge it.
#pragma once
#include <cstdint>

#include "control/controller.h"

namespace aca {

enum class Status { running, done, step_limit, step_size, not_finite, no_room };

struct StepControl {
    // Constant during a solve. A step must end at every stop; the last stop is the last requested time.
    Controller controller;
    double first_step;  // 0: by Hairer's rule
    double sign;        // direction of the solve, 1 or -1
    double length;      // of the solve in time
    int64_t max_num_steps, n_times, n_stops;
    uintptr_t times, stops;  // double
    int is_adaptive;         // 0: every trial ends at the next stop and is accepted

    // The state between two steps.
    Status status;
    int n_ratios;
    double t, h;              // h without its sign
    double ratio, ratios[3];  // error ratios of the last trial and of the last accepted ones, newest first
    double norm_f;            // of f(t0, y0), used while the first step is chosen
    int64_t n_steps, n_accepted, next_output, next_stop;

    // The proposed trial: its signed step, its end, and 1 if it ends at a stop.
    double h_trial, t_next;
    int is_cut;

    // The judged trial. If it was accepted: its start, signed step and end, and the range of outputs that it reached.
    int is_accepted;
    double t_start, h_done, t_done;
    int64_t first_due, end_due;
};

namespace control {

template <typename T>
ACA_HD T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

// Here and below, a Real is a number or a vector of them.
template <typename Real>
ACA_HD Real magnitude(Real x) {
    return x < 0 ? -x : x;
}

ACA_HD bool is_finite(double x) { return x - x == 0; }

// Returns the state of a solve before its first step.
ACA_HD StepControl begin(const Controller& controller, double first_step, bool is_adaptive, int64_t max_num_steps) {
    StepControl s{};
    s.controller = controller;
    s.first_step = first_step;
    s.is_adaptive = is_adaptive;
    s.max_num_steps = max_num_steps;
    s.sign = 1;
    s.ratio = s.ratios[0] = kNaN;
    s.next_output = 1;  // the first time is the start
    return s;
}

// Number of requested times, without the NaN that may pad their end.
ACA_HD int64_t count_times(const double* times, int64_t n_times) {
    while (n_times > 1 && times[n_times - 1] != times[n_times - 1]) --n_times;
    return n_times;
}

// Sets the times of a solve from `first` to `last`. `times` and `stops` may be device addresses.
ACA_HD void set_times(StepControl& s, double first, double last, uintptr_t times, int64_t n_times, uintptr_t stops,
                      int64_t n_stops) {
    s.times = times;
    s.stops = stops;
    s.n_times = n_times;
    s.n_stops = n_stops;
    s.t = first;
    s.length = magnitude(last - first);
    s.sign = last < first ? -1.0 : 1.0;
}

// First half of Hairer's first-step rule: proposes the Euler step along which the change of f is measured. The norms of
// y0 and f(t0, y0) are in units of the tolerance.
ACA_HD void propose_euler_step(StepControl& s, double norm_y, double norm_f) {
    s.norm_f = norm_f;
    s.h = is_finite(norm_f) ? s.controller.euler_step(s.length, norm_y, norm_f) : (s.length < 1e-6 ? s.length : 1e-6);
    s.h_trial = s.sign * s.h;
    s.t_next = s.t + s.h_trial;
}

// Second half, given the norm of the change of f. A norm of f(t0, y0) that is not finite comes from f or from a
// tolerance of zero. The status is then not_finite, and the caller finds out which it is.
ACA_HD void choose_first_step(StepControl& s, double norm_change) {
    if (is_finite(s.norm_f)) {
        s.h = s.controller.first_step(s.length, s.h, s.norm_f, norm_change);
    } else {
        s.h = s.controller.limit(s.h);
        s.ratio = s.norm_f;
        s.status = Status::not_finite;
    }
}

// Chooses the trial from t with a step of size h: its signed step and its end. A trial that would pass a stop, or end
// just before it, ends at the stop; returns the truth about that.
template <typename Real>
ACA_HD auto choose_trial(Real t, Real h, Real sign, Real stop, Real& h_trial, Real& t_next) {
    const Real step = sign * h, rest = magnitude(stop - t);
    const auto is_cut = (sign * (t + step) >= sign * stop) | (rest <= h * (1 + 1e-12));
    t_next = is_cut ? stop : t + step;
    h_trial = is_cut ? sign * rest : step;
    return is_cut;
}

// Proposes the next trial, or sets the status that says why there is none.
ACA_HD void propose(StepControl& s) {
    s.status = Status::running;
    const double stop = at<const double>(s.stops)[s.next_stop];
    if (!s.is_adaptive) {
        s.is_cut = 1;
        s.t_next = stop;
        s.h_trial = stop - s.t;
        return;
    }
    if (s.n_steps >= s.max_num_steps) {
        s.ratio = s.ratios[0];
        s.status = Status::step_limit;
        return;
    }
    s.is_cut = choose_trial(s.t, s.h, s.sign, stop, s.h_trial, s.t_next);
    if (s.t_next == s.t) {
        s.ratio = s.ratios[0];
        s.status = Status::step_size;
    }
}

// Tells if a smaller trial is possible: the step is not below min_step, and half of it still moves t.
template <typename Real>
ACA_HD auto can_shrink(const Controller& controller, Real t, Real h, Real sign) {
    return (h >= controller.min_step) & (t + sign * h * 0.5 != t);
}
ACA_HD bool can_shrink(const StepControl& s) { return can_shrink(s.controller, s.t, s.h, s.sign); }

// Size of the step after an accepted one, which would grow; one that was cut short says little about it.
template <typename Truth, typename Real>
ACA_HD Real next_size(Truth is_cut, Real h, Real grown) {
    return is_cut & (h > grown) ? h : grown;
}

// Finds the outputs that a step to t_next reaches.
ACA_HD void pass_outputs(StepControl& s, double t_next) {
    s.first_due = s.next_output;
    const double* const times = at<const double>(s.times);
    while (s.next_output < s.n_times && s.sign * times[s.next_output] <= s.sign * t_next) ++s.next_output;
    s.end_due = s.next_output;
}

// Accepts the trial: finds the outputs that it reached, and moves t to its end.
ACA_HD void accept(StepControl& s) {
    s.is_accepted = 1;
    ++s.n_accepted;
    s.t_start = s.t;
    s.h_done = s.h_trial;
    s.t_done = s.t = s.t_next;
    pass_outputs(s, s.t_next);
    if (s.is_cut && ++s.next_stop == s.n_stops) s.status = Status::done;
}

// Accepts or rejects the trial by its error ratio, and chooses the size of the next one. A ratio that is not finite
// sets the status not_finite; the caller decides if a smaller step can help.
template <typename PowerOf = Power>
ACA_HD void judge(StepControl& s, double ratio, PowerOf power = PowerOf()) {
    ++s.n_steps;
    s.is_accepted = 0;
    if (!s.is_adaptive) return accept(s);
    s.ratio = ratio;
    const double tried = magnitude(s.h_trial);
    if (ratio <= 1) {
        accept(s);
        s.ratios[2] = s.ratios[1];
        s.ratios[1] = s.ratios[0];
        s.ratios[0] = ratio;
        if (s.n_ratios < 3) ++s.n_ratios;
        const double grown = s.controller.grow(tried, s.ratios, s.n_ratios, power);
        s.h = next_size(s.is_cut, s.h, grown);
        return;
    }
    s.h = s.controller.shrink(tried, ratio, power);
    if (!is_finite(ratio))
        s.status = Status::not_finite;
    else if (!can_shrink(s))
        s.status = Status::step_size;
}

// Position (0..1) of a time in a step; exactly 1 at the end of the step.
template <typename Real>
ACA_HD Real position(Real time, Real start, Real end) {
    return time == end ? Real{} + 1 : (time - start) / (end - start);
}

// Position of the requested time number `output` in the accepted step.
ACA_HD double position(const StepControl& s, int64_t output) {
    return position(at<const double>(s.times)[output], s.t_start, s.t_done);
}

// Returns true if the proposed trial ends at the next requested time.
ACA_HD bool lands_on_output(const StepControl& s) {
    return s.next_output < s.n_times && at<const double>(s.times)[s.next_output] == s.t_next;
}

// Time of the stage at `c`. For c = 1 it is t_next itself, which t + h may miss by rounding.
template <typename Time>
ACA_HD Time stage_time(double c, Time t, Time h, Time t_next) {
    return c == 1 ? t_next : t + c * h;
}

// Largest mean square over the segments, from their sums of squares and their sizes in elements; NaN if any sum is NaN.
template <typename Real, typename Size>
ACA_HD Real largest_mean(const Real* sums, const Size* sizes, int segments) {
    Real largest{}, all{};
    for (int i = 0; i < segments; ++i) {
        all += sums[i];
        if (!(sizes[i] > 0)) continue;
        const Real mean = sums[i] / double(sizes[i]);
        largest = mean > largest ? mean : largest;
    }
    return all == all ? largest : all;
}

// Largest RMS over the segments.
template <typename Size>
ACA_HD double norm_of_sums(const double* sums, const Size* sizes, int segments) {
    return math::sqrt(largest_mean(sums, sizes, segments));
}

}  // namespace control
}  // namespace aca
