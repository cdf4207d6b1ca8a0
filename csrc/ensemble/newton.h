// Newton's method in lanes, for the stages of a diagonally implicit method: the twin of aca_ext.solver.implicit.newton,
// to whose tolerance it iterates. Each lane has its own matrix, iterations and failures.
//
// Types, each with an entry for every lane: V numbers of func's type T, M truths about them; R doubles, Q truths about
// them and counts (vectors.h, linear.h). A truth is -1 or 0, so that `count -= truth` counts the lanes where it holds.
#pragma once
#include "ensemble/convergence.h"
#include "ensemble/task.h"

namespace aca {

// A step to be made in every lane.
template <int s>
struct StagesOf {
    V time[s];
    R h;  // 0 in lanes at rest
    const V *y, *p, *tolerance;
    const T* shared;
    Q live;  // lanes that step
};

// The error of a stage to which the iterations go, in units of the tolerance of the solve: below rounding, changes mean
// nothing.
template <typename Field>
R wanted_error(const V* y, const V* tolerance_of_elements, double tolerance) {
    constexpr double eps = sizeof(T) == 8 ? 2.220446049250313e-16 : 1.1920928955078125e-07;
    return larger(R{} + tolerance, 10 * eps * norms<Field>(y, y, y, tolerance_of_elements));
}

template <typename Field, typename Method>
class Newton {
    static constexpr int n = Field::n, s = Method::stages;
    using Sum = Sums<Method>;

    struct Error {
        static constexpr double weight(int j) { return Method::error[j]; }
    };
    template <int i>
    struct Start {
        static constexpr double weight(int j) { return Method::starts[i][j]; }
    };

  public:
    using Stages = StagesOf<s>;

    // Forgets the sample that a lane had.
    void begin(int l) {
        lacks_jacobian_[l] = is_stale_[l] = -1;
        is_current_[l] = is_slow_[l] = 0;
        rate_[l] = 1;
        n_jacobians_[l] = n_factorizations_[l] = n_iterations_[l] = 0;
    }

    // Tells that the steps of these lanes were accepted, so that the next ones start elsewhere.
    void leave(M accepted) { is_current_ &= ~rounded<Q>(accepted); }

    // Advances y by h, given the first slope k[0]: computes the others, the end and the error. Lanes whose iterations
    // fail get numbers that mean nothing.
    void step(const Stages& at, double tolerance, V (*k)[n], V* y1, V* error) {
        begin_step(at, tolerance);
        const V step = rounded<V>(at.h), inverse = rounded<V>(chosen(at.h == 0, R{}, (1 / at.h) * (1 / Method::gamma)));
        for_each<s>([&](auto i) {
            if constexpr (i > 0) {
                if (!is_any(live_)) return;
                V base[n], z[n];
                for (int c = 0; c < n; ++c) {
                    const auto slope = [&](int j) { return k[j][c]; };
                    base[c] = fma(step, Sum::template of<typename Sum::template Stage<i>>(slope), at.y[c]);
                    z[c] = step * Sum::template of<Start<i>>(slope);
                }
                solve(at, at.time[i], base, z);
                for (int c = 0; c < n; ++c) k[i][c] = inverse * z[c];
            }
        });
        for (int c = 0; c < n; ++c) {
            const auto slope = [&](int j) { return k[j][c]; };
            y1[c] = fma(step, Sum::template of<typename Sum::Solution>(slope), at.y[c]);
            error[c] = step * Sum::template of<Error>(slope);
        }
        if constexpr (Method::filter_error) factors_.solve(error);
    }

    // Infinite in lanes whose iterations failed.
    R ratio_or_failure(R ratio) const { return chosen(failed_, R{} + kInfinity, ratio); }
    bool has_failed(int l) const { return failed_[l]; }

