// Calls func from C++ and checks its result, without Python in the usual case of a result laid out like the state.
#pragma once
#include <utility>
#include <vector>

#include "python/admission.h"
#include "python/tensors.h"
#include "python/torch_tensors.h"

namespace aca {

class Slope {
  public:
    // Calls `func(t, y, *args)`. A result that is not laid out like `like` is replaced by `checked(result)`. With
    // `versioned`, `changed()`, which raises, is called if func changed its state in place. If `is_grad_enabled()` is
    // false, a result with an autograd graph is detached.
    Slope(py::object func, py::tuple args, const py::object& like, py::object checked, py::object changed,
          py::object is_grad_enabled, bool versioned)
        : func_(std::move(func)),
          args_(std::move(args)),
          checked_(std::move(checked)),
          changed_(std::move(changed)),
          is_grad_enabled_(std::move(is_grad_enabled)),
          admission_(like),
          versioned_(versioned) {}

    // Returns a slope that no one else can change. The first evaluation of a solve is this one.
    py::object operator()(PyObject* t, PyObject* y) {
        dlpack::Tensor before;
        Result k = evaluate(t, y, Torch::found().look(y, &before) ? uintptr_t(before.data) : 0);
        if (n_evals == 1 && admission_.is_for_kernels()) check_whole(k.tensor.ptr());
        if (k.is_held || !Ownership::known().is_sole(k.tensor.ptr(), k.has_graph))
            return names().clone.call(k.tensor.ptr());
        return std::move(k.tensor);
    }

    // A slope as func returned it. `is_held`: another variable refers to the tensor; even if not, func may hold its
    // memory. The address is 0 if it takes a call into Python.
    struct Result {
        py::object tensor;
        uintptr_t address;
        bool has_graph, is_held;
    };

    // `y_address` is the address of y, or 0 if it is not known.
    Result evaluate(PyObject* t, PyObject* y, uintptr_t y_address) {
        ++n_evals;
        const py::object version = versioned_ ? names().version.of(y) : py::object();
        Result k{call(t, y), 0, false, false};
        if (!admission_.admits(k.tensor.ptr(), &k.address)) {
            k.tensor = checked_(k.tensor);
            if (!admission_.admits(k.tensor.ptr(), &k.address) && admission_.is_for_kernels()) refuse_without_memory();
        }
        if ((versioned_ && !equal(version, names().version.of(y))) || Torch::found().has_moved(y, y_address))
            changed_();
        k.is_held = Py_REFCNT(k.tensor.ptr()) != 1;
        if (names().requires_grad.of(k.tensor.ptr()).ptr() == Py_True) {
            k.has_graph = is_grad_enabled_().ptr() != Py_False;
            if (!k.has_graph) k.tensor = names().detach.call(k.tensor.ptr());
        }
        return k;
    }

    const Admission& admission() const { return admission_; }

    int traverse(visitproc visit, void* arg) const {
        for (const py::object* held : {&func_, &args_, &checked_, &surroundings}) Py_VISIT(held->ptr());
        return 0;
    }
    void clear() { func_ = args_ = checked_ = surroundings = py::none(); }

    Py_ssize_t n_evals = 0;
    py::object surroundings = py::none();  // context manager for calls of func, without the checks; or None

  private:
    struct Names {
        const Attribute version{"_version"}, requires_grad{"requires_grad"}, detach{"detach"}, clone{"clone"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    py::object call(PyObject* t, PyObject* y) const {
        if (surroundings.is_none()) return call_func(t, y);
        const py::object surroundings_now = surroundings;
        surroundings_now.attr("__enter__")();
        py::object k;
        try {
            k = call_func(t, y);
        } catch (py::error_already_set& error) {
            const py::object trace = error.trace() ? error.trace() : py::none();
            surroundings_now.attr("__exit__")(error.type(), error.value(), trace);
            throw;
        }
        surroundings_now.attr("__exit__")(py::none(), py::none(), py::none());
        return k;
    }

    py::object call_func(PyObject* t, PyObject* y) const {
        constexpr size_t kOffset = 1;  // a free place in front, which PY_VECTORCALL_ARGUMENTS_OFFSET lends the callee
        const size_t n_args = 2 + size_t(PyTuple_GET_SIZE(args_.ptr()));
        PyObject* few[kOffset + 6];
        std::vector<PyObject*> many;
        PyObject** operands = few;
        if (kOffset + n_args > sizeof(few) / sizeof(*few)) {
            many.resize(kOffset + n_args);
            operands = many.data();
        }
        operands[kOffset] = t, operands[kOffset + 1] = y;
        for (size_t i = 2; i < n_args; ++i) operands[kOffset + i] = PyTuple_GET_ITEM(args_.ptr(), Py_ssize_t(i - 2));
        return Attribute::owned(
            PyObject_Vectorcall(func_.ptr(), operands + kOffset, n_args | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr));
    }

    py::object func_, args_, checked_, changed_, is_grad_enabled_;
    Admission admission_;
    bool versioned_;
};

// f(t, y), with its address. `slope` is f itself if that is a Slope, else null; `y_address` is that of y.
inline Slope::Result slope_at(const py::object& f, Slope* slope, PyObject* t, PyObject* y, uintptr_t y_address) {
    static const Attribute requires_grad{"requires_grad"};
    if (slope) {
        Slope::Result k = slope->evaluate(t, y, y_address);
        if (k.address == 0) k.address = address_of(k.tensor);
        return k;
    }
    PyObject* const operands[] = {t, y};
    const auto k = Attribute::owned(PyObject_Vectorcall(f.ptr(), operands, 2, nullptr));
    // Not held: a callable that is no Slope ends in Slope's operator(), which copies results that func holds.
    return {k, address_of(k), requires_grad.of(k.ptr()).ptr() == Py_True, false};
}

}  // namespace aca
