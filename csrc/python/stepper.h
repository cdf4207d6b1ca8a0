// A trial step, its error norm and the choice of the first step, without a return to Python between their sums:
// aca_ext.solver.runge_kutta.step in C++.
#pragma once
#include <pybind11/stl.h>

#include <cmath>
#include <cstddef>
#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "control/step_control.h"
#include "python/error_norm.h"
#include "python/step_sums.h"

namespace aca {

class Stepper {
  public:
    // `c` and `rows`, (indices, weights), have an entry per stage. `solution` is (indices, b, error weights or None,
    // error weight of the last slope). `states` and `times` allocate for StepSums. `norm` is None, or as for ErrorNorm.
    Stepper(const BoundTarget& on, int64_t n, std::vector<double> c, const py::tuple& rows, const py::tuple& solution,
            bool fsal, py::object states, py::object times, const py::object& norm)
        : sums(on, n, rows, solution, std::move(states), std::move(times)), c_(std::move(c)), fsal_(fsal) {
        if (rows.size() != c_.size()) throw std::invalid_argument("a step needs one c per stage");
        estimates_error_ = !solution[2].is_none();
        if (!estimates_error_) return;
        error_ = solution[2].cast<std::vector<double>>();
        error_last_ = solution[3].cast<double>();
        if (!norm.is_none()) norm_.emplace(on, n, norm.cast<py::tuple>());
    }

    size_t n_stages() const { return sums.rows.size(); }
    bool fsal() const { return fsal_; }

    // A step not yet accepted.
    struct Trial {
        py::object y1, error;
        py::list slopes;
        double error_norm;  // valid only if this stepper computes the norm
    };

    std::vector<double> stage_times(const StepControl& trial) const {
        std::vector<double> times;
        for (const double c : c_) times.push_back(control::stage_time(c, trial.t, trial.h_trial, trial.t_next));
        return times;
    }

    Trial attempt(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                  const py::object& k_first, const py::object& out) {
        const size_t stages = n_stages();
        if (t.size() != stages) throw std::invalid_argument("a step takes one time for each stage");
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        sums.write_times(t, stages);
        const uintptr_t y_address = sums.memory_of(y);
        Trial trial{out, py::none(), py::list(), 0};
        std::vector<uintptr_t> k;
        const auto add = [&](const Row& k_i) {
            k.push_back(k_i.address);
            trial.slopes.append(k_i.tensor);
        };
        add(k_first.is_none() ? slope_of(f, slope, 0, y, y_address) : Row{k_first, sums.memory_of(k_first)});
        for (size_t i = 1; i < stages - fsal_; ++i) {
            const Row y_i = sums.weighted(sums.rows[i], y_address, h, k);
            add(slope_of(f, slope, i, y_i.tensor, y_i.address));
        }

        const BoundTarget& on = sums.on;
        const int64_t n = sums.n;
        const Sum sum = StepSums::select(sums.solution, k);
        if (out.is_none()) trial.y1 = sums.states.take_one().tensor;
        const uintptr_t y1 = sums.memory_of(trial.y1);
        uintptr_t error = 0;
        if (estimates_error_) {
            if (!error_estimate_) error_estimate_ = sums.states.take_one().tensor;  // read before the next step only
            trial.error = error_estimate_;
            error = sums.memory_of(error_estimate_);
            run(n, [&] { on.backend->solution_and_error(on.target, n, y1, error, y_address, h, sum, error_.data()); });
        } else {
            run(n, [&] { on.backend->weighted_sum(on.target, n, y1, y_address, h, sum); });
        }
        if (fsal_) add(slope_of(f, slope, stages - 1, trial.y1, y1));
        if (computes_norm()) {
            const uintptr_t k_last = error_last_ != 0 ? k[stages - 1] : 0;
            trial.error_norm = norm(error, k_last, error_last_ * h, y_address, y1);
        }
        return trial;
    }

    // Returns (y1, slopes, error or None, error norm or None). The error lacks the share of the last slope. `t` are the
    // times of the stages, `k_first` is f(t, y) or None; y1 is written to `out` unless that is None.
    py::tuple step(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                   const py::object& k_first, const py::object& out) {
        Trial trial = attempt(f, t, y, h, k_first, out);
        py::object error_norm = computes_norm() ? py::object(py::float_(trial.error_norm)) : py::none();
        return py::make_tuple(std::move(trial.y1), std::move(trial.slopes), std::move(trial.error), error_norm);
    }

    // Chooses the first step by Hairer's rule; k is f at the start y. Returns false if the norm of k is not finite.
    bool choose_first_step(const py::object& f, StepControl& solve, const py::object& y, const py::object& k) {
        if (!computes_norm()) throw std::invalid_argument("this stepper does not compute the norm");
        const uintptr_t y_address = sums.memory_of(y), k_address = sums.memory_of(k);
        const double norm_f = norm(k_address, 0, 0, y_address, y_address);
        if (!std::isfinite(norm_f)) return false;
        control::propose_euler_step(solve, norm(y_address, 0, 0, y_address, y_address), norm_f);
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        sums.write_times({solve.t_next}, 1);
        const Row y1 = sums.weighted({{0}, {1.0}}, y_address, solve.h_trial, {k_address});
        const Row change = slope_of(f, slope, 0, y1.tensor, y1.address);
        control::choose_first_step(solve, norm(change.address, k_address, -1.0, y_address, y_address));
        return true;
    }

    StepSums sums;

  private:
    bool computes_norm() const { return norm_.has_value(); }

    double norm(uintptr_t partial, uintptr_t k, double w, uintptr_t y0, uintptr_t y1) const {
        return (*norm_)(partial, k, w, y0, y1);
    }

    Row slope_of(const py::object& f, Slope* slope, size_t i, const py::object& y, uintptr_t y_address) {
        Slope::Result k = sums.call(f, slope, i, y, y_address);
        const bool is_own = !k.is_held && sums.is_own(k.tensor, false);
        return is_own ? Row{std::move(k.tensor), k.address} : sums.copy(k.address);
    }

    std::vector<double> c_;
    bool fsal_, estimates_error_;
    std::vector<double> error_;
    double error_last_ = 0;
    py::object error_estimate_;
    std::optional<ErrorNorm> norm_;
};

}  // namespace aca
