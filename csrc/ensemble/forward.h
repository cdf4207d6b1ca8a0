// The solve of a batch on lanes. Each lane has its own time and step; one that has finished takes the next sample.
#pragma once
#include "ensemble/starts.h"
#ifndef ACA_ONE_LANE
#include "ensemble/newton.h"
#endif

namespace aca {

template <typename Field, typename Method, typename Record>
class Forward {
    static constexpr int n = Field::n, s = Method::stages;
    static constexpr int n_by_sample = Field::n_by_sample > 0 ? Field::n_by_sample : 1;
    static constexpr bool fsal = Method::fsal;
    using Sum = Sums<Method>;
    using Round = typename Record::Round;

  public:
    ACA_HD Forward(const Task& task, Record& record) : task_(task), record_(record) {}

    // Repeats the steps of a round, and adds the evaluations of func for each sample to n_slopes.
    Forward(const Task& task, Record& record, const Round& round, int64_t* n_slopes)
        : task_(task), record_(record), round_(&round), n_slopes_(n_slopes) {}

    ACA_HD void run(const Share& share) {
        share_ = share.number;
        first_ = share.first;
        ready_.begin(share);
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
    // Puts the next sample into a lane; false where there is none.
    ACA_HD bool take(int l) {
        for (;;) {
            // A single lane always takes what it has just prepared, which need not stay in registers.
            if ((kLanes == 1 || ready_.next == ready_.count) && !ready_.prepare()) {
                lane_[l].is_live = false;
                return false;
            }
            const int from = ready_.next++;
            if (ready_.lanes[from].failure != none) {
                finish(ready_.lanes[from]);
                continue;
            }
            lane_[l] = ready_.lanes[from];
            for (int c = 0; c < n; ++c) y_[c][l] = ready_.y[c][from], k_[0][c][l] = ready_.k[c][from];
            for (int i = 0; i < Field::n_by_sample; ++i) p_[i][l] = ready_.p[i][from];
            for (int i = 0; i < 2 * n; ++i) tolerance_[i][l] = ready_.tolerance[i][from];
            if constexpr (Method::is_implicit) implicit_.begin(l);
            if constexpr (Record::has_checkpoints)
                if (record_.keep == Keep::checkpoints) save(l, ready_.y, from);
            if (propose(l)) return true;
            finish(lane_[l]);
        }
    }

    // Keeps a checkpoint of a lane if it is due; `y` has the state in lane `from`.
    ACA_HD void save(int l, const V* y, int from) {
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
                 state, sizeof state, record_.states(share_));
    }

    // A trial step in every lane, of length zero where there is no sample.
    ACA_HD void attempt() {
        R t, h, t_next;
        for (int l = 0; l < kLanes; ++l) {
            const StepControl& control = lane_[l].control;
            t[l] = control.t;
            h[l] = lane_[l].is_live ? control.h_trial : 0;
            t_next[l] = lane_[l].is_live ? control.t_next : control.t;
        }
        V first = rounded<V>(t), last = rounded<V>(t_next);
        if (task_.is_jump) {
            for (int l = 0; l < kLanes; ++l) {
                const Lane& lane = lane_[l];
                if (lane.is_live && lane.starts_at_jump) first[l] = beside(t[l], lane.control.sign);
                if (lane.is_live && lane.ends_at_jump()) last[l] = beside(t_next[l], -lane.control.sign);
            }
        }
        const auto time = [&](auto i) {
            constexpr double c = Method::c[i];
            return c == 0 ? first : c == 1 ? last : rounded<V>(control::stage_time(c, t, h, t_next));
        };
        if constexpr (Method::is_implicit) {
            typename Method::template Iterations<Field>::Stages at{{}, h, y_, p_, tolerance_, task_.shared, h != 0};
            for_each<s>([&](auto i) { at.time[i] = time(i); });
            implicit_.step(at, task_.newton_tolerance, k_, y1_, error_);
            ratio_ = implicit_.ratio_or_failure(norms<Field>(error_, y_, y1_, tolerance_));
        } else {
            evaluate_stages(time, h);
        }
    }

    template <typename Time>
    ACA_HD void evaluate_stages(Time time, R h) {
        const V step = rounded<V>(h);
        const auto slope = [&](auto i, const V* y) { Field::slope(time(i), y, p_, task_.shared, k_[i]); };
        if (!fsal) slope(Known<0>(), y_);
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
            slope(Known<s - 1>(), y1_);
            constexpr double weight = Method::error[s - 1];
            if constexpr (weight != 0) {
                const V w = rounded<V>(weight * h);
                for (int c = 0; c < n; ++c) error_[c] = fma(w, k_[s - 1][c], error_[c]);
            }
        }
        ratio_ = norms<Field>(error_, y_, y1_, tolerance_);
    }

