// Python bindings of the control block, of the operations on it, and of the CUDA graph that loops over it.
#pragma once
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "control/control_block.h"
#include "kernels/ops.h"
#include "python/step_control_bindings.h"
#include "python/tensors.h"
#ifdef ACA_CUDA
#include "cuda_graph/loop_graph.h"
#endif

namespace aca {

inline void set_tableau(Control& s, const std::vector<double>& c, const std::vector<std::vector<double>>& dense) {
    if (c.size() > size_t(kMaxTerms) || dense.size() > c.size())
        throw std::invalid_argument("a step has at most 16 stages, and no more rows of dense output than stages");
    s.stages = int(c.size());
    s.degree = 0;
    std::memset(s.dense, 0, sizeof s.dense);
    for (size_t i = 0; i < c.size(); ++i) s.c[i] = c[i];
    for (const auto& row : dense)
        if (int(row.size()) > s.degree) s.degree = int(row.size());
    if (s.degree > kMaxDegree) throw std::invalid_argument("dense output has at most degree 8");
    for (size_t i = 0; i < dense.size(); ++i)  // padded in front: leading zeros change no bit of a Horner scheme
        for (size_t p = 0; p < dense[i].size(); ++p) s.dense[i][size_t(s.degree) - dense[i].size() + p] = dense[i][p];
}

inline void add_block(Control& s, uintptr_t address, int64_t states) {
    if (s.n_blocks == kMaxBlocks) throw std::invalid_argument("a control block holds at most 48 blocks of states");
    s.blocks[s.n_blocks] = {address, s.n_blocks ? s.n_states : 0};
    s.n_states = s.blocks[s.n_blocks++].first + states;
}

inline Control control_from(const py::bytes& bytes) {
    const std::string raw = bytes;
    Control s;
    if (raw.size() != sizeof s) throw std::invalid_argument("a control block has another number of bytes");
    std::memcpy(static_cast<void*>(&s), raw.data(), sizeof s);
    return s;
}

inline Decision decision_named(const std::string& name) {
    const char* const names[] = {"start", "euler", "first", "next", "resume", "transpose"};
    for (int i = 0; i < 6; ++i)
        if (name == names[i]) return Decision(i);
    throw std::invalid_argument("there is no decision named " + name);
}

inline DecidedStep decided_step(uintptr_t control, uintptr_t y, const std::vector<uintptr_t>& k) {
    if (k.size() > size_t(kMaxTerms)) throw std::invalid_argument("a step has at most 16 slopes");
    DecidedStep step{control, y, int(k.size()), {}};
    for (size_t j = 0; j < k.size(); ++j) step.k[j] = k[j];
    return step;
}

inline void bind_control(py::module_& m) {
    m.attr("CONTROL_BYTES") = sizeof(Control);
    m.attr("STEP_ENTRY_DOUBLES") = sizeof(StepEntry) / sizeof(double);
    m.attr("H_TRIAL") = offsetof(Control, solve.h_trial);
    m.attr("SLOPE_WEIGHT") = offsetof(Control, slope_weight);
    py::class_<Control>(m, "Control")
        .def(py::init([](const std::string& dtype, const Controller& controller, double first_step, bool is_adaptive,
                         int64_t max_num_steps) {
                 Control s{};
                 s.dtype = dtype == "float32" ? DType::f32 : DType::f64;
                 s.solve = control::begin(controller, first_step, is_adaptive, max_num_steps);
                 return s;
             }),
             py::arg("dtype"), py::arg("controller"), py::arg("first_step"), py::arg("is_adaptive"),
             py::arg("max_num_steps"))
        .def(py::init(&control_from))
        .def("set_times",
             [](Control& s, double first, double last, uintptr_t times, int64_t n_times, uintptr_t stops,
                int64_t n_stops) { control::set_times(s.solve, first, last, times, n_times, stops, n_stops); })
        .def("set_tableau", &set_tableau)
        .def("add_block", &add_block)
        .def_property_readonly("status", [](const Control& s) { return name_of(s.solve.status); })
        .def_property_readonly("t", [](const Control& s) { return s.solve.t; })
        .def_property_readonly("h", [](const Control& s) { return s.solve.h; })
        .def_property_readonly("ratio", [](const Control& s) { return s.solve.ratio; })
        .def_property_readonly("n_steps", [](const Control& s) { return s.solve.n_steps; })
        .def_property_readonly("n_accepted", [](const Control& s) { return s.solve.n_accepted; })
        .def("set_first_step", [](Control& s, double h) { s.solve.first_step = h; })
        .def_property_readonly("can_shrink", [](const Control& s) { return control::can_shrink(s.solve); })
        .def_readwrite("fsal", &Control::fsal)
        .def_readwrite("segments", &Control::segments)
        .def_readwrite("error_last", &Control::error_last)
        .def_readwrite("n_states", &Control::n_states)
        .def_readwrite("n_blocks", &Control::n_blocks)
        .def_readwrite("row_bytes", &Control::row_bytes)
        .def_readwrite("sizes", &Control::sizes)
        .def_readwrite("sums", &Control::sums)
        .def_readwrite("stage_times", &Control::stage_times)
        .def_readwrite("weights", &Control::weights)
        .def_readwrite("outputs", &Control::outputs)
        .def_readwrite("grad_outputs", &Control::grad_outputs)
        .def_readwrite("steps", &Control::steps)
        .def_readwrite("step", &Control::step)
        .def_readonly("is_unfinished", &Control::is_unfinished);
    m.def("write_control", [](const BoundTarget& on, uintptr_t to, const Control& from) {
        on.backend->write_control(on.target, to, from);
    });
    m.def("decide", [](const BoundTarget& on, uintptr_t control, const std::string& decision) {
        on.backend->decide(on.target, control, decision_named(decision));
    });
    m.def("finish_step", [](const BoundTarget& on, int64_t n, uintptr_t control, uintptr_t y,
                            const std::vector<uintptr_t>& k, uintptr_t y1, uintptr_t k_first) {
        const DecidedStep step = decided_step(control, y, k);
        run(n, [&] { on.backend->finish_step(on.target, n, step, y1, k_first); });
    });
    m.def("restore_step", [](const BoundTarget& on, int64_t n, uintptr_t control, uintptr_t y,
                             const std::vector<uintptr_t>& k, uintptr_t g, uintptr_t inside) {
        const DecidedStep step = decided_step(control, y, k);
        run(n, [&] { on.backend->restore_step(on.target, n, step, g, inside); });
    });
#ifdef ACA_CUDA
    py::class_<LoopGraph>(m, "LoopGraph")
        .def(py::init<int, uintptr_t, uintptr_t, uintptr_t>())
        .def("launch", &LoopGraph::launch)
        .def_static("is_supported", &LoopGraph::is_supported);
    m.def("obstacle_to_loop", &obstacle_to_loop);
    m.def("restart_capture", &restart_capture);
    m.def("new_stream", &new_stream);
#endif
}

}  // namespace aca
