// The solve of a batch on lanes. Each lane has its own time and step; one that has finished takes the next sample.
#pragma once
#include "ensemble/controls.h"
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
        if (record_.keeps_entries()) entries_ = &record_.entries(share_);
        if (record_.keep == Keep::states) states_ = &record_.states(share_);
        ready_.begin(share);
        int live = 0;
        for (int l = 0; l < kLanes; ++l) live += take(l);
        while (live > 0) {
            attempt();
            judge();
            move_on();
            if (is_at_jump_) start_anew();
            propose();
            each_lane(over_, [&](int l) {
                end(l);
                live -= !take(l);
            });
            over_ = 0;
        }
    }

  private:
    // Puts the next sample into a lane; false where there is none.
    ACA_HD bool take(int l) {
        for (;;) {
            // A single lane always takes what it has just prepared, which need not stay in registers.
            if ((kLanes == 1 || ready_.next == ready_.count) && !ready_.prepare()) {
                controls_.clear(l);
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
            StepControl& control = lane_[l].control;
            lane_[l].n_outputs = control.next_output;
            control::propose(control);
            controls_.put(l, control);
            if (control.status == Status::running) return true;
            fail_to_propose(l);
            end(l);
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
        const R t = all_of(controls_.t), h = all_of(controls_.h_trial), t_next = all_of(controls_.t_next);
        step_ = rounded<V>(h);
        V first = rounded<V>(t), last = rounded<V>(t_next);
        if (task_.is_jump) {
            for (int l = 0; l < kLanes; ++l) {
                if (!controls_.is_live(l)) continue;
                const double sign = controls_.sign.each[l];
                if (lane_[l].starts_at_jump) first[l] = beside(t[l], sign);
                if (ends_at_jump(l)) last[l] = beside(t_next[l], -sign);
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
            controls_.ratio = parts_of(implicit_.ratio_or_failure(norms<Field>(error_, y_, y1_, tolerance_)));
        } else {
            evaluate_stages(time, h);
        }
    }

    template <typename Time>
    ACA_HD void evaluate_stages(Time time, R h) {
        const V step = step_;
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
        controls_.ratio = parts_of(norms<Field>(error_, y_, y1_, tolerance_));
    }

    ACA_HD bool ends_at_jump(int l) const {
        const Lane& lane = lane_[l];
        return lane.is_jump && controls_.is_cut(l) && lane.is_jump[lane.control.next_stop];
    }

    // Accepts or rejects the trials.
    ACA_HD void judge() {
        const Verdict verdict = controls_.judge(accepted_);
        const bool has_more_to_do = record_.keep == Keep::checkpoints || round_ || task_.is_jump;
        const unsigned all = verdict.accepted, some = has_more_to_do ? all : verdict.at_stop;
        if (!round_) write_outputs(verdict.due);
        if (entries_) each_lane(all & ~some, [&](int l) { keep(l, false); });
        each_lane(some, [&](int l) { accept(l); });
        each_lane(verdict.hopeless, [&](int l) { fail_if_hopeless(l); });
    }

    // Fails where no smaller step can help.
    ACA_HD void fail_if_hopeless(int l) {
        Lane& lane = lane_[l];
        lane.ratio = controls_.ratio.each[l];
        if (control::is_finite(lane.ratio)) {
            lane.failure = step_size;
        } else {
            lane.failure = fault<n>(y_, k_[0], l);
            if (lane.failure == none && !controls_.can_shrink(l))
                lane.failure = implicit_.has_failed(l)                          ? unsolved
                               : task_.forbids_error && lane.ratio == kInfinity ? no_tolerance
                                                                                : not_finite;
        }
        if (lane.failure != none) over_ |= 1u << l;
    }

    // Writes the outputs that the accepted steps reached, one of each lane at a time.
    ACA_HD void write_outputs(unsigned due) {
        while (due) {
            const Reals theta = controls_.positions();
            V y[n];
            interpolate<Method>(y, theta, step_, y_, y1_, k_);
            each_lane(due, [&](int l) {
                StepControl& control = lane_[l].control;
                T* const out = task_.outputs + (control.next_output++ * task_.n_samples + lane_[l].sample) * n;
                for (int c = 0; c < n; ++c) out[c] = y[c][l];
                controls_.find_time(l, control);
                if (!controls_.is_due(l)) due &= ~(1u << l);
            });
        }
    }

    // Ends the sample at its last stop or at the end of the round, and keeps what is kept of the step.
    ACA_HD void accept(int l) {
        Lane& lane = lane_[l];
        StepControl& control = lane.control;
        const bool is_at_jump = ends_at_jump(l);
        if (round_) control::pass_outputs(control, controls_.t_next.each[l]);
        if (entries_) keep(l, is_at_jump);
        lane.starts_at_jump = lane.needs_slope = is_at_jump;
        is_at_jump_ |= fsal && is_at_jump;
        const bool is_at_stop = controls_.is_cut(l), is_done = is_at_stop && ++control.next_stop == control.n_stops;
        if (is_done || controls_.n_accepted.each[l] == lane.last_step) over_ |= 1u << l;
        if (is_done) return;
        if (is_at_stop) controls_.find_stop(l, control);
        if constexpr (Record::has_checkpoints)
            if (record_.keep == Keep::checkpoints) {
                controls_.get(l, control);
                control.t = controls_.t_next.each[l];
                save(l, y1_, l);
            }
    }

    ACA_HD void keep(int l, bool ends_at_jump) {
        Lane& lane = lane_[l];
        const StepControl& control = lane.control;
        const double t = controls_.t.each[l], h = controls_.h_trial.each[l], t_next = controls_.t_next.each[l];
        T* y = nullptr;
        if (states_) {
            y = static_cast<T*>(states_->add(n * sizeof(T)));
            for (int c = 0; c < n; ++c) y[c] = y_[c][l];
        }
        lane.last_entry = new (entries_->add(sizeof(Entry))) Entry{
            t, h, t_next, lane.n_outputs, control.next_output, lane.starts_at_jump, ends_at_jump, y, lane.last_entry};
        lane.n_outputs = control.next_output;
    }

    // States and first slopes of the next trials.
    ACA_HD void move_on() {
        for (int c = 0; c < n; ++c) {
            y_[c] = select(accepted_, y1_[c], y_[c]);
            if (fsal) k_[0][c] = select(accepted_, k_[s - 1][c], k_[0][c]);
        }
        if constexpr (Method::is_implicit) implicit_.leave(accepted_);
        controls_.move_on();
    }

    // First slopes of lanes whose last step ended at a jump.
    ACA_HD void start_anew() {
        V time{};
        M is_new = never();
        for (int l = 0; l < kLanes; ++l) {
            Lane& lane = lane_[l];
            const double t = controls_.t.each[l];
            time[l] = T(t);
            if (!lane.needs_slope) continue;
            time[l] = beside(t, controls_.sign.each[l]);
            is_new[l] = -1;
            lane.needs_slope = false;
            ++lane.n_restarts;
        }
        Field::slope(time, y_, p_, task_.shared, error_);
        for (int c = 0; c < n; ++c) k_[0][c] = select(is_new, error_[c], k_[0][c]);
        is_at_jump_ = false;
    }

    // Proposes the next trials.
    ACA_HD void propose() {
        const unsigned without = controls_.propose(task_.max_num_steps);
        each_lane(without & ~over_, [&](int l) { fail_to_propose(l); });
        over_ |= without;
    }

    ACA_HD void fail_to_propose(int l) {
        lane_[l].failure = controls_.n_steps.each[l] >= task_.max_num_steps ? step_limit : step_size;
        lane_[l].ratio = controls_.ratios[0].each[l];
    }

    ACA_HD void end(int l) {
        controls_.get(l, lane_[l].control);
        if (entries_) record_.last(lane_[l].sample) = lane_[l].last_entry;
        if constexpr (Method::is_implicit) implicit_.finish(task_, lane_[l].sample, l, y_);
        finish(lane_[l]);
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
    typename Record::Memory *entries_ = nullptr, *states_ = nullptr;  // null: they are not kept
    Lane lane_[kLanes];
    Starts<Field, Round> ready_{task_, round_};
    V y_[n]{}, y1_[n], k_[s][n]{}, p_[n_by_sample]{}, error_[n], tolerance_[2 * n]{};
    V step_;
    Controls controls_{task_.controller};
    M accepted_{};
    unsigned over_ = 0;        // bits of lanes whose samples have ended
    bool is_at_jump_ = false;  // some lane
    typename Method::template Iterations<Field> implicit_;
};

}  // namespace aca
