// The solve of a batch on lanes. Each lane has its own time and step; one that has finished takes the next sample.
#pragma once
#include <algorithm>
#include <limits>

#include "ensemble/task.h"

namespace aca {

template <typename Field, typename Method>
class Forward {
    static constexpr int n = Field::n, s = Method::stages;
    static constexpr int n_by_sample = Field::n_by_sample > 0 ? Field::n_by_sample : 1;
    static constexpr bool fsal = Method::fsal;
    using Sum = Sums<Method>;

  public:
    Forward(const Task& task, Record& record) : task_(task), record_(record) {}

    // Repeats the steps of a round, and adds the evaluations of func for each sample to n_slopes.
    Forward(const Task& task, Record& record, const Round& round, int64_t* n_slopes)
        : task_(task), record_(record), round_(&round), n_slopes_(n_slopes) {}

    // Samples `first` to `last`, which share a chunk.
    void run(int64_t first, int64_t last) {
        chunk_ = first / kChunk;
        first_ = next_ = first;
        last_ = last;
        int live = 0;
        for (int l = 0; l < kLanes; ++l) live += take(l);
        while (live > 0) {
            attempt();
            power_ = powers(ratio_, task_.controller.shrink_exponent());
            for (int l = 0; l < kLanes; ++l)
                if (lane_[l].is_live) judge(l);
            move_on();
            if (is_at_jump_) start_anew();
            for (int l = 0; l < kLanes; ++l)
                if (lane_[l].is_live && has_ended(l)) live -= !take(l);
        }
    }

  private:
    struct Lane {
        bool is_live = false;
        int64_t sample = 0;
        StepControl control{};
        Failure failure = none;
        double ratio = 0;               // that belongs to the failure
        const bool* is_jump = nullptr;  // of each stop; null: none is
        bool starts_at_jump = false, needs_slope = false;
        int64_t n_restarts = 0, last_step = -1;

        // Tells whether the proposed trial ends at a jump.
        bool ends_at_jump() const { return is_jump && control.is_cut && is_jump[control.next_stop]; }
    };

    // Samples with their first slopes and steps, made for all lanes at once.
    struct Prepared {
        V y[n], p[n_by_sample], k[n], tolerance[2 * n];
        Lane lane[kLanes];
        int next = 0, count = 0;
    };

    // Puts the next sample into a lane; false where there is none.
    bool take(int l) {
        for (;;) {
            if (ready_.next == ready_.count && !prepare()) {
                lane_[l].is_live = false;
                return false;
            }
            const int from = ready_.next++;
            if (ready_.lane[from].failure != none) {
                finish(ready_.lane[from]);
                continue;
            }
            lane_[l] = ready_.lane[from];
            for (int c = 0; c < n; ++c) y_[c][l] = ready_.y[c][from], k_[0][c][l] = ready_.k[c][from];
            for (int i = 0; i < Field::n_by_sample; ++i) p_[i][l] = ready_.p[i][from];
            for (int i = 0; i < 2 * n; ++i) tolerance_[i][l] = ready_.tolerance[i][from];
            if (record_.keep == Keep::checkpoints) save(l, ready_.y, from);
            if (propose(l)) return true;
            finish(lane_[l]);
        }
    }

    // Loads as many samples as there are lanes and finds their first slopes and steps.
    bool prepare() {
        ready_.next = ready_.count = 0;
        int64_t samples[kLanes];
        for (; ready_.count < kLanes && next_ < last_; ++next_)
            if (!round_ || (round_->has(next_) && task_.outcomes[next_].failure == none))
                samples[ready_.count++] = next_;
        if (ready_.count == 0) return false;
        for (int l = 0; l < kLanes; ++l) load(l, samples[l < ready_.count ? l : 0]);
        V t;
        for (int l = 0; l < kLanes; ++l) {
            const Lane& lane = ready_.lane[l];
            t[l] = lane.starts_at_jump ? beside(lane.control.t, lane.control.sign) : T(lane.control.t);
        }
        Field::slope(t, ready_.y, ready_.p, task_.shared, ready_.k);
        if (round_) {
            // Steps have their sizes.
        } else if (task_.first_step != 0) {
            for (Lane& lane : ready_.lane) lane.control.h = task_.first_step;
        } else {
            choose_first_steps();
        }
        return true;
    }

