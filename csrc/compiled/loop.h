// The loop of a solve over compiled programs: what aca_ext.solver.loop and aca_ext.numerics.controller do, for steps so
// short that Python between them would take most of the time.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "compiled/specification.h"

namespace aca {

enum class Outcome { done, step_limit, step_size, not_finite, not_finite_at_start };

// One solve: its forward pass, and what is left of it.
class CompiledLoop {
  public:
    // Memory for the next states, and how many fit.
    using Slots = std::function<std::pair<uintptr_t, int64_t>()>;

    explicit CompiledLoop(std::shared_ptr<const Specification> specification)
        : spec_(std::move(specification)), bytes_(spec_->bytes()), stages_(spec_->method.stages()) {}

    // Bytes of memory that a solve needs.
    static size_t memory_bytes(const Specification& spec) { return Buffers(spec, 0).end; }

    // `inputs` are those of func, with the tolerances of each element before them. `outputs` has a row for each time.
    // Without `slots`, states alternate between two.
    Outcome solve(uintptr_t memory, const std::vector<uintptr_t>& inputs, uintptr_t y0, uintptr_t outputs, Slots slots,
                  std::function<void()> check_signals) {
        const std::vector<double>& times = spec_->times;
        direction_ = times.back() < times.front() ? -1.0 : 1.0;
        outputs_ = outputs;
        slots_ = std::move(slots);
        check_signals_ = std::move(check_signals);
        y_ = outputs;
        std::memcpy(at(outputs), at(y0), bytes_);
        if (slots_) {
            y_ = slot();
            std::memcpy(at(y_), at(y0), bytes_);
            accept_slot();
        }
        Outcome outcome = Outcome::done;
        if (times.size() > 1) {
            set_up(Buffers(*spec_, memory), inputs);
            outcome = spec_->grid.empty() ? adaptive() : fixed();
        }
        slots_ = nullptr;
        check_signals_ = nullptr;
        return outcome;
    }

    const Specification& specification() const { return *spec_; }

    std::vector<AcceptedStep> steps;
    int64_t n_inside = 0;  // accepted steps with outputs inside
    int64_t n_steps = 0, n_rejected = 0, n_f_evals = 0;
    double t = 0, h = 0, ratio = std::numeric_limits<double>::quiet_NaN();

  private:
    struct Buffers {
        Buffers(const Specification& spec, uintptr_t start) {
            Memory memory(start);
            scalars = memory.take(spec.scalars_bytes());
            sums = memory.take(spec.sums_bytes());
            for (uintptr_t& state : spare) state = memory.take(spec.bytes());
            for (size_t i = 0; i < spec.method.stages(); ++i) slopes.push_back(memory.take(spec.bytes()));
            prepared_slope = memory.take(spec.slope.prepared_bytes);
            prepared_step = memory.take(spec.step.prepared_bytes);
            workspace = memory.take(std::max(spec.slope.workspace_bytes, spec.step.workspace_bytes));
            end = memory.end();
        }

        uintptr_t scalars, sums, spare[2], prepared_slope, prepared_step, workspace, end;
        std::vector<uintptr_t> slopes;
    };

    void set_up(const Buffers& memory, const std::vector<uintptr_t>& inputs) {
        const Tolerances& tolerances = spec_->tolerances;
        std::copy(memory.spare, memory.spare + 2, spare_);
        k_first_ = memory.slopes[0];
        slope_ = {spec_->slope, memory.workspace, memory.prepared_slope, {memory.scalars, 0, 0}};
        step_ = {spec_->step, memory.workspace, memory.prepared_step, {memory.scalars, 0, k_first_, 0, memory.sums}};
        step_.inputs.insert(step_.inputs.end(), memory.slopes.begin() + 1, memory.slopes.end());
        if (tolerances.rtol_each) step_.inputs.insert(step_.inputs.end(), {tolerances.rtol_each, tolerances.atol_each});
        for (Program* program : {&slope_, &step_}) {
            program->inputs.insert(program->inputs.end(), inputs.begin(), inputs.end());
            program->prepare();
        }
    }

    Outcome fixed() {
        const std::vector<double>& grid = spec_->grid;
        evaluate_slope(grid[0]);
        for (size_t i = 0; i + 1 < grid.size(); ++i) {
            const double step = grid[i + 1] - grid[i];
            if (i && !spec_->method.fsal) evaluate_slope(grid[i]);
            attempt(grid[i], step, grid[i + 1]);
            accept(grid[i], step, grid[i + 1]);
            t = grid[i + 1];
            h = step;
        }
        return spec_->is_finite(y_) ? Outcome::done : Outcome::not_finite;
    }

    Outcome adaptive() {
        const Controller& control = spec_->control;
        const double end = spec_->times.back(), sign = direction_;
        size_t next_stop = 0;
        t = spec_->times.front();
        evaluate_slope(t);
        if (!initial_step()) return Outcome::not_finite_at_start;
        double ratios[3] = {};
        for (;;) {
            if (n_steps >= spec_->max_num_steps) return Outcome::step_limit;
            const double stop = next_stop < spec_->stops.size() ? spec_->stops[next_stop] : end;
            const bool is_cut = sign * (t + sign * h) >= sign * stop || std::abs(stop - t) <= h * (1 + 1e-12);
            const double h_now = is_cut ? std::abs(stop - t) : h, t_next = is_cut ? stop : t + sign * h;
            if (t_next == t) return Outcome::step_size;
            attempt(t, sign * h_now, t_next);
            ratio = norm_of_sums();
            if (ratio <= 1) {
                const bool reusable = spec_->method.fsal && !spec_->jumps_at(t_next);
                accept(t, sign * h_now, t_next);
                if (is_cut && next_stop++ == spec_->stops.size()) return Outcome::done;
                t = t_next;
                if (!reusable) evaluate_slope(t);
                ratios[2] = ratios[1];
                ratios[1] = ratios[0];
                ratios[0] = ratio;
                const double grown = control.grow(h_now, ratios, int(std::min<size_t>(steps.size(), 3)));
                h = is_cut ? std::max(grown, h) : grown;
            } else {
                ++n_rejected;
                h = control.shrink(h_now, ratio);
                const bool finite = std::isfinite(ratio);
                if (!finite && !is_start_finite()) return Outcome::not_finite_at_start;
                if (h < control.min_step || t + sign * h * 0.5 == t)
                    return finite ? Outcome::step_size : Outcome::not_finite;
            }
        }
    }

