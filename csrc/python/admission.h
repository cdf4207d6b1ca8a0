// Checks of tensors before the kernels get their addresses, which the kernels cannot check: layout, memory, and others
// who could change that memory.
#pragma once
#include <cstdint>
#include <stdexcept>

#include "python/tensors.h"
#include "python/torch_tensors.h"

namespace aca {

// Admits plain tensors that have the layout of a state and memory behind their elements. Refuses subclasses, tensors
// with the negative bit, and tensors without memory (zeros made by autograd, functional, fake and freed tensors). For a
// state of a subclass, it admits that subclass instead.
class Admission {
  public:
    explicit Admission(const py::object& like)
        : is_plain_(Torch::is_plain(like.ptr())),
          type_(py::type::of(like)),
          dtype_(names().dtype.of(like.ptr())),
          device_(names().device.of(like.ptr())),
          shape_(names().shape.of(like.ptr())),
          stride_(names().stride.call(like.ptr())) {
        dlpack::Tensor seen;
        is_seen_ = Torch::found().look(like.ptr(), &seen);
        if (is_seen_) layout_ = Layout(seen);
    }

    // False for a state of a subclass, whose operations run in plain torch.
    bool is_for_kernels() const { return is_plain_; }

    // Returns true if `x` is admitted. Sets its address, or 0 if that takes a call into Python.
    bool admits(PyObject* x, uintptr_t* address) const {
        dlpack::Tensor seen;
        *address = 0;
        if (is_seen_ && Torch::found().look(x, &seen)) {
            if (!layout_.is_that_of(seen) || names().is_neg.call(x).ptr() != Py_False) return false;
            *address = uintptr_t(seen.data);
            return true;
        }
        try {
            return has_layout(x) && has_memory(x);
        } catch (const py::error_already_set&) {  // `x` has no shape, strides or address
            return false;
        }
    }

  private:
    struct Names {
        const Attribute dtype{"dtype"}, device{"device"}, shape{"shape"}, stride{"stride"}, is_neg{"is_neg"},
            numel{"numel"}, data_ptr{"data_ptr"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    bool has_layout(PyObject* x) const {
        const bool is_of_type = is_plain_ ? Torch::is_plain(x) : py::type::handle_of(x).is(type_);
        return is_of_type && names().dtype.of(x).is(dtype_) && equal(names().shape.of(x), shape_) &&
               equal(names().stride.call(x), stride_) && equal(names().device.of(x), device_) &&
               names().is_neg.call(x).ptr() == Py_False;
    }

    // Subclasses run without kernels, and may keep their elements elsewhere.
    bool has_memory(PyObject* x) const {
        if (!is_plain_ || as_size(names().numel.call(x)) == 0) return true;
        return Torch::has_memory(x, as_size(names().data_ptr.call(x)));
    }

    bool is_plain_;
    py::object type_, dtype_, device_, shape_, stride_;
    bool is_seen_;
    Layout layout_;  // valid if is_seen_
};

// False if the storage of `x`, a dense tensor, has shrunk below the size of `x`.
inline bool is_whole(PyObject* x) {
    static const Attribute untyped_storage{"untyped_storage"}, nbytes{"nbytes"}, offset{"storage_offset"},
        element_size{"element_size"};
    const size_t held = as_size(nbytes.call(untyped_storage.call(x).ptr()));
    const size_t start = as_size(offset.call(x)) * as_size(element_size.call(x));
    return held >= start + as_size(nbytes.of(x));
}

inline void check_whole(PyObject* x) {
    if (!is_whole(x)) refuse_without_memory();
}

// True for a plain contiguous tensor with all of its memory; false means that Python code must decide.
inline bool is_surely_readable(PyObject* x) {
    dlpack::Tensor seen;
    if (!Torch::found().look(x, &seen)) return false;
    int64_t pitch = 1;
    for (int32_t d = seen.ndim; d-- > 0; pitch *= seen.shape[d])
        if (seen.shape[d] != 1 && seen.strides[d] != pitch) return false;
    return is_whole(x);
}

// True if reference counts count all references. Without the GIL, they count those of one thread alone.
#ifdef Py_GIL_DISABLED
constexpr bool kCounts = false;
#else
constexpr bool kCounts = true;
#endif

// Test for sole ownership: only the caller's reference leads to a tensor and its memory; no variable of func, no view
// and no NumPy array does. Reference counts are compared with those of a tensor known to be unshared, since versions of
// torch count differently. Any other difference counts as shared, which costs a copy but is safe.
class Ownership {
  public:
    static Ownership& known() {
        static Ownership ownership;
        return ownership;
    }

