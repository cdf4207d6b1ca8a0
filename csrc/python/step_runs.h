// Several steps in one call, up to the next step with an output inside it, or to the end of the solve.
#pragma once
#include <utility>

#include "control/step_control.h"
#include "python/step_control_bindings.h"
#include "python/stepper.h"

namespace aca {

// Makes steps from (y, k), where k is f(t, y) or None, until a step has an output inside it or the status is no longer
// running. `slot()` returns the checkpoint buffer for a trial's solution and `accept()` keeps it; both may be None.
// `rows` holds one tensor per requested time, which gets the state if a step ends at that time. Returns (y, k) of the
// next step; (t, h, t_next, first output due, end of the outputs due) of each accepted step; and (y, slopes) of the
// last step if outputs are due inside it, else None.
inline py::tuple run_steps(Stepper& stepper, const py::object& f, SolveControl& control, const py::object& slot,
                           const py::object& accept, py::object y, py::object k, const py::tuple& rows) {
    StepControl& s = control.solve;
    py::list accepted;
    py::object inside = py::none();
    while (s.status == Status::running) {
        control::propose(s);
        if (s.status != Status::running) break;
        py::object out = slot.is_none() ? slot : slot();
        if (slot.is_none() && !s.is_adaptive && control::lands_on_output(s)) out = rows[size_t(s.next_output)];
        auto trial = stepper.attempt(f, stepper.stage_times(s), y, s.h_trial, k, out);
        control::judge(s, s.is_adaptive ? trial.error_norm : 0.0);
        if (!s.is_accepted) {
            k = trial.slopes[0];
            continue;
        }
        accepted.append(py::make_tuple(s.t_start, s.h_done, s.t_done, s.first_due, s.end_due));
        if (!accept.is_none()) accept();
        const bool is_at_end = s.end_due > s.first_due && control::position(s, s.end_due - 1) == 1.0;
        if (is_at_end) {
            const py::object row = rows[size_t(s.end_due - 1)];
            if (!row.is(trial.y1)) row.attr("copy_")(trial.y1);
        }
        if (s.end_due - s.first_due > is_at_end) inside = py::make_tuple(y, trial.slopes);
        y = std::move(trial.y1);
        k = py::none();
        if (stepper.fsal()) k = trial.slopes[stepper.n_stages() - 1];
        if (!inside.is_none()) break;
    }
    return py::make_tuple(y, k, accepted, inside);
}

}  // namespace aca
