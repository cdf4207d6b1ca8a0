// Steps of an implicit method in lanes, solved again until rounding, and their transposes.
//
// With the matrix K_i = I - h·a·J_i of the converged stage i, its slope and cotangents are those of
// aca_ext.solver.implicit.step:
//
//     K_iᵀ·grad_k_i = r_i = h·(Σ_outputs w_i·g + Σ_{j>i} a_ji·v_j)        v_i = J_iᵀ·grad_k_i = (grad_k_i - r_i)/(h·a)
#pragma once
#include "ensemble/newton.h"

namespace aca {

// Faults of a repeated step.
enum ReplayFault : int64_t { repeated, not_solved, other_end };

template <typename Field, typename Method>
class ImplicitReplay {
    static constexpr int n = Field::n, s = Method::stages;
    static constexpr int kMostIterations = 60;
    static constexpr double kSlow = 0.1;  // contraction above which iterations take a new Jacobian
    static constexpr double kNear = 100;  // distance from the forward pass, in units of the tolerance of its iterations
    static constexpr double kEps = sizeof(T) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;
    using Sum = Sums<Method>;

  public:
    using Stages = StagesOf<s>;

    // Loads the end of a sample's last step and its tolerance, by which repeated steps are judged.
    void begin(const Task& task, int64_t sample, int l) {
        for (int c = 0; c < n; ++c) {
            const int64_t i = sample * n + c;
            y_next_[c][l] = task.ends[i];
            tolerance_[c][l] = task.rtol_each ? task.rtol_each[i] : T(task.rtol);
            tolerance_[n + c][l] = task.atol_each ? task.atol_each[i] : T(task.atol);
        }
    }

    const V* tolerance() const { return tolerance_; }

    // Solves the stages of a step: their states and slopes. As in the eager engine, the iterations start from the
    // polynomial through the known states, among them the end of the step in the forward pass.
    void solve(const Stages& at, V (*states)[n], V (*k)[n]) {
        const V step = rounded<V>(at.h);
        inverse_ = rounded<V>(chosen(at.h == 0, R{}, (1 / at.h) * (1 / Method::gamma)));
        scale_ = rounded<V>(at.h * Method::gamma);
        fault_ = V{};
        evaluations_ = V{};
        for (int c = 0; c < n; ++c) states[0][c] = at.y[c];
        Field::slope(at.time[0], at.y, at.p, at.shared, k[0]);
        linearise(at, at.time[0], states[0], factors_[0]);
        for_each<s>([&](auto i) {
            if constexpr (i > 0) {
                V base[n], z[n];
                for (int c = 0; c < n; ++c) {
                    const auto slope = [&](int j) { return k[j][c]; };
                    base[c] = fma(step, Sum::template of<typename Sum::template Stage<i>>(slope), at.y[c]);
                    z[c] = predicted<i>(at.y, y_next_, states, c) - base[c];
                }
                solve_stage(at, at.time[i], base, z, factors_[i - 1]);
                for (int c = 0; c < n; ++c) {
                    k[i][c] = inverse_ * z[c];
                    states[i][c] = base[c] + z[c];
                }
                linearise(at, at.time[i], states[i], factors_[i]);
            }
        });
    }

    // Compares the end of the step with that in the forward pass.
    void compare(const Stages& at, const V* y1, double tolerance) {
        V difference[n];
        for (int c = 0; c < n; ++c) difference[c] = y1[c] - y_next_[c];
        const R distance = norms<Field>(difference, at.y, y_next_, at.tolerance);
        const R wanted = wanted_error<Field>(at.y, at.tolerance, tolerance);
        const M is_far = rounded<M>(at.live & ~(distance <= kNear * wanted));
        fault_ = select(is_far & (fault_ == K(0)), K(other_end), fault_);
    }

    // The cotangents `pulled` of the stages' states, from that of the end of the step and, for outputs inside it, those
    // of the slopes. Lanes without outputs inside have zeros for these.
    void transpose(const Stages& at, const V (*states)[n], const V* of_end, const V (*of_slopes)[n], V (*pulled)[n],
                   V* by_sample, V* shared) const {
        const V step = rounded<V>(at.h);
        for_each<s>([&](auto reversed) {
            constexpr int i = s - 1 - decltype(reversed)::value;
            V r[n], g[n];
            for (int c = 0; c < n; ++c) {
                const auto later = [&](int j) { return pulled[j][c]; };
                const V of_outputs = fma(K(Method::b[i]), of_end[c], of_slopes[i][c]);
                r[c] = step * (of_outputs + Sum::template of<typename Sum::template Later<i, s>>(later));
                g[c] = r[c];
            }
            if constexpr (i > 0) factors_[i].solve_transposed(g);
            Field::pull(at.time[i], states[i], at.p, at.shared, g, pulled[i], by_sample, shared);
            if constexpr (i > 0) {  // the product with the Jacobian would multiply g's rounding errors by the stiffness
                for (int c = 0; c < n; ++c) pulled[i][c] = inverse_ * (g[c] - r[c]);
            }
        });
    }

