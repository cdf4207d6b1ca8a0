// A trial step and its transpose without Python between their sums: what aca_ext.runge_kutta.step and step_vjp do.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <stdexcept>
#include <utility>
#include <vector>

#include "controller.h"
#include "ops.h"
#include "slope.h"

namespace aca {

constexpr int64_t kReleaseGilAbove = 1 << 14;  // elements; below, releasing costs more than it gives

// A target together with its backend, so that a call names both by one object.
struct BoundTarget {
    Target target;
    const Backend* backend;
};

template <typename F>
void run(int64_t n, F&& f) {
    if (n < 0) throw std::invalid_argument("n must not be negative");
    if (n > kReleaseGilAbove) {
        const py::gil_scoped_release release;
        f();
    } else {
        f();
    }
}

inline uintptr_t address_of(const py::object& tensor) {
    static const Attribute data_ptr("data_ptr");
    return uintptr_t(PyLong_AsSize_t(data_ptr.call(tensor.ptr()).ptr()));
}

// Tensors of one layout, handed out one after another and allocated many at a time. None is handed out twice.
class Rows {
  public:
    // `allocate()` returns a tuple of tensors, equally far apart in memory.
    explicit Rows(py::object allocate) : allocate_(std::move(allocate)) {}

    // `count` neighbours; operator[] and address() then speak of them.
    void take(size_t count) {
        first_ += taken_;
        taken_ = count;
        if (block_ && first_ + count <= size_) return;
        block_ = allocate_();
        first_ = 0;
        size_ = size_t(PyTuple_GET_SIZE(block_.ptr()));
        if (size_ < count) throw std::invalid_argument("allocate() returned too few tensors");
        start_ = address_of((*this)[0]);
        pitch_ = size_ > 1 ? address_of((*this)[1]) - start_ : 0;
    }
    py::object operator[](size_t i) const {
        return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(block_.ptr(), Py_ssize_t(first_ + i)));
    }
    uintptr_t address() const { return start_ + first_ * pitch_; }

  private:
    py::object allocate_, block_;
    size_t first_ = 0, taken_ = 0, size_ = 0;
    uintptr_t start_ = 0, pitch_ = 0;
};

class Stepper {
  public:
    // `c` and `rows`, (indices, weights), are of each stage; `solution` is (indices, b, error weights or None, error
    // weight of the last slope). `states()` and `times()` allocate as Rows says, states laid out like the state and 0-d
    // tensors. `norm` is None, or (bounds of the segments, address of a double for each, rtol, atol, rtol_each,
    // atol_each).
    Stepper(const BoundTarget& on, int64_t n, std::vector<double> c, const py::tuple& rows, const py::tuple& solution,
            bool fsal, py::object states, py::object times, const py::object& norm)
        : on_(on), n_(n), c_(std::move(c)), fsal_(fsal), states_(std::move(states)), times_(std::move(times)) {
        if (rows.size() > size_t(kMaxTerms) || rows.size() != c_.size())
            throw std::invalid_argument("a step has at most 16 stages, each with its c");
        for (py::handle row : rows) {
            rows_.push_back(read_row(row.cast<py::tuple>()));
            a_.emplace_back(rows.size());
            for (size_t j = 0; j < rows_.back().index.size(); ++j)
                a_.back().at(size_t(rows_.back().index[j])) = rows_.back().weight[j];
        }
        solution_ = read_row(solution);
        estimates_error_ = !solution[2].is_none();
        if (!estimates_error_) return;
        error_ = solution[2].cast<std::vector<double>>();
        error_last_ = solution[3].cast<double>();
        if (!norm.is_none()) read_norm(norm.cast<py::tuple>());
    }

    // Returns (y1, slopes, error but for its last slope or None). `t` are the times of the stages, `k_first` is f(t, y)
    // or None; `out` receives y1. With a norm, the sums of the squared error ratios are on their way to its address.
    py::tuple step(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                   const py::object& k_first, const py::object& out) {
        Trial trial = attempt(f, t, y, h, k_first, out);
        return py::make_tuple(std::move(trial.y1), std::move(trial.slopes), std::move(trial.error));
    }

