// Weighted sums of a Runge-Kutta step, shared by a step and its transpose: the tableau, the buffers that the sums are
// written to, and the calls of f between them.
#pragma once
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "kernels/ops.h"
#include "python/admission.h"
#include "python/slope_function.h"
#include "python/tensors.h"

namespace aca {

class StepSums {
  public:
    // Nonzero weights of a sum over slopes, and the slopes that they belong to.
    struct Weights {
        std::vector<int> index;
        std::vector<double> weight;
    };
    // A sum of any length; terms of weight zero are dropped.
    struct Terms {
        std::vector<uintptr_t> x;
        std::vector<double> w;
        void add(double weight, uintptr_t address) {
            if (weight == 0) return;
            x.push_back(address);
            w.push_back(weight);
        }
    };

    // `tableau_rows` holds (indices, weights) for each stage, `solution_row` starts with those of the solution.
    // `allocate_states()` and `allocate_times()` return tuples of tensors for Rows: laid out like the state, and 0-d.
    StepSums(const BoundTarget& target, int64_t n_elements, const py::tuple& tableau_rows,
             const py::tuple& solution_row, py::object allocate_states, py::object allocate_times)
        : on(target),
          n(n_elements),
          states(allocate_states),
          times_(std::move(allocate_times)),
          copies_(std::move(allocate_states)) {
        if (tableau_rows.size() > size_t(kMaxTerms)) throw std::invalid_argument("a step has at most 16 stages");
        for (py::handle row : tableau_rows) {
            rows.push_back(read_weights(row.cast<py::tuple>()));
            a.emplace_back(tableau_rows.size());
            for (size_t j = 0; j < rows.back().index.size(); ++j)
                a.back().at(size_t(rows.back().index[j])) = rows.back().weight[j];
        }
        solution = read_weights(solution_row);
    }

    // Address of the elements of `x`; raises for a tensor without memory.
    uintptr_t memory_of(const py::object& x) const { return check_memory(address_of(x)); }

    void write_times(const std::vector<double>& t, size_t count) {
        times_.take(count);
        if (times_.address() < kLowestAddress) refuse_without_memory();
        on.backend->write_scalars(on.target, int(count), times_.address(), t.data());
    }

    // f at the time number `i` of those written last.
    Slope::Result call(const py::object& f, Slope* slope, size_t i, const py::object& y, uintptr_t y_address) const {
        Slope::Result k = slope_at(f, slope, times_[i].ptr(), y.ptr(), y_address);
        check_memory(k.address);
        return k;
    }

    // y + h·Σ_j weight_j·k_j
    Row weighted(const Weights& row, uintptr_t y, double h, const std::vector<uintptr_t>& k) {
        Row out = states.take_one();
        const Sum sum = select(row, k);
        check_memory(out.address);
        run(n, [&] { on.backend->weighted_sum(on.target, n, out.address, y, h, sum); });
        return out;
    }

    // out = base + h·Σ terms, in several launches if there are more than kMaxTerms.
    void sum_up(uintptr_t out, uintptr_t base, double h, const Terms& terms) const {
        for (size_t first = 0; first < terms.x.size(); first += kMaxTerms) {
            Sum sum{};
            for (size_t j = first; j < terms.x.size() && sum.count < kMaxTerms; ++j, ++sum.count)
                sum.x[sum.count] = terms.x[j], sum.w[sum.count] = terms.w[j];
            run(n, [&] { on.backend->weighted_sum(on.target, n, out, base, h, sum); });
            base = out;
        }
    }

    static Sum select(const Weights& row, const std::vector<uintptr_t>& k) {
        Sum sum{};
        sum.count = int(row.index.size());
        for (int j = 0; j < sum.count; ++j) {
            sum.x[j] = k[size_t(row.index[size_t(j)])];
            sum.w[j] = row.weight[size_t(j)];
        }
        return sum;
    }

    // False if someone else could change `x` before the step is done: func may write all its slopes, and a backward
    // pass all its results, into one buffer. False for small tensors too, since copying one costs less than this test.
    bool is_own(const py::object& x, bool has_graph) const {
        return !is_small() && Ownership::known().is_sole(x.ptr(), has_graph);
    }

    Row copy(uintptr_t x) {
        Row out = copies_.take();
        copy_to(check_memory(out.address), x);
        return out;
    }

    void copy_to(uintptr_t to, uintptr_t from) const {
        if (n == 0) return;
        if (is_small()) {
            std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size_t(n_bytes()));
        } else {
            Terms one;
            one.add(1, from);
            sum_up(to, 0, 1, one);
        }
    }

    // Address of place `i` in a buffer for results of a replay: its slopes, then its cotangents. Small states only.
    uintptr_t small_copy(size_t i) {
        const size_t pitch = (size_t(n_bytes()) + sizeof(Line) - 1) / sizeof(Line);
        small_copies_.resize(2 * rows.size() * pitch);
        return reinterpret_cast<uintptr_t>(small_copies_.data() + i * pitch);
    }

    bool is_small() const {
        constexpr int64_t kSmall = 4096;  // bytes
        return on.backend == &cpu_backend() && n_bytes() <= kSmall;
    }
    int64_t n_bytes() const { return n * (on.target.dtype == DType::f32 ? 4 : 8); }

    const BoundTarget on;
    const int64_t n;
    std::vector<Weights> rows;           // of the tableau, one per stage
    std::vector<std::vector<double>> a;  // the same with their zeros
    Weights solution;
    Rows states;
    bool has_checked_storage = false;  // of a cotangent, by check_whole: too slow for every evaluation

  private:
    struct alignas(64) Line {
        std::byte bytes[64];
    };

    static Weights read_weights(const py::tuple& row) {
        Weights result{row[0].cast<std::vector<int>>(), row[1].cast<std::vector<double>>()};
        if (result.index.size() != result.weight.size() || result.index.size() > size_t(kMaxTerms))
            throw std::invalid_argument("a row of the tableau needs one index per weight, and at most 16 of them");
        return result;
    }

    uintptr_t check_memory(uintptr_t address) const {
        if (address < kLowestAddress && n > 0) refuse_without_memory();
        return address;
    }

    Rows times_;
    Copies copies_;
    std::vector<Line> small_copies_;
};

}  // namespace aca
