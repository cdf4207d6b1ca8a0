// f called straight from C++, and a first look at what it returned: most results are laid out like the state.
#pragma once
#include <utility>
#include <vector>

#include "tensors.h"

namespace aca {

class Slope {
  public:
    // Calls `func(t, y, *args)`. A result whose layout is not that of `like`, a plain tensor, becomes
    // `checked(result)`. With `versioned`, a state that func changed in place ends in `changed()`, which raises. Where
    // the caller wants no graph, `is_grad_enabled()`, a result that has one all the same is detached.
    Slope(py::object func, py::tuple args, const py::object& like, py::object checked, py::object changed,
          py::object is_grad_enabled, bool versioned)
        : func_(std::move(func)),
          args_(std::move(args)),
          checked_(std::move(checked)),
          changed_(std::move(changed)),
          is_grad_enabled_(std::move(is_grad_enabled)),
          type_(py::type::of(like)),
          dtype_(names().dtype.of(like.ptr())),
          device_(names().device.of(like.ptr())),
          shape_(names().shape.of(like.ptr())),
          stride_(names().stride.call(like.ptr())),
          versioned_(versioned) {}

    py::object operator()(PyObject* t, PyObject* y) {
        ++n_evals;
        const py::object version = versioned_ ? names().version.of(y) : py::object();
        py::object k = call(t, y);
        if (!is_like_state(k)) k = checked_(k);
        if (versioned_ && !equal(version, names().version.of(y))) changed_();
        if (names().requires_grad.of(k.ptr()).ptr() == Py_True && is_grad_enabled_().ptr() == Py_False)
            k = names().detach.call(k.ptr());
        return k;
    }

    int traverse(visitproc visit, void* arg) const {
        for (const py::object* held : {&func_, &args_, &checked_}) Py_VISIT(held->ptr());
        return 0;
    }
    void clear() { func_ = args_ = checked_ = py::none(); }

    Py_ssize_t n_evals = 0;

  private:
    struct Names {
        const Attribute dtype{"dtype"}, device{"device"}, shape{"shape"}, stride{"stride"}, is_neg{"is_neg"},
            version{"_version"}, requires_grad{"requires_grad"}, detach{"detach"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    static bool equal(const py::object& a, const py::object& b) {
        const int result = a.is(b) ? 1 : PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
        if (result < 0) throw py::error_already_set();
        return result == 1;
    }

    py::object call(PyObject* t, PyObject* y) const {
        constexpr size_t kOffset = 1;  // a free place in front, which the callee may use
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

    bool is_like_state(const py::object& k) const {
        PyObject* const x = k.ptr();
        return reinterpret_cast<PyObject*>(Py_TYPE(x)) == type_.ptr() && names().dtype.of(x).is(dtype_) &&
               equal(names().shape.of(x), shape_) && equal(names().stride.call(x), stride_) &&
               equal(names().device.of(x), device_) && names().is_neg.call(x).ptr() == Py_False;
    }

    py::object func_, args_, checked_, changed_, is_grad_enabled_, type_, dtype_, device_, shape_, stride_;
    bool versioned_;
};

}  // namespace aca
