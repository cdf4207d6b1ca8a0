// The loop of a solve as data: a control block in the memory of the device, and the decisions between two steps as
// functions of it. Whoever launches the steps need not look at it: what aca_ext.solver.loop does from step to step
// happens where the states are. One thread makes the decisions, and they are the same numbers on a host and on a GPU.
#pragma once
#include <cstdint>

#include "control/controller.h"
#include "kernels/ops.h"

namespace aca {

enum class Status { running, done, step_limit, step_size, not_finite, no_room };

// One accepted step from t to t_next, computed with h; `outputs_end` is one past the last output that it reached.
struct StepEntry {
    double t, h, t_next;
    int64_t outputs_end;
};

// Memory for states number `first` and following, one every `row_bytes`.
struct StateBlock {
    uintptr_t address;
    int64_t first;
};

struct Control {
    // What stays the same through a solve. Addresses 0: there is none.
    DType dtype;
    int stages, fsal, is_adaptive, degree, segments;
    double c[kMaxTerms], dense[kMaxTerms][kMaxDegree];  // dense: highest power first, rows of zeros where unused
    double error_last;                                  // weight in the error of the slope at the solution
    Controller controller;
    double first_step;  // 0: by Hairer's rule
    double sign, length;
    int64_t max_num_steps, n_times, row_bytes;
    int64_t n_states;                        // that there is room for
    uintptr_t times, stops, sizes;           // double: outputs, then ends of steps, and elements of each segment
    uintptr_t sums, stage_times, weights;    // sums and weights (n_times rows of kMaxTerms) double
    uintptr_t outputs, grad_outputs, steps;  // a row for each time; n_states - 1 entries
    StateBlock blocks[kMaxBlocks];
    int n_blocks;  // 0: states are not kept