    void load(int l, int64_t sample) {
        Lane& lane = ready_.lane[l];
        lane = Lane{};
        lane.is_live = true;
        lane.sample = sample;
        lane.control = control::begin(task_.controller, task_.first_step, true, task_.max_num_steps);
        const double* const times = task_.times + sample * task_.times_step;
        const int64_t row = sample * task_.stops_step, last = row + task_.n_stops - 1;
        int64_t stop = row;
        while (stop < last && task_.stops[stop] != task_.stops[stop]) ++stop;
        control::set_times(lane.control, times[0], task_.stops[last], uintptr_t(times), task_.n_times,
                           uintptr_t(task_.stops + stop), last + 1 - stop);
        if (task_.is_jump) lane.is_jump = task_.is_jump + stop;
        for (int c = 0; c < n; ++c) {
            ready_.y[c][l] = task_.y0[sample * n + c];
            if (!round_) task_.outputs[sample * n + c] = task_.y0[sample * n + c];
            ready_.tolerance[c][l] = task_.rtol_each ? task_.rtol_each[sample * n + c] : T(task_.rtol);
            ready_.tolerance[n + c][l] = task_.atol_each ? task_.atol_each[sample * n + c] : T(task_.atol);
        }
        for (int i = 0; i < Field::n_by_sample; ++i) ready_.p[i][l] = task_.by_sample[sample * Field::n_by_sample + i];
        if (round_) resume(l);
    }

    // Puts a prepared sample where its round starts.
    void resume(int l) {
        Lane& lane = ready_.lane[l];
        const Checkpoint& from = round_->start(lane.sample);
        StepControl& control = lane.control;
        control.t = from.t;
        control.h = from.h;
        std::copy(from.ratios, from.ratios + 3, control.ratios);
        control.n_ratios = from.n_ratios;
        control.n_steps = from.n_steps;
        control.n_accepted = from.n_accepted;
        control.next_output = from.next_output;
        control.next_stop = from.next_stop;
        lane.starts_at_jump = from.starts_at_jump;
        lane.last_step = round_->end(lane.sample);
        const T* const y = static_cast<const T*>(from.state);
        for (int c = 0; c < n; ++c) ready_.y[c][l] = y[c];
    }

    // Keeps a checkpoint of a lane if it is due; `y` has the state in lane `from`.
    void save(int l, const V* y, int from) {
        const Lane& lane = lane_[l];
        const StepControl& control = lane.control;
        Checkpoints& kept = record_.checkpoints(lane.sample);
        if (!kept.takes(control.n_accepted, record_.most_checkpoints)) return;
        T state[n];
        for (int c = 0; c < n; ++c) state[c] = y[c][from];
        const double* const ratios = control.ratios;
        kept.add({control.t,
                  control.h,
                  {ratios[0], ratios[1], ratios[2]},
                  control.n_ratios,
                  lane.starts_at_jump,
                  control.n_steps,
                  control.n_accepted,
                  control.next_output,
                  control.next_stop,
                  nullptr},
                 state, sizeof state, record_.states(chunk_));
    }

    void choose_first_steps() {
        Prepared& r = ready_;
        const R norm_y = norms<Field>(r.y, r.y, r.y, r.tolerance), norm_f = norms<Field>(r.k, r.y, r.y, r.tolerance);
        R t, h;
        for (int l = 0; l < kLanes; ++l) {
            Lane& lane = r.lane[l];
            if (!control::is_finite(norm_f[l])) lane.failure = fault(r.y, r.k, l), lane.ratio = norm_f[l];
            control::propose_euler_step(lane.control, norm_y[l], norm_f[l]);
            h[l] = lane.control.h_trial;
            t[l] = lane.control.t_next;
        }
        auto &euler = y1_, &k = error_;
        const V step = __builtin_convertvector(h, V);
        for (int c = 0; c < n; ++c) euler[c] = fma(step, r.k[c], r.y[c]);
        Field::slope(__builtin_convertvector(t, V), euler, r.p, task_.shared, k);
        for (int c = 0; c < n; ++c) k[c] = fma(K(-1), r.k[c], k[c]);
        const R norm_change = norms<Field>(k, r.y, r.y, r.tolerance);
        for (int l = 0; l < kLanes; ++l) {
            control::choose_first_step(r.lane[l].control, norm_change[l]);
            r.lane[l].control.status = Status::running;  // where the norm was not finite, the trial tells
        }
    }