    // Chooses the first step; false where f is not finite.
    bool initial_step() {
        if (spec_->first_step != 0) {
            h = spec_->first_step;
            return true;
        }
        const Controller& control = spec_->control;
        const double norm_f = norm(k_first_, 0, 0, y_), length = std::abs(spec_->times.back() - t);
        if (!std::isfinite(norm_f)) {
            h = control.limit(std::min(1e-6, length));
            return is_start_finite();
        }
        const double step = control.euler_step(length, norm(y_, 0, 0, y_), norm_f);
        const uintptr_t euler = spare_[0], k = spare_[1];
        std::memcpy(at(euler), at(y_), bytes_);
        spec_->add(euler, direction_ * step, k_first_);
        slope_at(t + direction_ * step, euler, k);
        h = control.first_step(length, step, norm_f, norm(k, k_first_, -1.0, y_));
        return true;
    }

    void slope_at(double time, uintptr_t y, uintptr_t k) {
        spec_->write(slope_.inputs[0], 0, time);
        slope_.inputs[1] = y;
        slope_.inputs[2] = k;
        slope_.run();
        ++n_f_evals;
    }

    // The first slope of the step from `time`; where f jumps there, of the time next to it inside the step.
    void evaluate_slope(double time) {
        slope_at(spec_->jumps_at(time) ? spec_->next_after(time, direction_) : time, y_, k_first_);
    }

    void attempt(double from, double step, double to) {
        y1_ = slots_ ? slot() : spare_[y_ == spare_[0]];
        spec_->write_scalars(step_.inputs[0], from, step, to);
        step_.inputs[1] = y_;
        step_.inputs[2] = k_first_;
        step_.inputs[3] = y1_;
        step_.run();
        n_f_evals += int64_t(stages_) - 1;
        if ((++n_steps & 255) == 0) check_signals_();
    }

    void accept(double from, double step, double to) {
        bool has_inside = false;
        AcceptedStep accepted{from, step, to, y_, {}};
        const std::vector<double>& times = spec_->times;
        while (next_output_ < times.size() && direction_ * times[next_output_] <= direction_ * to) {
            const double time = times[next_output_], theta = time == to ? 1.0 : (time - from) / (to - from);
            const uintptr_t row = outputs_ + next_output_ * bytes_;
            std::memcpy(at(row), at(theta == 1.0 ? y1_ : y_), bytes_);
            if (theta != 1.0) {
                interpolate(row, step, theta);
                has_inside = true;
            }
            accepted.outputs.emplace_back(int(next_output_++), theta);
        }
        n_inside += has_inside;
        steps.push_back(std::move(accepted));
        if (slots_) accept_slot();
        y_ = y1_;
        if (spec_->method.fsal) std::swap(k_first_, step_.inputs[3 + stages_]);  // k_s is the next step's first slope
    }

    void interpolate(uintptr_t row, double step, double theta) const {
        Sum sum{};
        for (size_t i = 0; i < stages_; ++i) {
            const double w = spec_->method.weight(i, theta);
            if (w == 0) continue;
            sum.x[sum.count] = i == 0 ? k_first_ : step_.inputs[4 + i];
            sum.w[sum.count++] = w;
        }
        if (sum.count) spec_->backend.weighted_sum(spec_->target, spec_->n, row, y_, step, sum);
    }

    double norm(uintptr_t x, uintptr_t k, double w, uintptr_t y) {
        const Tolerances& tolerance = spec_->tolerances;
        const ErrorRatio r{x, k, w, y, y, tolerance.rtol, tolerance.atol, tolerance.rtol_each, tolerance.atol_each};
        const int64_t* const bounds = tolerance.bounds.data();
        spec_->backend.squared_error_ratio(spec_->target, tolerance.segments(), bounds, step_.inputs[4], r);
        return norm_of_sums();
    }

    double norm_of_sums() const {
        return spec_->tolerances.norm_of_sums(reinterpret_cast<const double*>(step_.inputs[4]));
    }

    bool is_start_finite() const { return spec_->is_finite(y_) && spec_->is_finite(k_first_); }

    uintptr_t slot() {
        if (slots_left_ == 0) std::tie(next_slot_, slots_left_) = slots_();
        return next_slot_;
    }

    void accept_slot() {
        next_slot_ += bytes_;
        --slots_left_;
    }

    std::shared_ptr<const Specification> spec_;
    size_t bytes_, stages_;
    Slots slots_;
    std::function<void()> check_signals_;
    Program slope_, step_;
    double direction_ = 1;
    uintptr_t outputs_ = 0, spare_[2] = {}, y_ = 0, y1_ = 0, k_first_ = 0, next_slot_ = 0;
    int64_t slots_left_ = 0;
    size_t next_output_ = 1;
};

}  // namespace aca
