// The extension module _C: bindings of the kernels, whose arguments are checked and converted here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels/ops.h"
#include "python/compiled_bindings.h"
#include "python/contents.h"
#include "python/control_bindings.h"
#include "python/leaves.h"
#include "python/modules.h"
#include "python/running_sums.h"
#include "python/stage_iterations.h"
#include "python/stage_system.h"
#include "python/step_runs.h"
#include "python/stepper.h"
#include "python/transposed_step.h"

namespace py = pybind11;

namespace {

using namespace aca;

constexpr int kMaxSegments = 64;

BoundTarget make_target(const std::string& backend, const std::string& dtype, int threads, int device, uintptr_t stream,
                        uintptr_t workspace) {
    BoundTarget bound{};
    if (dtype != "float32" && dtype != "float64")
        throw std::invalid_argument("there are no kernels for dtype " + dtype);
    if (threads < 1) throw std::invalid_argument("threads must be at least 1");
    bound.target = {dtype == "float32" ? DType::f32 : DType::f64, threads, device, stream, workspace};
    if (backend == "cpu") {
        bound.backend = &cpu_backend();
#ifdef ACA_CUDA
    } else if (backend == "cuda") {
        bound.backend = &cuda_backend();
#endif
    } else {
        throw std::invalid_argument("this build has no backend " + backend);
    }
    return bound;
}

// Reads up to `limit` numbers from a list or tuple without an allocation.
template <typename T, typename Convert>
int read(py::handle sequence, T* to, int limit, const char* what, Convert convert) {
    const bool list = PyList_CheckExact(sequence.ptr());
    if (!list && !PyTuple_CheckExact(sequence.ptr()))
        throw py::type_error(std::string(what) + " must be a list or a tuple");
    const Py_ssize_t count = PySequence_Fast_GET_SIZE(sequence.ptr());
    if (count < 1 || count > limit)
        throw std::invalid_argument(std::string(what) + " takes 1 to " + std::to_string(limit) + " entries, not " +
                                    std::to_string(count));
    for (Py_ssize_t i = 0; i < count; ++i) to[i] = convert(PySequence_Fast_GET_ITEM(sequence.ptr(), i));
    if (PyErr_Occurred()) throw py::error_already_set();
    return int(count);
}

int read_doubles(py::handle sequence, double* to, int limit, const char* what) {
    return read(sequence, to, limit, what, PyFloat_AsDouble);
}

Sum read_sum(py::handle x, py::handle w) {
    Sum sum{};
    sum.count = read(x, sum.x, kMaxTerms, "x", [](PyObject* o) { return uintptr_t(PyLong_AsSize_t(o)); });
    if (read_doubles(w, sum.w, kMaxTerms, "w") != sum.count) throw std::invalid_argument("x and w differ in length");
    return sum;
}

void read_weights(py::handle error_weight, double* to, int count) {
    if (read_doubles(error_weight, to, kMaxTerms, "error_weight") != count)
        throw std::invalid_argument("x and error_weight differ in length");
}

int read_bounds(py::handle bounds, int64_t* to) {
    const int segments = read(bounds, to, kMaxSegments + 1, "bounds", PyLong_AsLongLong) - 1;
    for (int s = 0; s < segments; ++s)
        if (to[s] < 0 || to[s + 1] < to[s]) throw std::invalid_argument("bounds must not decrease");
    return segments;
}

// Raises if an address is null or next to it, and the kernel would read or write elements there.
void check_memory(int64_t n, std::initializer_list<uintptr_t> addresses) {
    if (n <= 0) return;
    for (const uintptr_t address : addresses)
        if (address < kLowestAddress) refuse_without_memory();
}

void check_memory(int64_t n, const Sum& sum) {
    for (int j = 0; j < sum.count; ++j) check_memory(n, {sum.x[j]});
}

ErrorRatio make_ratio(uintptr_t partial, uintptr_t k, double w, uintptr_t y0, uintptr_t y1, double rtol, double atol,
                      uintptr_t rtol_each, uintptr_t atol_each) {
    if ((rtol_each == 0) != (atol_each == 0))
        throw std::invalid_argument("rtol_each and atol_each: pass both or neither");
    return {partial, k, w, y0, y1, rtol, atol, rtol_each, atol_each};
}

void weighted_sum(const BoundTarget& on, int64_t n, uintptr_t out, uintptr_t base, double h, py::handle x,
                  py::handle w) {
    const Sum sum = read_sum(x, w);
    check_memory(n, {out});
    check_memory(n, sum);
    run(n, [&] { on.backend->weighted_sum(on.target, n, out, base, h, sum); });
}

void solution_and_error(const BoundTarget& on, int64_t n, uintptr_t y1, uintptr_t error, uintptr_t y, double h,
                        py::handle x, py::handle b, py::handle error_weight) {
    const Sum sum = read_sum(x, b);
    double weight[kMaxTerms];
    read_weights(error_weight, weight, sum.count);
    check_memory(n, {y1, error, y});
    check_memory(n, sum);
    run(n, [&] { on.backend->solution_and_error(on.target, n, y1, error, y, h, sum, weight); });
}

void squared_error_ratio(const BoundTarget& on, py::handle bounds, uintptr_t out, uintptr_t partial, uintptr_t k,
                         double w, uintptr_t y0, uintptr_t y1, double rtol, double atol, uintptr_t rtol_each,
                         uintptr_t atol_each) {
    const ErrorRatio ratio = make_ratio(partial, k, w, y0, y1, rtol, atol, rtol_each, atol_each);
    int64_t bound[kMaxSegments + 1];
    const int segments = read_bounds(bounds, bound);
    check_memory(bound[segments], {out, partial, y0, y1});
    run(bound[segments], [&] { on.backend->squared_error_ratio(on.target, segments, bound, out, ratio); });
}

Samples make_samples(int64_t count, int64_t length, uintptr_t each) {
    if (count < 0 || length < 0)
        throw std::invalid_argument("the number of rows and their length must not be negative");
    return {count, length, each};
}

void weighted_sum_rows(const BoundTarget& on, int64_t count, int64_t length, uintptr_t h, uintptr_t out, uintptr_t base,
                       py::handle x, py::handle w) {
    const Samples rows = make_samples(count, length, h);
    const Sum sum = read_sum(x, w);
    check_memory(count * length, {h, out});
    check_memory(count * length, sum);
    run(count * length, [&] { on.backend->weighted_sum_rows(on.target, rows, out, base, sum); });
}

void solution_and_error_rows(const BoundTarget& on, int64_t count, int64_t length, uintptr_t h, uintptr_t y1,
                             uintptr_t error, uintptr_t y, py::handle x, py::handle b, py::handle error_weight) {
    const Samples rows = make_samples(count, length, h);
    const Sum sum = read_sum(x, b);
    double weight[kMaxTerms];
    read_weights(error_weight, weight, sum.count);
    check_memory(count * length, {h, y1, error, y});
    check_memory(count * length, sum);
    run(count * length, [&] { on.backend->solution_and_error_rows(on.target, rows, y1, error, y, sum, weight); });
}

void squared_error_ratio_rows(const BoundTarget& on, int64_t count, py::handle bounds, uintptr_t w, uintptr_t out,
                              uintptr_t partial, uintptr_t k, uintptr_t y0, uintptr_t y1, double rtol, double atol,
                              uintptr_t rtol_each, uintptr_t atol_each) {
    const ErrorRatio ratio = make_ratio(partial, k, 0, y0, y1, rtol, atol, rtol_each, atol_each);
    int64_t bound[kMaxSegments + 1];
    const int segments = read_bounds(bounds, bound);
    const Samples rows = make_samples(count, bound[segments], w);
    check_memory(count * rows.length, {w, out, partial, y0, y1});
    run(count * rows.length,
        [&] { on.backend->squared_error_ratio_rows(on.target, rows, segments, bound, out, ratio); });
}

// For each of `count` rows of `length` elements its two sizes, one row after the other.
std::vector<double> relative_changes_of_rows(const BoundTarget& on, int64_t count, int64_t length, uintptr_t change,
                                             uintptr_t state) {
    check_memory(count * length, {change, state});
    const uintptr_t pitch = uintptr_t(length) * (on.target.dtype == DType::f32 ? 4 : 8);
    std::vector<double> sizes;
    run(count * length, [&] {
        for (uintptr_t row = 0; row < uintptr_t(count); ++row) {
            const uintptr_t offset = row * pitch;
            const RelativeChanges found = relative_changes_at(on.target.dtype, length, change + offset, state + offset);
            sizes.insert(sizes.end(), {found.of_element, found.of_largest});
        }
    });
    return sizes;
}

void write_scalars(const BoundTarget& on, uintptr_t out, py::handle values) {
    double value[kMaxTerms];
    const int n = read_doubles(values, value, kMaxTerms, "values");
    check_memory(n, {out});
    on.backend->write_scalars(on.target, n, out, value);
}

// Shows the garbage collector the references of an object. It needs them to free cycles: func may hold a result, whose
// autograd graph holds a Slope, which holds func.
template <typename T>
void make_collectable(PyHeapTypeObject* heap_type) {
    PyTypeObject& type = heap_type->ht_type;
    type.tp_flags |= Py_TPFLAGS_HAVE_GC;
    type.tp_traverse = [](PyObject* self, visitproc visit, void* arg) {
        Py_VISIT(Py_TYPE(self));
        const auto held = reinterpret_cast<py::detail::instance*>(self)->get_value_and_holder();
        return held.holder_constructed() ? held.value_ptr<T>()->traverse(visit, arg) : 0;
    };
    type.tp_clear = [](PyObject* self) {
        py::cast<T&>(py::handle(self)).clear();
        return 0;
    };
}

// Stores the parts of torch that this module uses: the types of plain tensors, the table of DLPack's C functions, and
// the counter of a storage's references. The last two are None if this torch lacks them. `alone` is a tensor and a view
// of another, held by no one else, for Ownership.
void use_torch(const py::type& tensor, const py::type& parameter, const py::object& exchange_api,
               const py::object& storage_uses, const py::tuple& alone) {
    Torch& torch = Torch::found();
    torch = {};
    TensorClasses::known() = {reinterpret_cast<PyTypeObject*>(py::type(tensor).release().ptr()),
                              reinterpret_cast<PyTypeObject*>(py::type(parameter).release().ptr())};
    if (!storage_uses.is_none()) torch.storage_uses = py::object(storage_uses).release().ptr();
    Ownership::known().learn(alone[0], alone[1]);
    if (exchange_api.is_none()) return;
    const auto* api =
        static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(exchange_api.ptr(), "dlpack_exchange_api"));
    if (!api) throw py::error_already_set();
    if (api->major == 1) torch.view = api->view;
}

