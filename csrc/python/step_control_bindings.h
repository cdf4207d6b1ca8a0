// Python bindings of step control: for one solve, and for many solves at once as arrays.
#pragma once
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "control/step_control.h"

namespace aca {

namespace py = pybind11;

inline const char* name_of(Status status) {
    const char* const names[] = {"running", "done", "step_limit", "step_size", "not_finite", "no_room"};
    return names[int(status)];
}

// The step control of one solve on the host, with its times.
class SolveControl {
  public:
    SolveControl(const Controller& controller, bool is_adaptive, int64_t max_num_steps, std::vector<double> times,
                 std::vector<double> stops)
        : solve(control::begin(controller, 0, is_adaptive, max_num_steps)),
          times_(std::move(times)),
          stops_(std::move(stops)) {
        if (times_.empty() || (times_.size() > 1 && stops_.empty()))
            throw std::invalid_argument(
                "a solve needs a time; with several times, it needs a stop at the last of them");
        control::set_times(solve, times_.front(), times_.back(), uintptr_t(times_.data()), int64_t(times_.size()),
                           uintptr_t(stops_.data()), int64_t(stops_.size()));
        if (times_.size() == 1) solve.status = Status::done;
    }
    SolveControl(const SolveControl&) = delete;  // `solve` points to the times

    // Continues from the error ratios of earlier steps, newest first.
    void set_ratios(const std::vector<double>& ratios) {
        solve.n_ratios = int(ratios.size() < 3 ? ratios.size() : 3);
        for (int i = 0; i < solve.n_ratios; ++i) solve.ratios[i] = ratios[size_t(i)];
    }
    std::vector<double> ratios() const { return {solve.ratios, solve.ratios + solve.n_ratios}; }

    StepControl solve;

  private:
    std::vector<double> times_, stops_;
};

// The step controls of independent solves, one per row (a sample) of `times`, which may end in NaN as padding.
class BatchControl {
  public:
    using Array = py::array_t<double, py::array::c_style | py::array::forcecast>;

    BatchControl(const Controller& controller, double first_step, int64_t max_num_steps, const Array& times)
        : times_(times),
          controls_(size_t(times.shape(0)), control::begin(controller, first_step, true, max_num_steps)) {
        for (size_t i = 0; i < controls_.size(); ++i) {
            const double* const row = times_.data(py::ssize_t(i), 0);
            const int64_t count = control::count_times(row, times.shape(1));
            control::set_times(controls_[i], row[0], row[count - 1], uintptr_t(row), count, uintptr_t(row + count - 1),
                               1);
            if (count == 1) controls_[i].status = Status::done;
            controls_[i].h = first_step;
        }
    }
    BatchControl(const BatchControl&) = delete;

    void propose_euler_steps(const Array& norm_y, const Array& norm_f) {
        check(norm_y), check(norm_f);
        for (size_t i = 0; i < controls_.size(); ++i)
            control::propose_euler_step(controls_[i], norm_y.data()[i], norm_f.data()[i]);
    }
    void choose_first_steps(const Array& norm_change) {
        check(norm_change);
        for (size_t i = 0; i < controls_.size(); ++i) {
            if (controls_[i].status != Status::running) continue;
            control::choose_first_step(controls_[i], norm_change.data()[i]);
            controls_[i].status = Status::running;  // where it was not finite, the first trial decides
        }
    }

    // Finished solves get a trial of length zero.
    void propose() {
        for (StepControl& s : controls_) {
            if (s.status == Status::running) {
                control::propose(s);
            } else {
                s.h_trial = 0;
                s.t_next = s.t;
            }
        }
    }

    // The ratios of finished solves are ignored.
    void judge(const Array& ratios) {
        check(ratios);
        for (size_t i = 0; i < controls_.size(); ++i) {
            StepControl& s = controls_[i];
            s.is_accepted = 0;
            if (s.status == Status::running) control::judge(s, ratios.data()[i]);
        }
    }

    // Resumes the solves whose error ratio was not finite, if a smaller step is possible.
    void retry() {
        for (StepControl& s : controls_)
            if (s.status == Status::not_finite && control::can_shrink(s)) s.status = Status::running;
    }