    // Makes steps as long as they end before `until` and need no decision but the controller's: at most `trials`, and
    // none after one whose error is not finite or that no smaller step could follow. `start` is (t, h, y, f(t, y) or
    // None, up to three last error ratios, newest first); h counts in the direction of `until`. `error_norm()` is that
    // of the last step. `slot()` is where a solution belongs and `accept()` keeps it, or both are None.
    // Returns (start of the step to come, (t, h, t_next) of each accepted step, number of rejected ones, error ratio of
    // the last trial if it was rejected and the caller has to look, else None).
    py::tuple leap(const py::object& f, const Controller& controller, const py::object& error_norm,
                   const py::object& slot, const py::object& accept, const py::tuple& start, double until,
                   int64_t trials) {
        double t = start[0].cast<double>(), h = start[1].cast<double>();
        py::object y = start[2], k = start[3], alarm = py::none();
        auto ratios = start[4].cast<std::vector<double>>();
        const double sign = until < t ? -1 : 1;
        py::list accepted;
        int64_t n_rejected = 0;
        std::vector<double> times(rows_.size());
        const auto ends_before = [&](double time) {  // a step that moves at all
            return sign * (t + sign * h) < sign * time && std::abs(time - t) > h * (1 + 1e-12) && t + sign * h != t;
        };
        for (; trials > 0 && ends_before(until); --trials) {
            const double t_next = t + sign * h;
            set_times(times, t, sign * h, t_next);
            Trial trial = attempt(f, times, y, sign * h, k, slot.is_none() ? slot : slot());
            const double ratio = error_norm().cast<double>();
            if (ratio <= 1) {
                accepted.append(py::make_tuple(t, sign * h, t_next));
                if (!accept.is_none()) accept();
                t = t_next;
                y = std::move(trial.y1);
                k = py::none();
                if (fsal_) k = trial.slopes[rows_.size() - 1];
                ratios.insert(ratios.begin(), ratio);
                if (ratios.size() > 3) ratios.pop_back();
                h = controller.grow(h, ratios.data(), int(ratios.size()));
            } else {
                ++n_rejected;
                k = trial.slopes[0];
                h = controller.shrink(h, ratio);
                if (std::isfinite(ratio) && h >= controller.min_step && t + sign * h * 0.5 != t) continue;
                alarm = py::float_(ratio);
                break;
            }
        }
        return py::make_tuple(py::make_tuple(t, h, y, k, ratios), accepted, n_rejected, alarm);
    }

    // Makes the steps of a fixed grid. `start` is (y, f(t, y) or None) at its first node; `outputs` holds, for each
    // further node, where a copy of its state belongs, or None. `slot` and `accept` are those of leap. Returns (y,
    // slope or None) at the last node.
    py::tuple walk(const py::object& f, const py::object& slot, const py::object& accept, const py::tuple& start,
                   const std::vector<double>& grid, const py::list& outputs) {
        if (outputs.size() + 1 != grid.size()) throw std::invalid_argument("each node but the first has its output");
        py::object y = start[0], k = start[1];
        std::vector<double> times(rows_.size());
        for (size_t n = 0; n + 1 < grid.size(); ++n) {
            const double t = grid[n], t_next = grid[n + 1], h = t_next - t;
            set_times(times, t, h, t_next);
            const py::object output = outputs[n];
            Trial trial = attempt(f, times, y, h, k, slot.is_none() ? output : slot());
            if (!slot.is_none()) {
                if (!output.is_none()) output.attr("copy_")(trial.y1);
                accept();
            }
            y = std::move(trial.y1);
            k = py::none();
            if (fsal_) k = trial.slopes[rows_.size() - 1];
        }
        return py::make_tuple(y, k);
    }

