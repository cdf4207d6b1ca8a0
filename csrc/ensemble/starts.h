// Starts of samples: their states, first slopes and first steps, made for all lanes at once.
#pragma once
#include "ensemble/task.h"

namespace aca {

// A sample in a lane.
struct Lane {
    int64_t sample = 0;
    StepControl control{};
    Failure failure = none;
    double ratio = 0;               // that belongs to the failure
    const bool* is_jump = nullptr;  // of each stop; null: none is
    bool starts_at_jump = false, needs_slope = false;
    int64_t n_restarts = 0, last_step = -1;
    int64_t n_outputs = 0;              // before the step that is kept next
    const Entry* last_entry = nullptr;  // of its accepted steps

    // Tells whether the proposed trial ends at a jump.
    ACA_HD bool ends_at_jump() const { return is_jump && control.is_cut && is_jump[control.next_stop]; }
};

// Blames the state or func where one is not finite at the start of a step.
template <int n>
ACA_HD Failure fault(const V* y, const V* k, int l) {
    for (int c = 0; c < n; ++c)
        if (!control::is_finite(double(y[c][l]))) return state_not_finite;
    for (int c = 0; c < n; ++c)
        if (!control::is_finite(double(k[c][l]))) return slope_not_finite;
    return none;
}

// The next samples of a chunk, which wait for lanes. They start where the round does, if there is one.
template <typename Field, typename Round>
class Starts {
    static constexpr int n = Field::n;
    static constexpr int n_by_sample = Field::n_by_sample > 0 ? Field::n_by_sample : 1;

  public:
    ACA_HD Starts(const Task& task, const Round* round) : task_(task), round_(round) {}

    ACA_HD void begin(const Share& share) {
        next_sample_ = share.first;
        end_ = share.end;
        stride_ = share.stride;
        if (round_) return;
        for (int64_t sample = share.first; sample < share.end; sample += share.stride) begin_outputs(sample);
    }

    // Loads as many samples as there are lanes and finds their first slopes and steps.
    ACA_HD bool prepare() {
        next = count = 0;
        int64_t samples[kLanes];
        for (; count < kLanes && next_sample_ < end_; next_sample_ += stride_)
            if (has_steps(next_sample_)) samples[count++] = next_sample_;
        if (count == 0) return false;
        for (int l = 0; l < kLanes; ++l) load(l, samples[l < count ? l : 0]);
        V t;
        for (int l = 0; l < kLanes; ++l) {
            const Lane& lane = lanes[l];
            t[l] = lane.starts_at_jump ? beside(lane.control.t, lane.control.sign) : T(lane.control.t);
        }
        Field::slope(t, y, p, task_.shared, k);
        if (round_) {
            // Steps have their sizes.
        } else if (task_.first_step != 0) {
            for (Lane& lane : lanes) lane.control.h = task_.first_step;
        } else {
            choose_first_steps();
        }
        return true;
    }

    V y[n], p[n_by_sample], k[n], tolerance[2 * n];
    Lane lanes[kLanes];
    int next = 0, count = 0;  // the next one to take, and how many there are

  private:
    // Writes the first output of a sample, and NaN behind its last time.
    ACA_HD void begin_outputs(int64_t sample) {
        const int64_t count = task_.count_times(sample);
        for (int c = 0; c < n; ++c) task_.outputs[sample * n + c] = task_.y0[sample * n + c];
        for (int64_t i = count; i < task_.n_times; ++i)
            for (int c = 0; c < n; ++c) task_.outputs[(i * task_.n_samples + sample) * n + c] = T(kNaN);
    }

    ACA_HD bool has_steps(int64_t sample) const {
        if (round_) return round_->has(sample) && task_.outcomes[sample].failure == none;
        return task_.count_times(sample) > 1;
    }

    ACA_HD void load(int l, int64_t sample) {
        Lane& lane = lanes[l];
        lane = Lane{};
        lane.sample = sample;
        lane.control = control::begin(task_.controller, task_.first_step, true, task_.max_num_steps);
        const double* const times = task_.times + sample * task_.times_step;
        const int64_t row = sample * task_.stops_step, last = row + task_.n_stops - 1;
        int64_t stop = row;
        while (stop < last && task_.stops[stop] != task_.stops[stop]) ++stop;
        control::set_times(lane.control, times[0], task_.stops[last], uintptr_t(times), task_.count_times(sample),
                           uintptr_t(task_.stops + stop), last + 1 - stop);
        if (task_.is_jump) lane.is_jump = task_.is_jump + stop;
        for (int c = 0; c < n; ++c) {
            y[c][l] = task_.y0[sample * n + c];
            tolerance[c][l] = task_.rtol_each ? task_.rtol_each[sample * n + c] : T(task_.rtol);
            tolerance[n + c][l] = task_.atol_each ? task_.atol_each[sample * n + c] : T(task_.atol);
        }
        for (int i = 0; i < Field::n_by_sample; ++i) p[i][l] = task_.by_sample[sample * Field::n_by_sample + i];
        if constexpr (Round::is_resumed)
            if (round_) resume(l);
    }

    // Puts a prepared sample where its round starts.
    ACA_HD void resume(int l) {
        Lane& lane = lanes[l];
        const Checkpoint& from = round_->start(lane.sample);
        StepControl& control = lane.control;
        control.t = from.t;
        control.h = from.h;
        for (int i = 0; i < 3; ++i) control.ratios[i] = from.ratios[i];
        control.n_ratios = from.n_ratios;
        control.n_steps = from.n_steps;
        control.n_accepted = from.n_accepted;
        control.next_output = from.next_output;
        control.next_stop = from.next_stop;
        lane.starts_at_jump = from.starts_at_jump;
        lane.last_step = round_->end(lane.sample);
        const T* const state = static_cast<const T*>(from.state);
        for (int c = 0; c < n; ++c) y[c][l] = state[c];
    }

    ACA_HD void choose_first_steps() {
        const R norm_y = norms<Field>(y, y, y, tolerance), norm_f = norms<Field>(k, y, y, tolerance);
        R t, h;
        for (int l = 0; l < kLanes; ++l) {
            Lane& lane = lanes[l];
            if (!control::is_finite(norm_f[l])) lane.failure = fault<n>(y, k, l), lane.ratio = norm_f[l];
            control::propose_euler_step(lane.control, norm_y[l], norm_f[l]);
            h[l] = lane.control.h_trial;
            t[l] = lane.control.t_next;
        }
        V euler[n], change[n];
        const V step = rounded<V>(h);
        for (int c = 0; c < n; ++c) euler[c] = fma(step, k[c], y[c]);
        Field::slope(rounded<V>(t), euler, p, task_.shared, change);
        for (int c = 0; c < n; ++c) change[c] = fma(K(-1), k[c], change[c]);
        const R norm_change = norms<Field>(change, y, y, tolerance);
        for (int l = 0; l < kLanes; ++l) {
            control::choose_first_step(lanes[l].control, norm_change[l]);
            lanes[l].control.status = Status::running;  // where the norm was not finite, the trial tells
        }
    }

    const Task& task_;
    const Round* const round_;
    int64_t next_sample_ = 0, end_ = 0, stride_ = 1;
};

}  // namespace aca
