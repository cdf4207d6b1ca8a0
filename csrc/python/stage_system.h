// The systems of Newton's method for the stages of an implicit step, one for each block of the state, in C++.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <variant>
#include <vector>

#include "kernels/dense.h"
#include "kernels/ops.h"
#include "python/tensors.h"

namespace aca {

using Addresses = std::vector<uintptr_t>;

// Factors of the matrices K_ij = δ_ij·I - h·a_ij·J_i, where i and j count the stages of a group. States are the blocks
// one after the other, of m elements each. Arrays have the dtype of the target, and are given by their addresses.
class StageSystem {
  public:
    // `jacobians` holds for each stage the matrices J of all blocks. `h_each` is the address of the step sizes of the
    // blocks (double), or 0 if all have the size `h`.
    StageSystem(const BoundTarget& on, int64_t blocks, int m, const Addresses& jacobians,
                const std::vector<std::vector<double>>& a, double h, uintptr_t h_each)
        : blocks_(blocks), m_(m), stages_(int(a.size())), a_(a) {
        if (blocks < 0 || m < 1 || a.empty()) throw std::invalid_argument("a system has stages with elements");
        for (const auto& row : a)
            if (row.size() != a.size()) throw std::invalid_argument("a must be a square matrix");
        check(jacobians);
        if (h_each) {
            check_address(h_each);
            const double* const each = reinterpret_cast<const double*>(h_each);
            h_.assign(each, each + blocks);
        } else {
            h_.assign(size_t(blocks), h);
        }
        const size_t n = size_t(m_) * size_t(stages_);
        swaps_.resize(size_t(blocks) * n);
        if (on.target.dtype == DType::f32)
            a_factors_ = std::vector<float>(size_t(blocks) * n * n);
        else
            a_factors_ = std::vector<double>(size_t(blocks) * n * n);
        with_factors([&](auto factors, int64_t b) { factorise(factors, jacobians, b); });
    }

    int64_t n_elements() const { return blocks_ * m_; }

    // out = K⁻¹·r, or K⁻ᵀ·r; lists have an entry for each stage.
    void solve(const Addresses& r, const Addresses& out, bool transposed) {
        check(r);
        check(out);
        with_factors([&](auto factors, int64_t b) {
            using T = std::decay_t<decltype(*factors.a)>;
            T* const x = room(factors);
            for (int i = 0; i < stages_; ++i) std::copy_n(at<T>(r[i], b), m_, x + i * m_);
            transposed ? factors.solve_transposed(x) : factors.solve(x);
            for (int i = 0; i < stages_; ++i) std::copy_n(x + i * m_, m_, at<T>(out[i], b));
        });
    }

    // An iteration: change = K⁻¹·(h·Σ_j a_ij·slope_j - z_i) and next = z + change.
    void correct(const Addresses& slopes, const Addresses& z, const Addresses& next, const Addresses& change) {
        for (const Addresses* const list : {&slopes, &z, &next, &change}) check(*list);
        with_factors([&](auto factors, int64_t b) {
            using T = std::decay_t<decltype(*factors.a)>;
            T* const x = room(factors);
            for (int i = 0; i < stages_; ++i) {
                T* const part = x + i * m_;
                std::fill_n(part, m_, T(0));
                for (int j = 0; j < stages_; ++j) add(T(h_[size_t(b)] * a_[i][j]), at<T>(slopes[j], b), part);
                add(T(-1), at<T>(z[i], b), part);
            }
            factors.solve(x);
            for (int i = 0; i < stages_; ++i)
                for (int c = 0; c < m_; ++c) {
                    at<T>(change[i], b)[c] = x[i * m_ + c];
                    at<T>(next[i], b)[c] = at<T>(z[i], b)[c] + x[i * m_ + c];
                }
        });
    }

  private:
    template <typename T>
    T* at(uintptr_t address, int64_t block) const {
        return reinterpret_cast<T*>(address) + block * m_;
    }

