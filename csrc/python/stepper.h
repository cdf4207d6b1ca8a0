// A trial step and its transpose without Python between their sums: what aca_ext.solver.runge_kutta.step and step_vjp
// do.
#pragma once
#include <pybind11/stl.h>

#include <cmath>
#include <cstddef>
#include <cstring>
#include <stdexcept>
#include <utility>
#include <vector>

#include "control/step_control.h"
#include "kernels/ops.h"
#include "python/admission.h"
#include "python/slope_function.h"
#include "python/tensors.h"

namespace aca {

class Stepper {
  public:
    // `c` and `rows`, (indices, weights), are of each stage; `solution` is (indices, b, error weights or None, error
    // weight of the last slope). `states()` and `times()` allocate as Rows says, states laid out like the state and 0-d
    // tensors. `norm` is None, or (bounds of the segments, tensor of a double for each, rtol, atol, rtol_each,
    // atol_each).
    Stepper(const BoundTarget& on, int64_t n, std::vector<double> c, const py::tuple& rows, const py::tuple& solution,
            bool fsal, py::object states, py::object times, const py::object& norm)
        : on_(on),
          n_(n),
          c_(std::move(c)),
          fsal_(fsal),
          copies_(states),
          states_(std::move(states)),
          times_(std::move(times)) {
        if (rows.size() > size_t(kMaxTerms) || rows.size() != c_.size())
            throw std::invalid_argument("a step has at most 16 stages, each with its c");
        for (py::handle row : rows) {
            rows_.push_back(read_weights(row.cast<py::tuple>()));
            a_.emplace_back(rows.size());
            for (size_t j = 0; j < rows_.back().index.size(); ++j)
                a_.back().at(size_t(rows_.back().index[j])) = rows_.back().weight[j];
        }
        solution_ = read_weights(solution);
        estimates_error_ = !solution[2].is_none();
        if (!estimates_error_) return;
        error_ = solution[2].cast<std::vector<double>>();
        error_last_ = solution[3].cast<double>();
        if (!norm.is_none()) read_norm(norm.cast<py::tuple>());
    }

    size_t n_stages() const { return rows_.size(); }
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
        const size_t stages = rows_.size();
        if (t.size() != stages) throw std::invalid_argument("a step takes one time for each stage");
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        write_times(t, stages);
        const uintptr_t y_address = memory_of(y);
        Trial trial{out, py::none(), py::list(), 0};
        std::vector<uintptr_t> k;
        const auto add = [&](const Row& k_i) {
            k.push_back(k_i.address);
            trial.slopes.append(k_i.tensor);
        };
        add(k_first.is_none() ? slope_of(f, slope, 0, y, y_address) : Row{k_first, memory_of(k_first)});
        for (size_t i = 1; i < stages - fsal_; ++i) {
            const Row y_i = weighted(rows_[i], y_address, h, k);
            add(slope_of(f, slope, i, y_i.tensor, y_i.address));
        }

