// Sums of gradients, to which every evaluation of func in a backward pass adds one term each.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels/ops.h"
#include "python/tensors.h"

namespace aca {

class RunningSums {
  public:
    // `totals` must be tensors that no one else uses. Only small ones on the CPU are added to: for them, torch spends
    // more time on the call than on the sum.
    explicit RunningSums(const py::list& totals) {
        for (py::handle total : totals) {
            dlpack::Tensor seen;
            if (!Torch::found().look(total.ptr(), &seen) || !is_small_and_dense(seen)) {
                totals_.clear();
                return;
            }
            const DType dtype = seen.dtype.bits == 32 ? DType::f32 : DType::f64;
            totals_.push_back({py::reinterpret_borrow<py::object>(total), uintptr_t(seen.data), Layout(seen),
                               Target{dtype, 1, 0, 0, 0}, n_elements(seen)});
        }
    }

    // Adds a term to each total. Returns false, and adds nothing, if one of them is no plain tensor with memory and the
    // layout of its total.
    bool add(const py::sequence& terms) {
        static const Attribute is_neg{"is_neg"};
        if (totals_.empty() || terms.size() != totals_.size()) return false;
        terms_.clear();
        for (size_t i = 0; i < totals_.size(); ++i) {
            const py::object term = terms[i];
            dlpack::Tensor seen;
            if (!Torch::found().look(term.ptr(), &seen) || !totals_[i].layout.is_that_of(seen) ||
                is_neg.call(term.ptr()).ptr() != Py_False)
                return false;
            terms_.push_back(uintptr_t(seen.data));
        }
        for (size_t i = 0; i < totals_.size(); ++i) {
            const Total& total = totals_[i];
            Sum one{};
            one.count = 1, one.x[0] = terms_[i], one.w[0] = 1;
            cpu_backend().weighted_sum(total.target, total.n, total.address, total.address, 1, one);
        }
        return true;
    }

  private:
    struct Total {
        py::object tensor;
        uintptr_t address;
        Layout layout;
        Target target;
        int64_t n;
    };

    static int64_t n_elements(const dlpack::Tensor& x) {
        int64_t n = 1;
        for (int32_t d = 0; d < x.ndim; ++d) n *= x.shape[d];
        return n;
    }

    // Dense: the elements, in whatever order, fill the memory between the first and the last.
    static bool is_small_and_dense(const dlpack::Tensor& x) {
        constexpr int32_t kCpu = 1;
        constexpr uint8_t kFloat = 2;
        constexpr int64_t kLarge = 1 << 15;  // torch shares larger sums among its threads
        int64_t last = 0;
        for (int32_t d = 0; d < x.ndim; ++d) last += (x.shape[d] - 1) * x.strides[d];
        const int64_t n = n_elements(x);
        return x.device.type == kCpu && x.dtype.code == kFloat && x.dtype.lanes == 1 &&
               (x.dtype.bits == 32 || x.dtype.bits == 64) && 0 < n && n <= kLarge && last + 1 == n;
    }

    std::vector<Total> totals_;
    std::vector<uintptr_t> terms_;
};

}  // namespace aca