    // Replays the step with graphs and returns the cotangent of y, given `outputs`, a list of (weights, cotangent).
    // `f(t, y)` evaluates with a graph, `pull_back(y, k, grad_k)` returns the cotangent of y or None, and `admit(v)`
    // lays a tensor out like the state.
    py::object vjp(const py::object& f, const py::object& pull_back, const py::object& admit, const py::object& check,
                   const std::vector<double>& t, const py::object& y, double h, const py::list& outputs) {
        const std::vector<Output> given = read_outputs(outputs);
        const size_t count = stages_needed(given);
        if (t.size() < count) throw std::invalid_argument("a step takes one time for each stage");
        std::vector<py::object> states, slopes;  // slopes with their graphs
        std::vector<uintptr_t> k;
        write_times(t, count);
        const uintptr_t y_address = address_of(y);
        for (size_t i = 0; i < count; ++i) {
            states.push_back(i == 0 ? names().detach.call(y.ptr()) : weighted(rows_[i], y_address, h, k));
            names().require_grad.call(states[i].ptr());
            slopes.push_back(call(f, nullptr, i, states[i]));
            k.push_back(address_of(slopes[i]));
        }
        if (!check.is_none() && int(count) > solution_.index.back()) check(weighted(solution_, y_address, h, k));

        std::vector<std::pair<size_t, py::object>> pulled;  // v_i, stages that y does not reach left out
        std::vector<uintptr_t> v(count);
        for (size_t i = count; i-- > 0;) {
            const py::object y_i = std::move(states[i]), k_i = std::move(slopes[i]);
            Terms terms;
            for (const Output& output : given) terms.add(output.weight[i], output.address);
            for (const auto& [j, v_j] : pulled) terms.add(a_[j][i], v[j]);
            if (terms.x.empty() || names().requires_grad.of(k_i.ptr()).ptr() == Py_False) continue;
            states_.take(1);
            const py::object grad_k = states_[0];
            sum_up(states_.address(), 0, h, terms);
            py::object v_i = pull_back(y_i, k_i, grad_k);
            if (v_i.is_none()) continue;
            v_i = admit(v_i);
            v[i] = address_of(v_i);
            pulled.emplace_back(i, std::move(v_i));
        }

        Terms terms;
        for (size_t o = 1; o < given.size(); ++o) terms.add(1, given[o].address);
        for (const auto& [j, v_j] : pulled) terms.add(1, v[j]);
        if (terms.x.empty()) return given[0].g;
        states_.take(1);
        sum_up(states_.address(), given[0].address, 1, terms);
        return states_[0];
    }

  private:
    struct Trial {
        py::object y1, error;
        py::list slopes;
    };
    struct Row {
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
    struct Names {
        const Attribute detach{"detach"}, require_grad{"requires_grad_"}, requires_grad{"requires_grad"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    // Those of the stages; at the end of the step they are t_next exactly, which rounding may keep from t + h.
    void set_times(std::vector<double>& times, double t, double h, double t_next) const {
        for (size_t i = 0; i < times.size(); ++i) times[i] = c_[i] == 1 ? t_next : t + c_[i] * h;
    }

    Trial attempt(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                  const py::object& k_first, const py::object& out) {
        const size_t stages = rows_.size();
        if (t.size() != stages) throw std::invalid_argument("a step takes one time for each stage");
        Slope* const slope = py::isinstance<Slope>(f) ? f.cast<Slope*>() : nullptr;
        write_times(t, stages);
        const uintptr_t y_address = address_of(y);
        Trial trial{out, py::none(), py::list()};
        std::vector<uintptr_t> k;
        const auto add = [&](py::object k_i) {
            k.push_back(address_of(k_i));
            trial.slopes.append(std::move(k_i));
        };
        add(k_first.is_none() ? call(f, slope, 0, y) : k_first);
        for (size_t i = 1; i < stages - fsal_; ++i) add(call(f, slope, i, weighted(rows_[i], y_address, h, k)));

        const Sum sum = select(solution_, k);
        if (out.is_none()) states_.take(1), trial.y1 = states_[0];
        const uintptr_t y1 = address_of(trial.y1);
        uintptr_t error = 0;
        if (estimates_error_) {
            if (!error_estimate_) states_.take(1), error_estimate_ = states_[0];  // read before the next step only
            trial.error = error_estimate_;
            error = address_of(error_estimate_);
            run(n_,
                [&] { on_.backend->solution_and_error(on_.target, n_, y1, error, y_address, h, sum, error_.data()); });
        } else {
            run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, y1, y_address, h, sum); });
        }
        if (fsal_) add(call(f, slope, stages - 1, trial.y1));
        if (!bounds_.empty()) {
            const uintptr_t k_last = error_last_ != 0 ? k[stages - 1] : 0;
            const ErrorRatio ratio{error, k_last, error_last_ * h, y_address, y1, rtol_, atol_, rtol_each_, atol_each_};
            run(n_, [&] {
                on_.backend->squared_error_ratio(on_.target, int(bounds_.size()) - 1, bounds_.data(), sums_, ratio);
            });
        }
        return trial;
    }