    // Stores the counts of a new tensor and of a view of another one, each held by the caller alone.
    void learn(const py::object& tensor, const py::object& view) {
        if (!Torch::found().storage_uses) return;
        try {
            tensor_ = counts_of(tensor.ptr(), false), view_ = counts_of(view.ptr(), false);
            is_known_ = true;
        } catch (const py::error_already_set&) {  // this torch lacks the counts: every tensor counts as shared
            is_known_ = false;
        }
    }

    // With `has_graph`, only Python tensors count: the autograd graph of `x` may hold the memory too, but never writes.
    bool is_sole(PyObject* x, bool has_graph) const {
        if (!kCounts || !is_known_ || Py_REFCNT(x) != 1) return false;
        const Counts now = counts_of(x, has_graph);
        return now.is_like(now.base ? view_ : tensor_, has_graph);
    }

  private:
    struct Counts {
        Py_ssize_t storage = 0, base = 0;  // references from Python
        long uses = 0, storage_uses = 0, base_uses = 0;
        bool is_own = false;  // torch allocated the memory, so that no NumPy array shares it

        bool is_like(const Counts& alone, bool has_graph) const {
            const bool is_alike = uses == alone.uses && base == alone.base && base_uses == alone.base_uses;
            return is_alike &&
                   (has_graph || (is_own && storage == alone.storage && storage_uses == alone.storage_uses));
        }
    };

    static Counts counts_of(PyObject* x, bool has_graph) {
        static const Attribute untyped_storage{"untyped_storage"}, cdata{"_cdata"}, uses{"_use_count"},
            resizable{"resizable"}, base{"_base"};
        Counts counts;
        counts.uses = as_long(uses.call(x));
        if (!has_graph) {
            const py::object storage = untyped_storage.call(x);
            counts.storage = Py_REFCNT(storage.ptr());
            counts.is_own = resizable.call(storage.ptr()).ptr() == Py_True;
            PyObject* const count = Torch::found().storage_uses;
            counts.storage_uses = as_long(Attribute::owned(PyObject_CallOneArg(count, cdata.of(storage.ptr()).ptr())));
        }
        const py::object viewed = base.of(x);
        if (viewed.is_none()) return counts;
        counts.base = Py_REFCNT(viewed.ptr());
        counts.base_uses = as_long(uses.call(viewed.ptr()));
        return counts;
    }

    bool is_known_ = false;
    Counts tensor_, view_;
};

// Pool of buffers for copies, laid out like the state. func never sees them, so a buffer is free as soon as Python
// holds no reference to it.
class Copies {
  public:
    explicit Copies(py::object allocate) : allocate_(std::move(allocate)) {}

    Row take() {
        for (size_t tried = 0; tried < rows_.size(); ++tried) {
            next_ = next_ + 1 < rows_.size() ? next_ + 1 : 0;
            if (Py_REFCNT(rows_[next_].tensor.ptr()) == 1) return rows_[next_];
        }
        const py::tuple block = allocate_();
        const bool is_kept = kCounts && block.size() > 1;  // large states come one by one and are not pooled
        if (!is_kept) return {block[0], address_of(block[0])};
        for (py::handle row : block) {
            const auto tensor = py::reinterpret_borrow<py::object>(row);
            rows_.push_back({tensor, address_of(tensor)});
        }
        next_ = rows_.size() - 1;
        return rows_[next_];
    }

  private:
    py::object allocate_;
    std::vector<Row> rows_;
    size_t next_ = 0;
};

}  // namespace aca
