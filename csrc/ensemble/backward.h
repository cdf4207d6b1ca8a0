// The backward pass on lanes: every accepted step of a sample once more, last to first, and its transpose.
#pragma once
#include "ensemble/task.h"
#ifndef ACA_ONE_LANE
#include "ensemble/implicit_backward.h"
#endif

namespace aca {

// Asks for memory that is needed soon, where that pays.
ACA_HD void prefetch([[maybe_unused]] const void* memory) {
#ifndef ACA_ONE_LANE
    __builtin_prefetch(memory);
#endif
}

template <typename Field, typename Method, typename Record>
class Backward {
    static constexpr int n = Field::n, s = Method::stages;
    static constexpr int n_by_sample = Field::n_by_sample > 0 ? Field::n_by_sample : 1;
    static constexpr int n_shared = Field::n_learnt > 0 ? Field::n_learnt : 1;
    using Sum = Sums<Method>;
    using Round = typename Record::Round;

    // Stages that the solution needs; outputs inside a step may need the others.
    static constexpr int count_needed() {
        int needed = 0;
        for (int i = 0; i < s; ++i)
            if (Method::b[i] != 0) needed = i + 1;
        return needed;
    }
    static constexpr int needed = count_needed();

  public:
    ACA_HD Backward(const Task& task, const Cotangents& cotangents) : task_(task), cotangents_(cotangents) {
        for (V& each : shared_) each = V{};
    }

    // The steps of a round. Rounds follow one another; `n_slopes` holds the evaluations of func for each sample so far,
    // and may be null where there is one round.
    ACA_HD void run(const Share& share, const Record& record, const Round& round, int64_t* n_slopes) {
        share_ = share;
        record_ = &record;
        round_ = round;
        n_slopes_ = n_slopes;
        next_ = share.first;
        for (int c = 0; c < n; ++c) y_[c] = K(double(task_.y0[next_ * n + c]));
        for (int i = 0; i < Field::n_by_sample; ++i) p_[i] = K(double(task_.by_sample[next_ * Field::n_by_sample + i]));
        int live = 0;
        for (int l = 0; l < kLanes; ++l) live += take(l);
        while (live > 0) {
            unsigned due = 0;
            for (int l = 0; l < kLanes; ++l) due |= unsigned(enter(l)) << l;
            find_ends();
            const bool is_inside = add_outputs(due);
            if constexpr (Method::is_implicit) {
                transpose_implicit();
            } else {
                transpose(is_inside);
            }
            if (is_inside) forget_inside();
            for (int l = 0; l < kLanes; ++l)
                if (lane_[l].entry && !(lane_[l].entry = lane_[l].entry->previous)) {
                    finish(l);
                    live -= !take(l);
                }
        }
    }

  private:
    struct Lane {
        const Entry* entry = nullptr;  // null: there is no sample
        int64_t sample = 0, n_slopes = 0;
        int64_t output = 0;  // the next one whose cotangent is added
    };

    ACA_HD bool take(int l) {
        for (; next_ < share_.end; next_ += share_.stride) {
            const bool has_failed = task_.outcomes[next_].failure != none;
            if (round_.number > 0 && (has_failed || !round_.has(next_))) continue;
            lane_[l] = {has_failed ? nullptr : record_->last(next_), next_,
                        n_slopes_ ? n_slopes_[next_ - share_.first] : 0};
            const bool is_first = round_.number == 0;
            for (int c = 0; c < n; ++c) g_[c][l] = is_first ? 0 : cotangents_.y0[next_ * n + c];
            const T* const so_far = is_first ? nullptr : cotangents_.by_sample;
            for (int i = 0; i < Field::n_by_sample; ++i) {
                p_[i][l] = task_.by_sample[next_ * Field::n_by_sample + i];
                by_sample_[i][l] = so_far ? so_far[next_ * Field::n_by_sample + i] : 0;
            }
            if (lane_[l].entry) {
                if constexpr (Method::is_implicit) replay_.begin(task_, next_, l);
                next_ += share_.stride;
                return true;
            }
            finish(l);
        }
        lane_[l].entry = nullptr;
        return false;
    }

    ACA_HD const T* cotangent(int64_t output, int64_t sample) const {
        return cotangents_.outputs + (output * task_.n_samples + sample) * n;
    }

