// Search for tensors with an autograd graph: what holds one keeps the graph of the solve that made it.
#pragma once
#include "python/tensors.h"

namespace aca {

constexpr Py_ssize_t kMaxSearched = 64;  // elements of a container
constexpr int kMaxDepth = 3;             // of containers in one another

inline bool is_tensor(PyObject* x) { return PyType_IsSubtype(Py_TYPE(x), TensorClasses::known().tensor); }

inline bool has_attributes(PyObject* x) {
#ifdef Py_TPFLAGS_MANAGED_DICT
    if (PyType_HasFeature(Py_TYPE(x), Py_TPFLAGS_MANAGED_DICT)) return true;
#endif
    return Py_TYPE(x)->tp_dictoffset != 0;
}

// Returns true if `x` is, or holds not far inside, a tensor with an autograd graph. Modules are not searched, since
// a search of modules in modules takes long.
inline bool has_history(PyObject* x, int depth = 0);

inline bool dict_has_history(PyObject* dict, int depth) {
    PyObject *key, *x;
    Py_ssize_t position = 0;
    for (Py_ssize_t i = 0; i < kMaxSearched && PyDict_Next(dict, &position, &key, &x); ++i)
        if (has_history(x, depth)) return true;
    return false;
}

inline bool has_history(PyObject* x, int depth) {
    static const Attribute is_leaf("is_leaf"), parameters("_parameters");
    if (x == Py_None || PyBool_Check(x) || PyLong_CheckExact(x) || PyFloat_CheckExact(x) || PyUnicode_CheckExact(x))
        return false;
    if (is_tensor(x)) return is_leaf.of(x).ptr() != Py_True;
    if (depth == kMaxDepth || PyType_Check(x)) return false;
    if (PyDict_Check(x)) return dict_has_history(x, depth + 1);
    if (PyTuple_Check(x) || PyList_Check(x)) {
        const Py_ssize_t size = PySequence_Fast_GET_SIZE(x);
        for (Py_ssize_t i = 0; i < size && i < kMaxSearched; ++i)
            if (has_history(PySequence_Fast_GET_ITEM(x, i), depth + 1)) return true;
        return false;
    }
    if (PyFunction_Check(x)) {
        if (PyFunction_GET_DEFAULTS(x) && has_history(PyFunction_GET_DEFAULTS(x), depth)) return true;
        if (PyFunction_GET_KW_DEFAULTS(x) && has_history(PyFunction_GET_KW_DEFAULTS(x), depth)) return true;
        PyObject* cells = PyFunction_GET_CLOSURE(x);
        for (Py_ssize_t i = 0; cells && i < PyTuple_GET_SIZE(cells); ++i) {
            PyObject* value = PyCell_GET(PyTuple_GET_ITEM(cells, i));
            if (value && has_history(value, depth + 1)) return true;
        }
        return false;
    }
    if (!has_attributes(x)) return false;
    PyObject* attributes = PyObject_GenericGetDict(x, nullptr);
    if (!attributes) {
        PyErr_Clear();
        return false;
    }
    const auto held = py::reinterpret_steal<py::object>(attributes);
    return !PyDict_GetItem(attributes, parameters.name()) && dict_has_history(attributes, depth + 1);
}

}  // namespace aca
