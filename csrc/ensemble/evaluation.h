// func and what it pulls back at given states and times, by which generated code is checked.
#pragma once
#include "ensemble/task.h"

namespace aca {

// Rows as in the task; of gw one for each share of the samples.
struct Operands {
    int64_t n_samples;
    const T *t, *y, *p, *w, *g;
    T *k, *gy, *gp;
    double* gw;
};

template <typename Field>
class Evaluation {
    static constexpr int n = Field::n, n_by_sample = Field::n_by_sample, n_learnt = Field::n_learnt;

  public:
    ACA_HD explicit Evaluation(const Operands& of) : of_(of) {}

    ACA_HD void run(const Share& share) {
        for (int64_t first = share.first; first < share.end; first += kLanes * share.stride) {
            int64_t rows[kLanes];
            for (int l = 0; l < kLanes; ++l) {
                const int64_t row = first + l * share.stride;
                rows[l] = row < share.end ? row : first;
            }
            evaluate(rows);
            for (int l = 0; l < kLanes && first + l * share.stride < share.end; ++l)
                write(l, rows[l], of_.gw + share.number * n_learnt);
        }
    }

  private:
    ACA_HD void evaluate(const int64_t* rows) {
        V t;
        for (int l = 0; l < kLanes; ++l) t[l] = of_.t[rows[l]];
        read(y_, of_.y, n, rows), read(p_, of_.p, n_by_sample, rows), read(g_, of_.g, n, rows);
        for (V& x : gp_) x = V{};
        for (V& x : gw_) x = V{};
        Field::slope(t, y_, p_, of_.w, k_);
        Field::pull(t, y_, p_, of_.w, g_, gy_, gp_, gw_);
        if constexpr (Field::has_jacobian) confirm(t);
    }

    // Sets cotangents of y to NaN that the Jacobian does not confirm.
    ACA_HD void confirm(V t) {
        V jacobian[n * n];
        Field::jacobian(t, y_, p_, of_.w, jacobian);
        V sums[n], size{};
        for (int j = 0; j < n; ++j) {
            sums[j] = V{};
            for (int i = 0; i < n; ++i) {
                const V term = jacobian[i * n + j] * g_[i];
                sums[j] += term;
                size += magnitude(term);
            }
        }
        const V allowed = K(sizeof(T) == 8 ? 1e-7 : 1e-3) * size;
        for (int j = 0; j < n; ++j) {
            const M is_same = magnitude(sums[j] - gy_[j]) <= allowed;
            const M is_finite = allowed - allowed == K(0);
            gy_[j] = select(is_finite & ~is_same, K(kNaN), gy_[j]);
        }
    }

    ACA_HD static void read(V* to, const T* from, int count, const int64_t* rows) {
        for (int i = 0; i < count; ++i)
            for (int l = 0; l < kLanes; ++l) to[i][l] = from[rows[l] * count + i];
    }

    ACA_HD void write(int l, int64_t row, double* gw) const {
        for (int c = 0; c < n; ++c) of_.k[row * n + c] = k_[c][l], of_.gy[row * n + c] = gy_[c][l];
        for (int i = 0; i < n_by_sample; ++i) of_.gp[row * n_by_sample + i] = gp_[i][l];
        for (int i = 0; i < n_learnt; ++i) gw[i] += double(gw_[i][l]);
    }

    const Operands& of_;
    V y_[n], g_[n], k_[n], gy_[n], p_[n_by_sample + 1], gp_[n_by_sample + 1], gw_[n_learnt + 1];
};

}  // namespace aca
