// Snapshots of the dicts, lists, sets and closure cells that func's code reaches, to find what changed since.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "python/tensors.h"

namespace aca {

// A snapshot of many holders: objects that contain others. Every solve makes one and compares it with the present.
// Written in C++, both take well under a microsecond per module.
class Contents {
  public:
    // `missing` marks an absent value: a deleted entry, an empty cell.
    explicit Contents(py::object missing) : missing_(std::move(missing)) {}

    // Takes a snapshot of a dict, sequence, set or cell. One with more than kMaxEntries entries is skipped.
    void add(PyObject* holder) {
        Held held{py::reinterpret_borrow<py::object>(holder), {}, {}};
        read(held);
        if (held.before) helds_.push_back(std::move(held));
    }

    // Takes a snapshot of the entries of a dict, or the attributes of an object, with these `names`.
    void add_named(py::object holder, py::object names) {
        Held held{std::move(holder), std::move(names), {}};
        read(held);
        helds_.push_back(std::move(held));
    }

    // Returns the changes since the snapshot, as tuples (holder, key, before, now), and updates the snapshot. The key
    // is None for a set, a cell, and a sequence whose length changed. A change is omitted if the former value was a
    // tensor with an autograd graph that has been freed since.
    py::list update() {
        py::list changes;
        for (Held& held : helds_) {
            const Py_ssize_t n = PyList_GET_SIZE(changes.ptr());
            compare(held, changes);
            if (PyList_GET_SIZE(changes.ptr()) > n) read(held);
        }
        return changes;
    }

    // Returns the changes like update(), without an update of the snapshot.
    py::list changes() const {
        py::list changes;
        for (const Held& held : helds_) compare(held, changes);
        return changes;
    }

    // Returns the keys of a dict at the snapshot, in order; empty for any other holder.
    py::list order_of(PyObject* holder) const {
        for (const Held& held : helds_)
            if (held.holder.ptr() == holder && !held.names && PyDict_Check(holder))
                return py::reinterpret_steal<py::list>(PyDict_Keys(held.before.ptr()));
        return py::list();
    }

    // Records version and requires_grad of the tensors in the snapshot, except those held weakly (see kept), to detect
    // changes of a tensor itself.
    void watch_tensors() {
        tensors_.clear();
        for (const Held& held : helds_)
            each_value(held, [&](PyObject* x) {
                if (is_tensor(x)) tensors_.push_back({py::reinterpret_borrow<py::object>(x), state_of(x)});
            });
    }

    // Returns the tensors that changed since watch_tensors: pairs (tensor, True) if requires_grad was switched on, or
    // (tensor, False) if the tensor was written in place. `accepts` makes their present state the new reference.
    py::list changed_tensors(bool accepts) {
        py::list changed;
        for (auto& [x, state] : tensors_) {
            const TensorState now = state_of(x.ptr()), before = state;
            if (accepts) state = now;
            if (now.requires_grad && !before.requires_grad)
                changed.append(py::make_tuple(x, true));
            else if (now.version != before.version && !before.requires_grad)
                changed.append(py::make_tuple(x, false));
        }
        return changed;
    }

    // Returns the tensors of the snapshot, except those held weakly (see kept).
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
    static constexpr Py_ssize_t kMaxEntries = 1024;

    struct Held {
        py::object holder, names;  // names: null if all entries are in the snapshot
        py::object before;         // the snapshot: a dict, list or set, or the object in a cell
    };

    struct TensorState {
        long version;  // 0 if it requires grad: autograd checks the versions of such tensors
        bool requires_grad;
    };

    static TensorState state_of(PyObject* x) {
        static const Attribute requires_grad("requires_grad"), version("_version");
        if (requires_grad.of(x).ptr() == Py_True) return {0, true};
        PyObject* number = PyObject_GetAttr(x, version.name());
        if (!number) {  // tensors made in inference mode have no version
            PyErr_Clear();
            return {0, false};
        }
        return {as_long(py::reinterpret_steal<py::object>(number)), false};
    }

    // Takes the snapshot of one holder.
    void read(Held& held) const {
        PyObject* x = held.holder.ptr();
        if (held.names) {
            py::dict before;
            for (py::handle name : held.names) before[name] = kept(named(x, name.ptr()).ptr());
            held.before = std::move(before);
        } else if (PyDict_Check(x)) {
            if (PyDict_GET_SIZE(x) > kMaxEntries) return;
            held.before = Attribute::owned(PyDict_Copy(x));
            keep_values(held.before.ptr());
        } else if (PyCell_Check(x)) {
            held.before = kept(PyCell_GET(x));
        } else if (PySet_Check(x)) {
            if (PySet_GET_SIZE(x) <= kMaxEntries) held.before = Attribute::owned(PySet_New(x));
        } else {
            const Py_ssize_t size = PySequence_Size(x);
            if (size > kMaxEntries) return;
            held.before = Attribute::owned(PySequence_List(x));
            for (Py_ssize_t i = 0; i < size; ++i)
                if (has_history(PyList_GET_ITEM(held.before.ptr(), i)))
                    PyList_SetItem(held.before.ptr(), i, kept(PyList_GET_ITEM(held.before.ptr(), i)).release().ptr());
        }
    }

