// The leaf tensors of an autograd graph, found through the attributes that its nodes have in Python.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "python/tensors.h"

namespace aca {

// Tensors at which a walk through a graph ends: leaves, and others with the history that lies behind them.
class KnownTensors {
  public:
    // `alone` is the reference count of a leaf that only a graph holds.
    KnownTensors(const py::iterable& tensors, Py_ssize_t alone) : alone_(alone) {
        for (py::handle x : tensors) add(x.ptr());
    }

    void add(PyObject* x) {
        py::object node = names().grad_fn.of(x);
        held_.push_back(node.is_none() ? py::reinterpret_borrow<py::object>(x) : std::move(node));
        known_.insert(held_.back().ptr());
    }

    // Leaves in the graphs of `roots`, a tensor or several, that are neither known nor `state`; None where there is
    // none. A leaf that only the graph holds was made by the evaluation itself and does not count.
    py::object others(PyObject* roots, PyObject* state) const {
        py::object found = py::none();
        walk(roots, [&](py::object& leaf) {
            if (leaf.ptr() == state || Py_REFCNT(leaf.ptr()) <= alone_) return;
            if (found.is_none()) found = py::list();
            reinterpret_cast<py::list&>(found).append(leaf);
        });
        return found;
    }

    // Whether the graphs of `roots` meet any of them.
    bool are_met_by(PyObject* roots) const {
        return walk(roots, [](py::object&) {});
    }

    int traverse(visitproc visit, void* arg) const {
        for (const py::object& held : held_) Py_VISIT(held.ptr());
        return 0;
    }
    void clear() {
        known_.clear();
        held_.clear();
    }

  private:
    struct Names {
        const Attribute grad_fn{"grad_fn"}, next_functions{"next_functions"}, variable{"variable"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    // Most graphs of one evaluation are short, where looking through a list is fastest.
    class Visited {
      public:
        bool insert(PyObject* x) {
            if (list_.size() < 48) {
                if (std::find(list_.begin(), list_.end(), x) != list_.end()) return false;
                list_.push_back(x);
                return true;
            }
            if (set_.empty()) set_.insert(list_.begin(), list_.end());
            return set_.insert(x).second;
        }

      private:
        std::vector<PyObject*> list_;
        std::unordered_set<PyObject*> set_;
    };

    static bool is_leaf(PyObject* node) {
        static PyTypeObject* type = nullptr;  // of the nodes of leaves
        if (Py_TYPE(node) == type) return true;
        if (type || std::string(Py_TYPE(node)->tp_name) != "AccumulateGrad") return false;
        Py_INCREF(Py_TYPE(node));
        type = Py_TYPE(node);
        return true;
    }

    // Calls `on_leaf` for each leaf that is not known, and returns whether any that is known was met.
    template <typename F>
    bool walk(PyObject* roots, F&& on_leaf) const {
        bool met = false;
        Visited visited;
        std::vector<py::object> todo, done;  // `done` keeps the objects that stand for nodes alive, and so their ids
        const auto enter = [&](py::object node) {
            if (node.is_none() || !visited.insert(node.ptr())) return;
            if (known_.count(node.ptr()))
                met = true;
            else
                todo.push_back(node);
            done.push_back(std::move(node));
        };
        const auto enter_root = [&](PyObject* x) {
            if (known_.count(x))
                met = true;
            else
                enter(names().grad_fn.of(x));
        };
        if (PyTuple_CheckExact(roots))
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots); ++i) enter_root(PyTuple_GET_ITEM(roots, i));
        else
            enter_root(roots);
        while (!todo.empty()) {
            const py::object node = std::move(todo.back());
            todo.pop_back();
            if (is_leaf(node.ptr())) {
                py::object leaf = names().variable.of(node.ptr());
                if (known_.count(leaf.ptr()))
                    met = true;
                else
                    on_leaf(leaf);
                continue;
            }
            const py::object next = names().next_functions.of(node.ptr());
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(next.ptr()); ++i)
                enter(py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(PyTuple_GET_ITEM(next.ptr(), i), 0)));
        }
        return met;
    }

    std::vector<py::object> held_;
    std::unordered_set<PyObject*> known_;
    Py_ssize_t alone_;
};

}  // namespace aca