    // Goes on to the step before, which ended at `y`.
    void leave(const V* y) {
        for (int c = 0; c < n; ++c) y_next_[c] = y[c];
    }

    int64_t fault(int l) const { return int64_t(fault_[l]); }
    int64_t evaluations(int l) const { return int64_t(evaluations_[l]); }

  private:
    // Component c of the state of a stage, by the states before it and at both ends.
    template <int i>
    static V predicted(const V* y0, const V* y1, const V (*states)[n], int c) {
        V sum = K(0);
        for_each<s + 2>([&](auto j) {
            constexpr double w = Method::predictors[i][j];
            if constexpr (w != 0) sum = fma(K(w), j < s ? states[j][c] : j == s ? y1[c] : y0[c], sum);
        });
        return sum;
    }

    void linearise(const Stages& at, V time, const V* y, Factors<n>& factors) const {
        V jacobian[n * n];
        Field::jacobian(time, y, at.p, at.shared, jacobian);
        set_matrix(factors, jacobian, scale_);
    }

    // Iterates with the matrix of the stage before. Lanes that converge slowly begin again, with a new one each time.
    void solve_stage(const Stages& at, V time, const V* base, V* z, const Factors<n>& factors) {
        const M rows = rounded<M>(at.live);
        V start[n];
        for (int c = 0; c < n; ++c) start[c] = z[c];
        M solved = iterate(at, time, base, z, rows, &factors);
        const M again = rows & ~solved;
        if (!is_any(again)) return;
        for (int c = 0; c < n; ++c) z[c] = select(again, start[c], z[c]);
        solved |= iterate(at, time, base, z, again, nullptr);
        fault_ = select(rows & ~solved, K(not_solved), fault_);
    }

    // Returns the lanes that have converged.
    ACA_HD_CALLED M iterate(const Stages& at, V time, const V* base, V* z, M rows, const Factors<n>* factors) {
        M active = rows, solved{};
        V state[n], change[n], before = K(kInfinity);
        for (int count = 0; count < kMostIterations && is_any(active); ++count) {
            evaluations_ += select(active, K(1), K(0));
            for (int c = 0; c < n; ++c) state[c] = base[c] + z[c];
            if (!factors) linearise(at, time, state, own_);
            Field::slope(time, state, at.p, at.shared, change);
            for (int c = 0; c < n; ++c) change[c] = scale_ * change[c] - z[c];
            (factors ? *factors : own_).solve(change);
            V size, largest;
            measure(state, change, size, largest);
            const M is_fast = size <= K(kSlow) * before;
            const M done = active & ((size <= K(4 * kEps)) | (~is_fast & (largest <= K(4096 * kEps))));
            const M is_good = factors ? done | is_fast : always();
            const M going = active & (size < K(kInfinity)) & is_good;
            for (int c = 0; c < n; ++c) z[c] = select(going, z[c] + change[c], z[c]);
            solved |= done;
            active = going & ~done;
            before = size;
        }
        return solved;
    }

    // The largest change of an element relative to that element, and to the largest element.
    static void measure(const V* state, const V* change, V& size, V& largest) {
        V top{}, top_after{}, top_change{};
        M is_finite = always();
        for (int c = 0; c < n; ++c) {
            const V after = state[c] + change[c];
            is_finite &= after - after == K(0);
            top_after = maximum(top_after, magnitude(after));
            top = maximum(top, maximum(magnitude(state[c]), magnitude(after)));
            top_change = maximum(top_change, magnitude(change[c]));
        }
        size = V{};
        for (int c = 0; c < n; ++c) {
            const V of_element = maximum(magnitude(state[c]), magnitude(state[c] + change[c]));
            const V ratio = magnitude(change[c]) / maximum(of_element, K(kEps) * top);
            size = maximum(size, select(change[c] == K(0), K(0), ratio));
        }
        size = select(is_finite, size, K(kInfinity));
        largest = top_change / top_after;
    }

    V y_next_[n]{}, tolerance_[2 * n]{};  // at the end of the step in the forward pass
    V scale_{}, inverse_{}, fault_{}, evaluations_{};
    Factors<n> factors_[s], own_;
};

}  // namespace aca
