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
        remember(node.is_none() ? py::reinterpret_borrow<py::object>(x) : std::move(node));
    }

    // Leaves in the graphs of `roots`, a tensor or several, that are neither known nor `state`; None where there is
    // none. A leaf that only the graph holds was made by the evaluation itself and does not count.
    py::object others(PyObject* roots, PyObject* state) {
        py::object found = py::none();
        walk(roots, [&](py::object& leaf) {
            if (leaf.ptr() == state || Py_REFCNT(leaf.ptr()) <= alone_) return;
            if (found.is_none()) found = py::list();
            reinterpret_cast<py::list&>(found).append(leaf);
        });
        return found;
    }

    // Whether the graphs of `roots` meet any of them.
    bool are_met_by(PyObject* roots) {
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

    // A set of addresses: most graphs of one evaluation are short, where looking through a list is fastest.
    class Addresses {
      public:
        bool insert(PyObject* x) {
            if (contains(x)) return false;
            list_.push_back(x);
            if (list_.size() == kFew) set_.insert(list_.begin(), list_.end());
            if (list_.size() > kFew) set_.insert(x);
            return true;
        }
        bool contains(PyObject* x) const {
            return list_.size() < kFew ? std::find(list_.begin(), list_.end(), x) != list_.end() : set_.count(x) > 0;
        }
        void clear() {
            list_.clear();
            set_.clear();
        }

      private:
        static constexpr size_t kFew = 40;
        std::vector<PyObject*> list_;
        std::unordered_set<PyObject*> set_;
    };

    void remember(py::object x) {
        if (known_.insert(x.ptr())) held_.push_back(std::move(x));
    }

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
    bool walk(PyObject* roots, F&& on_leaf) {
        bool met = false;
        Addresses visited;
        std::vector<py::object>
            nodes;  // their objects live as long as the walk, so that each has an address of its own
        nodes.reserve(32);
        const auto enter = [&](PyObject* node) {
            if (node == Py_None) return;
            if (known_.contains(node))
                met = true;
            else if (visited.insert(node))
                nodes.push_back(py::reinterpret_borrow<py::object>(node));
        };
        const auto enter_root = [&](PyObject* x) {
            if (known_.contains(x))
                met = true;
            else
                enter(names().grad_fn.of(x).ptr());
        };
        if (PyTuple_CheckExact(roots))
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(roots); ++i) enter_root(PyTuple_GET_ITEM(roots, i));
        else
            enter_root(roots);
        for (size_t n = 0; n < nodes.size(); ++n) {
            const py::object node = nodes[n];
            if (is_leaf(node.ptr())) {
                py::object leaf = names().variable.of(node.ptr());
                if (known_.contains(leaf.ptr())) {
                    met = true;
                    remember(node);  // spares the look at the leaf from now on
                } else {
                    on_leaf(leaf);
                }
                continue;
            }
            const py::object next = names().next_functions.of(node.ptr());
            for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(next.ptr()); ++i)
                enter(PyTuple_GET_ITEM(PyTuple_GET_ITEM(next.ptr(), i), 0));
        }
        return met;
    }

    std::vector<py::object> held_;
    Addresses known_;
    Py_ssize_t alone_;
};

}  // namespace aca
