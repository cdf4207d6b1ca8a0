// Attributes and methods of Python objects by name, and conversions of what they return.
#pragma once
#include <pybind11/pybind11.h>

#include <cstddef>

namespace aca {

namespace py = pybind11;

// The classes torch.Tensor and torch.nn.Parameter; null until the package hands them over.
struct TensorClasses {
    PyTypeObject *tensor = nullptr, *parameter = nullptr;

    static TensorClasses& known() {
        static TensorClasses classes;
        return classes;
    }

    // False for other subclasses of torch.Tensor, which may have attributes of their own.
    bool are_those_of(PyObject* x) const { return Py_TYPE(x) == tensor || Py_TYPE(x) == parameter; }
};

// Attribute or method without arguments, by its name. Plain tensors are asked through torch's own descriptor, which is
// looked up once: an evaluation reads some twenty attributes, and Python finds each by a hash of names that may
// collide.
class Attribute {
  public:
    explicit Attribute(const char* name) : name_(PyUnicode_InternFromString(name)) {}

    py::object of(PyObject* x) const {
        PyObject* const descriptor = descriptor_for(x);
        const descrgetfunc get = descriptor ? Py_TYPE(descriptor)->tp_descr_get : nullptr;
        if (!get) return owned(PyObject_GetAttr(x, name_));
        return owned(get(descriptor, x, reinterpret_cast<PyObject*>(Py_TYPE(x))));
    }
    py::object call(PyObject* x) const {
        PyObject* const descriptor = descriptor_for(x);
        if (!descriptor) return owned(PyObject_VectorcallMethod(name_, &x, 1, nullptr));
        return owned(PyObject_Vectorcall(descriptor, &x, 1, nullptr));
    }
    PyObject* name() const { return name_; }

    static py::object owned(PyObject* result) {
        if (!result) throw py::error_already_set();
        return py::reinterpret_steal<py::object>(result);
    }

  private:
    // Null unless `x` is a plain tensor.
    PyObject* descriptor_for(PyObject* x) const {
        const TensorClasses& classes = TensorClasses::known();
        if (!classes.are_those_of(x)) return nullptr;
        if (!descriptor_)
            descriptor_ = owned(PyObject_GetAttr(reinterpret_cast<PyObject*>(classes.tensor), name_)).release().ptr();
        return descriptor_;
    }

    PyObject* name_;
    mutable PyObject* descriptor_ = nullptr;
};

inline size_t as_size(const py::object& x) {
    const size_t value = PyLong_AsSize_t(x.ptr());
    if (value == size_t(-1) && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

inline long as_long(const py::object& x) {
    const long value = PyLong_AsLong(x.ptr());
    if (value == -1 && PyErr_Occurred()) throw py::error_already_set();
    return value;
}

inline bool equal(const py::object& a, const py::object& b) {
    const int result = a.is(b) ? 1 : PyObject_RichCompareBool(a.ptr(), b.ptr(), Py_EQ);
    if (result < 0) throw py::error_already_set();
    return result == 1;
}

}  // namespace aca
