// The loop of a solve and of its backward pass over compiled programs: what aca_ext.solver, aca_ext.controller and
// aca_ext.gradients.aca do, for steps so short that Python between them would take most of the time.
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

#include "controller.h"
#include "ops.h"

namespace aca {

// A compiled graph: reads and writes its inputs, keeps intermediate results in the workspace. Its first inputs are
//   slope      scalars, y, k
//   step       scalars, y, k_1, y1, sums, k_2 ... k_s
//   transpose  scalars, y, g, g_y, and for outputs inside the step g_inside, G_1 ... G_s
// where scalars are the times of the stages, h, rtol and atol; the rest stays the same through a solve.
struct Program {
    uintptr_t function, workspace;
    std::vector<uintptr_t> inputs;

    void run() const { reinterpret_cast<void (*)(const uintptr_t*, uintptr_t)>(function)(inputs.data(), workspace); }
};

struct Method {
    std::vector<double> c;
    bool fsal;
    std::vector<std::vector<double>> dense;  // of each b_i(theta), highest power first
};

struct Tolerances {
    double rtol, atol;
    uintptr_t rtol_each, atol_each;  // 0: the numbers count
    std::vector<int64_t> bounds;     // of the segments
};

struct AcceptedStep {
    double t, h, t_next;
    uintptr_t y;                                  // the state at t
    std::vector<std::pair<int, double>> outputs;  // index and theta
};

enum class Outcome { done, step_limit, step_size, not_finite, not_finite_at_start };

// What stays the same from one solve to the next.
struct Specification {
    Target target;
    const Backend& backend;
    int64_t n;
    Method method;
    Tolerances tolerances;
    Controller control;
    double first_step;                              // 0: by Hairer's rule
    std::vector<double> times, stops, jumps, grid;  // grid: fixed steps, instead of `control`
    int64_t max_num_steps;
    uintptr_t slope, step;  // functions

    size_t bytes() const { return size_t(n) * (target.dtype == DType::f32 ? 4 : 8); }
    size_t stages() const { return method.c.size(); }

    // Memory of a pass, before the workspace of its programs: scalars, sums, and for each entry of `states` one.
    size_t scalars_bytes() const { return aligned(8 * (stages() + 3)); }
    size_t sums_bytes() const { return aligned(8 * tolerances.bounds.size()); }
    size_t memory_bytes(size_t states) const { return scalars_bytes() + sums_bytes() + states * aligned(bytes()); }
    uintptr_t state_in(uintptr_t memory, size_t i) const { return memory + memory_bytes(i); }

    static size_t aligned(size_t size) { return (size + 63) / 64 * 64; }
};

// One solve: its forward pass, the accepted steps, and any number of backward passes over them.
class CompiledLoop {
  public:
    // Memory for the next states, and how many fit.
    using Slots = std::function<std::pair<uintptr_t, int64_t>()>;

    explicit CompiledLoop(std::shared_ptr<const Specification> specification)
        : spec_(std::move(specification)), n_(spec_->n), bytes_(spec_->bytes()), stages_(spec_->stages()) {}

    // States that a forward pass needs memory for: two spare ones and the slopes. And a backward pass: what outputs
    // inside a step contribute.
    static size_t forward_states(const Specification& spec) { return 2 + spec.stages(); }
    static size_t backward_states(const Specification& spec, bool inside) { return inside ? 1 + spec.stages() : 0; }

    // The forward pass. `inputs` are those of func, with the tolerances of each element before them. `outputs` has a
    // row for each time. Without `slots`, states alternate between two.
    Outcome solve(uintptr_t memory, const std::vector<uintptr_t>& inputs, uintptr_t y0, uintptr_t outputs, Slots slots,
                  std::function<void()> check_signals) {
        outputs_ = outputs;
        slots_ = std::move(slots);
        check_signals_ = std::move(check_signals);
        spare_[0] = spec_->state_in(memory, 0);
        spare_[1] = spec_->state_in(memory, 1);
        const uintptr_t workspace = memory + spec_->memory_bytes(forward_states(*spec_));
        k_first_ = spec_->state_in(memory, 2);
        slope_ = {spec_->slope, workspace, {memory, 0, 0}};
        step_ = {spec_->step, workspace, {memory, 0, k_first_, 0, memory + spec_->scalars_bytes()}};
        for (size_t i = 1; i < stages_; ++i) step_.inputs.push_back(spec_->state_in(memory, 2 + i));
        if (spec_->tolerances.rtol_each)
            step_.inputs.insert(step_.inputs.end(), {spec_->tolerances.rtol_each, spec_->tolerances.atol_each});
        step_.inputs.insert(step_.inputs.end(), inputs.begin(), inputs.end());
        slope_.inputs.insert(slope_.inputs.end(), inputs.begin(), inputs.end());
        y_ = outputs;
        std::memcpy(at(outputs), at(y0), bytes_);
        if (slots_) {
            y_ = slot();
            std::memcpy(at(y_), at(y0), bytes_);
            accept_slot();
        }
        const std::vector<double>& times = spec_->times;
        direction_ = times.back() < times.front() ? -1.0 : 1.0;
        if (times.size() < 2) return Outcome::done;
        const Outcome outcome = spec_->grid.empty() ? adaptive() : fixed();
        slots_ = nullptr;
        check_signals_ = nullptr;
        return outcome;
    }