    // Loads the step to transpose. Tells whether it reached outputs.
    ACA_HD bool enter(int l) {
        Lane& lane = lane_[l];
        if (!lane.entry) {
            h_[l] = 0;
            return false;
        }
        const Entry& entry = *lane.entry;
        prefetch(entry.previous);
        t_[l] = entry.t;
        h_[l] = entry.h;
        t_next_[l] = entry.t_next;
        const T* const y = static_cast<const T*>(entry.state);
        for (int c = 0; c < n; ++c) y_[c][l] = y[c];
        lane.n_slopes += needed;
        lane.output = entry.first_due;
        return entry.first_due < entry.end_due;
    }

    // Times of the stages at the ends of the steps.
    ACA_HD void find_ends() {
        start_ = rounded<V>(t_);
        end_ = rounded<V>(t_next_);
        if (!task_.is_jump) return;
        for (int l = 0; l < kLanes; ++l) {
            if (!lane_[l].entry) continue;
            const Entry& entry = *lane_[l].entry;
            const double sign = entry.h < 0 ? -1 : 1;
            if (entry.starts_at_jump) start_[l] = beside(entry.t, sign);
            if (entry.ends_at_jump) end_[l] = beside(entry.t_next, -sign);
        }
    }

    // Adds the cotangents of the outputs that the steps of some lanes reached, one of each lane at a time. Tells
    // whether some lie inside a step.
    ACA_HD bool add_outputs(unsigned due) {
        bool is_inside = false;
        is_inside_ = never();
        while (due) {
            Reals theta{};
            V g[n]{};
            bool are_some_inside = false;
            each_lane(due, [&](int l) {
                Lane& lane = lane_[l];
                const double time = task_.times[lane.sample * task_.times_step + lane.output];
                const T* const given = cotangent(lane.output, lane.sample);
                const double at = control::position(time, lane.entry->t, lane.entry->t_next);
                if (at == 1.0) {
                    for (int c = 0; c < n; ++c) g_[c][l] += given[c];
                } else {
                    theta.each[l] = at;
                    for (int c = 0; c < n; ++c) g[c][l] = given[c];
                    if (!is_inside_[l]) lane.n_slopes += s - needed;
                    is_inside_[l] = -1;
                    are_some_inside = true;
                }
                if (++lane.output == lane.entry->end_due) due &= ~(1u << l);
            });
            if (are_some_inside) add_inside(all_of(theta), g);
            is_inside |= are_some_inside;
        }
        return is_inside;
    }

    ACA_HD void add_inside(R theta, const V* g) {
        for_each<s>([&](auto j) {
            const V w = rounded<V>(dense_weight<Method, j>(theta));
            for (int c = 0; c < n; ++c) slopes_[j][c] = fma(w, g[c], slopes_[j][c]);
        });
        for (int c = 0; c < n; ++c) inside_[c] += g[c];
    }

    ACA_HD void forget_inside() {
        for (int c = 0; c < n; ++c) {
            inside_[c] = K(0);
            for (int j = 0; j < s; ++j) slopes_[j][c] = K(0);
        }
    }

    // The stages of the step solved again, and their transposes; lanes without outputs inside have zeros for them.
    ACA_HD void transpose_implicit() {
        typename Method::template Replay<Field>::Stages at{{}, h_, y_, p_, replay_.tolerance(), task_.shared, h_ != 0};
        for_each<s>([&](auto i) {
            constexpr double c = Method::c[i];
            at.time[i] = c == 0 ? start_ : c == 1 ? end_ : rounded<V>(control::stage_time(c, t_, h_, t_next_));
        });
        replay_.solve(at, stages_, k_);
        replay_.compare(at, stages_[s - 1], task_.newton_tolerance);
        replay_.transpose(at, stages_, g_, slopes_, pulled_, by_sample_, shared_);
        for (int c = 0; c < n; ++c) {
            g_[c] += inside_[c];
            for (int i = s - 1; i >= 0; --i) g_[c] += pulled_[i][c];
        }
        replay_.leave(y_);
        for (int l = 0; l < kLanes; ++l) {
            if (!lane_[l].entry) continue;
            lane_[l].n_slopes += replay_.evaluations(l);
            int64_t& fault = cotangents_.replay_faults[share_.number];
            if (replay_.fault(l) > fault) fault = replay_.fault(l);
        }
    }