    // A trial step in every lane, of length zero where there is no sample.
    void attempt() {
        R t, h, t_next;
        for (int l = 0; l < kLanes; ++l) {
            const StepControl& control = lane_[l].control;
            t[l] = control.t;
            h[l] = lane_[l].is_live ? control.h_trial : 0;
            t_next[l] = lane_[l].is_live ? control.t_next : control.t;
        }
        const V step = __builtin_convertvector(h, V);
        V first = __builtin_convertvector(t, V), last = __builtin_convertvector(t_next, V);
        if (task_.is_jump) {
            for (int l = 0; l < kLanes; ++l) {
                const Lane& lane = lane_[l];
                if (lane.is_live && lane.starts_at_jump) first[l] = beside(t[l], lane.control.sign);
                if (lane.is_live && lane.ends_at_jump()) last[l] = beside(t_next[l], -lane.control.sign);
            }
        }
        const auto slope = [&](auto i, const V* y) {
            constexpr double c = Method::c[i];
            const V time = c == 0   ? first
                           : c == 1 ? last
                                    : __builtin_convertvector(control::stage_time(c, t, h, t_next), V);
            Field::slope(time, y, p_, task_.shared, k_[i]);
        };
        if (!fsal) slope(std::integral_constant<int, 0>(), y_);
        for_each<s>([&](auto i) {
            if constexpr (i > 0 && i < s - fsal) {
                for (int c = 0; c < n; ++c)
                    y1_[c] =
                        fma(step, Sum::template of<typename Sum::template Stage<i>>([&](int j) { return k_[j][c]; }),
                            y_[c]);
                slope(i, y1_);
            }
        });
        for (int c = 0; c < n; ++c) {
            const auto k = [&](int j) { return k_[j][c]; };
            y1_[c] = fma(step, Sum::template of<typename Sum::Solution>(k), y_[c]);
            error_[c] = step * Sum::template of<typename Sum::Error>(k);
        }
        if constexpr (fsal) {
            slope(std::integral_constant<int, s - 1>(), y1_);
            if constexpr (Method::error[s - 1] != 0) {
                const V w = __builtin_convertvector(Method::error[s - 1] * h, V);
                for (int c = 0; c < n; ++c) error_[c] = fma(w, k_[s - 1][c], error_[c]);
            }
        }
        ratio_ = norms<Field>(error_, y_, y1_, tolerance_);
    }

    void judge(int l) {
        Lane& lane = lane_[l];
        StepControl& control = lane.control;
        const double base = ratio_[l], known = power_[l], exponent = control.controller.shrink_exponent();
        const bool ends_at_jump = lane.ends_at_jump();
        control::judge(control, base,
                       [=](double x, double e) { return x == base && e == exponent ? known : std::pow(x, e); });
        accepted_[l] = control.is_accepted ? -1 : 0;
        if (control.is_accepted) return accept(l, ends_at_jump);
        if (control.status == Status::step_size) {
            lane.failure = step_size;
        } else if (control.status == Status::not_finite) {
            lane.failure = fault(y_, k_[0], l);
            if (lane.failure == none && !control::can_shrink(control))
                lane.failure = task_.forbids_error && ratio_[l] == std::numeric_limits<double>::infinity()
                                   ? no_tolerance
                                   : not_finite;
            if (lane.failure == none) control.status = Status::running;
        }
        lane.ratio = control.ratio;
    }

    // Blames the state or func where one is not finite at the start of a step.
    static Failure fault(const V* y, const V* k, int l) {
        for (int c = 0; c < n; ++c)
            if (!control::is_finite(double(y[c][l]))) return state_not_finite;
        for (int c = 0; c < n; ++c)
            if (!control::is_finite(double(k[c][l]))) return slope_not_finite;
        return none;
    }

    // Keeps the step, and writes the outputs that it reached.
    void accept(int l, bool ends_at_jump) {
        Lane& lane = lane_[l];
        const StepControl& control = lane.control;
        if (record_.keeps_entries()) keep(l, ends_at_jump);
        lane.starts_at_jump = lane.needs_slope = ends_at_jump;
        is_at_jump_ |= fsal && ends_at_jump;
        if (round_) return;
        if (record_.keep == Keep::checkpoints && control.status == Status::running) save(l, y1_, l);
        for (int64_t i = control.first_due; i < control.end_due; ++i) {
            T* const out = task_.outputs + (i * task_.n_samples + lane.sample) * n;
            const double theta = control::position(control, i);
            if (theta == 1.0) {
                for (int c = 0; c < n; ++c) out[c] = y1_[c][l];
            } else {
                interpolate(out, l, theta, T(control.h_done));
            }
        }
    }

