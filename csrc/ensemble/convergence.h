// Convergence of simplified Newton iterations in lanes: the twin of aca_ext.solver.implicit.convergence in C++, where
// the constants have their reasons. R and Q as in newton.h.
#pragma once
#include "ensemble/linear.h"

namespace aca {

template <typename X>
inline X chosen(Q mask, X a, X b) {
    return mask ? a : b;
}
inline R larger(R a, R b) { return a < b ? b : a; }

inline R roots(R x) {
#if defined(__FMA__) && !defined(__clang__)
    Doubles part[sizeof(R) / sizeof(Doubles)];
    std::memcpy(part, &x, sizeof x);
    for (Doubles& each : part) each = root(each);
    std::memcpy(&x, part, sizeof x);
#else
    for (int l = 0; l < kLanes; ++l) x[l] = math::sqrt(x[l]);
#endif
    return x;
}

class Convergence {
    static constexpr int kMostIterations = 10;
    static constexpr double kFast = 0.02, kLowestRate = 0.1, kLargestAtFirst = 3, kInfinite = 1e300;

  public:
    Convergence(Q rows, R wanted, R known, Q was_slow)
        : active(rows), solved(Q{}), rate(known), is_slow(was_slow), wanted_(wanted), rate_(known) {}

    // Judges an iteration by the sizes of its changes; returns the lanes that have not diverged in it.
    Q judge(R size) {
        ++count_;
        Q going = active & (size < kInfinite);
        if (count_ > 1) going = compare(going, size);
        const Q done = going & ((size == 0) | (rate_ * size <= wanted_));
        rate = chosen(done, chosen(rate == 1, rate_, larger(rate, rate_)), rate);
        solved |= done;
        active = count_ < kMostIterations ? going & ~done : Q{};
        before_ = last_;
        last_ = size;
        return going;
    }

    Q active, solved;  // lanes that need another iteration, and those that have converged
    R rate;
    Q is_slow;

  private:
    Q compare(Q going, R size) {
        const R contraction = count_ == 2 ? size / last_ : roots(size / before_);
        going &= contraction < (count_ == 2 ? kLargestAtFirst : 1.0);
        const R left = larger(1 - contraction, R{} + 1 / kInfinite);
        R rate = chosen(going, larger(R{} + kLowestRate, contraction / left), rate_);
        if (count_ > 2) {
            R last = rate * size;
            for (int i = count_; i < kMostIterations; ++i) last *= contraction;
            going &= last <= wanted_;
        }
        is_slow = chosen(going, Q(contraction > kFast), is_slow);
        rate_ = rate;
        return going;
    }

    const R wanted_;
    R rate_, last_{}, before_{};  // and the sizes of the last two changes
    int count_ = 0;
};

}  // namespace aca
