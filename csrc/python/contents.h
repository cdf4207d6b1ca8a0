// Contents of the places that the code of a function reaches: dicts, lists and closure cells, at one time.
#pragma once
#include <pybind11/pybind11.h>

#include <cstring>
#include <utility>
#include <vector>

#include "python/histories.h"

namespace aca {

// A snapshot of many places, made in each solve, and its comparison with their later contents. Both take well under a
// microsecond for a module, which is why they are written in C++. Holders are read by the functions of Python's
// built-in types alone: a subclass may override the others.
class Contents {
  public:
    // `missing` stands for the contents of a place that does not exist.
    explicit Contents(py::object missing)
        : missing_(std::move(missing)),
          forgotten_(Attribute::owned(PyObject_CallNoArgs(reinterpret_cast<PyObject*>(&PyBaseObject_Type)))) {
        helds_.reserve(64);
    }

    // Records a container, unless a tensor that was computed is in it. A container that a former solve's result is in
    // would keep the autograd graph of that solve, and with it the container before.
    void add_container(PyObject* holder) {
        const Py_ssize_t size = size_of(holder);
        if (size > left_ || has_history(holder)) return;
        left_ -= size;
        add(holder);
    }

    // Records a dict, list, tuple, deque, set or closure cell with all its contents; a large one not at all.
    void add(PyObject* holder) {
        Held held{py::reinterpret_borrow<py::object>(holder), {}, {}};
        if (size_of(holder) > kMaxEntries) return;
        read(held);
        if (held.before) helds_.push_back(std::move(held));
    }

    // Records the entries of a dict, or the attributes of an object, that have one of `names`.
    void add_named(py::object holder, py::object names) {
        Held held{std::move(holder), std::move(names), {}};
        read(held);
        helds_.push_back(std::move(held));
    }

    // Changes since the snapshot, as tuples (holder, key, before, now); the snapshot is then the present. The key is
    // None for a list, deque, set or cell, whose contents change as a whole.
    py::list update() {
        py::list changes;
        for (Held& held : helds_) {
            const Py_ssize_t n = PyList_GET_SIZE(changes.ptr());
            compare(held, changes);
            if (PyList_GET_SIZE(changes.ptr()) > n) read(held);
        }
        return changes;
    }

    // Changes since the snapshot, which stays as it is.
    py::list changes() const {
        py::list changes;
        for (const Held& held : helds_) compare(held, changes);
        return changes;
    }

    // The keys that a dict had, in order; none for another holder.
    py::list order_of(PyObject* holder) const {
        for (const Held& held : helds_)
            if (held.holder.ptr() == holder && !held.names && PyDict_Check(holder))
                return py::reinterpret_steal<py::list>(PyDict_Keys(held.before.ptr()));
        return py::list();
    }

    // Records the version of every leaf tensor, and whether it requires grad.
    void watch_tensors() {
        tensors_.clear();
        for (const Held& held : helds_)
            each_value(held, [&](PyObject* x) {
                if (is_tensor(x)) tensors_.push_back({py::reinterpret_borrow<py::object>(x), state_of(x)});
            });
    }

    // Tensors changed since, as tuples (tensor, it was frozen and requires grad now, it was written to in place). With
    // `accepts`, the present becomes what later calls compare with.
    py::list changed_tensors(bool accepts) {
        py::list changed;
        for (auto& [x, state] : tensors_) {
            const TensorState now = state_of(x.ptr()), before = state;
            if (accepts) state = now;
            const bool unfrozen = now.requires_grad && !before.requires_grad, written = now.version != before.version;
            if (unfrozen || written) changed.append(py::make_tuple(x, unfrozen, written));
        }
        return changed;
    }

    // All leaf tensors in the places.
    py::list tensors() const {
        py::list found;
        for (const Held& held : helds_)
            each_value(held, [&](PyObject* x) {
                if (is_tensor(x)) found.append(py::handle(x));
            });
        return found;
    }

    int traverse(visitproc visit, void* arg) const {
        for (const Held& held : helds_) {
            Py_VISIT(held.holder.ptr());
            Py_VISIT(held.names.ptr());
            Py_VISIT(held.before.ptr());
        }
        for (const auto& watched : tensors_) Py_VISIT(watched.first.ptr());
        return 0;
    }
    void clear() {
        helds_.clear();
        tensors_.clear();
    }

  private:
    static constexpr Py_ssize_t kMaxEntries = 1024, kMaxInAll = 20'000;

