// The norm of an error in units of the tolerances, for one state.
#pragma once
#include <pybind11/stl.h>

#include <stdexcept>
#include <vector>

#include "control/step_control.h"
#include "kernels/ops.h"
#include "python/tensors.h"

namespace aca {

class ErrorNorm {
  public:
    // `norm` is (bounds of the segments, tensor of a double for each, rtol, atol, rtol_each, atol_each); states have
    // `n` elements.
    ErrorNorm(const BoundTarget& on, int64_t n, const py::tuple& norm)
        : on_(on), n_(n), bounds_(norm[0].cast<std::vector<int64_t>>()), squares_(norm[1]) {
        for (size_t s = 1; s < bounds_.size(); ++s)
            if (bounds_[s - 1] < 0 || bounds_[s] < bounds_[s - 1] || bounds_[s] > n)
                throw std::invalid_argument("bounds must not decrease, and end within the state");
        for (size_t s = 1; s < bounds_.size(); ++s) sizes_.push_back(bounds_[s] - bounds_[s - 1]);
        squares_address_ = address_of(squares_);
        if (squares_address_ < kLowestAddress && bounds_.size() > 1) refuse_without_memory();
        rtol_ = norm[2].cast<double>(), atol_ = norm[3].cast<double>();
        rtol_each_ = norm[4].cast<uintptr_t>(), atol_each_ = norm[5].cast<uintptr_t>();
    }

    // The norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|)): the largest RMS over the segments, NaN where any is.
    double operator()(uintptr_t partial, uintptr_t k, double w, uintptr_t y0, uintptr_t y1) const {
        const ErrorRatio ratio{partial, k, w, y0, y1, rtol_, atol_, rtol_each_, atol_each_};
        const int segments = int(bounds_.size()) - 1;
        run(n_,
            [&] { on_.backend->squared_error_ratio(on_.target, segments, bounds_.data(), squares_address_, ratio); });
        const auto* squares = reinterpret_cast<const double*>(squares_address_);
        std::vector<double> copied;
        if (on_.backend != &cpu_backend()) {
            static const Attribute tolist{"tolist"};
            copied = tolist.call(squares_.ptr()).cast<std::vector<double>>();
            squares = copied.data();
        }
        return control::norm_of_sums(squares, sizes_.data(), segments);
    }

  private:
    BoundTarget on_;
    int64_t n_;
    std::vector<int64_t> bounds_, sizes_;  // of the segments
    py::object squares_;                   // the sum of each segment
    uintptr_t squares_address_, rtol_each_, atol_each_;
    double rtol_, atol_;
};

}  // namespace aca
