// Access to Python tensors: attributes, addresses, and tensors allocated in blocks.
#pragma once
#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <utility>

#include "python/torch_tensors.h"

namespace aca {

constexpr int64_t kReleaseGilAbove = 1 << 14;  // elements; below, releasing costs more than it gives

template <typename F>
void run(int64_t n, F&& f) {
    if (n < 0) throw std::invalid_argument("n must not be negative");
    if (n > kReleaseGilAbove) {
        const py::gil_scoped_release release;
        f();
    } else {
        f();
    }
}

// Address of the elements of a tensor, 0 if it has none.
inline uintptr_t address_of(const py::object& tensor) {
    static const Attribute data_ptr("data_ptr");
    return uintptr_t(as_size(data_ptr.call(tensor.ptr())));
}

// A tensor and the address of its elements.
struct Row {
    py::object tensor;
    uintptr_t address;
};

// Tensors of one layout, allocated in blocks and handed out one after another. A tensor is handed out again only if no
// one else, func above all, still holds it or its memory.
class Rows {
  public:
    // `allocate()` returns a tuple of tensors, equally far apart in memory.
    explicit Rows(py::object allocate) : allocate_(std::move(allocate)) {}

    // Takes `count` neighbours. operator[] and address() then refer to them.
    void take(size_t count) {
        if (first_ + count <= size_ && is_alone_again()) {
            taken_ = count;
            return;
        }
        first_ += taken_;
        taken_ = count;
        if (block_ && first_ + count <= size_ && address_of((*this)[0]) == address()) return;  // func may have moved it
        block_ = storage_ = py::object();
        block_ = allocate_();
        first_ = 0;
        size_ = size_t(PyTuple_GET_SIZE(block_.ptr()));
        if (size_ < count) throw std::invalid_argument("allocate() returned too few tensors");
        start_ = address_of((*this)[0]);
        pitch_ = size_ > 1 ? address_of((*this)[1]) - start_ : 0;
        if (size_ > 1) watch();
    }
    py::object operator[](size_t i) const {
        return py::reinterpret_borrow<py::object>(PyTuple_GET_ITEM(block_.ptr(), Py_ssize_t(first_ + i)));
    }
    uintptr_t address() const { return start_ + first_ * pitch_; }

    // Takes one tensor. A block whose tensors are never handed out again is released with its last one.
    Row take_one() {
        take(1);
        Row row{(*this)[0], address()};
        if (first_ + 1 == size_ && !storage_) block_ = py::object();
        return row;
    }

  private:
    struct Names {
        const Attribute untyped_storage{"untyped_storage"}, cdata{"_cdata"}, uses{"_use_count"},
            requires_grad{"requires_grad"};
    };

    static const Names& names() {
        static const Names all;
        return all;
    }

    // Records the reference counts of the block's storage, to detect aliases later. On the CPU only: a GPU may use the
    // memory after func has returned.
    void watch() {
        constexpr int32_t kCpu = 1;
        const Torch& torch = Torch::found();
        dlpack::Tensor seen;
        if (!torch.storage_uses || !torch.look((*this)[0].ptr(), &seen) || seen.device.type != kCpu) return;
        layout_ = Layout(seen);
        storage_ = names().untyped_storage.call((*this)[0].ptr());
        storage_address_ = names().cdata.of(storage_.ptr());
        storage_references_ = Py_REFCNT(storage_.ptr());
        storage_uses_ = storage_uses();
    }

    long storage_uses() const {
        PyObject* const count = Torch::found().storage_uses;
        return as_long(Attribute::owned(PyObject_CallOneArg(count, storage_address_.ptr())));
    }

    // Returns true if only this object holds the tensors handed out last and their memory, and they are unchanged.
    bool is_alone_again() const {
#ifdef Py_GIL_DISABLED
        return false;
#else
        if (!storage_ || Py_REFCNT(storage_.ptr()) != storage_references_) return false;
        for (size_t i = 0; i < taken_; ++i)
            if (!is_alone(PyTuple_GET_ITEM(block_.ptr(), Py_ssize_t(first_ + i)), address() + i * pitch_)) return false;
        return storage_uses() == storage_uses_;
#endif
    }

    bool is_alone(PyObject* x, uintptr_t at) const {
        if (Py_REFCNT(x) != 1 || *PyObject_GET_WEAKREFS_LISTPTR(x)) return false;
        const auto attributes = Attribute::owned(PyObject_GenericGetDict(x, nullptr));
        dlpack::Tensor now;
        return PyDict_GET_SIZE(attributes.ptr()) == 0 && Torch::found().look(x, &now) && uintptr_t(now.data) == at &&
               layout_.is_that_of(now) && as_long(names().uses.call(x)) == 1 &&
               names().requires_grad.of(x).ptr() == Py_False;
    }

    py::object allocate_, block_, storage_, storage_address_;
    Py_ssize_t storage_references_ = 0;
    long storage_uses_ = 0;
    size_t first_ = 0, taken_ = 0, size_ = 0;
    uintptr_t start_ = 0, pitch_ = 0;
    Layout layout_;
};

}  // namespace aca
