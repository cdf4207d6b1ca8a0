// Dense linear systems in lanes: LU factors with partial pivoting, and solutions with the matrix and its transpose.
#pragma once
#include "ensemble/lanes.h"

namespace aca {

// Truths of numbers in double precision.
typedef int64_t Q __attribute__((vector_size(kLanes * sizeof(int64_t))));

template <typename Mask>
inline bool is_any(Mask mask) {
    typedef long long Part __attribute__((vector_size(ACA_VECTOR_BYTES)));
    Part part[sizeof mask / sizeof(Part)];
    std::memcpy(part, &mask, sizeof mask);
    for (int i = 1; i < int(sizeof mask / sizeof(Part)); ++i) part[0] |= part[i];
#if defined(__AVX512F__) && !defined(__clang__)
    return __builtin_ia32_ptestmq512(part[0], part[0], -1) != 0;
#else
    int64_t found = 0;
    for (int i = 0; i < int(sizeof(Part) / sizeof found); ++i) found |= part[0][i];
    return found != 0;
#endif
}

template <int n>
class Factors {
  public:
    // Row i of the matrix, to be set before `factorise`.
    V* operator[](int i) { return a_[i]; }

    // A singular matrix gives solutions that are not finite.
    void factorise() {
        for (int k = 0; k < n; ++k) {
            find_pivot(k);
            if (swaps_[k])
                for (int i = k + 1; i < n; ++i) exchange(pivot_[k] == K(i), a_[k], a_[i], n);
            inverse_[k] = K(1) / a_[k][k];
            for (int i = k + 1; i < n; ++i) {
                const V factor = a_[i][k] * inverse_[k];
                a_[i][k] = factor;
                for (int j = k + 1; j < n; ++j) a_[i][j] = fma(-factor, a_[k][j], a_[i][j]);
            }
        }
    }

    // Replaces x by the solution of A·solution = x.
    void solve(V* x) const {
        for (int k = 0; k < n; ++k) swap(x, k);
        for (int i = 1; i < n; ++i)
            for (int j = 0; j < i; ++j) x[i] = fma(-a_[i][j], x[j], x[i]);
        for (int i = n - 1; i >= 0; --i) {
            for (int j = i + 1; j < n; ++j) x[i] = fma(-a_[i][j], x[j], x[i]);
            x[i] *= inverse_[i];
        }
    }

    // Replaces x by the solution of Aᵀ·solution = x.
    void solve_transposed(V* x) const {
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < i; ++j) x[i] = fma(-a_[j][i], x[j], x[i]);
            x[i] *= inverse_[i];
        }
        for (int i = n - 2; i >= 0; --i)
            for (int j = i + 1; j < n; ++j) x[i] = fma(-a_[j][i], x[j], x[i]);
        for (int k = n - 1; k >= 0; --k) swap(x, k);
    }

  private:
    void find_pivot(int k) {
        V largest = magnitude(a_[k][k]), row = K(k);
        for (int i = k + 1; i < n; ++i) {
            const V size = magnitude(a_[i][k]);
            row = select(size > largest, K(i), row);
            largest = select(size > largest, size, largest);
        }
        pivot_[k] = row;
        swaps_[k] = is_any(row != K(k));
    }

    static void exchange(M mask, V* x, V* y, int count) {
        if (!is_any(mask)) return;
        for (int j = 0; j < count; ++j) {
            const V one = x[j], other = y[j];
            x[j] = select(mask, other, one);
            y[j] = select(mask, one, other);
        }
    }

    void swap(V* x, int k) const {
        if (!swaps_[k]) return;
        for (int i = k + 1; i < n; ++i) exchange(pivot_[k] == K(i), x + k, x + i, 1);
    }

    V a_[n][n], inverse_[n], pivot_[n];  // the pivots are numbers of rows
    bool swaps_[n];                      // some lane
};

// Factorises I - scale·J.
template <int n>
inline void set_matrix(Factors<n>& factors, const V* jacobian, V scale) {
    for (int i = 0; i < n; ++i)
        for (int j = 0; j < n; ++j) {
            const V scaled = scale * jacobian[i * n + j];
            factors[i][j] = i == j ? K(1) - scaled : -scaled;
        }
    factors.factorise();
}

}  // namespace aca
