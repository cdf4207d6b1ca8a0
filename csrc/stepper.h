// One trial step without Python between its sums: what aca_ext.runge_kutta.step does, calling f directly.
#pragma once
#include <pybind11/pybind11.h>

#include <vector>

#include "ops.h"

namespace aca {

namespace py = pybind11;

// A target together with its backend, so that a call names both by one object.
struct BoundTarget {
    Target target;
    const Backend* backend;
};

class Stepper {
  public:
    // `rows` are (indices, weights) of each stage; `solution` is (indices, b, error weights or None). `empty_state()`
    // and `empty_times()` allocate a tensor laid out like the state, and a 1-d one with an entry for every stage.
    Stepper(const BoundTarget& on, int64_t n, const py::tuple& rows, const py::tuple& solution, bool fsal,
            py::object empty_state, py::object empty_times)
        : on_(on),
          n_(n),

          fsal_(fsal),
          empty_state_(std::move(empty_state)),
          empty_times_(std::move(empty_times)) {
        if (rows.size() > size_t(kMaxTerms)) throw std::invalid_argument("a step has at most 16 stages");
        for (py::handle row : rows) rows_.push_back(read_row(row.cast<py::tuple>()));
        solution_ = read_row(solution);
        estimates_error_ = !solution[2].is_none();
        if (estimates_error_) error_ = solution[2].cast<std::vector<double>>();
    }

    // Returns (y1, slopes, error but for its last slope or None). `t` are the times of the stages, `k_first` is f(t, y)
    // or None; `out` receives y1.
    py::tuple step(const py::object& f, const std::vector<double>& t, const py::object& y, double h,
                   const py::object& k_first, const py::object& out) {
        const size_t stages = rows_.size();
        if (t.size() != stages) throw std::invalid_argument("a step takes one time for each stage");
        const py::object times = empty_times_();
        on_.backend->write_scalars(on_.target, int(stages), address(times), t.data());
        const py::object time = times.attr("unbind")();
        const uintptr_t y_address = address(y);
        py::list slopes;
        std::vector<uintptr_t> k(stages);
        const auto add = [&](py::object slope) {
            k[slopes.size()] = address(slope);
            slopes.append(std::move(slope));
        };
        add(k_first.is_none() ? call(f, time, 0, y) : k_first);
        for (size_t i = 1; i < stages - fsal_; ++i) {
            const py::object y_i = empty_state_();
            const Sum sum = select(rows_[i], k);
            const uintptr_t to = address(y_i);
            run([&] { on_.backend->weighted_sum(on_.target, n_, to, y_address, h, sum); });
            add(call(f, time, i, y_i));
        }

        const Sum sum = select(solution_, k);
        const py::object y1 = out.is_none() ? empty_state_() : out;
        const uintptr_t y1_address = address(y1);
        py::object error = py::none();
        if (estimates_error_) {
            if (!error_estimate_) error_estimate_ = empty_state_();  // read before the next step, never by the user
            error = error_estimate_;
            const uintptr_t to = address(error);
            run([&] {
                on_.backend->solution_and_error(on_.target, n_, y1_address, to, y_address, h, sum, error_.data());
            });
        } else {
            run([&] { on_.backend->weighted_sum(on_.target, n_, y1_address, y_address, h, sum); });
        }
        if (fsal_) add(call(f, time, stages - 1, y1));
        return py::make_tuple(y1, slopes, error);
    }

  private:
    struct Row {
        std::vector<int> index;
        std::vector<double> weight;
    };

    static Row read_row(const py::tuple& row) {
        Row result{row[0].cast<std::vector<int>>(), row[1].cast<std::vector<double>>()};
        if (result.index.size() != result.weight.size() || result.index.size() > size_t(kMaxTerms))
            throw std::invalid_argument("a row holds as many indices as weights, at most 16");
        return result;
    }

    static uintptr_t address(const py::object& tensor) {
        static const py::object name = py::str("data_ptr");
        PyObject* const operand[] = {tensor.ptr()};
        const py::object result =
            py::reinterpret_steal<py::object>(PyObject_VectorcallMethod(name.ptr(), operand, 1, nullptr));
        if (!result) throw py::error_already_set();
        return uintptr_t(PyLong_AsSize_t(result.ptr()));
    }

    static py::object call(const py::object& f, const py::object& times, size_t i, const py::object& y) {
        PyObject* const operands[] = {PyTuple_GET_ITEM(times.ptr(), Py_ssize_t(i)), y.ptr()};
        PyObject* const slope = PyObject_Vectorcall(f.ptr(), operands, 2, nullptr);
        if (!slope) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(slope);
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

    template <typename F>
    void run(F&& f) const {
        if (n_ > kReleaseGilAbove) {
            const py::gil_scoped_release release;
            f();
        } else {
            f();
        }
    }

    static constexpr int64_t kReleaseGilAbove = 1 << 14;

    BoundTarget on_;
    int64_t n_;
    std::vector<Row> rows_;
    Row solution_;
    std::vector<double> error_;
    bool estimates_error_, fsal_;
    py::object empty_state_, empty_times_, error_estimate_;
};

}  // namespace aca