    ACA_HD void judge(int l) {
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
            lane.failure = fault<n>(y_, k_[0], l);
            if (lane.failure == none && !control::can_shrink(control))
                lane.failure = implicit_.has_failed(l)                        ? unsolved
                               : task_.forbids_error && ratio_[l] == INFINITY ? no_tolerance
                                                                              : not_finite;
            if (lane.failure == none) control.status = Status::running;
        }
        lane.ratio = control.ratio;
    }

    // Keeps the step, and writes the outputs that it reached.
    ACA_HD void accept(int l, bool ends_at_jump) {
        Lane& lane = lane_[l];
        const StepControl& control = lane.control;
        if (record_.keeps_entries()) keep(l, ends_at_jump);
        lane.starts_at_jump = lane.needs_slope = ends_at_jump;
        is_at_jump_ |= fsal && ends_at_jump;
        if (round_) return;
        if constexpr (Record::has_checkpoints)
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

    ACA_HD void keep(int l, bool ends_at_jump) {
        const StepControl& control = lane_[l].control;
        T* y = nullptr;
        if (record_.keep == Keep::states) {
            y = static_cast<T*>(record_.states(share_).add(n * sizeof(T)));
            for (int c = 0; c < n; ++c) y[c] = y_[c][l];
        }
        const Entry*& last = record_.last(lane_[l].sample);
        last = new (record_.entries(share_).add(sizeof(Entry))) Entry{control.t_start,
                                                                      control.h_done,
                                                                      control.t_done,
                                                                      control.first_due,
                                                                      control.end_due,
                                                                      lane_[l].starts_at_jump,
                                                                      ends_at_jump,
                                                                      y,
                                                                      last};
    }

    ACA_HD void interpolate(T* out, int l, double theta, T h) const {
        T w[s];
        for_each<s>([&](auto i) { w[i] = T(dense_weight<Method, i>(theta)); });
        for (int c = 0; c < n; ++c) {
            T sum = 0;
            for (int i = 0; i < s; ++i) sum = std::fma(w[i], k_[i][c][l], sum);
            out[c] = std::fma(h, sum, y_[c][l]);
        }
    }

    // States and first slopes of the next trials.
    ACA_HD void move_on() {
        for (int c = 0; c < n; ++c) {
            y_[c] = select(accepted_, y1_[c], y_[c]);
            if (fsal) k_[0][c] = select(accepted_, k_[s - 1][c], k_[0][c]);
        }
        if constexpr (Method::is_implicit) implicit_.leave(accepted_);
        accepted_ = never();
    }

    // First slopes of lanes whose last step ended at a jump.
    ACA_HD void start_anew() {
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
    ACA_HD bool has_ended(int l) {
        Lane& lane = lane_[l];
        const bool goes_on = lane.failure == none && lane.control.status == Status::running;
        if (goes_on && lane.control.n_accepted != lane.last_step && propose(l)) return false;
        if constexpr (Method::is_implicit) implicit_.finish(task_, lane.sample, l, y_);
        finish(lane);
        return true;
    }

    ACA_HD bool propose(int l) {
        Lane& lane = lane_[l];
        control::propose(lane.control);
        if (lane.control.status == Status::running) return true;
        lane.failure = lane.control.status == Status::step_limit ? step_limit : step_size;
        lane.ratio = lane.control.ratio;
        return false;
    }

    ACA_HD void finish(const Lane& lane) {
        const StepControl& control = lane.control;
        if constexpr (Round::is_resumed) {
            if (round_) {
                const int64_t n_steps = control.n_steps - round_->start(lane.sample).n_steps;
                n_slopes_[lane.sample - first_] += 1 + lane.n_restarts + n_steps * (s - fsal);
                return;
            }
        }
        task_.outcomes[lane.sample] = {control.n_steps, control.n_accepted, lane.failure,   control.t,
                                       control.h,       lane.ratio,         lane.n_restarts};
    }

    const Task& task_;
    Record& record_;
    const Round* const round_ = nullptr;
    int64_t* const n_slopes_ = nullptr;  // of each sample of the chunk
    int64_t share_ = 0, first_ = 0;
    Lane lane_[kLanes];
    Starts<Field, Round> ready_{task_, round_};
    V y_[n]{}, y1_[n], k_[s][n]{}, p_[n_by_sample]{}, error_[n], tolerance_[2 * n]{};
    R ratio_, power_;  // of the trials, and to the power that chooses the next steps
    M accepted_{};
    bool is_at_jump_ = false;  // some lane
    typename Method::template Iterations<Field> implicit_;
};

}  // namespace aca