    struct Held {
        py::object holder, names;  // names: null if all entries count
        py::object before;         // a copy of the holder, or the contents of a cell
    };

    struct TensorState {
        long version;
        bool requires_grad;
    };

    static TensorState state_of(PyObject* x) {
        static const Attribute requires_grad("requires_grad"), version("_version");
        const bool is_learnt = requires_grad.of(x).ptr() == Py_True;
        PyObject* number = PyObject_GetAttr(x, version.name());
        if (!number) {  // a tensor made in inference mode has no version
            PyErr_Clear();
            return {0, is_learnt};
        }
        return {as_long(py::reinterpret_steal<py::object>(number)), is_learnt};
    }

    static bool is_deque(PyObject* x) { return std::strcmp(Py_TYPE(x)->tp_name, "collections.deque") == 0; }

    static Py_ssize_t size_of(PyObject* x) {
        if (PyDict_Check(x)) return PyDict_GET_SIZE(x);
        if (PyList_Check(x)) return PyList_GET_SIZE(x);
        if (PyTuple_Check(x)) return PyTuple_GET_SIZE(x);
        if (PySet_Check(x)) return PySet_GET_SIZE(x);
        return is_deque(x) ? PySequence_Size(x) : 1;
    }

    // A new list of the elements of a list or deque.
    static py::object as_list(PyObject* x) {
        return Attribute::owned(PyList_Check(x) ? PyList_GetSlice(x, 0, PyList_GET_SIZE(x)) : PySequence_List(x));
    }

    // Reads the present contents of a holder.
    void read(Held& held) const {
        PyObject* x = held.holder.ptr();
        if (held.names) {
            py::dict before;
            for (py::handle name : held.names) before[name] = kept(named(x, name.ptr()).ptr());
            held.before = std::move(before);
        } else if (PyDict_Check(x)) {
            static const py::dict& empty = *new py::dict();  // shared, since most dicts of a module are empty
            if (PyDict_GET_SIZE(x) == 0) {
                held.before = empty;
                return;
            }
            held.before = Attribute::owned(PyDict_Copy(x));
            PyObject *key, *value;
            Py_ssize_t position = 0;
            while (PyDict_Next(held.before.ptr(), &position, &key, &value))
                if (has_history(value)) PyDict_SetItem(held.before.ptr(), key, kept(value).ptr());  // no new key
        } else if (PyCell_Check(x)) {
            held.before = kept(PyCell_GET(x));
        } else if (PySet_Check(x)) {
            held.before = Attribute::owned(PySet_New(x));
        } else if (PyTuple_Check(x)) {
            held.before = held.holder;
        } else if (PyList_Check(x) || is_deque(x)) {
            held.before = as_list(x);
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(held.before.ptr()); ++i) {
                PyObject* value = PyList_GET_ITEM(held.before.ptr(), i);
                if (has_history(value)) PyList_SetItem(held.before.ptr(), i, kept(value).release().ptr());
            }
        }
    }

    // A value with a history is held weakly, or not at all. Otherwise solves whose results func holds would keep one
    // another's autograd graphs. The graph of a solve keeps what func used anyway.
    py::object kept(PyObject* x) const {
        if (!x) return missing_;
        if (!has_history(x)) return py::reinterpret_borrow<py::object>(x);
        PyObject* weak = PyWeakref_NewRef(x, nullptr);
        if (weak) return py::reinterpret_steal<py::object>(weak);
        PyErr_Clear();
        return forgotten_;
    }

    // The value behind `kept`; null if it is gone.
    PyObject* alive(PyObject* x) const {
        if (x == forgotten_.ptr()) return nullptr;
        if (!PyWeakref_CheckRefExact(x)) return x;
        PyObject* value = PyWeakref_GET_OBJECT(x);
        return value == Py_None ? nullptr : value;
    }

    void compare(const Held& held, py::list& changes) const {
        PyObject* x = held.holder.ptr();
        if (held.names) {
            for (py::handle name : held.names)
                note(held, name.ptr(), PyDict_GetItem(held.before.ptr(), name.ptr()), named(x, name.ptr()).ptr(),
                     changes);
        } else if (PyDict_Check(x)) {
            compare_dicts(held, changes);
        } else if (PyCell_Check(x)) {
            note(held, Py_None, held.before.ptr(), PyCell_GET(x) ? PyCell_GET(x) : missing_.ptr(), changes);
        } else if (PySet_Check(x)) {
            compare_sets(held, changes);
        } else if (!PyTuple_Check(x)) {
            compare_lists(held, changes);
        }
    }