    // Returns one member of all controls as an array that shares their memory.
    template <typename T>
    static py::array view(const py::object& self, T StepControl::* member) {
        auto& controls = self.cast<BatchControl&>().controls_;
        T* const first = controls.empty() ? nullptr : &(controls[0].*member);
        return py::array_t<T>({py::ssize_t(controls.size())}, {py::ssize_t(sizeof(StepControl))}, first, self);
    }
    static py::array status(const py::object& self) {
        static_assert(sizeof(Status) == sizeof(int));
        auto& controls = self.cast<BatchControl&>().controls_;
        const auto* const first = controls.empty() ? nullptr : reinterpret_cast<const int*>(&controls[0].status);
        return py::array_t<int>({py::ssize_t(controls.size())}, {py::ssize_t(sizeof(StepControl))}, first, self);
    }

  private:
    void check(const Array& values) const {
        if (values.ndim() != 1 || size_t(values.shape(0)) != controls_.size())
            throw std::invalid_argument("pass one value for each solve");
    }

    Array times_;
    std::vector<StepControl> controls_;
};

inline void bind_step_control(py::module_& m) {
    py::class_<SolveControl>(m, "SolveControl")
        .def(py::init<const Controller&, bool, int64_t, std::vector<double>, std::vector<double>>(),
             py::arg("controller"), py::arg("is_adaptive"), py::arg("max_num_steps"), py::arg("times"),
             py::arg("stops"))
        .def("propose", [](SolveControl& s) { control::propose(s.solve); })
        .def("judge", [](SolveControl& s, double ratio) { control::judge(s.solve, ratio); })
        .def("resume", [](SolveControl& s) { s.solve.status = Status::running; })
        .def("position", [](const SolveControl& s, int64_t output) { return control::position(s.solve, output); })
        .def_property_readonly("can_shrink", [](const SolveControl& s) { return control::can_shrink(s.solve); })
        .def_property_readonly("status", [](const SolveControl& s) { return name_of(s.solve.status); })
        .def_property("ratios", &SolveControl::ratios, &SolveControl::set_ratios)
        .def_property(
            "t", [](const SolveControl& s) { return s.solve.t; }, [](SolveControl& s, double t) { s.solve.t = t; })
        .def_property(
            "h", [](const SolveControl& s) { return s.solve.h; }, [](SolveControl& s, double h) { s.solve.h = h; })
        .def_property_readonly("sign", [](const SolveControl& s) { return s.solve.sign; })
        .def_property_readonly("length", [](const SolveControl& s) { return s.solve.length; })
        .def_property_readonly("ratio", [](const SolveControl& s) { return s.solve.ratio; })
        .def_property_readonly("n_steps", [](const SolveControl& s) { return s.solve.n_steps; })
        .def_property_readonly("n_accepted", [](const SolveControl& s) { return s.solve.n_accepted; })
        .def_property_readonly("h_trial", [](const SolveControl& s) { return s.solve.h_trial; })
        .def_property_readonly("t_next", [](const SolveControl& s) { return s.solve.t_next; })
        .def_property_readonly("is_accepted", [](const SolveControl& s) { return s.solve.is_accepted != 0; })
        .def_property_readonly(
            "due", [](const SolveControl& s) { return py::make_tuple(s.solve.first_due, s.solve.end_due); });

    const auto view = [](auto member) {
        return [member](const py::object& self) { return BatchControl::view(self, member); };
    };
    py::class_<BatchControl>(m, "BatchControl")
        .def(py::init<const Controller&, double, int64_t, const BatchControl::Array&>(), py::arg("controller"),
             py::arg("first_step"), py::arg("max_num_steps"), py::arg("times"))
        .def("propose_euler_steps", &BatchControl::propose_euler_steps)
        .def("choose_first_steps", &BatchControl::choose_first_steps)
        .def("propose", &BatchControl::propose)
        .def("judge", &BatchControl::judge)
        .def("retry", &BatchControl::retry)
        .def_property_readonly("status", &BatchControl::status)
        .def_property_readonly("t", view(&StepControl::t))
        .def_property_readonly("h", view(&StepControl::h))
        .def_property_readonly("ratio", view(&StepControl::ratio))
        .def_property_readonly("h_trial", view(&StepControl::h_trial))
        .def_property_readonly("t_next", view(&StepControl::t_next))
        .def_property_readonly("is_accepted", view(&StepControl::is_accepted))
        .def_property_readonly("t_start", view(&StepControl::t_start))
        .def_property_readonly("first_due", view(&StepControl::first_due))
        .def_property_readonly("end_due", view(&StepControl::end_due))
        .def_property_readonly("n_steps", view(&StepControl::n_steps))
        .def_property_readonly("n_accepted", view(&StepControl::n_accepted));
    m.attr("STATUSES") = py::make_tuple("running", "done", "step_limit", "step_size", "not_finite", "no_room");
}

}  // namespace aca