    // A backward pass, with the programs for steps without and with outputs inside; `inputs` are the gradients to add
    // to and those of func. Returns which of g and g_next holds the cotangent of the start.
    uintptr_t transpose(uintptr_t end_only, uintptr_t inside, uintptr_t memory, const std::vector<uintptr_t>& inputs,
                        uintptr_t grad_outputs, uintptr_t g, uintptr_t g_next) const {
        const size_t states = backward_states(*spec_, inside != 0);
        const uintptr_t workspace = memory + spec_->memory_bytes(states);
        Program without{end_only, workspace, {memory, 0, 0, 0}}, with{inside, workspace, {memory, 0, 0, 0}};
        for (size_t i = 0; i < states; ++i) with.inputs.push_back(spec_->state_in(memory, i));
        for (Program* program : {&without, &with})
            program->inputs.insert(program->inputs.end(), inputs.begin(), inputs.end());
        std::memset(at(g), 0, bytes_);
        for (size_t i = steps.size(); i-- > 0;) {
            const AcceptedStep& step = steps[i];
            bool has_inside = false;
            for (const auto& [index, theta] : step.outputs) {
                if (theta == 1.0)
                    add(g, 1.0, grad_outputs + size_t(index) * bytes_);
                else
                    has_inside = true;
            }
            Program& program = has_inside ? with : without;
            if (has_inside) gather(with, grad_outputs, step);
            write_scalars(memory, step.t, step.h, step.t_next);
            program.inputs[1] = step.y;
            program.inputs[2] = g;
            program.inputs[3] = g_next;
            program.run();
            std::swap(g, g_next);
        }
        add(g, 1.0, grad_outputs);
        return g;
    }

    std::vector<AcceptedStep> steps;
    int64_t n_inside = 0;  // accepted steps with outputs inside
    int64_t n_steps = 0, n_rejected = 0, n_f_evals = 0;
    double t = 0, h = 0, ratio = std::numeric_limits<double>::quiet_NaN();

  private:
    static char* at(uintptr_t address) { return reinterpret_cast<char*>(address); }

