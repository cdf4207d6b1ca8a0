// Loop of the compiled engine: all steps of a solve without Python, which would take most of the time of short steps.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <memory>
#include <tuple>
#include <utility>
#include <vector>

#include "compiled/specification.h"

namespace aca {

enum class Outcome { done, step_limit, step_size, not_finite, not_finite_at_start };

// One solve: its forward pass, and the record of its steps for the backward pass.
class CompiledLoop {
  public:
    // Returns memory for the next states, and how many fit.
    using Slots = std::function<std::pair<uintptr_t, int64_t>()>;

    explicit CompiledLoop(std::shared_ptr<const Specification> specification)
        : spec_(std::move(specification)), bytes_(spec_->bytes()), stages_(spec_->method.stages()) {}

    // Size in bytes of the memory that `solve` needs.
    static size_t memory_bytes(const Specification& spec) { return Buffers(spec, 0).end; }

    // `inputs` are func's inputs. `outputs` holds one state per requested time. Without `slots`, states alternate
    // between two buffers.
    Outcome solve(uintptr_t memory, const std::vector<uintptr_t>& inputs, uintptr_t y0, uintptr_t outputs, Slots slots,
                  std::function<void()> check_signals) {
        const std::vector<double>& times = spec_->times;
        control_ = control::begin(spec_->control, spec_->first_step, spec_->is_adaptive, spec_->max_num_steps);
        control::set_times(control_, times.front(), times.back(), uintptr_t(times.data()), int64_t(times.size()),
                           uintptr_t(spec_->stops.data()), int64_t(spec_->stops.size()));
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
            outcome = run();
        }
        slots_ = nullptr;
        check_signals_ = nullptr;
        return outcome;
    }

    const Specification& specification() const { return *spec_; }

    std::vector<AcceptedStep> steps;
    int64_t n_inside = 0;  // accepted steps with outputs inside
    int64_t n_f_evals = 0;
    const StepControl& control() const { return control_; }

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

    Outcome run() {
        StepControl& s = control_;
        evaluate_slope(s.t);
        if (s.is_adaptive && !choose_first_step()) return Outcome::not_finite_at_start;
        for (bool needs_slope = false;;) {
            control::propose(s);
            if (s.status != Status::running) return outcome_of(s.status);
            if (needs_slope) evaluate_slope(s.t);
            attempt();
            control::judge(s, s.is_adaptive ? norm_of_sums() : 0.0);
            if (s.is_accepted) {
                accept();
                needs_slope = !spec_->method.fsal || spec_->jumps_at(s.t);
            } else {
                needs_slope = false;
            }
            if (s.status == Status::done) break;
            if (s.status == Status::not_finite) {
                if (!is_start_finite()) return Outcome::not_finite_at_start;
                if (control::can_shrink(s)) s.status = Status::running;
            }
            if (s.status != Status::running) return outcome_of(s.status);
        }
        return s.is_adaptive || spec_->is_finite(y_) ? Outcome::done : Outcome::not_finite;
    }

    static Outcome outcome_of(Status status) {
        return status == Status::step_limit  ? Outcome::step_limit
               : status == Status::step_size ? Outcome::step_size
                                             : Outcome::not_finite;
    }

    // Returns false if y0 or f(t0, y0) is not finite.
    bool choose_first_step() {
        StepControl& s = control_;
        if (s.first_step != 0) {
            s.h = s.first_step;
            return true;
        }
        control::propose_euler_step(s, norm(y_, 0, 0, y_), norm(k_first_, 0, 0, y_));
        double norm_change = 0;
        if (std::isfinite(s.norm_f)) {
            const uintptr_t euler = spare_[0], k = spare_[1];
            std::memcpy(at(euler), at(y_), bytes_);
            spec_->add(euler, s.h_trial, k_first_);
            slope_at(s.t_next, euler, k);
            norm_change = norm(k, k_first_, -1.0, y_);
        }
        control::choose_first_step(s, norm_change);
        return s.status != Status::not_finite || is_start_finite();
    }

    void slope_at(double time, uintptr_t y, uintptr_t k) {
        spec_->write(slope_.inputs[0], 0, time);
        slope_.inputs[1] = y;
        slope_.inputs[2] = k;
        slope_.run();
        ++n_f_evals;
    }

    // Evaluates the first slope of the step from `time`. If f jumps there, it is taken at the next number inside the
    // step.
    void evaluate_slope(double time) {
        slope_at(spec_->jumps_at(time) ? spec_->next_after(time, control_.sign) : time, y_, k_first_);
    }

    void attempt() {
        y1_ = slots_ ? slot() : spare_[y_ == spare_[0]];
        spec_->write_scalars(step_.inputs[0], control_.t, control_.h_trial, control_.t_next);
        step_.inputs[1] = y_;
        step_.inputs[2] = k_first_;
        step_.inputs[3] = y1_;
        step_.run();
        n_f_evals += int64_t(stages_) - 1;
        if ((control_.n_steps & 255) == 255) check_signals_();
    }

    void accept() {
        const StepControl& s = control_;
        AcceptedStep accepted{s.t_start, s.h_done, s.t_done, y_, {}};
        bool has_inside = false;
        for (int64_t i = s.first_due; i < s.end_due; ++i) {
            const double theta = control::position(s, i);
            const uintptr_t row = outputs_ + size_t(i) * bytes_;
            std::memcpy(at(row), at(theta == 1.0 ? y1_ : y_), bytes_);
            if (theta != 1.0) {
                interpolate(row, s.h_done, theta);
                has_inside = true;
            }
            accepted.outputs.emplace_back(int(i), theta);
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
        const Tolerances& tolerances = spec_->tolerances;
        return control::norm_of_sums(reinterpret_cast<const double*>(step_.inputs[4]), tolerances.sizes.data(),
                                     tolerances.segments());
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
    StepControl control_{};
    uintptr_t outputs_ = 0, spare_[2] = {}, y_ = 0, y1_ = 0, k_first_ = 0, next_slot_ = 0;
    int64_t slots_left_ = 0;
};

}  // namespace aca