    template <typename T>
    void add(T weight, const T* x, T* to) const {
        if (weight == 0) return;
        for (int c = 0; c < m_; ++c) to[c] += weight * x[c];
    }

    // Calls f with the factors of each block and its number.
    template <typename F>
    void with_factors(F&& f) {
        const int n = m_ * stages_;
        run(blocks_ * n * n, [&] {
            std::visit(
                [&](auto& all) {
                    for (int64_t b = 0; b < blocks_; ++b)
                        f(Factors<std::decay_t<decltype(all[0])>>{n, all.data() + b * n * n, swaps_.data() + b * n}, b);
                },
                a_factors_);
        });
    }

    template <typename T>
    void factorise(const Factors<T>& factors, const Addresses& jacobians, int64_t b) const {
        const int n = factors.n;
        for (int i = 0; i < stages_; ++i) {
            const T* const jacobian = reinterpret_cast<const T*>(jacobians[size_t(i)]) + b * m_ * m_;
            for (int j = 0; j < stages_; ++j) {
                const T scale = T(h_[size_t(b)] * a_[i][j]);
                for (int row = 0; row < m_; ++row)
                    for (int column = 0; column < m_; ++column)
                        factors.a[(i * m_ + row) * n + j * m_ + column] =
                            T(i == j && row == column) - scale * jacobian[row * m_ + column];
            }
        }
        factors.factorise();
    }

    // Memory for the unknowns of one block.
    template <typename T>
    static T* room(const Factors<T>& factors) {
        thread_local std::vector<T> unknowns;
        if (unknowns.size() < size_t(factors.n)) unknowns.resize(size_t(factors.n));
        return unknowns.data();
    }

    void check(const Addresses& addresses) const {
        if (addresses.size() != a_.size()) throw std::invalid_argument("a list must have one address for each stage");
        for (const uintptr_t address : addresses) check_address(address);
    }

    void check_address(uintptr_t address) const {
        if (blocks_ > 0 && address < kLowestAddress) refuse_without_memory();
    }

    int64_t blocks_;
    int m_, stages_;
    std::vector<std::vector<double>> a_;
    std::vector<double> h_;
    std::vector<int> swaps_;
    std::variant<std::vector<double>, std::vector<float>> a_factors_;
};

// The sizes of the changes of a state in one row of it.
struct RelativeChanges {
    double of_element = 0;  // of an element relative to itself, the largest; infinite if the new state is not finite
    double of_largest = 0;  // the largest one relative to the largest element of the new state
};

// Elements below rounding count as rounding.
template <typename T>
RelativeChanges relative_changes(int64_t n, const T* change, const T* state) {
    T largest = 0, largest_after = 0, largest_change = 0;
    bool finite = true;
    for (int64_t i = 0; i < n; ++i) {
        const T after = std::abs(state[i] + change[i]);
        finite = finite && std::isfinite(after);
        largest_after = std::max(largest_after, after);
        largest = std::max(largest, std::max(std::abs(state[i]), after));
        largest_change = std::max(largest_change, std::abs(change[i]));
    }
    if (!finite) return {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()};
    const T lowest = std::numeric_limits<T>::epsilon() * largest;
    T ratio = 0;
    for (int64_t i = 0; i < n; ++i)
        if (change[i] != 0) {
            const T size = std::max(std::abs(state[i]), std::abs(state[i] + change[i]));
            ratio = std::max(ratio, std::abs(change[i]) / std::max(size, lowest));
        }
    return {double(ratio), double(largest_change / largest_after)};
}

inline RelativeChanges relative_changes_at(DType dtype, int64_t n, uintptr_t change, uintptr_t state) {
    const auto of = [&](auto zero) {
        using T = decltype(zero);
        return relative_changes(n, reinterpret_cast<const T*>(change), reinterpret_cast<const T*>(state));
    };
    return dtype == DType::f32 ? of(float{}) : of(double{});
}

}  // namespace aca