    // Refers weakly to a tensor with an autograd graph. If func stores results of solves, strong references would keep
    // the graph of every earlier solve alive.
    py::object kept(PyObject* x) const {
        if (!x) return missing_;
        return has_history(x) ? Attribute::owned(PyWeakref_NewRef(x, nullptr)) : py::reinterpret_borrow<py::object>(x);
    }

    void keep_values(PyObject* dict) const {
        PyObject *key, *x;
        Py_ssize_t position = 0;
        while (PyDict_Next(dict, &position, &key, &x))
            if (has_history(x)) PyDict_SetItem(dict, key, kept(x).ptr());  // safe in the loop: the key exists
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
            if (PyObject_RichCompareBool(x, held.before.ptr(), Py_EQ) != 1)
                note(held, Py_None, held.before.ptr(), Attribute::owned(PySet_New(x)).ptr(), changes);
        } else if (!PyTuple_Check(x)) {
            compare_sequences(held, changes);
        }
    }

    void compare_dicts(const Held& held, py::list& changes) const {
        PyObject *now = held.holder.ptr(), *before = held.before.ptr();
        PyObject *key, *x, *other_key, *other;
        Py_ssize_t position = 0, other_position = 0;
        bool same_keys = PyDict_GET_SIZE(now) == PyDict_GET_SIZE(before);
        while (same_keys && PyDict_Next(now, &position, &key, &x)) {
            same_keys = PyDict_Next(before, &other_position, &other_key, &other) && key == other_key;
            if (same_keys) note(held, key, other, x, changes);
        }
        if (same_keys) return;
        position = 0;
        while (PyDict_Next(before, &position, &key, &other)) {
            x = PyDict_GetItem(now, key);
            if (!reported(held, key, changes)) note(held, key, other, x ? x : missing_.ptr(), changes);
        }
        position = 0;
        while (PyDict_Next(now, &position, &key, &x))
            if (!PyDict_Contains(before, key)) note(held, key, missing_.ptr(), x, changes);
    }

    void compare_sequences(const Held& held, py::list& changes) const {
        PyObject* before = held.before.ptr();
        const auto now = Attribute::owned(PySequence_List(held.holder.ptr()));
        const Py_ssize_t size = PyList_GET_SIZE(now.ptr());
        if (size != PyList_GET_SIZE(before)) {
            py::list values;
            for (Py_ssize_t i = 0; i < PyList_GET_SIZE(before); ++i)
                if (PyObject* x = alive(PyList_GET_ITEM(before, i))) values.append(py::handle(x));
            changes.append(py::make_tuple(held.holder, py::none(), values, now));
            return;
        }
        for (Py_ssize_t i = 0; i < size; ++i)
            note(held, py::int_(i).ptr(), PyList_GET_ITEM(before, i), PyList_GET_ITEM(now.ptr(), i), changes);
    }

    static bool reported(const Held& held, PyObject* key, const py::list& changes) {
        for (py::handle change : changes) {
            PyObject* tuple = change.ptr();
            if (PyTuple_GET_ITEM(tuple, 0) == held.holder.ptr() && PyTuple_GET_ITEM(tuple, 1) == key) return true;
        }
        return false;
    }

    void note(const Held& held, PyObject* key, PyObject* before, PyObject* now, py::list& changes) const {
        if (now == before) return;
        PyObject* value = alive(before);
        if (value && value != now)
            changes.append(py::make_tuple(held.holder, py::handle(key), py::handle(value), py::handle(now)));
    }

    // The referent of a weak reference, or null if it was freed; any other object itself.
    static PyObject* alive(PyObject* x) {
        if (!PyWeakref_CheckRefExact(x)) return x;
        PyObject* value = PyWeakref_GET_OBJECT(x);
        return value == Py_None ? nullptr : value;
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

    static bool is_tensor(PyObject* x) { return PyType_IsSubtype(Py_TYPE(x), Torch::found().tensor); }

    static bool has_history(PyObject* x) {
        static const Attribute is_leaf("is_leaf");
        return is_tensor(x) && is_leaf.of(x).ptr() != Py_True;
    }

    template <typename F>
    static void each_value(const Held& held, F&& f) {
        PyObject* before = held.before.ptr();
        PyObject *key, *x;
        Py_ssize_t position = 0;
        if (held.names || PyDict_Check(held.holder.ptr()))
            while (PyDict_Next(before, &position, &key, &x)) f(x);
        else if (PyCell_Check(held.holder.ptr()))
            f(before);
        else if (!PySet_Check(before))
            for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(before); ++i) f(PySequence_Fast_GET_ITEM(before, i));
    }

    std::vector<Held> helds_;
    std::vector<std::pair<py::object, TensorState>> tensors_;
    py::object missing_;
};

}  // namespace aca
