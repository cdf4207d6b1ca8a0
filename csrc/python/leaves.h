// Search for leaf tensors in an autograd graph, through the Python attributes of its nodes.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <string>
#include <unordered_set>
#include <utility>
#include <vector>

#include "python/tensors.h"

namespace aca {

// Tensors at which a walk through an autograd graph ends. The graph behind a known tensor that is no leaf is skipped.
class KnownTensors {
  public:
    // `alone` is the Python reference count of a leaf to which only an autograd graph refers.
    KnownTensors(const py::iterable& tensors, Py_ssize_t alone) : alone_(alone) {
        for (py::handle x : tensors) add(x.ptr());
    }

    void add(PyObject* x) {
        py::object node = names().grad_fn.of(x);
        remember(node.is_none() ? py::reinterpret_borrow<py::object>(x) : std::move(node));
    }

    // Returns a list of the leaves in the autograd graphs of `roots`, a tensor or a tuple of tensors, that are neither
    // known nor `state`; None if there are none. Leaves to which only the graph refers are omitted: the evaluation made
    // them itself.
    py::object others(PyObject* roots, PyObject* state) {
        py::object found = py::none();
        walk(roots, [&](py::object& leaf) {
            if (leaf.ptr() == state || Py_REFCNT(leaf.ptr()) <= alone_) return;
            if (found.is_none()) found = py::list();
            reinterpret_cast<py::list&>(found).append(leaf);
        });
        return found;
    }

    // Returns true if a known tensor is in the autograd graphs of `roots`.
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

    // A set of addresses. The autograd graph of one evaluation is usually short; a list is then fastest to search.
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
        static PyTypeObject* type = nullptr;  // class of the nodes of leaves, once one was found
        if (Py_TYPE(node) == type) return true;
        if (type || std::string(Py_TYPE(node)->tp_name) != "AccumulateGrad") return false;
        Py_INCREF(Py_TYPE(node));
        type = Py_TYPE(node);
        return true;
    }

    // Calls `on_leaf` for each leaf that is not known; returns true if a known tensor was met.
    template <typename F>
    bool walk(PyObject* roots, F&& on_leaf) {
        bool met = false;
        Addresses visited;
        std::vector<py::object> nodes;  // keeps the Python objects alive, so that no address is used twice
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
                    remember(node);  // later walks stop at the node and need not get its leaf
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
