// Walk over trees of modules and their attributes, the slowest part in Python of the search for what func holds.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string_view>
#include <utility>
#include <vector>

#include "python/contents.h"
#include "python/tensors.h"

namespace aca {

class ModuleWalk {
  public:
    // `atoms` are types whose objects hold no tensors. `names` are attributes that every module has; they are skipped.
    ModuleWalk(const py::iterable& atoms, py::frozenset names) : names_(std::move(names)) {
        for (py::handle type : atoms) atoms_.push_back(py::reinterpret_borrow<py::object>(type));
    }

    // Visits `module` and the modules inside it, except those whose ids are in `seen`. Adds
    //   the modules to `modules` and their classes to `kinds`,
    //   parameters that require grad to `places`, as (tensor, dict, name, True),
    //   hooks and attributes that may hold tensors to `others`, as (object, dict, name),
    //   snapshots of their dicts of attributes, parameters, buffers, children and hooks to `contents`.
    void visit(py::object module, py::set seen, py::list modules, py::list places, py::set kinds, py::list others,
               Contents& contents) const {
        std::vector<py::object> todo{std::move(module)};
        while (!todo.empty()) {
            const py::object m = std::move(todo.back());
            todo.pop_back();
            if (!is_new(seen, m.ptr())) continue;
            modules.append(m);
            kinds.add(py::type::of(m));
            const auto attributes = Attribute::owned(PyObject_GenericGetDict(m.ptr(), nullptr));
            contents.add(attributes.ptr());
            each(attributes.ptr(), [&](PyObject* name, PyObject* x) {
                if (is_name(name, "_parameters") && PyDict_Check(x)) {
                    contents.add(x);
                    each(x, [&](PyObject* key, PyObject* p) {
                        if (p != Py_None && requires_grad(p) && is_new(seen, p))
                            places.append(py::make_tuple(py::handle(p), py::handle(x), py::handle(key), true));
                    });
                } else if (is_name(name, "_modules") && PyDict_Check(x)) {
                    contents.add(x);
                    const size_t before = todo.size();
                    each(x, [&](PyObject*, PyObject* child) {
                        if (child != Py_None) todo.push_back(py::reinterpret_borrow<py::object>(child));
                    });
                    std::reverse(todo.begin() + std::ptrdiff_t(before), todo.end());
                } else if (is_hooks(name) && PyDict_Check(x)) {
                    contents.add(x);
                    each(x, [&](PyObject* key, PyObject* hook) { add(others, hook, x, key); });
                } else if (is_name(name, "_buffers") && PyDict_Check(x)) {
                    contents.add(x);
                } else if (!is_atom(x) && PySet_Contains(names_.ptr(), name) == 0) {
                    add(others, x, attributes.ptr(), name);
                }
            });
        }
    }

  private:
    template <typename F>
    static void each(PyObject* dict, F&& f) {
        PyObject *key, *value;
        Py_ssize_t position = 0;
        while (PyDict_Next(dict, &position, &key, &value)) f(key, value);
    }

    static void add(py::list& others, PyObject* x, PyObject* holder, PyObject* key) {
        others.append(py::make_tuple(py::handle(x), py::handle(holder), py::handle(key)));
    }

    static bool is_name(PyObject* name, const char* expected) {
        return PyUnicode_Check(name) && PyUnicode_CompareWithASCIIString(name, expected) == 0;
    }

    static bool is_hooks(PyObject* name) {
        static const std::string_view end = "_hooks";
        Py_ssize_t size = 0;
        const char* text = PyUnicode_Check(name) ? PyUnicode_AsUTF8AndSize(name, &size) : nullptr;
        return text && size_t(size) > end.size() &&
               std::string_view(text, size_t(size)).substr(size_t(size) - end.size()) == end;
    }

    static bool requires_grad(PyObject* x) {
        static const Attribute name("requires_grad");
        return name.of(x).ptr() == Py_True;
    }

    static bool is_new(const py::set& seen, PyObject* x) {
        const py::object id = Attribute::owned(PyLong_FromVoidPtr(x));
        const int is_there = PySet_Contains(seen.ptr(), id.ptr());
        if (is_there < 0 || (!is_there && PySet_Add(seen.ptr(), id.ptr()) < 0)) throw py::error_already_set();
        return !is_there;
    }

    bool is_atom(PyObject* x) const {
        const auto* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
        return std::any_of(atoms_.begin(), atoms_.end(), [&](const py::object& atom) { return atom.ptr() == type; });
    }

    std::vector<py::object> atoms_;
    py::frozenset names_;
};

}  // namespace aca