    static bool contains(const std::vector<double>& times, double time) {
        return std::find(times.begin(), times.end(), time) != times.end();
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
        return is_finite(y_) ? Outcome::done : Outcome::not_finite;
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
                const bool reusable = spec_->method.fsal && !contains(spec_->jumps, t_next);
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
                if (!finite && !(is_finite(y_) && is_finite(k_first_))) return Outcome::not_finite_at_start;
                if (h < control.min_step || t + sign * h * 0.5 == t)
                    return finite ? Outcome::step_size : Outcome::not_finite;
            }
        }
    }

    // Hairer's first step (Solving ODEs I, II.4), as Controller.initial has it; false where f is not finite.
    bool initial_step() {
        const Controller& control = spec_->control;
        if (spec_->first_step != 0) {
            h = spec_->first_step;
            return true;
        }
        const double norm_f = norm(k_first_, 0, 0, y_);
        const double length = std::abs(spec_->times.back() - t);
        if (!std::isfinite(norm_f)) {
            h = control.limit(std::min(1e-6, length));
            return is_finite(y_) && is_finite(k_first_);
        }
        const double norm_y = norm(y_, 0, 0, y_);
        const double h0 = control.euler_step(length, norm_y, norm_f);
        const uintptr_t euler = spare_[0], k = spare_[1];
        std::memcpy(at(euler), at(y_), bytes_);
        add(euler, direction_ * h0, k_first_);
        slope_at(t + direction_ * h0, euler, k);
        h = control.first_step(length, h0, norm_f, norm(k, k_first_, -1.0, y_));
        return true;
    }

    void slope_at(double time, uintptr_t y, uintptr_t k) {
        Program& slope = slope_;
        write(slope.inputs[0], 0, time);
        slope.inputs[1] = y;
        slope.inputs[2] = k;
        slope.run();
        ++n_f_evals;
    }

    // The first slope of the step from `time`; where f jumps there, of the time next to it inside the step.
    void evaluate_slope(double time) {
        slope_at(contains(spec_->jumps, time) ? next_after(time, direction_) : time, y_, k_first_);
    }

    void attempt(double from, double step, double to) {
        Program& program = step_;
        y1_ = slots_ ? slot() : spare_[y_ == spare_[0]];
        write_scalars(program.inputs[0], from, step, to);
        program.inputs[1] = y_;
        program.inputs[2] = k_first_;
        program.inputs[3] = y1_;
        program.run();
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
            const double w = weight(i, theta);
            if (w == 0) continue;
            sum.x[sum.count] = i == 0 ? k_first_ : step_.inputs[4 + i];
            sum.w[sum.count++] = w;
        }
        if (sum.count) spec_->backend.weighted_sum(spec_->target, n_, row, y_, step, sum);
    }

    double weight(size_t i, double theta) const {
        double w = 0;
        for (const double coefficient : spec_->method.dense[i]) w = (w + coefficient) * theta;
        return w;
    }

    // What the outputs inside a step contribute: their sum, and for each slope the sum weighted by b_i(theta).
    void gather(const Program& inside, uintptr_t grad_outputs, const AcceptedStep& step) const {
        const std::vector<uintptr_t>& to = inside.inputs;
        for (size_t i = 0; i <= stages_; ++i) std::memset(at(to[4 + i]), 0, bytes_);
        for (const auto& [index, theta] : step.outputs) {
            if (theta == 1.0) continue;
            const uintptr_t grad = grad_outputs + size_t(index) * bytes_;
            add(to[4], 1.0, grad);
            for (size_t i = 0; i < stages_; ++i) {
                const double w = weight(i, theta);
                if (w != 0) add(to[5 + i], w, grad);
            }
        }
    }

    void add(uintptr_t to, double factor, uintptr_t x) const {
        Sum sum{};
        sum.count = 1;
        sum.x[0] = x;
        sum.w[0] = 1.0;
        spec_->backend.weighted_sum(spec_->target, n_, to, to, factor, sum);
    }

    double norm(uintptr_t x, uintptr_t k, double w, uintptr_t y) {
        const Tolerances& tolerance = spec_->tolerances;
        const ErrorRatio r{x, k, w, y, y, tolerance.rtol, tolerance.atol, tolerance.rtol_each, tolerance.atol_each};
        const int segments = int(tolerance.bounds.size()) - 1;
        spec_->backend.squared_error_ratio(spec_->target, segments, tolerance.bounds.data(), step_.inputs[4], r);
        return norm_of_sums();
    }

    // The largest RMS over the segments; NaN where any is.
    double norm_of_sums() const {
        const auto* sums = reinterpret_cast<const double*>(step_.inputs[4]);
        double largest = 0;
        const std::vector<int64_t>& bounds = spec_->tolerances.bounds;
        for (size_t s = 0; s + 1 < bounds.size(); ++s) {
            const int64_t size = bounds[s + 1] - bounds[s];
            if (std::isnan(sums[s])) return sums[s];
            if (size) largest = std::max(largest, sums[s] / double(size));
        }
        return std::sqrt(largest);
    }

    bool is_finite(uintptr_t x) const {
        const auto all = [&](const auto* values) {
            return std::all_of(values, values + n_, [](auto value) { return std::isfinite(value); });
        };
        return spec_->target.dtype == DType::f32 ? all(reinterpret_cast<const float*>(x))
                                                 : all(reinterpret_cast<const double*>(x));
    }

    void write(uintptr_t scalars, size_t i, double value) const {
        if (spec_->target.dtype == DType::f32)
            reinterpret_cast<float*>(scalars)[i] = float(value);
        else
            reinterpret_cast<double*>(scalars)[i] = value;
    }

    double next_after(double time, double towards) const {
        const double far = towards * std::numeric_limits<double>::infinity();
        return spec_->target.dtype == DType::f32 ? double(std::nextafter(float(time), float(far)))
                                                 : std::nextafter(time, far);
    }

    // Stages at the end of a step see its end exactly; where f jumps at either end, the next number inside the step.
    void write_scalars(uintptr_t scalars, double from, double step, double to) const {
        const double first = contains(spec_->jumps, from) ? next_after(from, to - from) : from;
        const double last = contains(spec_->jumps, to) ? next_after(to, from - to) : to;
        for (size_t i = 0; i < stages_; ++i) {
            const double c = spec_->method.c[i];
            write(scalars, i, c == 0 ? first : c == 1 ? last : from + c * step);
        }
        write(scalars, stages_, step);
        write(scalars, stages_ + 1, spec_->tolerances.rtol);
        write(scalars, stages_ + 2, spec_->tolerances.atol);
    }

    uintptr_t slot() {
        if (slots_left_ == 0) std::tie(next_slot_, slots_left_) = slots_();
        return next_slot_;
    }

    void accept_slot() {
        next_slot_ += bytes_;
        --slots_left_;
    }

    std::shared_ptr<const Specification> spec_;
    int64_t n_;
    size_t bytes_, stages_;
    Slots slots_;
    std::function<void()> check_signals_;
    Program slope_{}, step_{};
    double direction_ = 1;
    uintptr_t outputs_ = 0, spare_[2] = {}, y_ = 0, y1_ = 0, k_first_ = 0, next_slot_ = 0;
    int64_t slots_left_ = 0;
    size_t next_output_ = 1;
};

}  // namespace aca
