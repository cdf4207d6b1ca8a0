// Dense linear systems of few unknowns: LU factors with partial pivoting. LAPACK takes longer to call than to solve
// them.
#pragma once
#include <algorithm>
#include <cmath>

namespace aca {

// The factors of a square matrix, row after row; `swaps[k]` is the row that changed places with row k.
template <typename T>
struct Factors {
    int n;
    T* a;
    int* swaps;

    // Replaces the matrix `a` by its factors. A singular one gives solutions that are not finite.
    void factorise() const {
        for (int k = 0; k < n; ++k) {
            int pivot = k;
            for (int i = k + 1; i < n; ++i)
                if (std::abs(a[i * n + k]) > std::abs(a[pivot * n + k])) pivot = i;
            swaps[k] = pivot;
            if (pivot != k) std::swap_ranges(a + k * n, a + (k + 1) * n, a + pivot * n);
            for (int i = k + 1; i < n; ++i) {
                const T factor = a[i * n + k] /= a[k * n + k];
                for (int j = k + 1; j < n; ++j) a[i * n + j] -= factor * a[k * n + j];
            }
        }
    }

    // Replaces x by the solution of A·solution = x.
    void solve(T* x) const {
        for (int k = 0; k < n; ++k) std::swap(x[k], x[swaps[k]]);
        for (int i = 1; i < n; ++i)
            for (int j = 0; j < i; ++j) x[i] -= a[i * n + j] * x[j];
        for (int i = n - 1; i >= 0; --i) {
            for (int j = i + 1; j < n; ++j) x[i] -= a[i * n + j] * x[j];
            x[i] /= a[i * n + i];
        }
    }

    // Replaces x by the solution of Aᵀ·solution = x.
    void solve_transposed(T* x) const {
        for (int i = 0; i < n; ++i) {
            for (int j = 0; j < i; ++j) x[i] -= a[j * n + i] * x[j];
            x[i] /= a[i * n + i];
        }
        for (int i = n - 2; i >= 0; --i)
            for (int j = i + 1; j < n; ++j) x[i] -= a[j * n + i] * x[j];
        for (int k = n - 1; k >= 0; --k) std::swap(x[k], x[swaps[k]]);
    }
};

}  // namespace aca