// Returns the tensor that `f(*args)` returns, or a copy if someone else could change it.
py::object own_result(const py::object& f, const py::tuple& args) {
    py::object x = Attribute::owned(PyObject_CallObject(f.ptr(), args.ptr()));
    if (x.is_none() || Ownership::known().is_sole(x.ptr(), false)) return x;
    return x.attr("clone")();
}

int device_count() {
#ifdef ACA_CUDA
    return cuda_device_count();
#else
    return 0;
#endif
}

}  // namespace

PYBIND11_MODULE(_C, m) {
    m.doc() = "Kernels of aca_ext on raw addresses, which they trust. Use aca_ext.kernels.fused, which checks tensors.";
    m.attr("VERSION") = ACA_VERSION;
    m.attr("CUDA_ARCHITECTURES") = ACA_CUDA_ARCHITECTURES;
    m.attr("HAS_CUDA") = py::bool_(sizeof(ACA_CUDA_ARCHITECTURES) > 1);
    m.attr("HAS_OPENMP") = py::bool_(
#ifdef _OPENMP
        true
#else
        false
#endif
    );
    m.attr("MAX_TERMS") = kMaxTerms;
    m.attr("MAX_SEGMENTS") = kMaxSegments;
    m.attr("WORKSPACE_BYTES") = kWorkspaceBytes;
    m.def("cpu_instruction_set", &cpu_instruction_set);
    m.def("cuda_device_count", &device_count);

    m.def("use_torch", &use_torch);
    m.def("own_result", &own_result);
    m.def("is_surely_readable", [](py::handle x) { return is_surely_readable(x.ptr()); });

    py::class_<BoundTarget>(m, "Target")
        .def(py::init(&make_target), py::arg("backend"), py::arg("dtype"), py::arg("threads"), py::arg("device"),
             py::arg("stream"), py::arg("workspace"));
    py::class_<Controller>(m, "Controller")
        .def(py::init([](int order, double safety, double ifactor, double dfactor, double pcoeff, double icoeff,
                         double dcoeff, double min_step, double max_step) {
                 return Controller{order, safety, ifactor, dfactor, pcoeff, icoeff, dcoeff, min_step, max_step};
             }),
             py::arg("order"), py::arg("safety"), py::arg("ifactor"), py::arg("dfactor"), py::arg("pcoeff"),
             py::arg("icoeff"), py::arg("dcoeff"), py::arg("min_step"), py::arg("max_step"));
    bind_step_control(m);
    py::class_<Slope>(m, "Slope", py::custom_type_setup(&make_collectable<Slope>))
        .def(py::init<py::object, py::tuple, const py::object&, py::object, py::object, py::object, bool>())
        .def_readonly("n_evals", &Slope::n_evals)
        .def_readwrite("surroundings", &Slope::surroundings)
        .def("__call__", [](Slope& f, py::handle t, py::handle y) { return f(t.ptr(), y.ptr()); });
    py::class_<KnownTensors>(m, "KnownTensors", py::custom_type_setup(&make_collectable<KnownTensors>))
        .def(py::init<const py::iterable&, Py_ssize_t>())
        .def("add", [](KnownTensors& known, py::handle x) { known.add(x.ptr()); })
        .def("others", [](KnownTensors& known, py::handle roots,
                          py::handle state) { return known.others(roots.ptr(), state.ptr()); })
        .def("are_met_by", [](KnownTensors& known, py::handle roots) { return known.are_met_by(roots.ptr()); });
    py::class_<RunningSums>(m, "RunningSums").def(py::init<const py::list&>()).def("add", &RunningSums::add);
    py::class_<Contents>(m, "Contents", py::custom_type_setup(&make_collectable<Contents>))
        .def(py::init<py::object>())
        .def("add", [](Contents& contents, py::handle holder) { contents.add(holder.ptr()); })
        .def("add_container", [](Contents& contents, py::handle holder) { contents.add_container(holder.ptr()); })
        .def("add_named", &Contents::add_named)
        .def("update", &Contents::update)
        .def("changes", &Contents::changes)
        .def("order_of", [](Contents& contents, py::handle holder) { return contents.order_of(holder.ptr()); })
        .def("watch_tensors", &Contents::watch_tensors)
        .def("changed_tensors", &Contents::changed_tensors)
        .def("tensors", &Contents::tensors);
    py::class_<ModuleWalk>(m, "ModuleWalk")
        .def(py::init<const py::iterable&, py::frozenset>())
        .def("visit", &ModuleWalk::visit);
    py::class_<Stepper>(m, "Stepper")
        .def(py::init<const BoundTarget&, int64_t, std::vector<double>, const py::tuple&, const py::tuple&, bool,
                      py::object, py::object, const py::object&>())
        .def("step", &Stepper::step)
        .def("choose_first_step", [](Stepper& stepper, const py::object& f, SolveControl& control, const py::object& y,
                                     const py::object& k) { return stepper.choose_first_step(f, control.solve, y, k); })
        .def("run_steps", &run_steps)
        .def("vjp", &transpose_step);
    m.def("weighted_sum", &weighted_sum);
    m.def("solution_and_error", &solution_and_error);
    m.def("squared_error_ratio", &squared_error_ratio);
    m.def("weighted_sum_rows", &weighted_sum_rows);
    m.def("solution_and_error_rows", &solution_and_error_rows);
    m.def("squared_error_ratio_rows", &squared_error_ratio_rows);
    m.def("write_scalars", &write_scalars);
    m.def("relative_changes", &relative_changes_of_rows);
    py::class_<StageSystem>(m, "StageSystem")
        .def(py::init<const BoundTarget&, int64_t, int, const Addresses&, const std::vector<std::vector<double>>&,
                      double, uintptr_t>())
        .def("solve", &StageSystem::solve)
        .def("correct", &StageSystem::correct);
    py::class_<StageIterations>(m, "StageIterations")
        .def(py::init<const BoundTarget&, int64_t, const py::object&, const py::object&, const py::tuple&>())
        .def("iterate", &StageIterations::iterate);
    bind_compiled(m);
    bind_control(m);
}
