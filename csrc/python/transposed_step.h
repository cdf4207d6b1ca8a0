// The transpose of a step, without a return to Python between its sums: aca_ext.solver.runge_kutta.step_vjp in C++.
#pragma once
#include <pybind11/stl.h>

#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "python/step_sums.h"
#include "python/stepper.h"

namespace aca {

// One step: replayed with autograd graphs, compared with the forward pass, and pulled back, in this order.
class TransposedStep {
  public:
    // `outputs` is a list of (weights, cotangent).
    TransposedStep(StepSums& sums, const py::object& f, double h, const py::list& outputs)
        : sums_(sums), f_(f), slope_(py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr), h_(h) {
        for (py::handle output : outputs) {
            const auto pair = output.cast<py::tuple>();
            py::object g = pair[1];
            const uintptr_t address = sums_.memory_of(g);
            outputs_.push_back({pair[0].cast<std::vector<double>>(), std::move(g), address});
            if (outputs_.back().weight.size() != sums_.rows.size())
                throw std::invalid_argument("an output needs one weight per slope");
        }
        if (outputs_.empty()) throw std::invalid_argument("a step without outputs has no cotangent");
    }

    void replay(const std::vector<double>& t, const py::object& y) {
        static const Attribute detach{"detach"}, require_grad{"requires_grad_"};
        const size_t count = stages_needed();
        if (t.size() < count) throw std::invalid_argument("a step takes one time for each stage");
        sums_.write_times(t, count);
        y_ = sums_.memory_of(y);
        for (size_t i = 0; i < count; ++i) {
            const Row y_i = i == 0 ? Row{detach.call(y.ptr()), y_} : sums_.weighted(sums_.rows[i], y_, h_, k_);
            require_grad.call(y_i.tensor.ptr());
            states_.push_back(y_i.tensor);
            stages_.push_back(stage(sums_.call(f_, slope_, i, y_i.tensor, y_i.address), i));
            k_.push_back(stages_[i].values.address);
        }
    }

    // Calls `compare(y1, slopes)` unless the end of the step is known to be `y_next` bit for bit.
    void compare(const py::object& compare, const py::object& y_next) {
        if (int(stages_.size()) <= sums_.solution.index.back()) return;
        const Row y1 = sums_.weighted(sums_.solution, y_, h_, k_);
        if (is_known_equal(y1.address, y_next)) return;
        py::list slopes;
        for (const Stage& stage_i : stages_) slopes.append(stage_i.slope);
        compare(y1.tensor, slopes);
    }

    py::object pull_back(const py::object& pull_back, const py::object& admit) {
        const size_t count = stages_.size();
        std::vector<std::pair<size_t, Row>> pulled;  // v_i, without the stages that do not depend on y
        for (size_t i = count; i-- > 0;) {
            const py::object y_i = std::move(states_[i]);
            const Stage stage_i = std::move(stages_[i]);
            StepSums::Terms terms;
            for (const Output& output : outputs_) terms.add(output.weight[i], output.address);
            for (const auto& [j, v_j] : pulled) terms.add(sums_.a[j][i], v_j.address);
            if (terms.x.empty() || !stage_i.version) continue;
            const Row grad_k = sums_.states.take_one();
            sums_.sum_up(grad_k.address, 0, h_, terms);
            stage_i.check_unchanged();
            py::object v_i = pull_back(y_i, stage_i.slope, grad_k.tensor);
            if (Torch::found().has_moved(grad_k.tensor.ptr(), grad_k.address)) refuse_without_memory();
            if (v_i.is_none()) continue;
            Row v = admitted(admit, std::move(v_i));
            if (!sums_.has_checked_storage) check_whole(v.tensor.ptr());
            sums_.has_checked_storage = true;
            const bool is_held = Py_REFCNT(v.tensor.ptr()) != 1;
            pulled.emplace_back(i, kept(v.tensor, v.address, is_held, false, count + i));
        }

        StepSums::Terms terms;
        for (size_t o = 1; o < outputs_.size(); ++o) terms.add(1, outputs_[o].address);
        for (const auto& [j, v_j] : pulled) terms.add(1, v_j.address);
        if (terms.x.empty()) return outputs_[0].g;
        const Row grad_y = sums_.states.take_one();
        sums_.sum_up(grad_y.address, outputs_[0].address, 1, terms);
        return grad_y.tensor;
    }