    void keep(int l, bool ends_at_jump) {
        const StepControl& control = lane_[l].control;
        T* y = nullptr;
        if (record_.keep == Keep::states) {
            y = static_cast<T*>(record_.states(chunk_).add(n * sizeof(T)));
            for (int c = 0; c < n; ++c) y[c] = y_[c][l];
        }
        const Entry*& last = record_.last(lane_[l].sample);
        last = new (record_.entries(chunk_).add(sizeof(Entry))) Entry{control.t_start,
                                                                      control.h_done,
                                                                      control.t_done,
                                                                      control.first_due,
                                                                      control.end_due,
                                                                      lane_[l].starts_at_jump,
                                                                      ends_at_jump,
                                                                      y,
                                                                      last};
    }

    void interpolate(T* out, int l, double theta, T h) const {
        T w[s];
        for (int i = 0; i < s; ++i) w[i] = T(dense_weight<Method>(i, theta));
        for (int c = 0; c < n; ++c) {
            T sum = 0;
            for (int i = 0; i < s; ++i) sum = std::fma(w[i], k_[i][c][l], sum);
            out[c] = std::fma(h, sum, y_[c][l]);
        }
    }

    // States and first slopes of the next trials.
    void move_on() {
        for (int c = 0; c < n; ++c) {
            y_[c] = select(accepted_, y1_[c], y_[c]);
            if (fsal) k_[0][c] = select(accepted_, k_[s - 1][c], k_[0][c]);
        }
        accepted_ = never();
    }

    // First slopes of lanes whose last step ended at a jump.
    void start_anew() {
        V time{};
        M is_new = never();
        for (int l = 0; l < kLanes; ++l) {
            Lane& lane = lane_[l];
            time[l] = T(lane.control.t);
            if (!lane.needs_slope) continue;
            time[l] = beside(lane.control.t, lane.control.sign);
            is_new[l] = -1;
            lane.needs_slope = false;
            ++lane.n_restarts;
        }
        Field::slope(time, y_, p_, task_.shared, error_);
        for (int c = 0; c < n; ++c) k_[0][c] = select(is_new, error_[c], k_[0][c]);
        is_at_jump_ = false;
    }

    // Proposes the next trial of a lane, or finishes its sample.
    bool has_ended(int l) {
        Lane& lane = lane_[l];
        const bool goes_on = lane.failure == none && lane.control.status == Status::running;
        if (goes_on && lane.control.n_accepted != lane.last_step && propose(l)) return false;
        finish(lane);
        return true;
    }

    bool propose(int l) {
        Lane& lane = lane_[l];
        control::propose(lane.control);
        if (lane.control.status == Status::running) return true;
        lane.failure = lane.control.status == Status::step_limit ? step_limit : step_size;
        lane.ratio = lane.control.ratio;
        return false;
    }

    void finish(const Lane& lane) {
        const StepControl& control = lane.control;
        if (round_) {
            const int64_t n_steps = control.n_steps - round_->start(lane.sample).n_steps;
            n_slopes_[lane.sample - first_] += 1 + lane.n_restarts + n_steps * (s - fsal);
            return;
        }
        task_.outcomes[lane.sample] = {control.n_steps, control.n_accepted, lane.failure,   control.t,
                                       control.h,       lane.ratio,         lane.n_restarts};
    }

    const Task& task_;
    Record& record_;
    const Round* const round_ = nullptr;
    int64_t* const n_slopes_ = nullptr;  // of each sample of the chunk
    int64_t chunk_ = 0, first_ = 0, next_ = 0, last_ = 0;
    Lane lane_[kLanes];
    Prepared ready_;
    V y_[n]{}, y1_[n], k_[s][n]{}, p_[n_by_sample]{}, error_[n], tolerance_[2 * n]{};
    R ratio_, power_;  // of the trials, and to the power that chooses the next steps
    M accepted_{};
    bool is_at_jump_ = false;  // some lane
};

}  // namespace aca