    void compare_dicts(const Held& held, py::list& changes) const {
        PyObject *now = held.holder.ptr(), *before = held.before.ptr();
        PyObject *key, *x, *other_key, *other;
        Py_ssize_t position = 0, other_position = 0;
        bool same_keys = PyDict_GET_SIZE(now) == PyDict_GET_SIZE(before), same_values = true;
        while (same_keys && PyDict_Next(now, &position, &key, &x)) {
            same_keys = PyDict_Next(before, &other_position, &other_key, &other) && key == other_key;
            same_values = same_values && x == other;
        }
        if (same_keys && same_values) return;
        position = 0;
        while (PyDict_Next(before, &position, &key, &other)) {
            x = PyDict_GetItem(now, key);  // without errors of keys that cannot be compared
            note(held, key, other, x ? x : missing_.ptr(), changes);
        }
        position = 0;
        while (!same_keys && PyDict_Next(now, &position, &key, &x))
            if (!PyDict_GetItem(before, key)) note(held, key, missing_.ptr(), x, changes);
    }

    void compare_lists(const Held& held, py::list& changes) const {
        PyObject* before = held.before.ptr();
        const py::object now = as_list(held.holder.ptr());
        const Py_ssize_t size = PyList_GET_SIZE(before);
        bool same = size == PyList_GET_SIZE(now.ptr());
        py::list values;
        for (Py_ssize_t i = 0; i < size; ++i) {
            PyObject* x = alive(PyList_GET_ITEM(before, i));
            if (!x) return;  // it could not be restored
            same = same && x == PyList_GET_ITEM(now.ptr(), i);
        }
        if (same) return;
        for (Py_ssize_t i = 0; i < size; ++i) values.append(py::handle(alive(PyList_GET_ITEM(before, i))));
        changes.append(py::make_tuple(held.holder, py::none(), values, now));
    }

    void compare_sets(const Held& held, py::list& changes) const {
        const py::object now = Attribute::owned(PySet_New(held.holder.ptr()));
        bool same = PySet_GET_SIZE(now.ptr()) == PySet_GET_SIZE(held.before.ptr());
        for (py::handle x : now) {
            if (!same) break;
            const int is_there = PySet_Contains(held.before.ptr(), x.ptr());
            if (is_there < 0) PyErr_Clear();
            same = is_there != 0;
        }
        if (!same) changes.append(py::make_tuple(held.holder, py::none(), held.before, now));
    }

    void note(const Held& held, PyObject* key, PyObject* before, PyObject* now, py::list& changes) const {
        if (now == before) return;
        PyObject* value = alive(before);
        if (value && value != now)
            changes.append(py::make_tuple(held.holder, py::handle(key), py::handle(value), py::handle(now)));
    }

    py::object named(PyObject* holder, PyObject* name) const {
        PyObject* x = nullptr;
        if (PyDict_Check(holder)) {
            x = PyDict_GetItem(holder, name);
            Py_XINCREF(x);
        } else if (PyType_Check(holder)) {
            const auto attributes = Attribute::owned(PyObject_GetAttrString(holder, "__dict__"));
            x = PyObject_GetItem(attributes.ptr(), name);
        } else {
            x = PyObject_GetAttr(holder, name);
        }
        if (!x) PyErr_Clear();
        return x ? py::reinterpret_steal<py::object>(x) : missing_;
    }

    template <typename F>
    static void each_value(const Held& held, F&& f) {
        PyObject *before = held.before.ptr(), *key, *x;
        Py_ssize_t position = 0;
        if (held.names || PyDict_Check(held.holder.ptr()))
            while (PyDict_Next(before, &position, &key, &x)) f(x);
        else if (PyCell_Check(held.holder.ptr()))
            f(before);
        else if (PySet_Check(before))
            for (py::handle value : held.before) f(value.ptr());
        else
            for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(before); ++i) f(PySequence_Fast_GET_ITEM(before, i));
    }

    std::vector<Held> helds_;
    std::vector<std::pair<py::object, TensorState>> tensors_;
    py::object missing_, forgotten_;
    Py_ssize_t left_ =
        kMaxInAll;  // entries of containers that may still be recorded; the attributes of modules always are
};

}  // namespace aca