  private:
    struct Output {
        std::vector<double> weight;  // of each slope
        py::object g;
        uintptr_t address;
    };
    // A slope in the replay: with its autograd graph, and the values that it had when func returned it.
    struct Stage {
        py::object slope;
        Row values;
        py::object version;  // of the slope; null if it has no autograd graph

        void check_unchanged() const {
            static const Attribute current{"_version"};
            if (!equal(version, current.of(slope.ptr())))
                raise_error(
                    "SlopeError",
                    "func changed a slope in place that it had returned earlier, so the gradient of that slope is "
                    "lost. Return a new tensor from every evaluation.");
        }
    };

    // Number of stages up to the last one that some output depends on.
    size_t stages_needed() const {
        size_t count = 0;
        for (const Output& output : outputs_)
            for (size_t i = count; i < output.weight.size(); ++i)
                if (output.weight[i] != 0) count = i + 1;
        return count;
    }

    Stage stage(Slope::Result k, size_t i) {
        static const Attribute clone{"clone"}, current{"_version"};
        if (!k.has_graph) {
            Row values = kept(k.tensor, k.address, k.is_held, false, i);
            return {std::move(k.tensor), std::move(values), py::object()};
        }
        py::object version = k.is_held ? py::object() : version_of(k.tensor);
        if (!version) {  // func may still attach another autograd graph to this tensor
            k.tensor = clone.call(k.tensor.ptr());
            k.address = sums_.memory_of(k.tensor);
            version = current.of(k.tensor.ptr());
        }
        Row values = kept(k.tensor, k.address, false, true, i);
        return {std::move(k.tensor), std::move(values), std::move(version)};
    }

    // Null for a tensor made in inference mode, which has no version counter.
    static py::object version_of(const py::object& x) {
        static const Attribute version{"_version"};
        try {
            return version.of(x.ptr());
        } catch (const py::error_already_set&) {
            return py::object();
        }
    }

    // The cotangent that func's backward pass returned, laid out like the state.
    Row admitted(const py::object& admit, py::object x) const {
        uintptr_t address = 0;
        if (!slope_ || !slope_->admission().admits(x.ptr(), &address)) x = admit(x);
        if (address == 0) address = sums_.memory_of(x);
        return {std::move(x), address};
    }

    // Returns `x`, to which only the caller may hold a reference, or a copy if someone else could change it. Small ones
    // are copied to place `i` of a common buffer.
    Row kept(const py::object& x, uintptr_t address, bool is_held, bool has_graph, size_t i) {
        if (sums_.is_small()) {
            const uintptr_t to = sums_.small_copy(i);
            sums_.copy_to(to, address);
            return {py::object(), to};
        }
        return !is_held && sums_.is_own(x, has_graph) ? Row{x, address} : sums_.copy(address);
    }

    // False on a GPU, where a comparison would have to wait for the device.
    bool is_known_equal(uintptr_t x, const py::object& other) const {
        if (other.is_none() || sums_.on.backend != &cpu_backend()) return false;
        if (sums_.n == 0) return true;
        const auto* const a = reinterpret_cast<const void*>(x);
        const auto* const b = reinterpret_cast<const void*>(sums_.memory_of(other));
        bool equal = false;
        run(sums_.n, [&] { equal = std::memcmp(a, b, size_t(sums_.n_bytes())) == 0; });
        return equal;
    }

    StepSums& sums_;
    const py::object& f_;
    Slope* slope_;
    double h_;
    uintptr_t y_ = 0;
    std::vector<Output> outputs_;
    std::vector<py::object> states_;
    std::vector<Stage> stages_;
    std::vector<uintptr_t> k_;
};

// Replays the step with autograd graphs and returns the cotangent of y, given `outputs`, a list of (weights,
// cotangent). `f(t, y)` evaluates with a graph, `pull_back(y, k, grad_k)` returns the cotangent of y or None, and
// `admit(v)` lays a tensor out like the state. `compare(y1, slopes)`, or None, receives the end of the step and its
// slopes; on the CPU it is called only if that end differs from `y_next`.
inline py::object transpose_step(Stepper& stepper, const py::object& f, const py::object& pull_back,
                                 const py::object& admit, const py::object& compare, const py::object& y_next,
                                 const std::vector<double>& t, const py::object& y, double h, const py::list& outputs) {
    TransposedStep step(stepper.sums, f, h, outputs);
    step.replay(t, y);
    if (!compare.is_none()) step.compare(compare, y_next);
    return step.pull_back(pull_back, admit);
}

}  // namespace aca