        const Sum sum = select(solution_, k);
        if (out.is_none()) trial.y1 = states_.take_one().tensor;
        const uintptr_t y1 = memory_of(trial.y1);
        uintptr_t error = 0;
        if (estimates_error_) {
            if (!error_estimate_) error_estimate_ = states_.take_one().tensor;  // read before the next step only
            trial.error = error_estimate_;
            error = memory_of(error_estimate_);
            run(n_,
                [&] { on_.backend->solution_and_error(on_.target, n_, y1, error, y_address, h, sum, error_.data()); });
        } else {
            run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, y1, y_address, h, sum); });
        }
        if (fsal_) add(slope_of(f, slope, stages - 1, trial.y1, y1));
        if (takes_norm()) {
            const uintptr_t k_last = error_last_ != 0 ? k[stages - 1] : 0;
            trial.error_norm = norm(error, k_last, error_last_ * h, y_address, y1);
        }
        return trial;
    }

    // Returns (y1, slopes, error but for its last slope or None, error norm or None). `t` are the times of the stages,
    // `k_first` is f(t, y) or None; `out` receives y1.
    py::tuple step(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                   const py::object& k_first, const py::object& out) {
        Trial trial = attempt(f, t, y, h, k_first, out);
        py::object error_norm = takes_norm() ? py::object(py::float_(trial.error_norm)) : py::none();
        return py::make_tuple(std::move(trial.y1), std::move(trial.slopes), std::move(trial.error), error_norm);
    }

    // Chooses the first step by Hairer's rule from y at the start, where f is k; false where the norm of k is not
    // finite.
    bool choose_first_step(const py::object& f, StepControl& solve, const py::object& y, const py::object& k) {
        if (!takes_norm()) throw std::invalid_argument("this stepper does not compute the norm");
        const uintptr_t y_address = memory_of(y), k_address = memory_of(k);
        const double norm_f = norm(k_address, 0, 0, y_address, y_address);
        if (!std::isfinite(norm_f)) return false;
        control::propose_euler_step(solve, norm(y_address, 0, 0, y_address, y_address), norm_f);
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        write_times({solve.t_next}, 1);
        const Row y1 = weighted({{0}, {1.0}}, y_address, solve.h_trial, {k_address});
        const Row change = slope_of(f, slope, 0, y1.tensor, y1.address);
        control::choose_first_step(solve, norm(change.address, k_address, -1.0, y_address, y_address));
        return true;
    }

    // Replays the step with graphs and returns the cotangent of y, given `outputs`, a list of (weights, cotangent).
    // `f(t, y)` evaluates with a graph, `pull_back(y, k, grad_k)` returns the cotangent of y or None, and `admit(v)`
    // lays a tensor out like the state. `compare(y1, slopes)`, where it is given, is told the end of the step and its
    // slopes unless that is `y_next` bit for bit, which is known here on the CPU alone.
    py::object vjp(const py::object& f, const py::object& pull_back, const py::object& admit, const py::object& compare,
                   const py::object& y_next, const std::vector<double>& t, const py::object& y, double h,
                   const py::list& outputs) {
        const std::vector<Output> given = read_outputs(outputs);
        const size_t count = stages_needed(given);
        if (t.size() < count) throw std::invalid_argument("a step takes one time for each stage");
        std::vector<py::object> states;
        std::vector<Stage> stages;
        std::vector<uintptr_t> k;
        write_times(t, count);
        const uintptr_t y_address = memory_of(y);
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        for (size_t i = 0; i < count; ++i) {
            const Row y_i = i == 0 ? Row{names().detach.call(y.ptr()), y_address} : weighted(rows_[i], y_address, h, k);
            names().require_grad.call(y_i.tensor.ptr());
            states.push_back(y_i.tensor);
            stages.push_back(stage(call(f, slope, i, y_i.tensor, y_i.address), i));
            k.push_back(stages[i].values.address);
        }
        if (!compare.is_none() && int(count) > solution_.index.back()) {
            const Row y1 = weighted(solution_, y_address, h, k);
            if (!is_known_equal(y1.address, y_next)) {
                py::list slopes;
                for (const Stage& stage_i : stages) slopes.append(stage_i.slope);
                compare(y1.tensor, slopes);
            }
        }

        std::vector<std::pair<size_t, Row>> pulled;  // v_i, stages that y does not reach left out
        for (size_t i = count; i-- > 0;) {
            const py::object y_i = std::move(states[i]);
            const Stage stage_i = std::move(stages[i]);
            Terms terms;
            for (const Output& output : given) terms.add(output.weight[i], output.address);
            for (const auto& [j, v_j] : pulled) terms.add(a_[j][i], v_j.address);
            if (terms.x.empty() || !stage_i.version) continue;
            const Row grad_k = states_.take_one();
            sum_up(grad_k.address, 0, h, terms);
            stage_i.check_unchanged();
            py::object v_i = pull_back(y_i, stage_i.slope, grad_k.tensor);
            if (Torch::found().has_moved(grad_k.tensor.ptr(), grad_k.address)) refuse_without_memory();
            if (v_i.is_none()) continue;
            Row v = admitted(slope, admit, std::move(v_i));
            if (!has_looked_) check_whole(v.tensor.ptr());  // once: it takes longer than the other checks
            has_looked_ = true;
            const bool is_held = Py_REFCNT(v.tensor.ptr()) != 1;
            pulled.emplace_back(i, kept(std::move(v), is_held, false, count + i));
        }

        Terms terms;
        for (size_t o = 1; o < given.size(); ++o) terms.add(1, given[o].address);
        for (const auto& [j, v_j] : pulled) terms.add(1, v_j.address);
        if (terms.x.empty()) return given[0].g;
        const Row grad_y = states_.take_one();
        sum_up(grad_y.address, given[0].address, 1, terms);
        return grad_y.tensor;
    }

  private:
    struct Weights {
        std::vector<int> index;
        std::vector<double> weight;
    };
    struct Output {
        std::vector<double> weight;  // of each slope
        py::object g;
        uintptr_t address;
    };
    // A sum of any length, its zeros left out.
    struct Terms {
        std::vector<uintptr_t> x;
        std::vector<double> w;
        void add(double weight, uintptr_t address) {
            if (weight == 0) return;
            x.push_back(address);
            w.push_back(weight);
        }
    };
    // A slope in the replay: with its graph, and the values that it had when func returned it.
    struct Stage {
        py::object slope;
        Row values;
        py::object version;  // of the slope; null where it has no graph

        void check_unchanged() const {
            if (!equal(version, names().version.of(slope.ptr())))
                raise_error(
                    "SlopeError",
                    "func changed in place a slope that it had returned before, whose gradient is lost. Return a new "
                    "tensor from every evaluation.");
        }
    };
    struct Names {
        const Attribute detach{"detach"}, require_grad{"requires_grad_"}, requires_grad{"requires_grad"},
            tolist{"tolist"}, version{"_version"}, clone{"clone"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    static Weights read_weights(const py::tuple& row) {
        Weights result{row[0].cast<std::vector<int>>(), row[1].cast<std::vector<double>>()};
        if (result.index.size() != result.weight.size() || result.index.size() > size_t(kMaxTerms))
            throw std::invalid_argument("a row holds as many indices as weights, at most 16");
        return result;
    }

    bool takes_norm() const { return !bounds_.empty(); }

    // The norm of (partial + w·k) / (atol + rtol·max(|y0|, |y1|)): the largest RMS over the segments, NaN where any is.
    double norm(uintptr_t partial, uintptr_t k, double w, uintptr_t y0, uintptr_t y1) {
        const ErrorRatio ratio{partial, k, w, y0, y1, rtol_, atol_, rtol_each_, atol_each_};
        const int segments = int(bounds_.size()) - 1;
        run(n_, [&] { on_.backend->squared_error_ratio(on_.target, segments, bounds_.data(), sums_address_, ratio); });
        const auto* sums = reinterpret_cast<const double*>(sums_address_);
        std::vector<double> copied;
        if (on_.backend != &cpu_backend()) {
            copied = names().tolist.call(sums_.ptr()).cast<std::vector<double>>();
            sums = copied.data();
        }
        return control::norm_of_sums(sums, sizes_.data(), segments);
    }

    void read_norm(const py::tuple& norm) {
        bounds_ = norm[0].cast<std::vector<int64_t>>();
        for (size_t s = 1; s < bounds_.size(); ++s)
            if (bounds_[s - 1] < 0 || bounds_[s] < bounds_[s - 1] || bounds_[s] > n_)
                throw std::invalid_argument("bounds must not decrease, and end within the state");
        for (size_t s = 1; s < bounds_.size(); ++s) sizes_.push_back(bounds_[s] - bounds_[s - 1]);
        sums_ = norm[1];
        sums_address_ = address_of(sums_);
        if (sums_address_ < kLowestAddress && bounds_.size() > 1) refuse_without_memory();
        rtol_ = norm[2].cast<double>(), atol_ = norm[3].cast<double>();
        rtol_each_ = norm[4].cast<uintptr_t>(), atol_each_ = norm[5].cast<uintptr_t>();
    }

    std::vector<Output> read_outputs(const py::list& outputs) const {
        std::vector<Output> result;
        for (py::handle output : outputs) {
            const auto pair = output.cast<py::tuple>();
            py::object g = pair[1];
            const uintptr_t address = memory_of(g);
            result.push_back({pair[0].cast<std::vector<double>>(), std::move(g), address});
            if (result.back().weight.size() != rows_.size())
                throw std::invalid_argument("an output has a weight for every slope");
        }
        if (result.empty()) throw std::invalid_argument("a step without outputs has no cotangent");
        return result;
    }

    // As many as up to the last slope that some output depends on.
    static size_t stages_needed(const std::vector<Output>& outputs) {
        size_t count = 0;
        for (const Output& output : outputs)
            for (size_t i = count; i < output.weight.size(); ++i)
                if (output.weight[i] != 0) count = i + 1;
        return count;
    }

    using Evaluation = Slope::Result;

    Evaluation call(const py::object& f, Slope* slope, size_t i, const py::object& y, uintptr_t y_address) const {
        const py::object t = times_[i];
        if (slope) {
            Evaluation k = slope->evaluate(t.ptr(), y.ptr(), y_address);
            if (k.address == 0) k.address = memory_of(k.tensor);
            return k;
        }
        PyObject* const operands[] = {t.ptr(), y.ptr()};
        const auto k = Attribute::owned(PyObject_Vectorcall(f.ptr(), operands, 2, nullptr));
        return {k, memory_of(k), names().requires_grad.of(k.ptr()).ptr() == Py_True, false};  // its own, by Slope
    }

    Row slope_of(const py::object& f, Slope* slope, size_t i, const py::object& y, uintptr_t y_address) {
        Evaluation k = call(f, slope, i, y, y_address);
        Row row{std::move(k.tensor), k.address};
        return !k.is_held && is_own(row, false) ? row : copy(row);
    }

    Stage stage(Evaluation k, size_t i) {
        if (!k.has_graph) return {k.tensor, kept({k.tensor, k.address}, k.is_held, false, i), py::object()};
        py::object version = k.is_held ? py::object() : version_of(k.tensor);
        if (!version) {  // func may give the same tensor another graph
            k.tensor = names().clone.call(k.tensor.ptr());
            k.address = memory_of(k.tensor);
            version = names().version.of(k.tensor.ptr());
        }
        Row values = kept({k.tensor, k.address}, false, true, i);
        return {std::move(k.tensor), std::move(values), std::move(version)};
    }

    // Null for a tensor made in inference mode, which counts no versions.
    static py::object version_of(const py::object& x) {
        try {
            return names().version.of(x.ptr());
        } catch (const py::error_already_set&) {
            return py::object();
        }
    }

    // What a backward pass returned, laid out like the state.
    Row admitted(const Slope* slope, const py::object& admit, py::object x) const {
        uintptr_t address = 0;
        if (!slope || !slope->admission().admits(x.ptr(), &address)) x = admit(x);
        if (address == 0) address = memory_of(x);
        return {std::move(x), address};
    }

    // False where somebody else could change `x` before the step is done: func may write all its slopes, and a backward
    // pass all its results, into one buffer. Copying a small one is cheaper than looking who else has it.
    bool is_own(const Row& x, bool has_graph) const {
        return !is_small() && Ownership::known().is_sole(x.tensor.ptr(), has_graph);
    }

    Row copy(const Row& x) {
        Row out = copies_.take();
        copy_to(check_memory(out.address), x.address);
        return out;
    }

    // `x` in the replay, or a copy of a small one in place `i` of those of the step.
    Row kept(Row x, bool is_held, bool has_graph, size_t i) {
        if (!is_small()) return !is_held && is_own(x, has_graph) ? x : copy(x);
        const size_t pitch = (size_t(n_bytes()) + sizeof(Line) - 1) / sizeof(Line);
        values_.resize(2 * rows_.size() * pitch);
        const auto to = reinterpret_cast<uintptr_t>(values_.data() + i * pitch);
        copy_to(to, x.address);
        return {py::object(), to};
    }

    void copy_to(uintptr_t to, uintptr_t from) const {
        if (n_ == 0) return;
        if (is_small()) {
            std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size_t(n_bytes()));
        } else {
            Terms one;
            one.add(1, from);
            sum_up(to, 0, 1, one);
        }
    }

    bool is_small() const { return on_.backend == &cpu_backend() && n_bytes() <= kSmall; }
    int64_t n_bytes() const { return n_ * (on_.target.dtype == DType::f32 ? 4 : 8); }

    uintptr_t memory_of(const py::object& x) const { return check_memory(address_of(x)); }

    uintptr_t check_memory(uintptr_t address) const {
        if (address < kLowestAddress && n_ > 0) refuse_without_memory();
        return address;
    }

    void write_times(const std::vector<double>& t, size_t count) {
        times_.take(count);
        if (times_.address() < kLowestAddress) refuse_without_memory();
        on_.backend->write_scalars(on_.target, int(count), times_.address(), t.data());
    }

    // y + h·Σ_j weight_j·k_j
    Row weighted(const Weights& row, uintptr_t y, double h, const std::vector<uintptr_t>& k) {
        Row out = states_.take_one();
        const Sum sum = select(row, k);
        check_memory(out.address);
        run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, out.address, y, h, sum); });
        return out;
    }

    // Without waiting for a device.
    bool is_known_equal(uintptr_t x, const py::object& other) const {
        if (other.is_none() || on_.backend != &cpu_backend()) return false;
        if (n_ == 0) return true;
        const auto* const a = reinterpret_cast<const void*>(x);
        const auto* const b = reinterpret_cast<const void*>(memory_of(other));
        const size_t bytes = size_t(n_) * (on_.target.dtype == DType::f32 ? sizeof(float) : sizeof(double));
        bool equal = false;
        run(n_, [&] { equal = std::memcmp(a, b, bytes) == 0; });
        return equal;
    }

    // out = base + h·Σ terms, through the kernel kMaxTerms at a time.
    void sum_up(uintptr_t out, uintptr_t base, double h, const Terms& terms) const {
        for (size_t first = 0; first < terms.x.size(); first += kMaxTerms) {
            Sum sum{};
            for (size_t j = first; j < terms.x.size() && sum.count < kMaxTerms; ++j, ++sum.count)
                sum.x[sum.count] = terms.x[j], sum.w[sum.count] = terms.w[j];
            run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, out, base, h, sum); });
            base = out;
        }
    }

    static Sum select(const Weights& row, const std::vector<uintptr_t>& k) {
        Sum sum{};
        sum.count = int(row.index.size());
        for (int j = 0; j < sum.count; ++j) {
            sum.x[j] = k[size_t(row.index[size_t(j)])];
            sum.w[j] = row.weight[size_t(j)];
        }
        return sum;
    }

    static constexpr int64_t kSmall = 4096;  // bytes
    struct alignas(64) Line {
        std::byte bytes[64];
    };

    BoundTarget on_;
    int64_t n_;
    std::vector<double> c_;
    std::vector<Weights> rows_;
    std::vector<std::vector<double>> a_;  // the rows with their zeros
    Weights solution_;
    bool fsal_, estimates_error_;
    bool has_looked_ = false;  // closely at what backward passes return
    std::vector<double> error_;
    double error_last_ = 0;
    std::vector<Line> values_;  // of slopes and cotangents in the replay, where they are small
    Copies copies_;
    Rows states_, times_;
    py::object error_estimate_;
    std::vector<int64_t> bounds_, sizes_;  // of the segments; empty: this stepper does not compute the norm
    py::object sums_;
    uintptr_t sums_address_ = 0, rtol_each_ = 0, atol_each_ = 0;
    double rtol_ = 0, atol_ = 0;
};

}  // namespace aca
