// Contents of the places that the code of a function reaches: dicts, lists and closure cells, at one time.
#pragma once
#include <pybind11/pybind11.h>

#include <utility>
#include <vector>

#include "python/tensors.h"

namespace aca {

// A snapshot of many places, made in each solve, and its comparison with what is there later. Both take well under a
// microsecond for a module, which is why they are written in C++.
class Contents {
  public:
    // `missing` stands for what is not there.
    explicit Contents(py::object missing) : missing_(std::move(missing)) {}

    // Notes a dict, sequence, set or cell with all that it contains; of a large one nothing.
    void add(PyObject* holder) {
        Held held{py::reinterpret_borrow<py::object>(holder), {}, {}};
        read(held);
        if (held.before) helds_.push_back(std::move(held));
    }

    // Notes the entries of a dict, or the attributes of an object, that have one of `names`.
    void add_named(py::object holder, py::object names) {
        Held held{std::move(holder), std::move(names), {}};
        read(held);
        helds_.push_back(std::move(held));
    }

    // Changes since the snapshot, as tuples (holder, key, before, now); the snapshot is then that of now. The key is
    // None for a sequence whose length changed, a set, and a cell. A change from a tensor with a graph that is gone,
    // since nobody else held it, is left out.
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

    // Notes of every tensor without a history its version, and whether it requires grad.
    void watch_tensors() {
        tensors_.clear();
        for (const Held& held : helds_)
            each_value(held, [&](PyObject* x) {
                if (is_tensor(x)) tensors_.push_back({py::reinterpret_borrow<py::object>(x), state_of(x)});
            });
    }

    // Tensors changed since by themselves, as pairs: each with whether it was frozen and requires grad now (True), or
    // was written to in place (False).
    py::list changed_tensors() const {
        py::list changed;
        for (const auto& [x, before] : tensors_) {
            const TensorState now = state_of(x.ptr());
            if (now.requires_grad && !before.requires_grad)
                changed.append(py::make_tuple(x, true));
            else if (now.version != before.version && !before.requires_grad)
                changed.append(py::make_tuple(x, false));
        }
        return changed;
    }

    // All tensors without a history that the places held.
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
        py::object holder, names;  // names: none where all entries count
        py::object before;         // a dict or list of the contents, or the contents of a cell
    };

    struct TensorState {
        long version;  // 0 where it requires grad, when autograd sees to it
        bool requires_grad;
    };

    static TensorState state_of(PyObject* x) {
        static const Attribute requires_grad("requires_grad"), version("_version");
        if (requires_grad.of(x).ptr() == Py_True) return {0, true};
        PyObject* number = PyObject_GetAttr(x, version.name());
        if (!number) {  // one made in inference mode has none
            PyErr_Clear();
            return {0, false};
        }
        return {as_long(py::reinterpret_steal<py::object>(number)), false};
    }

    // Reads the contents that a place has now.
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

    // A tensor with a graph is held weakly: else solves whose results func holds would keep one another's graphs.
    py::object kept(PyObject* x) const {
        if (!x) return missing_;
        return has_history(x) ? Attribute::owned(PyWeakref_NewRef(x, nullptr)) : py::reinterpret_borrow<py::object>(x);
    }

    void keep_values(PyObject* dict) const {
        PyObject *key, *x;
        Py_ssize_t position = 0;
        while (PyDict_Next(dict, &position, &key, &x))
            if (has_history(x)) PyDict_SetItem(dict, key, kept(x).ptr());  // of a key that is there: no new size
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

    // What a weak reference refers to, null if it is gone.
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
