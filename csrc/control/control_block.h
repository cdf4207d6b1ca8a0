// Control block: the step control of a solve and the addresses of its buffers, in device memory. One device thread
// makes the decisions between two steps, so that the host need not wait for them.
#pragma once
#include <cstdint>

#include "control/step_control.h"
#include "kernels/types.h"

namespace aca {

// One accepted step from t to t_next, computed with h; `outputs_end` is one past the last output that it reached.
struct StepEntry {
    double t, h, t_next;
    int64_t outputs_end;
};

// Buffer for the states from number `first` on, `row_bytes` apart.
struct StateBlock {
    uintptr_t address;
    int64_t first;
};

struct Control {
    StepControl solve;  // in the backward pass, its judged step is the step to transpose

    // Constant during a solve. An address of 0 means that there is no such buffer.
    DType dtype;
    int stages, fsal, degree, segments;
    double c[kMaxTerms], dense[kMaxTerms][kMaxDegree];  // dense: a row per stage, highest power first; zero if unused
    double error_last;                                  // weight in the error of the slope at the solution
    int64_t row_bytes;
    int64_t n_states;                      // capacity of the blocks
    uintptr_t sizes;                       // double: elements of each segment
    uintptr_t sums, stage_times, weights;  // sums and weights are double; weights: kMaxTerms per requested time
    uintptr_t outputs, grad_outputs;       // one state per requested time
    uintptr_t steps;                       // n_states - 1 of StepEntry
    StateBlock blocks[kMaxBlocks];
    int n_blocks;  // 0: states are not kept

    double slope_weight;  // of the next trial: error_last times its step
    uintptr_t slot;       // checkpoint of the state at the end of the accepted step; backward: at its start
    int64_t step;         // backward: number of the step to transpose
    int is_unfinished;    // 1 while the loop continues
};

// Decisions of the device thread: the functions below, with `resume` for prepare.
enum class Decision { start, euler, first, next, resume, transpose };

namespace control {

// Largest RMS over the segments, whose sums of squares start at sums[first].
ACA_HD double norm(const Control& s, int first) {
    return norm_of_sums(at<const double>(s.sums) + first, at<const double>(s.sizes), s.segments);
}

ACA_HD uintptr_t state_address(const Control& s, int64_t number) {
    if (s.n_blocks == 0) return 0;
    int b = s.n_blocks - 1;
    while (b > 0 && s.blocks[b].first > number) --b;
    return s.blocks[b].address + uintptr_t((number - s.blocks[b].first) * s.row_bytes);
}

ACA_HD void write_stage_time(const Control& s, int i, double time) {
    if (s.dtype == DType::f32)
        at<float>(s.stage_times)[i] = float(time);
    else
        at<double>(s.stage_times)[i] = time;
}

ACA_HD void write_stage_times(const Control& s, double t, double h, double t_next) {
    for (int i = 0; i < s.stages; ++i) write_stage_time(s, i, stage_time(s.c[i], t, h, t_next));
}

// Proposes the next trial, or sets the status that says why there is none.
ACA_HD void prepare(Control& s) {
    propose(s.solve);
    if (s.solve.status == Status::running && s.solve.n_accepted + 1 >= s.n_states) s.solve.status = Status::no_room;
    s.is_unfinished = s.solve.status == Status::running;
    if (!s.is_unfinished) return;
    s.slope_weight = s.error_last * s.solve.h_trial;
    write_stage_times(s, s.solve.t, s.solve.h_trial, s.solve.t_next);
}

// Sets all stage times to t0, for a device that evaluates f(t0, y0) itself.
ACA_HD void start(Control& s) { write_stage_times(s, s.solve.t, 0, s.solve.t); }

// First half of Hairer's first-step rule: proposes the Euler step along which the change of f is measured. `sums` holds
// the sums of f(t0, y0), then those of y0.
ACA_HD void euler(Control& s) {
    if (!s.solve.is_adaptive || s.solve.first_step != 0) return;
    propose_euler_step(s.solve, norm(s, s.segments), norm(s, 0));
    write_stage_time(s, 0, s.solve.t_next);
}

// Second half: chooses the first step and proposes the first trial. `sums` holds the sums of the change of f.
ACA_HD void first(Control& s) {
    if (s.solve.is_adaptive) {
        if (s.solve.first_step != 0)
            s.solve.h = s.solve.first_step;
        else
            choose_first_step(s.solve, norm(s, 0));
        if (s.solve.status != Status::running) {
            s.is_unfinished = 0;
            return;
        }
    }
    prepare(s);
}

// Judges the trial just made and proposes the next one. `sums` holds its squared error ratios.
ACA_HD void next(Control& s) {
    s.solve.is_accepted = 0;
    if (s.solve.status != Status::running) return;
    judge(s.solve, s.solve.is_adaptive ? norm(s, 0) : 0.0);
    if (s.solve.is_accepted) {
        at<StepEntry>(s.steps)[s.solve.n_accepted - 1] = {s.solve.t_start, s.solve.h_done, s.solve.t_done,
                                                          s.solve.end_due};
        s.slot = state_address(s, s.solve.n_accepted);
    }
    s.is_unfinished = s.solve.status == Status::running;
    if (s.is_unfinished) prepare(s);
}

// Selects the next step to transpose, last to first.
ACA_HD void transpose(Control& s) {
    const StepEntry* const entry = at<const StepEntry>(s.steps) + --s.step;
    s.solve.h_done = s.solve.h_trial = entry->h;
    s.solve.t_start = entry->t;
    s.solve.t_done = entry->t_next;
    s.solve.first_due = s.step ? entry[-1].outputs_end : 1;
    s.solve.end_due = entry->outputs_end;
    s.slot = state_address(s, s.step);
    s.solve.is_accepted = 1;
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

// Writes b_i(theta), for each i, of one output of the accepted step. One output per call, so that threads can share
// them.
ACA_HD void write_weights(const Control& s, int64_t output) {
    const double theta = position(s.solve, output);
    for (int i = 0; i < s.stages; ++i) {
        double w = 0;
        for (int p = 0; p < s.degree; ++p) w = (w + s.dense[i][p]) * theta;
        at<double>(s.weights)[output * kMaxTerms + i] = w;
    }
}

}  // namespace control

// The control block operations of the CPU backend, in host memory.
void write_control_on_cpu(uintptr_t to, const Control& from);
void decide_on_cpu(uintptr_t control, Decision decision);

}  // namespace aca
