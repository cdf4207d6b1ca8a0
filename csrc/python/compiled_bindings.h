// Python bindings of the compiled engine: its loop, its backward pass, and checksums of func's inputs.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "compiled/backward.h"
#include "compiled/loop.h"
#include "kernels/ops.h"
#include "python/checksum.h"
#include "python/torch_tensors.h"

namespace aca {

// Fields of Code, in its order; nullopt if there is no such program.
using CodeFields = std::array<uintptr_t, 4>;

inline Code make_code(const CodeFields& fields) { return {fields[0], fields[1], size_t(fields[2]), size_t(fields[3])}; }

inline Code make_code(const std::optional<CodeFields>& fields) { return fields ? make_code(*fields) : Code{}; }

inline std::shared_ptr<Specification> make_specification(const BoundTarget& on, int64_t n, std::vector<double> c,
                                                         bool fsal, std::vector<std::vector<double>> dense, double rtol,
                                                         double atol, uintptr_t rtol_each, uintptr_t atol_each,
                                                         std::vector<int64_t> bounds, const Controller& control,
                                                         double first_step, bool is_adaptive, std::vector<double> times,
                                                         std::vector<double> stops, std::vector<double> jumps,
                                                         int64_t max_num_steps, const CodeFields& slope,
                                                         const CodeFields& step) {
    return std::shared_ptr<Specification>(new Specification{on.target,
                                                            *on.backend,
                                                            n,
                                                            {std::move(c), fsal, std::move(dense)},
                                                            {rtol, atol, rtol_each, atol_each, std::move(bounds)},
                                                            control,
                                                            first_step,
                                                            is_adaptive,
                                                            std::move(times),
                                                            std::move(stops),
                                                            std::move(jumps),
                                                            max_num_steps,
                                                            make_code(slope),
                                                            make_code(step)});
}

// Returns the status of the solve, and its numbers of steps, accepted steps and evaluations of func.
inline std::tuple<int, int64_t, size_t, int64_t> solve_compiled(CompiledLoop& loop, uintptr_t memory,
                                                                const std::vector<uintptr_t>& inputs, uintptr_t y0,
                                                                uintptr_t outputs, const py::object& next_slots) {
    CompiledLoop::Slots slots;
    if (!next_slots.is_none())
        slots = [&] {
            const py::gil_scoped_acquire acquire;
            return next_slots().cast<std::pair<uintptr_t, int64_t>>();
        };
    const auto check_signals = [] {
        const py::gil_scoped_acquire acquire;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    };
    const py::gil_scoped_release release;
    const int status = int(loop.solve(memory, inputs, y0, outputs, std::move(slots), check_signals));
    return {status, loop.control().n_steps, loop.steps.size(), loop.n_f_evals};
}

inline size_t backward_bytes(const Specification& spec, const std::optional<CodeFields>& end_only,
                             const std::optional<CodeFields>& inside) {
    return CompiledBackward(spec, make_code(end_only), make_code(inside)).memory_bytes();
}

inline void transpose(const CompiledLoop& loop, const std::optional<CodeFields>& end_only,
                      const std::optional<CodeFields>& inside, uintptr_t memory, const std::vector<uintptr_t>& inputs,
                      const std::vector<size_t>& gradient_bytes, uintptr_t grad_outputs, uintptr_t grad_y0) {
    CompiledBackward backward(loop.specification(), make_code(end_only), make_code(inside));
    backward.run(loop.steps, memory, inputs, gradient_bytes, grad_outputs, grad_y0);
}

// Returns (t, h, t_next, outputs) of each accepted step.
inline py::list accepted_steps(const CompiledLoop& loop) {
    py::list steps;
    for (const AcceptedStep& s : loop.steps) steps.append(py::make_tuple(s.t, s.h, s.t_next, s.outputs));
    return steps;
}

// Returns start and end of each accepted step as the bytes of float64 numbers.
inline py::bytearray bounds_of(const CompiledLoop& loop) {
    std::vector<double> values;
    for (const AcceptedStep& s : loop.steps) values.insert(values.end(), {s.t, s.t_next});
    return {reinterpret_cast<const char*>(values.data()), values.size() * sizeof(double)};
}

// Checksums of func's inputs, eight bytes each. Different contents have the same checksum with probability 2^-64.
class Checksums {
  public:
    // `sizes` of the inputs in bytes; an input of size 0 is not read.
    explicit Checksums(std::vector<size_t> sizes) : sizes_(std::move(sizes)) {}

    py::bytes operator()(const py::list& addresses) const {
        if (addresses.size() != sizes_.size()) throw std::invalid_argument("pass one address for each size");
        std::vector<uint64_t> sums;
        sums.reserve(sizes_.size());
        for (size_t i = 0; i < sizes_.size(); ++i)
            sums.push_back(sizes_[i] ? checksum(addresses[i].cast<uintptr_t>(), sizes_[i]) : 0);
        return {reinterpret_cast<const char*>(sums.data()), sums.size() * sizeof(uint64_t)};
    }

  private:
    std::vector<size_t> sizes_;
};

inline void bind_compiled(py::module_& m) {
    py::class_<Checksums>(m, "Checksums").def(py::init<std::vector<size_t>>()).def("__call__", &Checksums::operator());
    py::class_<Specification, std::shared_ptr<Specification>>(m, "CompiledSpecification")
        .def(py::init(&make_specification))
        .def_property_readonly("forward_bytes", &CompiledLoop::memory_bytes)
        .def("backward_bytes", &backward_bytes);
    py::class_<CompiledLoop>(m, "CompiledLoop")
        .def(py::init<std::shared_ptr<Specification>>())
        .def("solve", &solve_compiled)
        .def("transpose", &transpose, py::call_guard<py::gil_scoped_release>())
        .def("accepted_steps", &accepted_steps)
        .def("bounds", &bounds_of)
        .def_property_readonly("n_accepted", [](const CompiledLoop& loop) { return loop.steps.size(); })
        .def_property_readonly("t", [](const CompiledLoop& loop) { return loop.control().t; })
        .def_property_readonly("h", [](const CompiledLoop& loop) { return loop.control().h; })
        .def_property_readonly("error_ratio", [](const CompiledLoop& loop) { return loop.control().ratio; })
        .def_readonly("n_inside", &CompiledLoop::n_inside);
}

}  // namespace aca