    // Writes the counts of a sample that leaves its lane, and where it ends.
    void finish(const Task& task, int64_t sample, int l, const V* y) const {
        task.newton_counts[sample] = {n_jacobians_[l], n_factorizations_[l], n_iterations_[l], h_[l], residual_[l]};
        if (task.ends)
            for (int c = 0; c < n; ++c) task.ends[sample * n + c] = y[c][l];
    }

  private:
    void begin_step(const Stages& at, double tolerance) {
        lacks_jacobian_ |= is_slow_ & ~is_current_;
        is_stale_ |= at.h != h_;
        h_ = at.h;
        scale_ = rounded<V>(h_ * Method::gamma);
        live_ = at.live;
        failed_ = Q{};
        wanted_ = wanted_error<Field>(at.y, at.tolerance, tolerance);
    }

    // Iterates from z; lanes in which that fails get a Jacobian at the start of the step and begin again.
    void solve(const Stages& at, V time, const V* base, V* z) {
        const Q rows = live_;
        V start[n];
        for (int c = 0; c < n; ++c) start[c] = z[c];
        linearise(at, rows & lacks_jacobian_);
        Q solved = iterate(at, time, base, z, rows);
        const Q again = rows & ~(solved | is_current_);
        if (is_any(again)) {
            linearise(at, again);
            for (int c = 0; c < n; ++c) z[c] = select(rounded<M>(again), start[c], z[c]);
            solved |= iterate(at, time, base, z, again);
        }
        live_ = solved;
        failed_ |= rows & ~solved;
    }

    // Returns the lanes that have converged.
    ACA_HD_CALLED Q iterate(const Stages& at, V time, const V* base, V* z, Q rows) {
        Convergence course(rows, wanted_, rate_, is_slow_);
        V state[n], change[n];
        while (is_any(course.active)) {
            const Q active = course.active;
            n_iterations_ -= active;
            for (int c = 0; c < n; ++c) state[c] = base[c] + z[c];
            Field::slope(time, state, at.p, at.shared, change);
            for (int c = 0; c < n; ++c) change[c] = scale_ * change[c] - z[c];
            factorise(is_stale_ & active);
            factors_.solve(change);
            const R size = norms<Field>(change, at.y, state, at.tolerance);
            residual_ = chosen(active, size, residual_);
            const M going = rounded<M>(course.judge(size));
            for (int c = 0; c < n; ++c) z[c] = select(going, z[c] + change[c], z[c]);
        }
        rate_ = course.rate;
        is_slow_ = course.is_slow;
        return course.solved;
    }

    // Evaluates the Jacobians of some lanes at the start of the step.
    void linearise(const Stages& at, Q rows) {
        if (!is_any(rows)) return;
        V found[n * n];
        Field::jacobian(at.time[0], at.y, at.p, at.shared, found);
        for (int i = 0; i < n * n; ++i) jacobian_[i] = select(rounded<M>(rows), found[i], jacobian_[i]);
        n_jacobians_ -= rows;
        is_current_ |= rows;
        is_stale_ |= rows;
        lacks_jacobian_ &= ~rows;
        is_slow_ &= ~rows;
        rate_ = chosen(rows, R{} + 1, rate_);
    }

    // Makes the matrices of all lanes, of which some have changed.
    void factorise(Q changed) {
        if (!is_any(changed)) return;
        set_matrix(factors_, jacobian_, scale_);
        n_factorizations_ -= changed;
        is_stale_ = Q{};
    }

    V scale_{}, jacobian_[n * n]{};
    Factors<n> factors_;
    Q live_{}, failed_{};
    Q is_current_{};  // the Jacobian belongs to the start of this step
    Q is_stale_{};    // the matrix belongs to another step size or Jacobian
    Q lacks_jacobian_{};
    Q is_slow_{};  // the last iterations converged slowly, so that the next step takes a new Jacobian
    R rate_{}, wanted_{}, h_{}, residual_{};
    Q n_jacobians_{}, n_factorizations_{}, n_iterations_{};
};

}  // namespace aca