    static Row read_row(const py::tuple& row) {
        Row result{row[0].cast<std::vector<int>>(), row[1].cast<std::vector<double>>()};
        if (result.index.size() != result.weight.size() || result.index.size() > size_t(kMaxTerms))
            throw std::invalid_argument("a row holds as many indices as weights, at most 16");
        return result;
    }

    void read_norm(const py::tuple& norm) {
        bounds_ = norm[0].cast<std::vector<int64_t>>();
        for (size_t s = 1; s < bounds_.size(); ++s)
            if (bounds_[s - 1] < 0 || bounds_[s] < bounds_[s - 1] || bounds_[s] > n_)
                throw std::invalid_argument("bounds must not decrease, and end within the state");
        sums_ = norm[1].cast<uintptr_t>();
        rtol_ = norm[2].cast<double>(), atol_ = norm[3].cast<double>();
        rtol_each_ = norm[4].cast<uintptr_t>(), atol_each_ = norm[5].cast<uintptr_t>();
    }

    std::vector<Output> read_outputs(const py::list& outputs) const {
        std::vector<Output> result;
        for (py::handle output : outputs) {
            const auto pair = output.cast<py::tuple>();
            py::object g = pair[1];
            const uintptr_t address = address_of(g);
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

    static py::object call(const py::object& f, Slope* slope, PyObject* t, PyObject* y) {
        if (slope) return (*slope)(t, y);
        PyObject* const operands[] = {t, y};
        return Attribute::owned(PyObject_Vectorcall(f.ptr(), operands, 2, nullptr));
    }

    py::object call(const py::object& f, Slope* slope, size_t i, const py::object& y) const {
        return call(f, slope, times_[i].ptr(), y.ptr());
    }

    void write_times(const std::vector<double>& t, size_t count) {
        times_.take(count);
        on_.backend->write_scalars(on_.target, int(count), times_.address(), t.data());
    }

    // y + h·Σ_j weight_j·k_j
    py::object weighted(const Row& row, uintptr_t y, double h, const std::vector<uintptr_t>& k) {
        states_.take(1);
        const Sum sum = select(row, k);
        run(n_, [&] { on_.backend->weighted_sum(on_.target, n_, states_.address(), y, h, sum); });
        return states_[0];
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

    static Sum select(const Row& row, const std::vector<uintptr_t>& k) {
        Sum sum{};
        sum.count = int(row.index.size());
        for (int j = 0; j < sum.count; ++j) {
            sum.x[j] = k[size_t(row.index[size_t(j)])];
            sum.w[j] = row.weight[size_t(j)];
        }
        return sum;
    }

    BoundTarget on_;
    int64_t n_;
    std::vector<double> c_;
    std::vector<Row> rows_;
    std::vector<std::vector<double>> a_;  // the rows with their zeros
    Row solution_;
    bool fsal_, estimates_error_;
    std::vector<double> error_;
    double error_last_ = 0;
    Rows states_, times_;
    py::object error_estimate_;
    std::vector<int64_t> bounds_;  // empty: the norm is not ours to take
    uintptr_t sums_ = 0, rtol_each_ = 0, atol_each_ = 0;
    double rtol_ = 0, atol_ = 0;
};

}  // namespace aca
