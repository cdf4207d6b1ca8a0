// f called straight from C++, and a first look at what it returned: most results are laid out like the state.
#pragma once
#include <utility>
#include <vector>

#include "tensors.h"
#include "torch_tensors.h"

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
          versioned_(versioned) {
        dlpack::Tensor seen;
        is_seen_ = Torch::found().look(like.ptr(), &seen);
        if (is_seen_) layout_ = Layout(seen);
    }

    py::object operator()(PyObject* t, PyObject* y) { return evaluate(t, y).tensor; }

    // The address is 0 where it is not known yet.
    Row evaluate(PyObject* t, PyObject* y) {
        ++n_evals;
        const py::object version = versioned_ ? names().version.of(y) : py::object();
        Row k{call(t, y), 0};
        if (!is_like_state(k)) k = {checked_(k.tensor), 0};
        if (versioned_ && !equal(version, names().version.of(y))) changed_();
        if (names().requires_grad.of(k.tensor.ptr()).ptr() == Py_True && is_grad_enabled_().ptr() == Py_False)
            k.tensor = names().detach.call(k.tensor.ptr());
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

    // Notes the address of `k` where the answer takes it.
    bool is_like_state(Row& k) const {
        PyObject* const x = k.tensor.ptr();
        dlpack::Tensor seen;
        if (is_seen_ && Torch::found().look(x, &seen)) {
            k.address = uintptr_t(seen.data);
            return layout_.is_that_of(seen) && names().is_neg.call(x).ptr() == Py_False;
        }
        return reinterpret_cast<PyObject*>(Py_TYPE(x)) == type_.ptr() && names().dtype.of(x).is(dtype_) &&
               equal(names().shape.of(x), shape_) && equal(names().stride.call(x), stride_) &&
               equal(names().device.of(x), device_) && names().is_neg.call(x).ptr() == Py_False;
    }

    py::object func_, args_, checked_, changed_, is_grad_enabled_, type_, dtype_, device_, shape_, stride_;
    bool versioned_;
    bool is_seen_;
    Layout layout_;  // where it is seen
};

}  // namespace aca
