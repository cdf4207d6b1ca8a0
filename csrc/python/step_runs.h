// Several steps in one call: those between two outputs of an adaptive solve, and those of a fixed grid.
#pragma once
#include <cmath>
#include <utility>
#include <vector>

#include "control/controller.h"
#include "python/stepper.h"

namespace aca {

// Makes at most `trials` steps that need no decision but the controller's: up to the first that reaches `stop`, on
// which it lands, or passes `output`; none after one whose error is not finite or that no smaller step could follow, or
// that would not move. `start` is (t, h, y, f(t, y) or None, up to three last error ratios, newest first); h counts in
// the direction of `stop`. `slot()` is where a solution belongs and `accept()` keeps it, or both are None. Returns
// (start of the step to come, (t, h, t_next) of each accepted step, number of rejected ones, (y, slopes) of the last
// step if it reached one of the two, else None, error ratio of the last trial if it was rejected and the caller has to
// look, else None).
inline py::tuple leap(Stepper& stepper, const py::object& f, const Controller& controller, const py::object& slot,
                      const py::object& accept, const py::tuple& start, double stop, double output, int64_t trials) {
    double t = start[0].cast<double>(), h = start[1].cast<double>();
    py::object y = start[2], k = start[3], reached = py::none(), alarm = py::none();
    auto ratios = start[4].cast<std::vector<double>>();
    const double sign = stop < t ? -1 : 1;
    py::list accepted;
    int64_t n_rejected = 0;
    for (; trials > 0; --trials) {
        const bool is_cut = sign * (t + sign * h) >= sign * stop || std::abs(stop - t) <= h * (1 + 1e-12);
        const double t_next = is_cut ? stop : t + sign * h, h_now = is_cut ? std::abs(stop - t) : h;
        if (t_next == t) break;
        auto trial = stepper.attempt(f, stepper.stage_times(t, sign * h_now, t_next), y, sign * h_now, k,
                                     slot.is_none() ? slot : slot());
        if (trial.error_norm <= 1) {
            accepted.append(py::make_tuple(t, sign * h_now, t_next));
            if (!accept.is_none()) accept();
            if (is_cut || sign * t_next >= sign * output) reached = py::make_tuple(y, trial.slopes);
            t = t_next;
            y = std::move(trial.y1);
            k = py::none();
            if (stepper.fsal()) k = trial.slopes[stepper.n_stages() - 1];
            ratios.insert(ratios.begin(), trial.error_norm);
            if (ratios.size() > 3) ratios.pop_back();
            const double grown = controller.grow(h_now, ratios.data(), int(ratios.size()));
            h = is_cut && h > grown ? h : grown;  // a step cut short says little about the size to come
            if (!reached.is_none()) break;
        } else {
            ++n_rejected;
            k = trial.slopes[0];
            h = controller.shrink(h_now, trial.error_norm);
            if (std::isfinite(trial.error_norm) && h >= controller.min_step && t + sign * h * 0.5 != t) continue;
            alarm = py::float_(trial.error_norm);
            break;
        }
    }
    return py::make_tuple(py::make_tuple(t, h, y, k, ratios), accepted, n_rejected, reached, alarm);
}

// Makes the steps of a fixed grid. `start` is (y, f(t, y) or None) at its first node; `outputs` holds, for each
// further node, where a copy of its state belongs, or None. `slot` and `accept` are those of leap. Returns (y,
// slope or None) at the last node.
inline py::tuple walk(Stepper& stepper, const py::object& f, const py::object& slot, const py::object& accept,
                      const py::tuple& start, const std::vector<double>& grid, const py::list& outputs) {
    if (outputs.size() + 1 != grid.size()) throw std::invalid_argument("each node but the first has its output");
    py::object y = start[0], k = start[1];
    for (size_t n = 0; n + 1 < grid.size(); ++n) {
        const double t = grid[n], t_next = grid[n + 1], h = t_next - t;
        const py::object output = outputs[n];
        auto trial = stepper.attempt(f, stepper.stage_times(t, h, t_next), y, h, k, slot.is_none() ? output : slot());
        if (!slot.is_none()) {
            if (!output.is_none()) output.attr("copy_")(trial.y1);
            accept();
        }
        y = std::move(trial.y1);
        k = py::none();
        if (stepper.fsal()) k = trial.slopes[stepper.n_stages() - 1];
    }
    return py::make_tuple(y, k);
}

}  // namespace aca