    // The state of the solve.
    Status status;
    double t, h;                           // h without its sign
    double ratio, ratios[3];               // of the last trial and of the last accepted ones, newest first
    double h_trial, slope_weight, t_next;  // of the trial to come: signed step, error_last times it, end
    int is_cut;                            // the trial ends where the controller did not choose
    double t_start, h_done, t_done;        // of the step just accepted: start, signed step, end
    int is_accepted;                       // the last trial was
    int64_t first_due, end_due;            // outputs that it reached
    int64_t n_steps, n_accepted, next_output, next_stop;
    uintptr_t slot;        // where the state at its end is kept, or read from in the backward pass
    int64_t step;          // backward: number of the step to transpose
    int is_unfinished;     // whether the loop goes on
    double euler, norm_f;  // between the two halves of the first step
};

// What the one thread is asked to do.
enum class Decision { start, euler, first, next, resume, transpose };

namespace control {

template <typename T>
ACA_HD T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}

ACA_HD double magnitude(double x) { return x < 0 ? -x : x; }

ACA_HD bool is_finite(double x) { return x - x == 0; }

// Largest RMS over the segments from their sums of squares; NaN where any is.
ACA_HD double norm(const Control& s, int first) {
    const double *const sums = at<const double>(s.sums) + first, *const sizes = at<const double>(s.sizes);
    double largest = 0, all = 0;
    for (int i = 0; i < s.segments; ++i) {
        all += sums[i];
        if (sizes[i] > 0 && sums[i] / sizes[i] > largest) largest = sums[i] / sizes[i];
    }
    return all == all ? sqrt(largest) : all;
}

ACA_HD uintptr_t state_address(const Control& s, int64_t number) {
    if (s.n_blocks == 0) return 0;
    int b = s.n_blocks - 1;
    while (b > 0 && s.blocks[b].first > number) --b;
    return s.blocks[b].address + uintptr_t((number - s.blocks[b].first) * s.row_bytes);
}

// Times of the stages; at the end of the step they are t_next exactly, which rounding may keep from t + h.
ACA_HD void write_stage_times(const Control& s, double t, double h, double t_next) {
    for (int i = 0; i < s.stages; ++i) {
        const double time = s.c[i] == 1 ? t_next : t + s.c[i] * h;
        if (s.dtype == DType::f32)
            at<float>(s.stage_times)[i] = float(time);
        else
            at<double>(s.stage_times)[i] = time;
    }
}

ACA_HD void stop(Control& s, Status status) {
    s.status = status;
    s.is_unfinished = 0;
}

// The trial to come, or why there is none.
ACA_HD void prepare(Control& s) {
    if (s.is_adaptive && s.n_steps >= s.max_num_steps) {
        s.ratio = s.ratios[0];
        return stop(s, Status::step_limit);
    }
    if (s.n_accepted + 1 >= s.n_states) return stop(s, Status::no_room);
    const double end = at<const double>(s.stops)[s.next_stop];
    if (s.is_adaptive) {
        s.is_cut = s.sign * (s.t + s.sign * s.h) >= s.sign * end || magnitude(end - s.t) <= s.h * (1 + 1e-12);
        s.t_next = s.is_cut ? end : s.t + s.sign * s.h;
        s.h_trial = s.is_cut ? s.sign * magnitude(end - s.t) : s.sign * s.h;
        if (s.t_next == s.t) {
            s.ratio = s.ratios[0];
            return stop(s, Status::step_size);
        }
    } else {
        s.is_cut = 1;
        s.t_next = end;
        s.h_trial = end - s.t;
    }
    s.slope_weight = s.error_last * s.h_trial;
    write_stage_times(s, s.t, s.h_trial, s.t_next);
    s.status = Status::running;
    s.is_unfinished = 1;
}

// Before anything else, where the device is to find f(t0, y0) by itself.
ACA_HD void start(Control& s) { write_stage_times(s, s.t, 0, s.t); }

// The first half of the first step: how far along f(t0, y0) to go to see it change. `sums` hold those of f(t0, y0) and
// then those of y0.
ACA_HD void euler(Control& s) {
    if (!s.is_adaptive || s.first_step != 0) return;
    s.norm_f = norm(s, 0);
    s.euler = is_finite(s.norm_f) ? s.controller.euler_step(s.length, norm(s, s.segments), s.norm_f)
                                  : (s.length < 1e-6 ? s.length : 1e-6);
    s.h_trial = s.sign * s.euler;
    const double time = s.t + s.h_trial;
    if (s.dtype == DType::f32)
        at<float>(s.stage_times)[0] = float(time);
    else
        at<double>(s.stage_times)[0] = time;
}

// The second half, and the first trial. `sums` hold those of the change of f.
ACA_HD void first(Control& s) {
    if (!s.is_adaptive) return prepare(s);
    if (s.first_step != 0) {
        s.h = s.first_step;
    } else if (is_finite(s.norm_f)) {
        s.h = s.controller.first_step(s.length, s.euler, s.norm_f, norm(s, 0));
    } else {  // a tolerance of 0 somewhere, which only the trial can tell, or a slope that is not finite
        s.h = s.controller.limit(s.euler);
        s.ratio = s.norm_f;
        return stop(s, Status::not_finite);
    }
    prepare(s);
}

ACA_HD void accept(Control& s) {
    const double* const times = at<const double>(s.times);
    s.is_accepted = 1;
    s.t_start = s.t;
    s.h_done = s.h_trial;
    s.t_done = s.t_next;
    s.first_due = s.next_output;
    while (s.next_output < s.n_times && s.sign * times[s.next_output] <= s.sign * s.t_next) ++s.next_output;
    s.end_due = s.next_output;
    at<StepEntry>(s.steps)[s.n_accepted] = {s.t, s.h_trial, s.t_next, s.end_due};
    s.slot = state_address(s, ++s.n_accepted);
    s.t = s.t_next;
}

// What follows from the trial just made. `sums` hold its squared error ratios.
ACA_HD void next(Control& s) {
    s.is_accepted = 0;
    if (s.status != Status::running) return;
    ++s.n_steps;
    if (!s.is_adaptive) {
        accept(s);
        if (at<const double>(s.stops)[s.next_stop++] == at<const double>(s.times)[s.n_times - 1])
            return stop(s, Status::done);
        return prepare(s);
    }
    s.ratio = norm(s, 0);
    const double tried = magnitude(s.h_trial);
    if (s.ratio <= 1) {
        accept(s);
        s.ratios[2] = s.ratios[1];
        s.ratios[1] = s.ratios[0];
        s.ratios[0] = s.ratio;
        const double grown = s.controller.grow(tried, s.ratios, int(s.n_accepted < 3 ? s.n_accepted : 3));
        s.h = s.is_cut && s.h > grown ? s.h : grown;  // a step cut short says little about the size to come
        if (s.is_cut && at<const double>(s.stops)[s.next_stop++] == at<const double>(s.times)[s.n_times - 1])
            return stop(s, Status::done);
    } else {
        s.h = s.controller.shrink(tried, s.ratio);
        if (!is_finite(s.ratio)) return stop(s, Status::not_finite);  // the host looks whether a smaller step can help
        if (s.h < s.controller.min_step || s.t + s.sign * s.h * 0.5 == s.t) return stop(s, Status::step_size);
    }
    prepare(s);
}

// The next step to transpose, last to first.
ACA_HD void transpose(Control& s) {
    const StepEntry* const entry = at<const StepEntry>(s.steps) + --s.step;
    s.h_done = s.h_trial = entry->h;
    s.t_start = entry->t;
    s.t_done = entry->t_next;
    s.first_due = s.step ? entry[-1].outputs_end : 1;
    s.end_due = entry->outputs_end;
    s.slot = state_address(s, s.step);
    s.is_accepted = 1;
    s.is_unfinished = s.step > 0;
    write_stage_times(s, entry->t, entry->h, entry->t_next);
}

ACA_HD void decide(Control& s, Decision decision) {
    switch (decision) {
        case Decision::start:
            return start(s);
        case Decision::euler:
            return euler(s);
        case Decision::first:
            return first(s);
        case Decision::next:
            return next(s);
        case Decision::resume:
            return prepare(s);
        case Decision::transpose:
            return transpose(s);
    }
}

// b_i(theta) of one output of the step just decided on, for each i; threads may share the outputs.
ACA_HD void write_weights(const Control& s, int64_t output) {
    const double theta = (at<const double>(s.times)[output] - s.t_start) / (s.t_done - s.t_start);
    for (int i = 0; i < s.stages; ++i) {
        double w = 0;
        for (int p = 0; p < s.degree; ++p) w = (w + s.dense[i][p]) * theta;
        at<double>(s.weights)[output * kMaxTerms + i] = w;
    }
}

}  // namespace control

// One decision about a control block in the host's memory.
void write_control_on_cpu(uintptr_t to, const Control& from);
void decide_on_cpu(uintptr_t control, Decision decision);

}  // namespace aca