    // Outputs inside steps may need the last stages.
    ACA_HD void transpose(bool is_inside) {
        const V step = rounded<V>(h_);
        V time[s];
        auto &y = stages_, &k = k_, &pulled = pulled_;
        for_each<s>([&](auto i) {
            constexpr double at = Method::c[i];
            if (i >= needed && !is_inside) return;
            time[i] = at == 0 ? start_ : at == 1 ? end_ : rounded<V>(control::stage_time(at, t_, h_, t_next_));
            for (int c = 0; c < n; ++c) {
                if constexpr (i == 0) {
                    y[i][c] = y_[c];
                } else {
                    const V advance = Sum::template of<typename Sum::template Stage<i>>([&](int j) { return k[j][c]; });
                    y[i][c] = fma(step, advance, y_[c]);
                }
            }
            if constexpr (i >= needed) {  // a sample without outputs inside its step has nothing to do with this stage
                time[i] = select(is_inside_, time[i], time[0]);
                for (int c = 0; c < n; ++c) y[i][c] = select(is_inside_, y[i][c], y_[c]);
            }
            if (i < needed - 1 || (i < s - 1 && is_inside)) Field::slope(time[i], y[i], p_, task_.shared, k[i]);
        });
        for_each<s>([&](auto reversed) {
            constexpr int i = s - 1 - decltype(reversed)::value;
            constexpr double b = Method::b[i];
            if (i >= needed && !is_inside) {
                for (int c = 0; c < n; ++c) pulled[i][c] = K(0);
                return;
            }
            V(&g)[n] = k_[i];  // which was needed for the later stages alone
            for (int c = 0; c < n; ++c) {
                V sum = b != 0 ? K(b) * g_[c] : K(0);
                sum += slopes_[i][c];
                sum += Sum::template of<typename Sum::template Later<i, s>>([&](int j) { return pulled[j][c]; });
                g[c] = step * sum;
            }
            Field::pull(time[i], y[i], p_, task_.shared, g, pulled[i], by_sample_, shared_);
        });
        for (int c = 0; c < n; ++c) {
            g_[c] += inside_[c];
            for (int i = s - 1; i >= 0; --i) g_[c] += pulled[i][c];
        }
    }

    ACA_HD void finish(int l) {
        const Lane& lane = lane_[l];
        const int64_t sample = lane.sample;
        const bool has_failed = task_.outcomes[sample].failure != none;
        const T* const first = cotangent(0, sample);
        const bool is_last = round_.is_last(sample);
        for (int c = 0; c < n; ++c)
            cotangents_.y0[sample * n + c] = has_failed ? 0 : is_last ? g_[c][l] + first[c] : g_[c][l];
        if (cotangents_.by_sample)
            for (int i = 0; i < Field::n_by_sample; ++i)
                cotangents_.by_sample[sample * Field::n_by_sample + i] = by_sample_[i][l];
        double* const shared = cotangents_.shared + share_.number * Field::n_learnt;
        for (int i = 0; i < Field::n_learnt; ++i) {
            shared[i] += double(shared_[i][l]);
            shared_[i][l] = 0;
        }
        if (n_slopes_) n_slopes_[sample - share_.first] = lane.n_slopes;
        int64_t& most = cotangents_.most_slopes[share_.number];
        if (lane.n_slopes > most) most = lane.n_slopes;
    }

    const Task& task_;
    const Cotangents& cotangents_;
    const Record* record_ = nullptr;
    Round round_;
    int64_t* n_slopes_ = nullptr;
    Share share_{};
    int64_t next_ = 0;
    Lane lane_[kLanes];
    R t_{}, h_{}, t_next_{};
    V start_{}, end_{};  // times of stages at the ends of the step
    M is_inside_{};
    V y_[n], p_[n_by_sample]{}, g_[n]{}, inside_[n]{}, slopes_[s][n]{}, by_sample_[n_by_sample]{}, shared_[n_shared];
    V stages_[s][n], k_[s][n], pulled_[s][n];  // of the step at hand
    typename Method::template Replay<Field> replay_;
};

}  // namespace aca
